"""What differs between upstream releases: data from ``configs/releases.yaml``, else detection."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field, field_validator

from pipeline.errors import PathError, ReleaseError
from pipeline.files import relative_inside
from pipeline.profile import Model, load_yaml_model

RELEASES_FILE = Path(__file__).resolve().parent.parent / "configs" / "releases.yaml"
FETCH_CONTENT = "3rdparty/fetch_content.json"
CUTLASS_SUBMODULE = "3rdparty/cutlass"
VERSION_FILE = "tensorrt_llm/version.py"


class Generator(Model):
    script: str
    options: tuple[str, ...] = ("-o", "{out}")


class Launcher(Model):
    function: str
    namespace: str
    defines: tuple[str, ...] = ()
    stream_k: bool
    sm90_layout: Literal["signed", "permuted"]


class GemvSource(Model):
    folder: str
    layouts: dict[int, str]
    without: str


class Unknown(Model):
    """How a release that no entry holds is looked at."""

    name: str
    paths: tuple[str, ...]
    generator: Generator
    launcher: Launcher
    include_dirs: tuple[str, ...]
    link_sources: tuple[str, ...]
    layout_check: tuple[str, ...]
    gemv: GemvSource

    @field_validator("paths", "include_dirs", "link_sources", "layout_check")
    @classmethod
    def _inside(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            try:
                relative_inside(path, what="path")
            except PathError as error:
                raise ValueError(error.what) from error
        return value


class Known(Unknown):
    """An entry for the releases whose version ``versions`` holds."""

    versions: str


class Refused(Model):
    """Releases that cannot be extracted, and why."""

    name: str
    versions: str
    refused: str


class ReleaseTable(Model):
    releases: tuple[Refused | Known, ...]
    unknown: Unknown
    cutlass_paths: tuple[str, ...] = Field(min_length=1)
    cutlass_include_dirs: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts:
    """Everything that the stages need to know of one release."""

    name: str
    paths: tuple[str, ...]
    script: str
    options: tuple[str, ...]
    launcher: Launcher
    include_dirs: tuple[str, ...]
    cutlass_include_dirs: tuple[str, ...]
    link_sources: tuple[str, ...]
    layout_check: tuple[str, ...]
    gemv_folder: str
    gemv_layouts: dict[int, str]
    gemv_without: str


def load_table(path: Path = RELEASES_FILE) -> ReleaseTable:
    return load_yaml_model(path, ReleaseTable, what="releases file")


def parse_version(text: str) -> Version:
    """Read ``__version__ = "…"`` from the text of ``tensorrt_llm/version.py``."""
    match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    try:
        return Version(match.group(1) if match else "")
    except ValueError as error:  # InvalidVersion, or a number of thousands of digits
        raise ReleaseError(
            f"{VERSION_FILE} does not say which release this is",
            hint="check that the source is a TensorRT-LLM repository at a release",
        ) from error


def entry_for(table: ReleaseTable, version: Version) -> Known | Unknown:
    for entry in table.releases:
        if SpecifierSet(entry.versions, prereleases=True).contains(version):
            if isinstance(entry, Refused):
                raise ReleaseError(
                    f"TensorRT-LLM {version} cannot be extracted: {entry.refused}",
                    hint="ask for v0.9.0 or later; v1.0.0 is the default",
                )
            return entry
    return table.unknown


def facts_of(table: ReleaseTable, entry: Known | Unknown, checkout: Path) -> ReleaseFacts:
    """The facts of a checked-out release; what an unknown one does not say is detected."""
    script = entry.generator.script
    options = entry.generator.options
    layouts = entry.gemv.layouts
    launcher = entry.launcher
    if not isinstance(entry, Known):
        script = _find_script(checkout, script)
        options = _detect_options(checkout / script)
        layouts = _detect_layouts(checkout / entry.gemv.folder, layouts)
        launcher = _detect_launcher(checkout, launcher)
    elif not (checkout / script).is_file():
        raise ReleaseError(
            f"the release has no generator at {script}",
            hint="check the ref, or the entry of this release in configs/releases.yaml",
        )
    return ReleaseFacts(
        name=entry.name,
        paths=entry.paths,
        script=script,
        options=options,
        launcher=launcher,
        include_dirs=entry.include_dirs,
        cutlass_include_dirs=table.cutlass_include_dirs,
        link_sources=tuple(p for p in entry.link_sources if (checkout / p).is_file()),
        layout_check=tuple(p for p in entry.layout_check if (checkout / p).is_file()),
        gemv_folder=entry.gemv.folder,
        gemv_layouts=layouts,
        gemv_without=entry.gemv.without,
    )


def _find_script(checkout: Path, usual: str) -> str:
    if (checkout / usual).is_file():
        return usual
    name = Path(usual).name
    found = sorted(path.relative_to(checkout).as_posix() for path in checkout.rglob(name))
    if len(found) == 1:
        return found[0]
    raise ReleaseError(
        f"the release has {'no' if not found else 'more than one'} {name}",
        details="\n".join(found),
        hint="releases before v0.9.0 have none; give a later one, or add an entry to "
        "configs/releases.yaml",
    )


def _detect_options(script: Path) -> tuple[str, ...]:
    """Whether the generator takes an architecture, from the options that its parser declares."""
    text = script.read_text(encoding="utf-8", errors="replace")
    if re.search(r"[\"']--architectures[\"']", text):
        return ("-o", "{out}", "-a", "{sm}")
    return ("-o", "{out}")


def _detect_layouts(folder: Path, usual: dict[int, str]) -> dict[int, str]:
    details = folder / "details.h"
    text = details.read_text(encoding="utf-8", errors="replace") if details.is_file() else ""
    return {sm: layout for sm, layout in usual.items() if re.search(rf"\b{layout}\b", text)}


def _detect_launcher(checkout: Path, usual: Launcher) -> Launcher:
    """Scheduler and weight layout, from the text of the file that defines the launcher."""
    for path in sorted(checkout.rglob("*launcher_sm90.inl")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if re.search(rf"\b{usual.function}\b", text):
            permuted = re.search(r"\bCollective\w+Interleaved\b", text) is not None
            return usual.model_copy(
                update={
                    "stream_k": "StreamKScheduler" in text,
                    "sm90_layout": "permuted" if permuted else "signed",
                }
            )
    return usual
