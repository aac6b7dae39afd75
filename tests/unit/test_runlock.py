"""The lock between processes: they take turns, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import BusyError, ResourceError
from pipeline.runlock import held

_HOLDER = """
import sys, time
from pathlib import Path
from pipeline.runlock import held

with held(Path(sys.argv[1]), what="the folder"):
    print("held", flush=True)
    time.sleep(60)
"""

_WORKER = """
import sys, time
from pathlib import Path
from pipeline.runlock import held

lock, log = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(10):
    with held(lock, what="the folder"):
        for word in ("in", "out"):
            with log.open("a") as stream:
                stream.write(f"{sys.argv[3]} {word}\\n")
            time.sleep(0.002)
"""


def start_holder(lock: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_two_processes_take_turns(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, str(lock), str(log), name])
        for name in ("a", "b")
    ]
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 40
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert (entered[2:], left[2:]) == ("in", "out")
        assert entered[0] == left[0]


def test_a_second_run_that_may_not_wait_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "lock")
    try:
        with (
            pytest.raises(BusyError, match=rf"process {holder.pid}\) holds the folder"),
            held(tmp_path / "lock", what="the folder", wait=False),
        ):
            pass
    finally:
        end(holder)


def test_a_holder_killed_outright_frees_the_lock(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "lock")
    os.kill(holder.pid, signal.SIGKILL)
    end(holder)
    with held(tmp_path / "lock", what="the folder", wait=False):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_who_waits_says_so_and_goes_on_when_the_holder_dies(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "lock")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        end(holder)

    begin = time.monotonic()
    with held(tmp_path / "lock", what="the folder", say=say):
        pass
    assert time.monotonic() - begin < 10
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "lock", what="the folder"):
        raise ZeroDivisionError
    with held(tmp_path / "lock", what="the folder", wait=False):
        pass


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with held(tmp_path / "lock", what="the folder"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with held(tmp_path / "lock", what="the folder", wait=False):
            pass
    finally:
        child.communicate(b"\n")


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError), held(tmp_path / "file" / "lock", what="the folder"):
        pass
