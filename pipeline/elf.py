"""What a built library asks for and offers, read from its ELF dynamic section."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

from pipeline.errors import VerifyError


@dataclass(frozen=True, kw_only=True)
class Undefined:
    """A symbol that another library has to give."""

    name: str
    weak: bool
    library: str
    """The needed library that its symbol version names; empty for one without a version."""
    version: str = ""
    """That version, ``GLIBC_2.34`` say; empty likewise."""


@dataclass(frozen=True, kw_only=True)
class ElfFacts:
    size: int
    stripped: bool
    soname: str
    needed: tuple[str, ...]
    runpath: str
    exported: tuple[str, ...]
    undefined: tuple[Undefined, ...]


def read_elf(path: Path) -> ElfFacts:
    """Read a shared library or program; a file that is neither is a :class:`VerifyError`."""
    try:
        with path.open("rb") as stream:
            return _facts(ELFFile(stream), path.stat().st_size)
    except (ELFError, OSError) as error:
        raise VerifyError(
            f"{path} cannot be read as an ELF file: {error}", hint="build again from nothing"
        ) from error


def _facts(elf: Any, size: int) -> ElfFacts:
    needed: list[str] = []
    soname = runpath = ""
    exported: set[str] = set()
    undefined: dict[str, Undefined] = {}
    versions = _needed_versions(elf)
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            tag: Any
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag == "DT_SONAME":
                    soname = tag.soname
                elif tag.entry.d_tag == "DT_RUNPATH":
                    runpath = tag.runpath
                elif tag.entry.d_tag == "DT_RPATH":
                    runpath = tag.rpath
        elif section.name == ".dynsym" and isinstance(section, SymbolTableSection):
            for index, symbol in enumerate(section.iter_symbols()):
                bind, visibility = symbol["st_info"]["bind"], symbol["st_other"]["visibility"]
                if not symbol.name or bind == "STB_LOCAL":
                    continue
                if symbol["st_shndx"] == "SHN_UNDEF":
                    library, version = versions.get(index, ("", ""))
                    undefined[symbol.name] = Undefined(
                        name=symbol.name,
                        weak=bind == "STB_WEAK",
                        library=library,
                        version=version,
                    )
                elif symbol["st_shndx"] == "SHN_ABS" and symbol["st_size"] == 0:
                    continue  # the name of a version, not of anything that can be called
                elif visibility in ("STV_DEFAULT", "STV_PROTECTED"):
                    exported.add(symbol.name)
    return ElfFacts(
        size=size,
        stripped=elf.get_section_by_name(".symtab") is None,
        soname=soname,
        needed=tuple(needed),
        runpath=runpath,
        exported=tuple(sorted(exported)),
        undefined=tuple(undefined[name] for name in sorted(undefined)),
    )


def _needed_versions(elf: Any) -> dict[int, tuple[str, str]]:
    """Index in ``.dynsym`` → the library that the symbol's version comes from, and the version."""
    versions: dict[int, tuple[str, str]] = {}
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for need, auxiliaries in section.iter_versions():
                for auxiliary in auxiliaries:
                    versions[auxiliary["vna_other"]] = need.name or "", auxiliary.name
    found: dict[int, tuple[str, str]] = {}
    for section in elf.iter_sections():
        if isinstance(section, GNUVerSymSection):
            for index in range(section.num_symbols()):
                version = section.get_symbol(index)["ndx"]
                if isinstance(version, int) and version & 0x7FFF in versions:
                    found[index] = versions[version & 0x7FFF]
    return found


# Symbols that no library has to give: the linker, libc's start files and tools define them, or
# the code tests for their absence.
_OPTIONAL = re.compile(r"_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize")


def unresolved(facts: ElfFacts) -> list[str]:
    """Symbols that no needed library is known to give.

    Each library that we may need versions its symbols, so an undefined symbol without a version
    has no known giver; weak ones may stay open by design.
    """
    return [
        symbol.name
        for symbol in facts.undefined
        if not symbol.weak and not symbol.library and not _OPTIONAL.fullmatch(symbol.name)
    ]
