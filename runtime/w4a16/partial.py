"""Where a conversion works: ``OUT.partial`` beside OUT, which appears whole, by one rename.

::

    OUT.partial/lock              held by the process at work
    OUT.partial/job.json          what the result depends on
    OUT.partial/shard-00001.json  a shard that is done: its digest, its layers
    OUT.partial/sources.json      digests of source files
    OUT.partial/out/              what will be OUT

Whoever finds such a folder goes on if it was made from the same inputs and options.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from w4a16.errors import ArgumentError, FormatError
from w4a16.files import dump_json, output_error, read_json, replace_file, sync_folder

try:
    import fcntl
except ImportError:  # not on Linux
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"

_FORMAT = "w4a16 convert"
_LOCK, _JOB, _SOURCES, _OUT, _OLD = "lock", "job.json", "sources.json", "out", "old"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Partial:
    """The folder of one conversion; the lock is held."""

    def __init__(self, target: Path, root: Path, found: bool) -> None:
        """``found``: whether the folder was there before."""
        self.target = target
        self.root = root
        self.out = root / _OUT
        self._found = found

    def finished_before(self) -> bool:
        """Whether an earlier process put its result in its place, and died cleaning up."""
        return self._found and not self.out.exists()

    def begin(self, inputs: Mapping[str, Any]) -> str:
        """Goes on with what is there, if it is of the same inputs. What had to be thrown away and
        why, or nothing."""
        found = self._job()
        said = ""
        if found is None or found["inputs"] != json.loads(json.dumps(inputs)):
            if found is not None:
                said = (
                    f"{self.root} was made from other inputs or options"
                    f" ({_difference(found['inputs'], inputs)}): started anew"
                )
            self._clear()
            job = {"format": _FORMAT, "inputs": inputs}
            replace_file(self.root / _JOB, dump_json(job))
        self.out.mkdir(exist_ok=True)
        return said

    def _job(self) -> Mapping[str, Any] | None:
        try:
            found = read_json(self.root / _JOB)
        except FormatError:
            return None
        if isinstance(found, dict) and found.get("format") == _FORMAT and "inputs" in found:
            return found
        return None

    def _clear(self) -> None:
        (self.root / _JOB).unlink(missing_ok=True)
        for path in self.root.iterdir():
            if path.name != _LOCK:
                _remove(path)

    def keep_only(self, names: set[str]) -> None:
        """Removes all but these files from what will be OUT."""
        for path in self.out.iterdir():
            if path.name not in names:
                _remove(path)

    def record(self, number: int) -> Any:
        """What was stored with :meth:`store`; None if nothing, or nothing readable."""
        return self._read(f"shard-{number:05}.json")

    def store(self, number: int, content: Mapping[str, Any]) -> None:
        replace_file(self.root / f"shard-{number:05}.json", dump_json(content))

    def forget(self, number: int) -> None:
        (self.root / f"shard-{number:05}.json").unlink(missing_ok=True)

    def sources(self) -> dict[str, str]:
        """Digests of source files, as far as they are known."""
        found = self._read(_SOURCES)
        if not isinstance(found, dict):
            return {}
        return {str(name): str(digest) for name, digest in found.items()}

    def store_sources(self, digests: Mapping[str, str]) -> None:
        replace_file(self.root / _SOURCES, dump_json(dict(digests)))

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.root / name, limit=200 << 20)
        except FormatError:
            return None

    def finish(self) -> None:
        """Puts the result in its place, instead of what may be there."""
        sync_folder(self.out)
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                self._swap()
            else:
                os.rename(self.out, self.target)
        except OSError as error:
            raise output_error(self.target, error) from error
        sync_folder(self.target.parent)
        self.discard()

    def _swap(self) -> None:
        if _exchange(self.out, self.target):
            return
        old = self.root / _OLD
        os.rename(self.target, old)
        try:
            os.rename(self.out, self.target)
        except OSError:
            os.rename(old, self.target)
            raise

    def recover(self) -> None:
        """Puts back what a process killed inside a swap had taken away."""
        old = self.root / _OLD
        if old.is_dir() and not self.target.exists():
            os.rename(old, self.target)

    def discard_if_new(self) -> None:
        """Removes the folder, unless it was there before."""
        if not self._found:
            self.discard()

    def discard(self) -> None:
        """Removes the folder; the lock is the last to go."""
        with suppress(OSError):
            (self.root / _JOB).unlink(missing_ok=True)
            for path in self.root.iterdir():
                if path.name != _LOCK:
                    _remove(path)
            (self.root / _LOCK).unlink()
            self.root.rmdir()


@contextmanager
def claimed(target: Path) -> Iterator[Partial]:
    """Holds the lock of a target's folder. The kernel drops it when its holder dies, however.

    Raises :class:`w4a16.ArgumentError` if another process is at work, or if the folder is someone
    else's, and :class:`w4a16.files.OutputError`.
    """
    root = target.with_name(target.name + SUFFIX)
    _check_ours(root)
    found = root.exists()
    try:
        descriptor = _lock(root)
    except OSError as error:
        raise output_error(root, error) from error
    try:
        yield Partial(target, root, found)
    finally:
        os.close(descriptor)


def _check_ours(root: Path) -> None:
    if not root.exists() and not root.is_symlink():
        return
    if root.is_symlink() or not root.is_dir():
        raise ArgumentError(f"{root} is in the way, where the conversion would work: remove it")
    strange = [path.name for path in root.iterdir() if not _is_ours(path.name)]
    if strange:
        raise ArgumentError(
            f"{root} holds {strange[0]!r}, which is not of a conversion, and is in the way: move it"
        )


def _is_ours(name: str) -> bool:
    own = (_LOCK, _JOB, _SOURCES, _OUT, _OLD)
    return name in own or name.startswith(("shard-", ".shard-", f".{_JOB}.", f".{_SOURCES}."))


def _lock(root: Path) -> int:
    while True:
        root.mkdir(parents=True, exist_ok=True)
        path = root / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process was done and removed the folder
            continue
        try:
            if fcntl is not None:
                _try_lock(descriptor, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            return  # a file system without locks
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise ArgumentError(
            f"another conversion (process {owner}) works in {path.parent}: wait for it to end, or"
            " give another OUT_DIR"
        ) from None


def _exchange(one: Path, other: Path) -> bool:
    """Whether both names were swapped, at once (Linux's ``renameat2``)."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _difference(old: Any, new: Mapping[str, Any]) -> str:
    """The first keys that differ, in words."""
    if not isinstance(old, dict):
        return "unknown ones"
    found: list[str] = []
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, Mapping):
            found += [n for n in {**before, **now} if before.get(n) != _plain(now.get(n))]
        elif before != _plain(now):
            found.append(f"{key}: {before!s:.40} then, {now!s:.40} now")
    return ", ".join(found[:4]) or "unknown ones"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def digest(inputs: Mapping[str, Any]) -> str:
    """Of what a result depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
