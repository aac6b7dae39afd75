"""The project that the wheel is made of: the package, the library, licences and records, staged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from pipeline.errors import WheelError
from pipeline.files import dump_json, walk_files
from pipeline.provenance import Origin, provenance
from pipeline.sbom import sbom

_ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = _ROOT / "templates" / "wheel"
#: The Python package, without what a build gives it.
PACKAGE = _ROOT / "runtime" / "w4a16"
LICENSE = _ROOT / "LICENSE"
SBOM = "w4a16.cdx.json"
#: What the wheel adds to the package: its folders there may not exist in PACKAGE.
_ADDED = ("cmake", "include", "lib")
_SUFFIXES = (".json", ".py", ".pyi")
_NAMES = ("py.typed",)


def package_files(package: Path = PACKAGE) -> dict[str, bytes]:
    """The package's own files, by path in the wheel; one of an unknown kind is refused."""
    files = {}
    strangers = []
    for path in walk_files(package):
        relative = path.relative_to(package)
        if any(part == "__pycache__" or part.startswith(".") for part in relative.parts):
            continue
        if relative.parts[0] in _ADDED or not (path.suffix in _SUFFIXES or path.name in _NAMES):
            strangers.append(relative.as_posix())
        files[f"w4a16/{relative.as_posix()}"] = path.read_bytes()
    if strangers:
        raise WheelError(
            f"{package} holds files that a wheel does not take: {', '.join(strangers)}",
            hint="move them elsewhere, or teach pipeline/wheel_tree.py their kind",
        )
    if "w4a16/__init__.py" not in files:
        raise WheelError(
            f"there is no Python package in {package}",
            hint="run from a whole checkout of this project",
        )
    return files


def staged(
    origin: Origin,
    *,
    package: Mapping[str, bytes],
    bundle: Path,
    library: Path,
    policy: str,
) -> dict[str, bytes]:
    """The staged project: path → content. ``policy`` is the manylinux policy of the wheel's tag."""
    licenses = {
        "LICENSE": LICENSE.read_bytes(),
        "CUDA-runtime.txt": (TEMPLATES / "CUDA-runtime.txt").read_bytes(),
        **{path.name: path.read_bytes() for path in walk_files(bundle / "licenses")},
    }
    context = {
        "origin": origin,
        "license_files": sorted([*licenses, "NOTICE"]),
        "sbom_file": SBOM,
        "soname": origin.library.soname,
        "tag": f"py3-none-{policy}",
    }
    config = "w4a16/cmake/w4a16Config.cmake"
    version = "w4a16ConfigVersion.cmake"
    return {
        **package,
        **licenses,
        **{
            name: render(f"{name}.j2", context)
            for name in ("NOTICE", "README.md", "hatch_build.py", "pyproject.toml")
        },
        config: render("w4a16Config.cmake.j2", context),
        # Compares versions only, so the install tree's own will do.
        f"w4a16/cmake/{version}": (library.parent / "cmake/w4a16" / version).read_bytes(),
        "w4a16/include/w4a16.h": (bundle / "include" / "w4a16.h").read_bytes(),
        "w4a16/lib/libw4a16.so": library.read_bytes(),
        "w4a16/data/provenance.json": dump_json(provenance(origin, policy)).encode(),
        SBOM: sbom(origin).encode(),
    }


def render(template: str, context: Mapping[str, Any]) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    try:
        return environment.get_template(template).render(**context).encode()
    except TemplateError as error:
        raise WheelError(
            f"templates/wheel/{template} cannot be rendered: {error}",
            hint="pipeline/wheel_tree.py says what a template sees",
        ) from error
