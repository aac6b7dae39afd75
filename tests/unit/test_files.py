"""Files: written whole or not at all, untouched when unchanged, never outside their folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import files
from pipeline.errors import PathError, ResourceError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_with(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    assert files.write_json(path, {"z": [1, "é"], "a": None})
    assert (
        path.read_text(encoding="utf-8") == '{\n  "a": null,\n  "z": [\n    1,\n    "é"\n  ]\n}\n'
    )
    assert files.read_json(path) == {"z": [1, "é"], "a": None}
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_unchanged_file_keeps_its_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert files.write_text(path, "same")
    os.utime(path, ns=(1, 1))
    assert not files.write_text(path, "same")
    assert path.stat().st_mtime_ns == 1
    assert files.write_text(path, "other")
    assert path.stat().st_mtime_ns != 1


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        fail_with(patch, call, errno.ENOSPC)
        with pytest.raises(ResourceError, match="No space left"):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "text")
    with (
        pytest.raises(ResourceError, match="cannot write"),
        files.replaced_folder(tmp_path / "file" / "below"),
    ):
        pass


def test_a_folder_in_the_place_of_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        files.write_text(tmp_path / "folder", "text")
    assert names_in(tmp_path) == ["folder"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("first", "second"):
        with files.replaced_folder(target) as fresh:
            (fresh / content).write_text(content)
            assert not (target / content).exists()
        assert names_in(target) == [content]
    assert names_in(tmp_path) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("fault", [ValueError("bad"), KeyboardInterrupt(), OSError(28, "no room")])
def test_a_folder_keeps_its_content_when_filling_it_fails(
    tmp_path: Path, fault: BaseException
) -> None:
    target = tmp_path / "target"
    with files.replaced_folder(target) as fresh:
        (fresh / "good").write_text("good")
    expected = ResourceError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected):  # noqa: PT012, SIM117
        with files.replaced_folder(target) as fresh:
            (fresh / "half").write_text("half")
            raise fault
    assert names_in(target) == ["good"]
    assert names_in(tmp_path) == ["target"]


def test_a_folder_keeps_its_content_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with files.replaced_folder(target) as fresh:
        (fresh / "good").write_text("good")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(ResourceError), files.replaced_folder(target) as fresh:
            (fresh / "new").write_text("new")
    assert names_in(target) == ["good"]
    assert names_in(tmp_path) == ["target"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import files

moment, target = sys.argv[1], Path(sys.argv[2])
rename = Path.rename

def die_at(self, to):
    step = "first" if ".new-" not in self.name else "second"
    if moment == f"before {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    result = rename(self, to)
    if moment == f"after {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Path.rename = die_at
with files.replaced_folder(target) as fresh:
    (fresh / "new").write_text("new")
    if moment == "while filling":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("moment", "content"),
    [
        ("while filling", "good"),
        ("before first", "good"),
        ("after first", "good"),
        ("before second", "good"),
        ("after second", "new"),
    ],
)
def test_a_run_killed_while_it_replaces_a_folder_is_recovered_from(
    tmp_path: Path, moment: str, content: str
) -> None:
    target = tmp_path / "target"
    with files.replaced_folder(target) as fresh:
        (fresh / "good").write_text("good")
    done = subprocess.run([sys.executable, "-c", _KILLED, moment, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    files.recover_folder(target)
    assert names_in(target) == [content]
    assert names_in(tmp_path) == ["target"]
    files.recover_folder(target)
    assert names_in(target) == [content]


def test_recovery_touches_no_other_folder(tmp_path: Path) -> None:
    for name in ("target", "target2", ".target2.new-abc", ".other.old"):
        (tmp_path / name).mkdir()
    before = names_in(tmp_path)
    files.recover_folder(tmp_path / "target")
    files.recover_folder(tmp_path / "absent")
    files.recover_folder(tmp_path / "absent" / "below")
    assert names_in(tmp_path) == before


def test_a_digest_depends_on_paths_and_content_only(tmp_path: Path) -> None:
    for name, order in (("one", (1, 2)), ("two", (2, 1))):
        for number in order:
            files.write_text(tmp_path / name / "sub" / f"{number}.h", str(number))
    (tmp_path / "two" / "sub" / "1.h").chmod(0o755)
    (tmp_path / "two" / "empty").mkdir()
    assert files.tree_digest(tmp_path / "one") == files.tree_digest(tmp_path / "two")
    files.write_text(tmp_path / "two" / "sub" / "1.h", "2")
    assert files.tree_digest(tmp_path / "one") != files.tree_digest(tmp_path / "two")


def test_links_are_not_followed_into_a_digest(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree")
    assert files.tree_digests(tmp_path / "tree") == {}


@given(st.dictionaries(st.text(st.characters(exclude_characters="\0\n")), st.text(max_size=4)))
@settings(deadline=None, max_examples=50)
def test_a_digest_of_files_does_not_depend_on_their_order(digests: dict[str, str]) -> None:
    items = list(digests.items())
    assert files.digest_of_files(dict(reversed(items))) == files.digest_of_files(dict(items))


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "/etc/passwd", "//a", "..", "../a", "a/../../b", "a/.."),
        *("a\0b", "..\\a", "C:\\a", "a\nb", "\ud800", "a\x7fb"),
    ],
)
def test_a_path_that_leads_outside_is_refused(text: str) -> None:
    with pytest.raises(PathError, match="outside its folder"):
        files.relative_inside(text, what="path")


PATHS = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["..", ".", "a", "/", "//", "\\", "\0", "~", "b c"])).map("".join),
    st.lists(st.sampled_from(["..", ".", "", "a", "...", "~"])).map("/".join),
)


@given(PATHS)
@settings(deadline=None, max_examples=300)
def test_a_path_that_is_accepted_stays_inside(text: str) -> None:
    try:
        path = files.relative_inside(text, what="path")
    except PathError:
        return
    full = os.path.normpath(f"/root/run/{path}")
    assert full == "/root/run" or full.startswith("/root/run/")
    Path("/nowhere", path).exists()  # can be asked of the system


@pytest.mark.parametrize("link", ["/etc", "../..", "inside/../../.."])
def test_a_link_that_leads_outside_is_refused(tmp_path: Path, link: str) -> None:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    (root / "link").symlink_to(link)
    assert not files.stays_inside(root, root / "link" / "passwd")


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "link").symlink_to("inside")
    assert files.stays_inside(tmp_path, tmp_path / "link" / "file")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert not files.stays_inside(tmp_path, tmp_path / "a" / "file")


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    files.remove_tree(tmp_path / "link")
    files.remove_tree(tmp_path / "absent")
    assert names_in(tmp_path) == ["folder"]
