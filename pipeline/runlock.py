"""Locks between processes: two runs on one folder take turns."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BusyError, ResourceError


@contextmanager
def held(
    path: Path, *, what: str, wait: bool = True, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock file ``path``; a second holder waits, or fails where ``wait`` is false.

    The kernel drops the lock when its holder dies, however it dies.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}",
            hint="give a folder that can be written to",
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            if not wait:
                raise BusyError(
                    f"another run (process {owner}) holds {what}",
                    hint="wait for it to end, or give another folder with --out",
                ) from None
            if say is not None:
                say(f"waiting for another run (process {owner}) that holds {what}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
