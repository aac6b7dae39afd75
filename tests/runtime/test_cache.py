"""The user's measured tactics on disk: shared, damaged, read-only, full."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from w4a16 import cache, tables
from w4a16.cache import CacheError
from w4a16.library import QuantOp
from w4a16.tables import Case

from .tactics_fakes import key

PLAIN = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)
ENTRIES: Any = {PLAIN: {1: {"gemv": 5.0, "sm90:128x16x64:1x1x1": 15.0}}}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored() -> Path:
    return cache.store(key(), ENTRIES, {"date": "today"})


# ---- Where ----


def test_the_folder_is_the_environments_then_xdgs_then_homes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.folder() == (tmp_path / "cache", "")
    monkeypatch.delenv("W4A16_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder()[0] == tmp_path / "xdg" / "w4a16"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.folder()[0] == tmp_path / "home" / ".cache" / "w4a16"


@pytest.mark.parametrize("value", ["off", "OFF", "0", "none"])
def test_the_cache_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16_CACHE", value)
    assert cache.folder()[0] is None
    found = cache.read(key())
    assert (found.table, found.path, found.problem) == (None, None, "")
    assert "W4A16_CACHE" in found.note
    with pytest.raises(CacheError, match="off"):
        stored()


def test_without_a_home_the_cache_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("W4A16_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache.folder()[0] is None


@pytest.mark.parametrize(
    "change",
    [
        *({"gpu": "NVIDIA Other"}, {"sm": "9.1"}, {"sm_count": 114}, {"driver": 13010}),
        *({"cuda_runtime": 12080}, {"library": "def"}),
    ],
)
def test_every_part_of_the_key_has_its_own_file(change: dict[str, Any], place: Path) -> None:
    path = stored()
    other = key(**change)
    assert cache.path_of(other, place) != path
    found = cache.read(other)
    assert found.table is None
    assert found.problem == ""
    if "gpu" not in change:
        assert next(iter(change)) in found.note  # what else there is, and why it does not count


# ---- What is stored ----


def test_nothing_is_there_before_and_what_was_stored_after(place: Path) -> None:
    found = cache.read(key())
    assert found == (None, cache.path_of(key(), place), "nothing tuned yet", "")
    assert not place.exists(), "reading made a folder"
    path = stored()
    found = cache.read(key())
    assert found.path == path
    assert found.problem == ""
    assert found.table is not None
    assert found.table.key == key()
    assert found.table.entries == ENTRIES
    assert found.table.made["date"] == "today"


def test_storing_adds_and_replaces_by_case_and_bucket() -> None:
    stored()
    other = PLAIN._replace(n=8192)
    cache.store(key(), {PLAIN: {2: {"gemv": 6.0}}, other: {1: {"gemv": 9.0}}}, {})
    cache.store(key(), {PLAIN: {1: {"gemv": 4.0}}}, {})
    table = cache.read(key()).table
    assert table is not None
    assert table.entries == {
        PLAIN: {1: {"gemv": 4.0}, 2: {"gemv": 6.0}},
        other: {1: {"gemv": 9.0}},
    }


def test_the_file_is_as_readable_as_the_umask_lets(place: Path) -> None:
    before = os.umask(0o022)
    try:
        path = stored()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(p.suffix for p in place.iterdir()) == [".json", ".lock"]


# ---- What is not used ----


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "no JSON"),
        (lambda text: "", "no JSON"),
        (lambda text: text.replace("5.0", "NaN"), "NaN"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "version 7"),
        (lambda text: text.replace('"driver": 13000', '"driver": 12080'), "measured elsewhere"),
        (lambda text: text.replace("NVIDIA Fake", "NVIDIA Other"), "gpu 'NVIDIA Other'"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_reason_and_replaced(
    damage: Any, reason: str
) -> None:
    path = stored()
    path.write_text(damage(path.read_text()))
    found = cache.read(key())
    assert found.table is None
    assert found.note == "ignored"
    assert reason in found.problem
    assert str(path) in found.problem
    stored()
    assert cache.read(key()).problem == ""


def test_a_bad_entry_is_ignored_and_the_others_used() -> None:
    cache.store(key(), {**ENTRIES, PLAIN._replace(n=8192): {1: {"gemv": 7.5}}}, {})
    path = stored()
    path.write_text(path.read_text().replace("7.5", "-7.5"))
    found = cache.read(key())
    assert found.table is not None
    assert found.table.entries == ENTRIES
    assert "1 of its entries" in found.problem


def test_a_file_of_absurd_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored()
    monkeypatch.setattr(cache, "LARGEST_FILE", 100)
    monkeypatch.setattr(tables, "LARGEST_FILE", 100)
    assert "at most 100" in cache.read(key()).problem
    assert path.exists()


def test_a_pipe_or_a_folder_in_its_place_is_ignored_at_once(place: Path) -> None:
    place.mkdir()
    path = cache.path_of(key(), place)
    os.mkfifo(path)
    assert "no regular file" in cache.read(key()).problem
    path.unlink()
    path.mkdir()
    found = cache.read(key())
    assert found.table is None
    assert found.problem


# ---- What cannot be written ----


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "file" / "cache"))
    assert cache.read(key()).problem == ""
    with pytest.raises(CacheError, match=r"file/cache.*W4A16_CACHE"):
        stored()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    function: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = stored()
    before, files = path.read_bytes(), sorted(place.iterdir())
    monkeypatch.setattr(os, function, full)
    with pytest.raises(CacheError, match="No space left"):
        cache.store(key(), {PLAIN: {1: {"gemv": 1.0}}}, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(place.iterdir()) == files


def test_a_lock_that_is_never_free_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path = stored()
    monkeypatch.setattr(cache, "_PATIENCE", 0.05)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="locked"):
            stored()
    stored()


def test_a_file_system_without_locks_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    stored()
    assert cache.read(key()).table is not None


# ---- Together ----

WRITERS, EACH = 6, 8


def store_some(writer: int) -> None:
    for number in range(EACH):
        case = PLAIN._replace(n=8 * (1 + writer), k=256 * (1 + number))
        cache.store(key(), {case: {1: {"gemv": 1.0 + writer}}}, {})
        found = cache.read(key())
        assert found.problem == ""
        assert found.table is not None


def check_all_there() -> None:
    table = cache.read(key()).table
    assert table is not None
    assert len(table.entries) == WRITERS * EACH
    for case, rows in table.entries.items():
        assert rows == {1: {"gemv": case.n / 8}}


def test_processes_that_store_at_once_lose_nothing(place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=store_some, args=(i,)) for i in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * WRITERS
    check_all_there()
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_threads_that_store_at_once_lose_nothing() -> None:
    threads = [threading.Thread(target=store_some, args=(i,)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_all_there()


def test_a_killed_writer_leaves_the_last_good_file(place: Path) -> None:
    path = stored()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=store_forever)
    process.start()
    for _ in range(200):
        process.join(0.02)
        if len(json.loads(path.read_text())["entries"]) > 5:
            break
    process.kill()
    process.join()
    assert cache.read(key()).problem == ""
    stored()  # the lock died with it
    assert cache.read(key()).table is not None


def store_forever() -> None:
    for number in range(100000):
        cache.store(key(), {PLAIN._replace(n=8 * (number % 50 + 1)): {1: {"gemv": 1.0}}}, {})
