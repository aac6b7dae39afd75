"""Every file the pipeline writes or digests goes through here: atomic, and only if changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import PathError, ResourceError

_CHUNK = 1 << 20


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def dump_json(value: object) -> str:
    """Canonical JSON: sorted keys, two spaces, one trailing newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest_json(value: object) -> str:
    return sha256_bytes(dump_json(value).encode())


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One digest for a tree, from its files' relative POSIX paths and sha256 digests.

    It depends on nothing else (no modes, times or order), so that a mirror of a repository, an
    export and a checkout of the same content agree.
    """
    lines = [f"{path}\0{digest}\n" for path, digest in sorted(digests.items())]
    # surrogatepass: a name that is no UTF-8 must not stop the run here.
    return sha256_bytes("".join(lines).encode(errors="surrogatepass"))


def walk_files(root: Path) -> Iterator[Path]:
    """Regular files below ``root``, sorted; links are not followed and not returned."""
    for folder, folders, names in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def tree_digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in walk_files(root)}


def tree_digest(root: Path) -> str:
    return digest_of_files(tree_digests(root))


def relative_inside(text: str, *, what: str) -> PurePosixPath:
    """Check that an untrusted relative path stays below the folder it is relative to."""
    path = PurePosixPath(text)
    strange = not text.isprintable() or "\\" in text
    if not text or strange or path.is_absolute() or ".." in path.parts:
        raise PathError(
            f"{what} {text!r} leads outside its folder",
            hint="give a relative path without '..' parts and control characters",
        )
    return path


def stays_inside(root: Path, path: Path) -> bool:
    """Whether ``path``, all links followed, is below ``root``; links in a circle are not."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        target = path.resolve()
    except (OSError, RuntimeError):
        return False
    return target.is_relative_to(root.resolve())


def write_bytes(path: Path, data: bytes) -> bool:
    """Write ``data`` to ``path`` through a temporary file and a rename; False if unchanged."""
    try:
        if path.read_bytes() == data:
            return False
    except OSError:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _no_room(path, error) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise _no_room(path, error) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def write_text(path: Path, text: str) -> bool:
    return write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> bool:
    return write_text(path, dump_json(value))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _no_room(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot write {path}: {error.strerror or error}",
        hint="free disk space or give another folder with --out; what was there before is intact",
    )


def remove_tree(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Fill a fresh folder, then put it in the place of ``target`` by rename.

    If the block raises or the process dies, ``target`` still holds what it held before. The
    moment between the two renames is covered by :func:`recover_folder`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new-"))
    except OSError as error:
        raise _no_room(target, error) from error
    try:
        fresh.chmod(0o755)
        yield fresh
    except BaseException as error:
        remove_tree(fresh)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(target, error) from error
        raise
    try:
        swap_folder(fresh, target)
    except OSError as error:
        remove_tree(fresh)
        raise _no_room(target, error) from error


def swap_folder(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; if that fails, ``target`` is what it was."""
    old = target.with_name(f".{target.name}.old")
    remove_tree(old)
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    remove_tree(old)


def recover_folder(target: Path) -> None:
    """Undo what a run killed inside :func:`replaced_folder` left beside ``target``."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        if target.exists():
            remove_tree(old)
        else:
            old.rename(target)
    if target.parent.is_dir():
        for leftover in target.parent.glob(f".{target.name}.new-*"):
            remove_tree(leftover)
