"""Facts of a shared library, on small ones compiled here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.elf import read_elf, unresolved
from pipeline.errors import VerifyError

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="no g++")

SOURCE = """\
#include <string>
#include <cstdio>
extern "C" int nobody_has_this(int);
extern "C" __attribute__((weak)) int maybe_later(int);
extern "C" int w4a16_print(int n) { std::string text(n, 'x'); return std::puts(text.c_str()); }
int shown() { return 1; }
__attribute__((visibility("hidden"))) int hidden() { return 2; }
#ifdef BROKEN
extern "C" int w4a16_broken(int n) { return nobody_has_this(n); }
#endif
extern "C" int w4a16_weak(int n) { return maybe_later ? maybe_later(n) : 0; }
"""


def library(folder: Path, *options: str) -> Path:
    (folder / "a.cpp").write_text(SOURCE)
    target = folder / "libw4a16.so"
    assert GXX is not None
    command = [GXX, "-shared", "-fPIC", "-O1", str(folder / "a.cpp"), "-o", str(target), *options]
    subprocess.run(command, check=True)
    return target


def test_needed_libraries_and_exports_are_listed(tmp_path: Path) -> None:
    facts = read_elf(library(tmp_path, "-Wl,-soname,libw4a16.so.1"))
    assert {"libstdc++.so.6", "libc.so.6"} <= set(facts.needed)
    assert facts.soname == "libw4a16.so.1"
    assert {"w4a16_print", "_Z5shownv"} <= set(facts.exported)
    assert "_Z6hiddenv" not in facts.exported
    assert facts.size > 0


def test_symbols_of_needed_libraries_and_weak_ones_are_resolved(tmp_path: Path) -> None:
    facts = read_elf(library(tmp_path))
    assert unresolved(facts) == []
    givers = {symbol.name: symbol.library for symbol in facts.undefined}
    assert givers["puts"] == "libc.so.6"
    assert any(symbol.name == "maybe_later" and symbol.weak for symbol in facts.undefined)


def test_a_symbol_that_no_library_has_is_unresolved(tmp_path: Path) -> None:
    assert unresolved(read_elf(library(tmp_path, "-DBROKEN"))) == ["nobody_has_this"]


def test_stripping_is_seen(tmp_path: Path) -> None:
    assert not read_elf(library(tmp_path)).stripped
    assert read_elf(library(tmp_path, "-s")).stripped


def test_a_run_path_is_seen(tmp_path: Path) -> None:
    assert read_elf(library(tmp_path, "-Wl,-rpath,/somewhere")).runpath == "/somewhere"
    assert read_elf(library(tmp_path)).runpath == ""


def test_the_name_of_a_version_is_no_exported_symbol(tmp_path: Path) -> None:
    script = tmp_path / "exports.map"
    script.write_text("W4A16_1 { global: w4a16_*; local: *; };\n")
    facts = read_elf(library(tmp_path, f"-Wl,--version-script={script}"))
    assert facts.exported == ("w4a16_print", "w4a16_weak")


@pytest.mark.parametrize("content", [b"", b"not an ELF file", b"\x7fELF\x02\x01\x01" + b"\0" * 20])
def test_a_file_that_is_no_library_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "libw4a16.so"
    path.write_bytes(content)
    with pytest.raises(VerifyError, match="cannot be read"):
        read_elf(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="cannot be read"):
        read_elf(tmp_path / "nothing.so")
