"""Stage 5, render: the bundle, a source tree that builds with CMake and a CUDA toolkit alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from pipeline import __version__, vendor
from pipeline.errors import VendorError
from pipeline.files import (
    digest_of_files,
    dump_json,
    remove_tree,
    sha256_bytes,
    walk_files,
    write_bytes,
)
from pipeline.model import Bundle, Closure, Selection, Sources
from pipeline.profile import Profile
from pipeline.releases import ReleaseFacts

_ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = _ROOT / "templates"
#: Our own CUDA and C++: FOLDER/FILE becomes src/FOLDER/FILE of the bundle, as it is.
KERNELS = _ROOT / "kernels"
INDEX = "bundle.json"
#: Each GEMM kernel has a file in both: upstream's instantiation, and our wrapper of it.
_GEMM_FOLDERS = ("gemm", "wrappers")


def context(
    profile: Profile, facts: ReleaseFacts, sources: Sources, selection: Selection, closure: Closure
) -> dict[str, Any]:
    """What every template sees; templates/README.md lists it."""
    tactics: dict[str, dict[str, str]] = {}
    for kernel in selection.selected:
        tactics.setdefault(kernel.tactic, {})[kernel.quant_op] = kernel.ident
    return {
        "project_version": __version__,
        "release": {
            "name": sources.release,
            "version": sources.version,
            "trtllm_url": profile.upstream.trtllm.url,
            "trtllm_commit": sources.trtllm.commit,
            "cutlass_commit": sources.cutlass.commit,
        },
        "profile": profile.name,
        "arch": {
            "name": profile.architecture,
            "cc_major": profile.sm // 10,
            "cc_minor": profile.sm % 10,
            "gencode": gencode(profile),
        },
        "gemm": selection.selected,
        "gemv": selection.gemv.selected,
        "gemv_reason": selection.gemv.reason,
        "decode": selection.decode.selected,
        "tactics": [{"name": name, "kernels": kernels} for name, kernels in tactics.items()],
        "include_dirs": vendor.include_dirs(facts),
        "sources": closure.sources,
        "own_sources": own_sources(),
        "layout_check_sources": closure.layout_check_sources,
        "launcher_include": selection.selected[0].instantiation.include[0],
        "launcher": facts.launcher,
        "namespace": facts.launcher.namespace,
        "defines": facts.launcher.defines,
        "compress": profile.build.compress,
        "shims": closure.shims,
    }


def own_files() -> dict[str, Path]:
    """Where each file of :data:`KERNELS` goes: every folder of it becomes one of src/."""
    return {
        f"src/{path.relative_to(KERNELS).as_posix()}": path
        for path in walk_files(KERNELS)
        if path.name != "README.md"
    }


def own_sources() -> tuple[str, ...]:
    """Which of :func:`own_files` are compiled."""
    return tuple(name for name in sorted(own_files()) if name.endswith((".cpp", ".cu")))


def gencode(profile: Profile) -> str:
    number = profile.architecture.removeprefix("sm_")
    return f"arch=compute_{number},code=sm_{number}"


def probe(
    profile: Profile, facts: ReleaseFacts, sources: Sources, selection: Selection
) -> vendor.Probe:
    """The rendered units whose includes make the closure: one for each set of includes."""
    shims = tuple(sorted(path.stem for path in (TEMPLATES / "shims").glob("*.j2")))
    everything = Closure(
        files=(),
        sources=tuple(f"{vendor.TRTLLM}/{path}" for path in facts.link_sources),
        layout_check_sources=(),
        shims=shims,
    )
    files = rendered(context(profile, facts, sources, selection, everything), selection)
    gemm = {kernel.instantiation.include: kernel.ident for kernel in reversed(selection.selected)}
    gemv = {family.details: family.ident for family in reversed(selection.gemv.selected)}
    return vendor.Probe(
        files={
            name: content
            for name, content in files.items()
            if name.split("/")[0] in ("src", "include", "shims")
        },
        units=(
            *(f"src/{folder}/{ident}.cu" for ident in gemm.values() for folder in _GEMM_FOLDERS),
            *(f"src/gemv/{ident}.cu" for ident in gemv.values()),
        ),
        shims=tuple(f"shims/{name}" for name in shims),
    )


def rendered(values: Mapping[str, Any], selection: Selection) -> dict[str, bytes]:
    """All files of the bundle that are ours: path → content."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    files: dict[str, bytes] = {}

    def render(template: str, target: str, **more: object) -> None:
        try:
            text = environment.get_template(template).render(**values, **more)
        except TemplateError as error:
            raise VendorError(
                f"templates/{template} cannot be rendered: {error}",
                hint="templates/README.md lists what a template sees",
            ) from error
        files[target] = text.encode()

    for path in walk_files(TEMPLATES / "bundle"):
        name = path.relative_to(TEMPLATES / "bundle").as_posix()
        if path.suffix == ".j2":
            render(f"bundle/{name}", name.removesuffix(".j2"))
        else:
            files[name] = path.read_bytes()
    files.update({name: path.read_bytes() for name, path in own_files().items()})
    for name in values["shims"]:
        render(f"shims/{name}.j2", f"shims/{name}")
    for kernel in selection.selected:
        render("gemm_unit.cu.j2", f"src/gemm/{kernel.ident}.cu", kernel=kernel)
        render("gemm_wrapper.cu.j2", f"src/wrappers/{kernel.ident}.cu", kernel=kernel)
    for family in selection.gemv.selected:
        render("gemv_unit.cu.j2", f"src/gemv/{family.ident}.cu", family=family)
    for tactic in selection.decode.selected:
        render("decode_unit.cu.j2", f"src/decode/{tactic.ident}.cu", tactic=tactic)
    return files


def render(
    profile: Profile,
    facts: ReleaseFacts,
    sources: Sources,
    selection: Selection,
    closure: Closure,
    target: Path,
) -> Bundle:
    """Make ``target`` the bundle; files whose content stays keep their times, others go.

    The index is written last: a folder without it, or one that disagrees with it, is not whole.
    """
    files = rendered(context(profile, facts, sources, selection, closure), selection)
    for vendored in closure.files:
        content = vendor.source_of(vendored, sources).read_bytes()
        if sha256_bytes(content) != vendored.sha256:
            raise VendorError(
                f"{vendored.origin} changed while it was copied",
                hint="let nothing else write to the checkouts, and run again",
            )
        files[vendored.path] = content
    digests = {name: sha256_bytes(content) for name, content in files.items()}
    digest = digest_of_files(digests)
    files[INDEX] = dump_json(
        {
            "digest": digest,
            "files": digests,
            "vendored": [asdict(vendored) for vendored in closure.files],
        }
    ).encode()
    (target / INDEX).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == INDEX):
        write_bytes(target / name, files[name])
    for path in list(walk_files(target)):
        if path.relative_to(target).as_posix() not in files:
            path.unlink()
    for folder in sorted(target.rglob("*"), reverse=True):
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir() and not any(folder.iterdir()):
            remove_tree(folder)
    return Bundle(folder=target.name, digest=digest, files=digests)
