"""Stage wheel: what people install, made from a verified library; equal builds give equal bytes."""

from __future__ import annotations

import gzip
import io
import os
import platform
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from pipeline.errors import WheelError
from pipeline.files import (
    remove_tree,
    replaced_folder,
    sha256_file,
    walk_files,
    write_bytes,
    write_text,
)
from pipeline.process import CommandError, Printer, run
from pipeline.provenance import Origin
from pipeline.wheel_policy import policy_of
from pipeline.wheel_tree import SBOM, staged

SUMS = "SHA256SUMS"
_TOOLS = ("auditwheel", "cyclonedx-python-lib", "hatchling")


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """What stage *wheel* leaves in ``DIR/wheel``, beside ``SHA256SUMS``."""

    wheel: str
    bundle: str
    policy: str
    """The manylinux policy that auditwheel found."""
    sha256: dict[str, str]


def tools() -> dict[str, str]:
    """The packages that make the wheel → version; one that is not installed is an ImportError."""
    return {name: installed_version(name) for name in _TOOLS}


def make_wheel(
    origin: Origin,
    *,
    package: Mapping[str, bytes],
    bundle: Path,
    library: Path,
    scratch: Path,
    target: Path,
    show: Printer | None = None,
) -> Wheel:
    """Fill ``target`` with the wheel, the bundle's tarball and their sums, nothing compiled.

    ``package`` is the Python package, as :func:`pipeline.wheel_tree.package_files` reads it. The
    policy is asked of a first wheel, and stands in the name and the provenance of the second.
    """

    def built_for(policy: str) -> Path:
        files = staged(origin, package=package, bundle=bundle, library=library, policy=policy)
        built = _built(files, origin, scratch, show)
        _check_contents(built, files)
        return built

    with replaced_folder(target) as fresh:
        try:
            first = built_for(f"linux_{platform.machine()}")
            policy = policy_of(first, library, show=show)
            built = built_for(policy)
            if policy_of(built, library, show=show) != policy:
                raise WheelError(
                    f"auditwheel finds another policy than {policy} in {built.name}",
                    hint="this is a fault of the wheel stage; run it with -v",
                )
            wheel = built.rename(fresh / built.name)
        finally:
            remove_tree(scratch)
        name = f"w4a16-{origin.version}-bundle"
        tarball = fresh / f"{name}.tar.gz"
        write_bytes(tarball, archive(bundle, name, origin.project.time))
        sums = {path.name: sha256_file(path) for path in (tarball, wheel)}
        write_text(
            fresh / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        )
    return Wheel(wheel=wheel.name, bundle=tarball.name, policy=policy, sha256=sums)


def _built(files: Mapping[str, bytes], origin: Origin, scratch: Path, show: Printer | None) -> Path:
    """The wheel that Hatchling makes of ``files``."""
    remove_tree(scratch)
    for name, content in files.items():
        write_bytes(scratch / "project" / name, content)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HATCH")}
    env["SOURCE_DATE_EPOCH"] = str(origin.project.time)
    output = scratch / "dist"
    try:
        run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", output],
            cwd=scratch / "project",
            env=env,
            show=show,
        )
    except CommandError as error:
        raise WheelError(
            "Hatchling could not make the wheel",
            details=error.output,
            hint="see templates/wheel/pyproject.toml.j2; -v shows the command",
        ) from error
    (wheel,) = output.glob("*.whl")
    return wheel


def _check_contents(wheel: Path, files: Mapping[str, bytes]) -> None:
    """The package is in the wheel whole, whatever the backend's defaults leave out."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    lacking = sorted(name for name in files if name.startswith("w4a16/") and name not in names)
    if not any(name.endswith(f".dist-info/sboms/{SBOM}") for name in names):
        lacking.append(SBOM)
    if lacking:
        raise WheelError(
            f"{wheel.name} lacks {', '.join(lacking)}",
            hint="see the build settings in templates/wheel/pyproject.toml.j2",
        )


def archive(folder: Path, name: str, time: int) -> bytes:
    """``folder`` as a ``.tar.gz`` whose only folder is ``name``; its bytes tell nothing else."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(walk_files(folder)):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            entry.size = path.stat().st_size
            entry.mtime = time
            entry.mode = 0o644
            with path.open("rb") as content:
                tar.addfile(entry, content)
    return packed.getvalue()
