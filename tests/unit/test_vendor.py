"""Stage vendor: how a compiler's list of dependencies is read, and what may stand in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PathError
from pipeline.vendor import _classified, parse_dependencies

NAMES = st.text(st.sampled_from("abc/._-+@ #$~"), min_size=1, max_size=12)


def escaped(name: str) -> str:
    """A name as GCC writes it into a rule."""
    return name.replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.o: a.cu b.h\n", ["a.cu", "b.h"]),
        ("a.o : \\\n    /x/a.cu \\\n    /x/b.h\n", ["/x/a.cu", "/x/b.h"]),
        ("a.o: a.cu \\\n with\\ space.h money$$.h hash\\#.h\n", None),
        ("a.o:", []),
        ("", []),
    ],
)
def test_a_rule_is_read_into_its_files(text: str, names: list[str] | None) -> None:
    expected = ["a.cu", "with space.h", "money$.h", "hash#.h"] if names is None else names
    assert parse_dependencies(text) == expected


@given(st.lists(NAMES, max_size=5))
@settings(deadline=None, max_examples=100)
def test_any_names_survive_the_way_through_a_rule(names: list[str]) -> None:
    rule = "unit.o: " + " \\\n  ".join(escaped(name) for name in names) + "\n"
    assert parse_dependencies(rule) == names


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("trtllm", "cutlass", "scratch", "cuda", "other")}
    for folder in found.values():
        folder.mkdir()
    return found


def classified(folders: dict[str, Path], *found: Path) -> set[tuple[str, Path]]:
    roots = {name: folders[name] for name in ("trtllm", "cutlass")}
    toolchain: Any = SimpleNamespace(root=folders["cuda"])
    return _classified(set(found), roots, folders["scratch"], toolchain)


def test_upstreams_files_are_told_from_ours_and_the_compilers(folders: dict[str, Path]) -> None:
    ours, theirs = folders["trtllm"] / "a.h", folders["cutlass"] / "b.h"
    rest = (folders["scratch"] / "c.h", folders["cuda"] / "d.h", Path("/usr/include/e.h"))
    assert classified(folders, ours, theirs, *rest) == {("trtllm", ours), ("cutlass", theirs)}


@pytest.mark.parametrize("path", ["/etc/passwd", "/root/.ssh/id", "/usrlocal/x.h"])
def test_a_file_from_elsewhere_is_refused(folders: dict[str, Path], path: str) -> None:
    with pytest.raises(PathError, match="outside its repository"):
        classified(folders, Path(path))


def test_a_folder_of_a_like_name_is_elsewhere(folders: dict[str, Path]) -> None:
    with pytest.raises(PathError):
        classified(folders, folders["trtllm"].with_name("trtllm-evil") / "a.h")
