"""The order of the stages in a run: each takes the last one's value; none calls another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import fetch, manifest, releases, render, vendor
from pipeline.console import Reporter
from pipeline.errors import MissingStageError, ProfileError
from pipeline.files import recover_folder, tree_digests
from pipeline.generate import generate
from pipeline.git import Location
from pipeline.lock import load_lock, lock_of, write_lock
from pipeline.model import Bundle, Closure, GeneratedTree, Selection, Sources
from pipeline.profile import NAME, Profile, load_profile
from pipeline.runlock import held
from pipeline.select import select
from pipeline.state import Stages, code_digest
from pipeline.toolchain import Mode, Toolchain, find_toolchain

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PROFILE = ROOT / "configs" / "w4a16-sm90.yaml"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; the same for every stage."""

    config: Path = DEFAULT_PROFILE
    trtllm: Location | None = None
    cutlass: Location | None = None
    out: Path | None = None
    jobs: int | None = None
    memory_gb: float | None = None
    toolchain: Mode = "auto"
    vendor: Path = ROOT / "vendor"
    verbose: bool = False


class Run:
    """One run on one folder DIR."""

    def __init__(self, options: Options, reporter: Reporter, run_dir: Path) -> None:
        self.options = options
        self.reporter = reporter
        self.run_dir = run_dir
        self.profile = load_profile(options.config)
        self.table = releases.load_table()
        self.stages = Stages(run_dir, reporter.say)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs off DIR, and put right what a killed one left."""
        with held(self.run_dir / ".lock", what=str(self.run_dir), say=self.reporter.say):
            for name in ("generated", "dist"):
                recover_folder(self.run_dir / name)
            yield

    def toolchain(self, *, sass_tools: bool = False) -> Toolchain:
        return find_toolchain(
            self.options.toolchain,
            need_sass_tools=sass_tools,
            environment=self.options.vendor / "toolchain",
            architecture=self.profile.architecture,
            say=self.reporter.say,
            show=self.reporter.show,
        )

    @property
    def source(self) -> Path:
        return self.run_dir / "source"


def locate_run(options: Options, reporter: Reporter) -> tuple[Run, fetch.Resolved | None]:
    """The folder of the run: ``--out``, or ``artifacts/PROFILE/RELEASE``.

    The release's name is asked of a source given on the command line; for the profile's own it
    is in the lock, so that stages after *extract* need no network.
    """
    profile = load_profile(options.config)
    resolved = None
    if options.out is not None:
        run_dir = options.out
    else:
        if options.trtllm is not None:
            resolved = resolve(options, profile)
            release = resolved.release
        else:
            release = _release_of_profile(options, profile)
        run_dir = ROOT / "artifacts" / profile.name / release
    return Run(options, reporter, run_dir.resolve()), resolved


def resolve(options: Options, profile: Profile) -> fetch.Resolved:
    wanted = fetch.wanted_sources(profile, options.trtllm, options.cutlass)
    return fetch.resolve(wanted, releases.load_table(), options.vendor)


def _release_of_profile(options: Options, profile: Profile) -> str:
    lock = load_lock(options.vendor / fetch.LOCK_NAME)
    ref = profile.upstream.trtllm.ref
    assert ref is not None, "the profile model requires it"
    release = lock.release if lock is not None and lock.trtllm.ref == ref else ref
    if not NAME.match(release):
        raise ProfileError(
            f"upstream.trtllm.ref {release!r} cannot name a folder",
            hint="give the folder of the run with --out",
        )
    return release


def extract(run: Run, resolved: fetch.Resolved | None, *, allow_moved: bool = False) -> Bundle:
    """Stages fetch to render: DIR then holds ``source/``, the bundle, and ``manifest.json``."""
    profile, stages, say = run.profile, run.stages, run.reporter.say
    resolved = resolved or resolve(run.options, profile)
    sources, facts = fetch.fetch(
        resolved,
        run.table,
        vendor=run.options.vendor,
        run_dir=run.run_dir,
        allow_moved=allow_moved,
        say=say,
    )
    say(
        f"fetch: TensorRT-LLM {sources.release} ({sources.trtllm.commit[:12]}), "
        f"CUTLASS {sources.cutlass.commit[:12]}"
    )
    inputs: dict[str, Any] = {
        "content": [sources.trtllm.digests, sources.cutlass.digests],
        "facts": facts,
        "profile": profile,
        "code": code_digest(),
    }
    generated = run.run_dir / "generated"

    def make_tree() -> GeneratedTree:
        with run.reporter.stage("generate"):
            return generate(
                sources, facts, sm=profile.sm, target=generated, show=run.reporter.show
            )

    tree = stages.run(
        "generate", GeneratedTree, make_tree, inputs=inputs, outputs=(generated,)
    )
    tree = replace(tree, folder=str(generated))

    def make_selection() -> Selection:
        found = select(profile, facts, tree, Path(sources.trtllm.folder))
        kernels = sum(len(family.kernels) for family in found.gemv.selected)
        say(
            f"select: {len(found.selected)} instantiations kept, {len(found.dropped)} dropped, "
            f"{len(found.ignored)} files ignored; {kernels} GEMV kernels"
            + (f" ({found.gemv.reason})" if found.gemv.reason else "")
        )
        return found

    selection = stages.run("select", Selection, make_selection, inputs=inputs)

    def make_closure() -> Closure:
        with run.reporter.stage("vendor"):
            return vendor.close(
                sources,
                facts,
                render.probe(profile, facts, sources, selection),
                run.toolchain(),
                gencode=render.gencode(profile),
                scratch=run.run_dir / ".state" / "probe",
                show=run.reporter.show,
            )

    closure = stages.run("vendor", Closure, make_closure, inputs=inputs)

    def make_bundle() -> Bundle:
        with run.reporter.stage("render"):
            return render.render(profile, facts, sources, selection, closure, run.source)

    commits = [sources.trtllm.commit, sources.cutlass.commit]
    bundle = stages.run(
        "render",
        Bundle,
        make_bundle,
        inputs={**inputs, "closure": closure, "commits": commits},
        outputs=(run.source,),
    )
    values = manifest.extracted(profile, sources, tree, selection, closure, bundle)
    old = _manifest_of(run)
    if old is None or any(old.get(key) != value for key, value in values.items()):
        manifest.write(run.run_dir, values)
    if not allow_moved:
        write_first_lock(run, resolved, sources)
    return bundle


def write_first_lock(run: Run, resolved: fetch.Resolved, sources: Sources) -> None:
    """Lock the sources where no lock holds them yet: given ones in DIR, the profile's in vendor."""
    folder = run.run_dir if resolved.wanted.given else run.options.vendor
    path = folder / fetch.LOCK_NAME
    lock = load_lock(path)
    if lock is None or lock.trtllm.ref != sources.trtllm.ref or resolved.wanted.given:
        write_lock(path, lock_of(sources))


def _manifest_of(run: Run) -> dict[str, Any] | None:
    try:
        return manifest.read(run.run_dir)
    except (OSError, ValueError):
        return None


def bundle_of(run: Run) -> tuple[Bundle, Selection]:
    """What *extract* left in DIR, whole."""
    bundle = run.stages.last("render", Bundle)
    selection = run.stages.last("select", Selection)
    if bundle is None or selection is None or _manifest_of(run) is None:
        raise MissingStageError(
            f"{run.run_dir} holds no bundle",
            hint="run `nox -s extract` first, with the same --config and --out",
        )
    found = tree_digests(run.source) if run.source.is_dir() else {}
    found.pop(render.INDEX, None)
    if found != bundle.files:
        raise MissingStageError(
            f"the bundle in {run.source} is not what extract left",
            details="\n".join(
                sorted(
                    name
                    for name in found.keys() | bundle.files.keys()
                    if found.get(name) != bundle.files.get(name)
                )[:10]
            ),
            hint="run `nox -s extract` again; it remakes what was damaged",
        )
    return bundle, selection
