"""The user's measured tactics on disk: a file for each GPU, driver and library.

A file is replaced by an atomic rename, so readers need no lock and never see half of one; writers
take a lock on a file beside it, read what is there, and write both. What is on disk is never
trusted: a file that is damaged or of another key is ignored, with a reason.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from w4a16.errors import FormatError, W4A16Error
from w4a16.files import OutputError, open_regular, replace_file
from w4a16.switches import is_off
from w4a16.tables import LARGEST_FILE, Entries, Key, Table, dumps, loads, merged, slug

try:
    import fcntl
except ImportError:  # not on Linux: a rename is still atomic, but two writers may lose a merge
    fcntl = None  # type: ignore[assignment]

ENVIRONMENT = "W4A16_CACHE"
_PATIENCE = 20.0


class CacheError(W4A16Error):
    """Times cannot be stored: no folder, no permission, no space, or a lock that is never free."""


class Found(NamedTuple):
    """What the cache holds for a key."""

    table: Table | None
    path: Path | None
    """Where it is or would be; None: no cache."""
    note: str
    """What was found, or why there is nothing."""
    problem: str
    """Why a file that is there was not used, or not all of it; empty if nothing is wrong."""


def folder() -> tuple[Path | None, str]:
    """``$W4A16_CACHE``, or ``$XDG_CACHE_HOME/w4a16``, or ``~/.cache/w4a16``; or None, and why.

    ``W4A16_CACHE=off`` turns the cache off.
    """
    given = os.environ.get(ENVIRONMENT, "").strip()
    if is_off(given):
        return None, f"off ({ENVIRONMENT}={given})"
    if given:
        return Path(given).expanduser().absolute(), ""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification says to ignore a relative one
        return Path(base) / "w4a16", ""
    try:
        return Path.home() / ".cache" / "w4a16", ""
    except RuntimeError:
        return None, f"off (no home directory, and {ENVIRONMENT} is not set)"


def path_of(key: Key, place: Path) -> Path:
    """The file of a key."""
    text = json.dumps([getattr(key, name) for name in sorted(Key.__dataclass_fields__)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return place / f"tactics-{slug(key.gpu)}-{digest}.json"


def read(key: Key) -> Found:
    """What is stored for a key. Never raises, writes nothing."""
    place, reason = folder()
    if place is None:
        return Found(None, None, reason, "")
    path = path_of(key, place)
    if not os.path.lexists(path):
        return Found(None, path, "nothing tuned yet" + _elsewhere(key, place), "")
    try:
        table, dropped = loads(_bytes_of(path))
        if other := table.key.differences(key):
            raise FormatError(f"it was measured elsewhere: {other}")
    except (OSError, FormatError) as error:
        return Found(None, path, "ignored", f"{path} was ignored: {error}")
    cases = len(table.entries)
    problem = ""
    if dropped:
        problem = f"{path}: {len(dropped)} of its entries were ignored: {'; '.join(dropped[:3])}"
    return Found(table, path, f"{cases} case{'' if cases == 1 else 's'} tuned here", problem)


def store(key: Key, entries: Entries, made: Mapping[str, str | int | float]) -> Path:
    """Adds times to what is stored for a key, in place of older ones of the same case and bucket.

    Safe between threads and processes: none loses what another stored. Raises
    :class:`CacheError`; then nothing has changed.
    """
    place, reason = folder()
    if place is None:
        raise CacheError(f"the cache is {reason}")
    path = path_of(key, place)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            before = read(key).table
            known = before.entries if before else {}
            table = Table(key=key, entries=merged(known, entries), made=made)
            replace_file(path, dumps(table).encode())
    except OutputError as error:
        raise CacheError(str(error)) from error
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror or error}; set {ENVIRONMENT} to a folder"
            " that can"
        ) from error
    return path


def _bytes_of(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        return file.read(LARGEST_FILE + 1)


def _elsewhere(key: Key, place: Path) -> str:
    """What was tuned on the same GPU model under another driver or library, in words."""
    reasons: list[str] = []
    with contextlib.suppress(OSError):
        for path in sorted(place.glob(f"tactics-{slug(key.gpu)}-*.json"))[:8]:
            with contextlib.suppress(OSError, FormatError):
                reasons.append(loads(_bytes_of(path))[0].key.differences(key))
    return f"; not used: {' | '.join(reasons)}" if reasons else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock; a file system without locks gets none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if fcntl is not None:
            _wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _wait_for(descriptor: int, path: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EINTR):
                return
        if time.monotonic() > end:
            raise CacheError(f"{path} has been locked by another process for {_PATIENCE:.0f} s")
        time.sleep(0.01)
