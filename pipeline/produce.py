"""``build``, ``verify``, ``test`` and ``wheel``: from the bundle to what people install."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__, libtest, manifest, provenance
from pipeline.build import build as compile_bundle
from pipeline.errors import MissingStageError, WheelError
from pipeline.extract import bundle_of
from pipeline.files import (
    digest_json,
    read_json,
    recover_folder,
    sha256_bytes,
    sha256_file,
    tree_digest,
)
from pipeline.libtest import LibraryTest
from pipeline.memory import find_machine
from pipeline.model import Build, Selection, to_json
from pipeline.plan import (
    Plan,
    costs_for,
    describe_plan,
    members_of,
    memory_limit,
    plan_from_json,
    plan_units,
)
from pipeline.report import write_report
from pipeline.run import ROOT, Run
from pipeline.state import code_digest
from pipeline.verify import Verification
from pipeline.verify import verify as check_library

if TYPE_CHECKING:
    from pipeline.wheel import Wheel

_PLAN = "build/plan.json"
_WHEEL = "wheel"


def plan(run: Run) -> str:
    """The units that ``build`` would compile, as text."""
    bundle, selection, _ = bundle_of(run)
    return describe_plan(_plan(run, selection, bundle.files))


def build(run: Run) -> Build:
    """Compile the bundle and install it; skipped when neither it nor the compiler changed."""
    bundle, selection, changed = bundle_of(run)
    if changed:
        run.reporter.say(f"build: source/ was changed by hand: {', '.join(changed)}")
    toolchain = run.toolchain(sass_tools=True)
    planned = _plan(run, selection, bundle.files)
    definitions = {
        "W4A16_BUILD_SHARED": "ON",
        "W4A16_BUILD_STATIC": "ON" if run.profile.build.static else "OFF",
        "W4A16_BUNDLE_DIGEST": bundle.digest,
    }

    def make() -> Build:
        with run.reporter.stage("build"):
            return compile_bundle(
                run.source,
                run.run_dir / "build",
                run.install,
                toolchain,
                planned,
                console=run.reporter.console,
                definitions=definitions,
                jobs=run.options.jobs,
                verbose=run.options.verbose,
            )

    result = run.stages.run(
        "build",
        Build,
        make,
        inputs={
            "bundle": bundle.digest,
            "toolchain": toolchain.identity,
            "definitions": definitions,
        },
        outputs=(run.install,),
    )
    manifest.extend(run.run_dir, build={**to_json(result), "changed_by_hand": list(changed)})
    return result


def verify(run: Run) -> Verification:
    """Prove the library against the selection and the profile's gates; write the report."""
    _, selection, _ = bundle_of(run)
    _require_library(run)
    toolchain = run.toolchain(sass_tools=True)

    def make() -> Verification:
        with run.reporter.stage("verify"):
            return check_library(
                run.install, selection, run.profile.gates, toolchain, show=run.reporter.show
            )

    result = run.stages.run(
        "verify",
        Verification,
        make,
        inputs={
            "library": tree_digest(run.install),
            "selection": selection,
            "gates": run.profile.gates,
            "toolchain": toolchain.identity,
            "code": _code_digest(),
        },
    )
    values = to_json(result)
    manifest.extend(run.run_dir, verification={k: v for k, v in values.items() if k != "kernels"})
    report(run)
    result.raise_if_failed()
    passed = len(result.checks)
    run.reporter.say(
        f"verify: {passed} checks passed, {result.library_bytes:,} bytes; {run.run_dir}/report.md"
    )
    return result


def test(run: Run) -> LibraryTest | None:
    """Test the library in DIR, if there is one: packing on the CPU, kernels on a GPU."""
    if run.stages.last("build", Build) is None or not run.install.is_dir():
        run.reporter.say(f"test: no library in {run.run_dir}; `nox -s extract build` makes one")
        return None
    with run.reporter.stage("test"):
        result = libtest.test_library(run.install, run.run_dir, run.reporter)
    manifest.extend(run.run_dir, test=to_json(result))
    report(run)
    result.raise_if_failed()
    return result


def wheel(run: Run, verified: Verification) -> Wheel:
    """The wheel, the bundle's tarball and SHA256SUMS in ``DIR/wheel``, from the library in DIR."""
    try:  # of the extra ``wheel``, which no other stage needs
        from pipeline.wheel import Wheel, make_wheel, tools
        from pipeline.wheel_tree import package_files

        versions = tools()
    except ImportError as error:
        raise WheelError(
            f"the Python package {error.name} is not installed",
            hint="run `nox -s wheel`, or pip install '.[wheel]'",
        ) from error
    bundle, _, _ = bundle_of(run)
    built = run.stages.last("build", Build)
    assert built is not None, "verify requires it"
    package = package_files()
    library = run.install / verified.library
    show, target = run.reporter.show, run.run_dir / _WHEEL
    origin = provenance.gather(
        provenance.project_state(ROOT, __version__, show=show),
        run.profile,
        manifest.read(run.run_dir),
        bundle,
        built,
        library=library,
        info=provenance.library_info(run.install / "bin" / "w4a16_info", show=show),
        device_kernels=len(verified.kernels),
        tools=versions,
    )

    def make() -> Wheel:
        with run.reporter.stage("wheel"):
            return make_wheel(
                origin,
                package=package,
                bundle=run.source,
                library=library,
                scratch=run.run_dir / ".state" / "wheel",
                target=target,
                show=show,
            )

    recover_folder(target)
    result = run.stages.run(
        "wheel",
        Wheel,
        make,
        inputs={
            "origin": origin,
            "package": {name: sha256_bytes(content) for name, content in package.items()},
            "license": sha256_file(ROOT / "LICENSE"),
            "code": code_digest(),
        },
        outputs=(target,),
    )
    manifest.extend(run.run_dir, wheel=to_json(result))
    run.reporter.say(f"wheel: {target / result.wheel}")
    return result


def report(run: Run) -> None:
    """Write ``report.md`` and ``report.json`` from what the stages have left so far."""
    made = run.stages.last("build", Build)
    verified = run.stages.last("verify", Verification)
    write_report(
        run.run_dir,
        manifest=manifest.read(run.run_dir),
        plan=_stored_plan(run.run_dir),
        build=None if made is None else to_json(made),
        verification=None if verified is None else to_json(verified),
    )


def _plan(run: Run, selection: Selection, files: dict[str, str]) -> Plan:
    """The plan for this machine, close to the last one so that objects stay of use."""
    machine = find_machine()
    asked = run.options.memory_gb
    stored = _stored_plan(run.run_dir)
    sources = [name for name in files if not name.startswith("tools/")]
    return plan_units(
        members_of(selection, sources),
        cores=machine.cores,
        memory_bytes=memory_limit(
            machine.memory_available,
            machine.memory_total,
            None if asked is None else int(asked * 1e9),
        ),
        jobs=run.options.jobs,
        costs=costs_for(files),
        previous=None if stored is None else plan_from_json(stored),
    )


def _stored_plan(run_dir: Path) -> dict[str, Any] | None:
    try:
        stored: dict[str, Any] = read_json(run_dir / _PLAN)
    except (OSError, ValueError):
        return None
    return stored


def _require_library(run: Run) -> None:
    if run.stages.last("build", Build) is None or not run.install.is_dir():
        raise MissingStageError(
            f"{run.run_dir} holds no built library", hint="run `nox -s build` first"
        )


def _code_digest() -> str:
    """The modules that verify; a change in them verifies again."""
    here = Path(__file__)
    return digest_json(
        [sha256_file(here.with_name(name)) for name in ("elf.py", "sass.py", "verify.py")]
    )
