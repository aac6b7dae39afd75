"""Stage 4, vendor: the upstream files that the kept kernels include, asked of the compiler."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PathError, VendorError
from pipeline.files import sha256_file, write_bytes
from pipeline.model import Closure, Sources, VendoredFile
from pipeline.process import CommandError, Printer, run
from pipeline.releases import ReleaseFacts
from pipeline.toolchain import Toolchain

TRTLLM = "third_party/tensorrt_llm"
CUTLASS = "third_party/cutlass"
#: Licence texts: file of a checkout → file of the bundle.
_LICENSES = {
    ("trtllm", "LICENSE"): "licenses/TensorRT-LLM.txt",
    ("cutlass", "LICENSE.txt"): "licenses/CUTLASS.txt",
}
_ABSOLUTE_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*["<][ \t]*(/[^">\n]*)', re.MULTILINE)
#: Where a compiler's own headers may be; what a probe reads elsewhere is refused.
_SYSTEM_ROOTS = ("/usr", "/lib", "/opt")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Our own text, rendered, from which the closure starts: bundle path → content."""

    files: Mapping[str, bytes]
    units: tuple[str, ...]
    """Paths among ``files`` whose includes are asked for."""
    shims: tuple[str, ...]
    """Stand-in headers among ``files``, by bundle path."""


def include_dirs(facts: ReleaseFacts) -> tuple[str, ...]:
    """Include folders of the bundle for upstream's code, in order; the stand-ins come first."""
    return (
        "shims",
        *(f"{TRTLLM}/{folder}" for folder in facts.include_dirs),
        *(f"{CUTLASS}/{folder}" for folder in facts.cutlass_include_dirs),
    )


def close(
    sources: Sources,
    facts: ReleaseFacts,
    probe: Probe,
    toolchain: Toolchain,
    *,
    gencode: str,
    scratch: Path,
    show: Printer | None = None,
) -> Closure:
    """The upstream files that ``probe`` and upstream's linked sources include."""
    roots = {
        "trtllm": Path(sources.trtllm.folder).resolve(),
        "cutlass": Path(sources.cutlass.folder).resolve(),
    }
    for name, content in probe.files.items():
        write_bytes(scratch / name, content)
    upstream = [roots["trtllm"] / path for path in (*facts.link_sources, *facts.layout_check)]
    starts = [scratch / unit for unit in probe.units] + upstream
    includes = [
        scratch / "shims",
        scratch / "src",
        scratch / "include",
        *(roots["trtllm"] / folder for folder in facts.include_dirs),
        *(roots["cutlass"] / folder for folder in facts.cutlass_include_dirs),
    ]
    command: list[str | Path] = [
        toolchain.nvcc,
        "-std=c++17",
        f"-gencode={gencode}",
        "-DNDEBUG",
        *(f"-D{name}" for name in facts.launcher.defines),
        *(f"-I{folder}" for folder in includes),
        "-M",
    ]

    def headers(start: Path) -> set[Path]:
        return _headers([*command, start], start, toolchain, show)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = set().union(*pool.map(headers, starts))
    needed = _classified(found, roots, scratch.resolve(), toolchain)
    files = [
        _vendored(name, path, roots[name])
        for name, path in sorted({*needed, *(("trtllm", path.resolve()) for path in upstream)})
    ]
    files += [
        VendoredFile(
            path=target, origin=f"{name}:{source}", sha256=sha256_file(roots[name] / source)
        )
        for (name, source), target in _LICENSES.items()
    ]
    read = {path.relative_to(scratch.resolve()).as_posix() for path in _below(found, scratch)}
    return Closure(
        files=tuple(files),
        sources=tuple(f"{TRTLLM}/{path}" for path in facts.link_sources),
        layout_check_sources=tuple(f"{TRTLLM}/{path}" for path in facts.layout_check),
        shims=tuple(sorted(Path(shim).name for shim in probe.shims if shim in read)),
    )


def source_of(file: VendoredFile, sources: Sources) -> Path:
    """Where a vendored file comes from in the checkouts."""
    name, _, relative = file.origin.partition(":")
    return Path(getattr(sources, name).folder, relative)


def _headers(
    command: Sequence[str | Path], start: Path, toolchain: Toolchain, show: Printer | None
) -> set[Path]:
    try:
        finished = run(command, env=toolchain.env(), show=show, separate_stderr=True)
    except CommandError as error:
        missing = re.search(r"fatal error: ([^:\n]+): No such file", error.output)
        what = f"{start.name} includes {missing.group(1)}" if missing else f"{start.name} fails"
        raise VendorError(
            f"the include closure cannot be gathered: {what}",
            details=error.output[-4000:],
            hint="a header from outside TensorRT-LLM, CUTLASS and CUDA needs a stand-in in "
            "templates/shims/; a header that upstream lacks means an incomplete checkout",
        ) from error
    return {Path(name).resolve() for name in parse_dependencies(finished.stdout)}


def parse_dependencies(text: str) -> list[str]:
    """The prerequisites in a Makefile rule as compilers write them with ``-M``."""
    joined = text.replace("\\\n", " ")
    _, _, prerequisites = joined.partition(": ")
    words = re.findall(r"(?:\\.|[^\s\\])+", prerequisites)
    return [re.sub(r"\\(.)", r"\1", word).replace("$$", "$") for word in words]


def _below(paths: Iterable[Path], root: Path) -> list[Path]:
    inside = root.resolve()
    return [path for path in paths if path.is_relative_to(inside)]


def _classified(
    found: set[Path], roots: Mapping[str, Path], scratch: Path, toolchain: Toolchain
) -> set[tuple[str, Path]]:
    """Upstream's files among ``found``; the rest must be ours or the compiler's."""
    system = [*(Path(root) for root in _SYSTEM_ROOTS), toolchain.root.resolve()]
    needed = set()
    for path in found:
        owner = next((name for name, root in roots.items() if path.is_relative_to(root)), None)
        if owner is not None:
            needed.add((owner, path))
        elif not any(path.is_relative_to(root) for root in (scratch, *system)):
            raise PathError(
                f"upstream includes {path}, outside its repository",
                hint="use another copy of the repository; this one may have been tampered with",
            )
    return needed


def _vendored(name: str, path: Path, root: Path) -> VendoredFile:
    relative = path.relative_to(root).as_posix()
    absolute = _ABSOLUTE_INCLUDE.search(path.read_bytes())
    if absolute is not None:
        raise PathError(
            f"upstream's {relative} includes {absolute.group(1).decode(errors='replace')}, "
            "a place outside its repository",
            hint="use another copy of the repository; this one may have been tampered with",
        )
    folder = TRTLLM if name == "trtllm" else CUTLASS
    return VendoredFile(
        path=f"{folder}/{relative}", origin=f"{name}:{relative}", sha256=sha256_file(path)
    )
