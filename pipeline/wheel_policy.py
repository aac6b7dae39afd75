"""Which Linux systems a wheel runs on, asked of auditwheel: its manylinux tag."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from pipeline.elf import read_elf
from pipeline.errors import WheelError
from pipeline.process import CommandError, Printer, run

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Need:
    """The newest version of a system library's interface that a library asks for."""

    library: str
    version: str
    """``GLIBC_2.34``, say."""
    symbols: tuple[str, ...]

    def __str__(self) -> str:
        more = ", …" if len(self.symbols) > _SHOWN else ""
        return f"{self.library} {self.version} for {', '.join(self.symbols[:_SHOWN])}{more}"


def policy_of(wheel: Path, library: Path, *, show: Printer | None = None) -> str:
    """The manylinux policy that ``wheel`` satisfies, ``manylinux_2_34_x86_64`` say.

    A wheel that satisfies none is refused, with what ``library``, the one that it holds, needs.
    """
    command: list[str | Path] = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    try:
        output = run(command, show=show, timeout=300, separate_stderr=True).stdout
        found: dict[str, Any] = json.loads(output)
        tag = str(found["overall_tag"])
    except CommandError as error:
        raise _unread(wheel, error.output) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unread(wheel, f"it said: {output}") from error
    if not tag.startswith("manylinux_"):
        raise WheelError(
            f"libw4a16.so fits no manylinux policy (auditwheel says {tag})",
            details="\n".join(f"- {reason}" for reason in _reasons(found, library)),
            hint="build on an older system, with an older compiler (a manylinux_2_34 container, "
            "say), then make the wheel again",
        )
    return tag


def _unread(wheel: Path, details: str) -> WheelError:
    return WheelError(
        f"auditwheel cannot read {wheel.name}",
        details=details,
        hint="see whether `pip install -U auditwheel` helps",
    )


def _reasons(found: Mapping[str, Any], library: Path) -> list[str]:
    reasons = [
        f"needs {name}, which no policy lets a wheel expect"
        for name in sorted(found.get("external_libs", {}))
    ]
    if found.get("unsupported_isa"):
        reasons.append("needs instructions that not every processor of its kind has")
    if not str(found.get("sym_tag", "")).startswith("manylinux_"):
        reasons += [f"needs {need}" for need in newest_needs(library)]
    return reasons or [json.dumps(found)]


def newest_needs(library: Path) -> list[Need]:
    """For each system library, and each of its interfaces, the newest version asked for."""
    by_version: dict[tuple[str, str], list[str]] = {}
    for symbol in read_elf(library).undefined:
        if symbol.version:
            by_version.setdefault((symbol.library, symbol.version), []).append(symbol.name)
    newest: dict[tuple[str, str], tuple[str, str]] = {}
    for name, version in by_version:
        family = (name, version.rpartition("_")[0])
        held = newest.get(family)
        if held is None or _rank(held[1]) < _rank(version):
            newest[family] = (name, version)
    return [
        Need(library=name, version=version, symbols=tuple(sorted(by_version[name, version])))
        for name, version in sorted(newest.values())
    ]


def _rank(version: str) -> Version:
    try:
        return Version(version.rpartition("_")[2])
    except InvalidVersion:  # GLIBC_PRIVATE
        return Version("999")
