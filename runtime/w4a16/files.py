"""Files of others read with care, own files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from w4a16.errors import FormatError, W4A16Error

_CHUNK = 8 << 20


class OutputError(W4A16Error, OSError):
    """A file cannot be written: no space, no permission, a limit."""


def output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}: {error.strerror or error}; nothing half-written is left under that"
        " name"
    )


def open_regular(path: Path) -> int:
    """A descriptor for reading. Raises :class:`w4a16.FormatError` unless it is a regular file.

    Never waits: a pipe in the place of a file is refused.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is no regular file")
    return descriptor


def parse_json(text: str | bytes, where: str, *, unique: bool = False) -> Any:
    """``unique``: a key that stands twice in an object is an error.

    Raises :class:`w4a16.FormatError`, also for nesting too deep, NaN and lone surrogates.
    """
    hook = _unique if unique else None
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=hook, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise FormatError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{where} is no JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r:.120} stands there twice")
            seen.add(name)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def read_json(path: Path, *, limit: int = 16 << 20, unique: bool = False) -> Any:
    """Raises :class:`w4a16.FormatError` for a file that is too large, no file, or no JSON."""
    with open(open_regular(path), "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path} is larger than {limit} bytes")
    return parse_json(data, str(path), unique=unique)


def json_object(value: Any, where: str) -> Mapping[str, Any]:
    """``value``, if it is a JSON object; otherwise raises :class:`w4a16.FormatError`."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} is no JSON object")
    return value


def dump_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def replace_file(path: Path, data: bytes) -> None:
    """Readers and crashes see the old content or the new. Raises :class:`OutputError`."""
    name = temporary_name(path)
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise output_error(path, error) from error
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Beside ``path``, and of this call only."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last; some file systems cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: Path, stopped: Callable[[], bool] | None = None) -> str:
    """Hexadecimal; empty if ``stopped`` says so on the way. Raises :class:`w4a16.FormatError`."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(open_regular(path), "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            if stopped is not None and stopped():
                return ""
    return digest.hexdigest()
