"""The compilers and tools of a run: the machine's CUDA toolkit, or one from the package index."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ToolchainError
from pipeline.files import (
    digest_json,
    read_json,
    recover_folder,
    replaced_folder,
    sha256_file,
    write_json,
)
from pipeline.process import CommandError, Printer, run

Mode = Literal["auto", "system", "pypi"]
Version = tuple[int, ...]

#: First with ``--compress-mode``, which keeps the library small.
MINIMUM_NVCC: Version = (12, 8)
#: First that makes unity batches of CUDA sources.
MINIMUM_CMAKE: Version = (3, 31)
INDEX_VERSIONS = ">=13.2,<14"
COMPILER_EXTRAS = ("cccl", "crt", "cudart", "nvcc", "nvvm")
SASS_EXTRAS = ("cuobjdump", "nvdisasm")

#: CUDA's major version → oldest Linux driver that runs what it builds (minor-version
#: compatibility).
DRIVERS: dict[int, str] = {12: "525.60.13", 13: "580.65.06"}

_STAMP = "installed.json"
_PROBE = """\
__global__ void probe(int* out) { *out = 1; }
int main() { probe<<<1, 1>>>(nullptr); return 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Tools that were seen to work, by absolute path."""

    origin: Literal["system", "pypi"]
    nvcc: Path
    version: Version
    root: Path
    """The toolkit's folder: ``bin``, ``include``, ``lib`` or ``lib64`` are below it."""
    include: Path
    lib: Path
    cudart_static: Path
    host_compiler: Path
    host_version: str
    cuobjdump: Path | None
    nvdisasm: Path | None
    cmake: Path
    cmake_version: Version
    ninja: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """What subprocesses need on top of this process's environment."""

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)

    @property
    def driver(self) -> str:
        """The oldest driver that runs what this compiler builds."""
        return DRIVERS.get(self.version[0], "that came with the CUDA toolkit")

    @property
    def identity(self) -> dict[str, str]:
        """What decides the compiler's output: part of the inputs of each stage that compiles."""
        return {
            "nvcc": str(self.nvcc),
            "nvcc_version": self.version_text,
            "host_compiler": str(self.host_compiler),
            "host_version": self.host_version,
        }

    def env(self) -> dict[str, str]:
        """The whole environment for a subprocess."""
        return {**os.environ, **self.environment}


def find_toolchain(
    mode: Mode,
    *,
    environment: Path,
    need_sass_tools: bool = True,
    architecture: str = "sm_90a",
    show: Printer | None = None,
    say: Printer | None = None,
) -> Toolchain:
    """Find tools that work, and install what is missing into ``environment``.

    ``auto`` takes the machine's compiler if it is new enough and builds a small program, and one
    from the package index otherwise; ``system`` and ``pypi`` take no other. ``show`` gets each
    command (``-v``), ``say`` a line before anything is downloaded.
    """
    problems: list[str] = []
    compiler = None
    if mode in ("auto", "system"):
        compiler = _system_compiler(environment, architecture, problems, show)
    if compiler is None and mode == "system":
        raise ToolchainError(
            "no CUDA compiler on this machine that can be used"
            if problems
            else "no CUDA compiler on this machine",
            details="\n".join(problems),
            hint=f"install a CUDA toolkit {_text(MINIMUM_NVCC)} or newer, name its nvcc in "
            "CUDACXX, or use --toolchain pypi",
        )
    if compiler is None:
        for problem in problems:
            if say is not None:
                say(f"not used: {problem}")
        compiler = _index_compiler(environment, architecture, problems, need_sass_tools, show, say)
    cuobjdump, nvdisasm = _sass_tools(compiler, environment, need_sass_tools, show, say)
    cmake, cmake_version = _find_cmake(show)
    return Toolchain(
        origin=compiler.origin,
        nvcc=compiler.nvcc,
        version=compiler.version,
        root=compiler.root,
        include=compiler.include,
        lib=compiler.lib,
        cudart_static=compiler.lib / "libcudart_static.a",
        host_compiler=compiler.host,
        host_version=compiler.host_version,
        cuobjdump=cuobjdump,
        nvdisasm=nvdisasm,
        cmake=cmake,
        cmake_version=cmake_version,
        ninja=_find_ninja(show),
        environment=_environment(compiler),
    )


# --- the compiler ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Compiler:
    origin: Literal["system", "pypi"]
    nvcc: Path
    version: Version
    root: Path
    include: Path
    lib: Path
    host: Path
    host_version: str


class _UnusableError(Exception):
    """Why one candidate was passed over."""


def _environment(compiler: _Compiler) -> dict[str, str]:
    found = {"CUDACXX": str(compiler.nvcc), "CUDAHOSTCXX": str(compiler.host)}
    if compiler.origin == "pypi":
        # Another toolkit's folder must not win in CMake's or a script's search.
        found |= {"CUDA_HOME": str(compiler.root), "CUDA_PATH": str(compiler.root)}
    return found


def _candidates() -> Iterator[Path]:
    """Where a system nvcc may be, best first."""
    if os.environ.get("CUDACXX"):
        named = shutil.which(os.environ["CUDACXX"])
        yield Path(named or os.environ["CUDACXX"])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name], "bin", "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield from _installed_toolkits()


def _installed_toolkits(base: Path = Path("/usr/local")) -> Iterator[Path]:
    yield base / "cuda" / "bin" / "nvcc"
    versioned = {
        tuple(int(part) for part in match[1].split(".")): folder
        for folder in base.glob("cuda-*")
        if (match := re.fullmatch(r"cuda-(\d+(?:\.\d+)*)", folder.name))
    }
    for version in sorted(versioned, reverse=True):
        yield versioned[version] / "bin" / "nvcc"


def _system_compiler(
    environment: Path, architecture: str, problems: list[str], show: Printer | None
) -> _Compiler | None:
    tried: set[Path] = set()
    for nvcc in _candidates():
        # Made absolute, not resolved: a link to a compiler cache is called by its link's name.
        absolute = Path(os.path.abspath(nvcc))
        if absolute in tried:
            continue
        tried.add(absolute)
        if not absolute.is_file():
            if os.environ.get("CUDACXX") in (str(nvcc), nvcc.name):
                problems.append(f"{nvcc} (from CUDACXX): no such file")
            continue
        try:
            return _checked("system", absolute, environment, architecture, show)
        except _UnusableError as reason:
            problems.append(f"{absolute}: {reason}")
    return None


def _checked(
    origin: Literal["system", "pypi"],
    nvcc: Path,
    environment: Path,
    architecture: str,
    show: Printer | None,
) -> _Compiler:
    version = _nvcc_version(nvcc, show)
    if version < MINIMUM_NVCC:
        raise _UnusableError(f"too old (found {_text(version)}, need {_text(MINIMUM_NVCC)})")
    host, host_version = _host_compiler(show)
    root = _toolkit_root(nvcc, show)
    include = _first(root, ("include", "targets/x86_64-linux/include"), "cuda_runtime.h")
    lib = _first(
        root,
        ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"),
        "libcudart_static.a",
    )
    compiler = _Compiler(
        origin=origin,
        nvcc=nvcc,
        version=version,
        root=root,
        include=include,
        lib=lib,
        host=host,
        host_version=host_version,
    )
    _probe(compiler, environment, architecture, show)
    return compiler


def _nvcc_version(nvcc: Path, show: Printer | None) -> Version:
    try:
        output = run([nvcc, "--version"], show=show, timeout=60).stdout
    except CommandError as error:
        raise _UnusableError(f"does not run: {error.output.strip() or error.what}") from error
    match = re.search(r"release\s+(\d+)\.(\d+)(?:,\s*V(\d+)\.(\d+)\.(\d+))?", output)
    if match is None:
        raise _UnusableError(f"does not say its version: {output.strip()[:200]}")
    parts = match.groups() if match[3] else match.groups()[:2]
    # "release 13.0, V13.0.88"
    return tuple(int(part) for part in (parts[2:] or parts))


def _toolkit_root(nvcc: Path, show: Printer | None) -> Path:
    """The toolkit that ``nvcc`` works with; it may be a script that calls the real one."""
    try:
        output = run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], show=show, timeout=60).stdout
    except CommandError as error:
        raise _UnusableError(f"does not run: {error.output.strip() or error.what}") from error
    match = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    return Path(os.path.realpath(match[1].strip())) if match else nvcc.resolve().parent.parent


def _first(root: Path, folders: tuple[str, ...], holding: str) -> Path:
    for folder in folders:
        if (root / folder / holding).is_file():
            return root / folder
    raise _UnusableError(f"its toolkit {root} has no {holding}")


def _host_compiler(show: Printer | None) -> tuple[Path, str]:
    """The C++ compiler that nvcc drives: CUDAHOSTCXX, NVCC_CCBIN, CXX or g++."""
    for variable in ("CUDAHOSTCXX", "NVCC_CCBIN", "CXX"):
        if os.environ.get(variable):
            found = shutil.which(os.environ[variable])
            if found is None:
                raise ToolchainError(
                    f"{variable} names {os.environ[variable]!r}, which is not a program",
                    hint=f"correct or unset {variable}",
                )
            return Path(found), _host_version(Path(found), show)
    for name in ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return Path(found), _host_version(Path(found), show)
    raise ToolchainError(
        "no C++ compiler on this machine (nvcc needs one for host code)",
        hint="install g++, for example with: apt-get install g++",
    )


def _host_version(compiler: Path, show: Printer | None) -> str:
    try:
        output = run([compiler, "--version"], show=show, timeout=60).stdout
    except CommandError as error:
        raise ToolchainError(
            f"{compiler} does not run", details=error.output, hint="install g++ anew"
        ) from error
    return output.splitlines()[0].strip() if output.strip() else ""


def _probe(compiler: _Compiler, environment: Path, architecture: str, show: Printer | None) -> None:
    """Build and link a two-line program, once for each compiler and its files' state."""
    number = architecture.removeprefix("sm_")
    key = digest_json(
        {
            "architecture": architecture,
            "host": [str(compiler.host), compiler.host_version, _state(compiler.host)],
            "nvcc": [str(compiler.nvcc), compiler.version, _state(compiler.nvcc)],
            "root": [str(compiler.root), _state(compiler.root / "bin" / "nvcc")],
        }
    )
    remembered = environment / "probes" / f"{key[:16]}.json"
    if remembered.is_file():
        return
    with tempfile.TemporaryDirectory(prefix="w4a16-probe-") as folder:
        source = Path(folder, "probe.cu")
        source.write_text(_PROBE, encoding="utf-8")
        command: list[str | Path] = [
            compiler.nvcc,
            f"-gencode=arch=compute_{number},code=sm_{number}",
            "-std=c++17",
            "-cudart=static",
            "-ccbin",
            compiler.host,
            "-o",
            Path(folder, "probe"),
            source,
        ]
        env = {**os.environ, **_environment(compiler)}
        try:
            run(command, cwd=Path(folder), env=env, show=show, timeout=300)
        except CommandError as error:
            raise _UnusableError(
                f"does not build a small program for {architecture}: "
                f"{error.output.strip() or error.what}"
            ) from error
    write_json(remembered, {"nvcc": str(compiler.nvcc), "version": _text(compiler.version)})


def _state(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


# --- the package index -------------------------------------------------------------------------


def _index_compiler(
    environment: Path,
    architecture: str,
    problems: list[str],
    with_sass_tools: bool,
    show: Printer | None,
    say: Printer | None,
) -> _Compiler:
    extras = (*COMPILER_EXTRAS, *SASS_EXTRAS) if with_sass_tools else COMPILER_EXTRAS
    root = _installed(environment / "cuda-toolkit", extras, problems, show, say)
    try:
        return _checked("pypi", root / "bin" / "nvcc", environment, architecture, show)
    except _UnusableError as reason:
        raise ToolchainError(
            f"the CUDA toolkit from the package index cannot be used: {reason}",
            details="\n".join(problems),
            hint=f"delete {environment / 'cuda-toolkit'} to have it installed again, or install "
            "a CUDA toolkit on the machine",
        ) from reason


def _sass_tools(
    compiler: _Compiler,
    environment: Path,
    needed: bool,
    show: Printer | None,
    say: Printer | None,
) -> tuple[Path | None, Path | None]:
    """``cuobjdump`` and ``nvdisasm`` (which the first one calls), from one place."""
    folders = [compiler.root / "bin", compiler.nvcc.parent]
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        folders.append(Path(on_path).parent)
    for folder in folders:
        pair = folder / "cuobjdump", folder / "nvdisasm"
        if all(tool.is_file() and os.access(tool, os.X_OK) for tool in pair) and _can_read(
            pair[0], compiler.version, show
        ):
            return pair
    if not needed:
        return None, None
    root = _installed(environment / "cuda-tools", SASS_EXTRAS, [], show, say)
    return root / "bin" / "cuobjdump", root / "bin" / "nvdisasm"


def _can_read(cuobjdump: Path, compiler: Version, show: Printer | None) -> bool:
    """Whether the tool runs and is not of an older release than the compiler."""
    try:
        output = run([cuobjdump, "--version"], show=show, timeout=60).stdout
    except CommandError:
        return False
    match = re.search(r"release\s+(\d+)\.(\d+)", output)
    return match is not None and (int(match[1]), int(match[2])) >= compiler[:2]


def _installed(
    target: Path,
    extras: tuple[str, ...],
    problems: list[str],
    show: Printer | None,
    say: Printer | None,
) -> Path:
    """The root of a toolkit below ``target``, installed now unless a whole one is there."""
    recover_folder(target)
    root = _trusted(target, extras)
    if root is not None:
        return root
    requirement = f"cuda-toolkit[{','.join(sorted(extras))}]{INDEX_VERSIONS}"
    if say is not None:
        say(f"installing {requirement} from the Python package index")
    with replaced_folder(target) as fresh:
        try:
            run([*_installer(), "--target", fresh, requirement], show=show)
        except CommandError as error:
            raise ToolchainError(
                f"{requirement} could not be installed from the Python package index",
                details="\n".join([*problems, error.output.strip() or error.what]),
                hint="this needs the network once (or PIP_INDEX_URL set to a mirror, or "
                "PIP_FIND_LINKS to a folder of wheels); without it, install a CUDA toolkit "
                f"{_text(MINIMUM_NVCC)} or newer on the machine",
            ) from error
        found = _index_root(fresh)
        if found is None:
            raise ToolchainError(
                f"{requirement} was installed but holds no toolkit",
                hint="its layout has changed: install a CUDA toolkit on the machine",
            )
        _complete(found)
        tools = sorted((found / "bin").glob("*"))
        stamp = {
            "extras": sorted(extras),
            "root": found.relative_to(fresh).as_posix(),
            "tools": {tool.name: sha256_file(tool) for tool in tools if tool.is_file()},
            "sizes": {
                path.relative_to(fresh).as_posix(): path.stat().st_size
                for path in sorted(found.rglob("*"))
                if path.is_file()
            },
            "versions": _versions(fresh),
        }
        # The last file of all: a folder without it is never trusted.
        write_json(fresh / _STAMP, stamp)
    root = _trusted(target, extras)
    if root is None:
        raise ToolchainError(f"{target} changed while it was installed", hint="run again")
    return root


def _trusted(target: Path, extras: tuple[str, ...]) -> Path | None:
    """The toolkit's root if the install is whole: all its files, with the sizes they had."""
    try:
        stamp: dict[str, Any] = read_json(target / _STAMP)
        if not set(extras) <= set(stamp["extras"]):
            return None
        for name, size in stamp["sizes"].items():
            if (target / name).stat().st_size != size:
                return None
        return target / str(stamp["root"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _index_root(folder: Path) -> Path | None:
    """``nvidia/cu13`` or what a later major version calls it."""
    for tool in sorted(folder.glob("nvidia/*/bin")):
        if (tool / "nvcc").is_file() or (tool / "cuobjdump").is_file():
            return tool.parent
    return None


def _complete(root: Path) -> None:
    """Give an index toolkit the two names that CMake's FindCUDAToolkit looks for."""
    lib = root / "lib"
    if not lib.is_dir():
        return
    for versioned in sorted(lib.glob("libcudart.so.*")):
        link = lib / "libcudart.so"
        if not link.exists():
            link.symlink_to(versioned.name)
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("lib")


def _versions(folder: Path) -> dict[str, str]:
    found = {}
    for info in sorted(folder.glob("*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        found[name] = version
    return found


def _installer() -> list[str]:
    """The command that installs packages into a folder, up to its ``--target``."""
    if importlib.util.find_spec("pip") is not None:
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-warn-conflicts"]
        return [sys.executable, "-m", "pip", "install", *quiet, "--no-compile"]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise ToolchainError(
        "neither pip nor uv is in this Python environment, so no toolkit can be installed",
        hint=f"run {sys.executable} -m ensurepip, or install a CUDA toolkit on the machine",
    )


# --- CMake and Ninja ---------------------------------------------------------------------------


def _find_cmake(show: Printer | None) -> tuple[Path, Version]:
    found = ""
    for candidate in _programs("cmake", "CMAKE_BIN_DIR"):
        try:
            output = run([candidate, "--version"], show=show, timeout=60).stdout
        except CommandError:
            continue
        match = re.search(r"cmake version (\d+)\.(\d+)(?:\.(\d+))?", output)
        if match is None:
            continue
        version = tuple(int(part) for part in match.groups() if part is not None)
        if version >= MINIMUM_CMAKE:
            return candidate, version
        found = found or f"{candidate} is {_text(version)}"
    raise ToolchainError(
        f"no CMake {_text(MINIMUM_CMAKE)} or newer" + (f" ({found})" if found else ""),
        hint=f"{sys.executable} -m pip install 'cmake>={_text(MINIMUM_CMAKE)}' "
        "(it is a dependency of this project)",
    )


def _find_ninja(show: Printer | None) -> Path:
    for candidate in _programs("ninja", "BIN_DIR"):
        try:
            run([candidate, "--version"], show=show, timeout=60)
        except CommandError:
            continue
        return candidate
    raise ToolchainError(
        "no Ninja",
        hint=f"{sys.executable} -m pip install ninja (it is a dependency of this project)",
    )


def _programs(name: str, constant: str) -> Iterator[Path]:
    """The Python package's program, the environment's script, and what is on PATH."""
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        folder = getattr(module, constant, None)
        if folder is not None and Path(folder, name).is_file():
            yield Path(folder, name)
    script = Path(sys.executable).parent / name
    if script.is_file():
        yield script
    on_path = shutil.which(name)
    if on_path is not None:
        yield Path(on_path)


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)
