"""Kills conversions at chosen moments; a program of its own, since it forks.

``killed.py SOURCE TARGET REPLACED SERIES…``: a moment is a number of calls that change a file
system, and a series of them, ``7+30``, kills the first run at its 7th change, the second at its
30th, and lets the last one finish (``0`` kills none). REPLACED is a converted folder that TARGET is
a copy of before, or ``-``: then there is none. Prints for each series how its runs ended, and the
target's digest, in JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w4a16.convert import convert

CHANGES = ("write", "replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "truncate", "pwrite")
SHARD_BYTES = 150_000


def digest(folder: Path) -> str:
    """Of all names and contents."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def count_changes(moment: int) -> Callable[[], int]:
    """From now on counts; at the given one this process is killed, before the call."""
    lock = threading.Lock()
    calls = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                calls[0] += 1
                if calls[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, watched(getattr(os, name)))
    return lambda: calls[0]


def run(source: Path, target: Path, moment: int, overwrite: bool) -> str:
    """In a process of its own: ``done``, ``killed``, or what went wrong."""
    reader, writer = os.pipe()
    report = os.write  # not counted: a run that reports has ended, and killing it would hide how
    child = os.fork()
    if child == 0:
        try:
            changes = count_changes(moment)
            convert(
                source,
                target,
                shard_bytes=SHARD_BYTES,
                device="cpu",
                threads=1,
                overwrite=overwrite,
            )
            report(writer, f"done {changes()}".encode())
        except BaseException:
            report(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said


def main() -> None:
    source, target, replaced = map(Path, sys.argv[1:4])
    partial = target.with_name(target.name + ".partial")
    overwrite = replaced != Path("-")
    for series in sys.argv[4:]:
        for folder in (target, partial):
            shutil.rmtree(folder, ignore_errors=True)
        if overwrite:
            shutil.copytree(replaced, target)
        before = digest(target) if overwrite else ""
        ends: list[str] = []
        torn = False
        for moment in [*map(int, series.split("+")), 0]:
            ends.append(run(source, target, moment, overwrite))
            torn = torn or is_torn(target, before)
            if ends[-1] != "killed":
                break
        result = {
            "series": series,
            "ends": ends,
            "torn": torn,
            "digest": digest(target) if target.exists() else "",
            "left": partial.exists(),
        }
        print(json.dumps(result), flush=True)


def is_torn(target: Path, before: str) -> bool:
    """Whether there is something other than nothing, what was there before, or a whole result."""
    if not target.exists():
        return before != ""
    return digest(target) != before and not (target / "w4a16.json").is_file()


if __name__ == "__main__":
    main()
