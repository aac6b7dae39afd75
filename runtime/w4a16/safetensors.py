"""safetensors files: a reader that trusts nothing, and a writer that streams.

Layout, limits and rules are those of the reference (``safetensors/src/tensor.rs``): eight bytes
with the header's length (little-endian), the header in JSON (``{name: {dtype, shape,
data_offsets}}``, ``__metadata__`` a mapping from texts to texts), then the tensors' bytes without
gaps. The ``safetensors`` package is not used because with numpy it can neither hand out BF16 and
F8 tensors nor write a file tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from w4a16.arguments import round_up
from w4a16.errors import ArgumentError, FormatError
from w4a16.files import open_regular, output_error, parse_json, sync_folder, temporary_name

LARGEST_HEADER = 100_000_000

#: Bits of an element, in the order in which the reference sorts, the last first in a file.
DTYPES = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_ORDER = {name: place for place, name in enumerate(DTYPES)}

#: What numpy makes of them; BF16 and F8 as their bits, F4 and F6 as bytes.
_NUMPY = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E5M2": "|u1",
    "F8_E4M3": "|u1",
    "F8_E8M0": "|u1",
    "F8_E4M3FNUZ": "|u1",
    "F8_E5M2FNUZ": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "C64": "<c8",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}
#: The dtype in which a numpy array is written.
OF_NUMPY = {
    np.dtype(spelled).name: name
    for name, spelled in _NUMPY.items()
    if not name.startswith("F8") and name != "BF16"
}

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_LARGEST = 2**64 - 1
_ALIGNMENT = 64
_CHUNK = 16 << 20
_MOST_AT_ONCE = 1 << 30
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)

Bytes: TypeAlias = Any
"""Anything contiguous with the buffer protocol: bytes, a memoryview, a numpy array."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    dtype: str
    """As the file names it: ``F16``, ``BF16``, ``I32``, … (:data:`DTYPES`)."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    nbytes: int


class SafetensorsFile:
    """A file, mapped into memory; nothing but its header is read before a tensor is.

    Views stay valid after :meth:`close`, as long as they are held.
    """

    path: Path
    size: int
    metadata: Mapping[str, str]
    """``__metadata__``."""
    tensors: Mapping[str, Entry]
    """In the order of their bytes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises :class:`w4a16.FormatError`, naming the file and what is wrong with it."""
        self.path = Path(path)
        descriptor = open_regular(self.path)
        try:
            status = os.fstat(descriptor)
            self.size = status.st_size
            self.mtime_ns = status.st_mtime_ns
            header = _read_header(descriptor, self.path, self.size)
            self.header_bytes = len(header)
            self.tensors, self.metadata = _parse(header, self.path, self.size)
            try:
                self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise FormatError(f"{self.path} cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the mapping; it ends with the last view of it."""
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def entry(self, name: str) -> Entry:
        """Raises :class:`w4a16.FormatError` for a tensor that is not there."""
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.path} has no tensor {name!r}") from None

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only, not copied."""
        entry = self.entry(name)
        return self._view[entry.start : entry.start + entry.nbytes]

    def array(self, name: str) -> Any:
        """A tensor as a read-only numpy array, not copied (possibly not aligned).

        BF16 comes as uint16 and F8 as uint8 of the same shape, F4 and F6 as flat bytes.
        """
        entry = self.entry(name)
        data = self.data(name)
        spelled = _NUMPY.get(entry.dtype)
        if spelled is None:
            return np.frombuffer(data, np.uint8)
        try:
            return np.frombuffer(data, np.dtype(spelled)).reshape(entry.shape)
        except ValueError as error:
            raise FormatError(
                f"{self.path}: {name} has the shape {list(entry.shape)}, which numpy cannot hold:"
                f" {error}"
            ) from None

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor piece by piece; each leaves this process's memory after use."""
        entry = self.entry(name)
        for begin in range(0, entry.nbytes, _CHUNK):
            count = min(_CHUNK, entry.nbytes - begin)
            start = entry.start + begin
            yield self._view[start : start + count]
            self._advise(_DONTNEED, start, count)

    def release(self, name: str) -> None:
        """Takes a tensor's pages out of this process's memory; reading it maps them anew."""
        entry = self.entry(name)
        self._advise(_DONTNEED, entry.start, entry.nbytes)

    def prefetch(self, name: str) -> None:
        """Lets the system read a tensor ahead."""
        entry = self.entry(name)
        self._advise(_WILLNEED, entry.start, entry.nbytes)

    def _advise(self, advice: int | None, start: int, count: int) -> None:
        if advice is None or count == 0:
            return
        begin = start - start % mmap.PAGESIZE
        with contextlib.suppress(OSError):
            self._map.madvise(advice, begin, start + count - begin)


def _read_header(descriptor: int, path: Path, size: int) -> bytes:
    prefix = os.pread(descriptor, _LENGTH_BYTES, 0)
    if len(prefix) < _LENGTH_BYTES:
        raise _wrong(path, f"it has {size} bytes, but begins with {_LENGTH_BYTES} for a length")
    length = int.from_bytes(prefix, "little")
    if length > LARGEST_HEADER:
        raise _wrong(path, f"its header would have {length} bytes, at most {LARGEST_HEADER} may be")
    if length > size - _LENGTH_BYTES:
        raise _wrong(
            path,
            f"its header would have {length} bytes, but only {size - _LENGTH_BYTES} follow: it is"
            " truncated, or of another format",
        )
    header = b""
    while len(header) < length:
        piece = os.pread(descriptor, length - len(header), _LENGTH_BYTES + len(header))
        if not piece:
            raise _wrong(path, "it became shorter while it was read")
        header += piece
    return header


def _parse(header: bytes, path: Path, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    found = parse_json(header, f"{path}: the header", unique=True)
    if not isinstance(found, dict):
        raise _wrong(path, "its header is no JSON object")
    given = found.pop(_METADATA, None)
    metadata: dict[str, str] = {}
    if given is not None:
        if not isinstance(given, dict) or not all(
            isinstance(text, str) and _is_text(text) for pair in given.items() for text in pair
        ):
            raise _wrong(path, f"{_METADATA} is not a mapping from texts to texts")
        metadata = given
    base = _LENGTH_BYTES + len(header)
    ranges = [(*_entry(path, name, value), name) for name, value in found.items()]
    ranges.sort(key=lambda item: (item[0], item[1]))
    tensors: dict[str, Entry] = {}
    end = 0
    for begin, stop, dtype, shape, name in ranges:
        if begin != end:
            what = "overlaps what is before it" if begin < end else "leaves a gap before it"
            raise _wrong(path, f"{name!r:.120} begins at {begin}, not at {end}: it {what}")
        tensors[name] = Entry(dtype, shape, base + begin, stop - begin)
        end = stop
    if end != size - base:
        truncated = f"; it is truncated by {end - size + base}" if end > size - base else ""
        raise _wrong(
            path, f"its tensors have {end} bytes, but {size - base} follow the header{truncated}"
        )
    return tensors, metadata


def _entry(path: Path, name: str, value: Any) -> tuple[int, int, str, tuple[int, ...]]:
    def wrong(reason: str) -> FormatError:
        return _wrong(path, f"{name!r:.120}: {reason}")

    if not _is_text(name):
        raise wrong("the name is no valid Unicode")
    if not isinstance(value, dict):
        raise wrong("expected an object with dtype, shape and data_offsets")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in value:
            raise wrong(f"{key} is missing")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise wrong(f"dtype is {dtype!r:.40}: known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise wrong(f"shape is {shape!r:.80}: expected a list of integers from 0 up")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise wrong(f"data_offsets is {offsets!r:.80}: expected two integers from 0 up")
    total = bits_of(dtype, shape)
    if total is None:
        raise wrong(f"shape {shape!r:.80} overflows 64 bits")
    if total % 8:
        raise wrong(f"shape {shape!r:.80} of {dtype} is no whole number of bytes")
    begin, stop = offsets
    if stop - begin != total // 8:
        raise wrong(
            f"data_offsets {offsets!r:.80} are {stop - begin} bytes, but {dtype} {shape!r:.80} is"
            f" {total // 8}"
        )
    return begin, stop, dtype, tuple(shape)


def bits_of(dtype: str, shape: Sequence[int]) -> int | None:
    """None: more than 64 bits can count, on the way from the first dimension to the last."""
    total = 1
    for size in shape:
        total *= size
        if total > _LARGEST:
            return None
    total *= DTYPES[dtype]
    return total if total <= _LARGEST else None


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Raises :class:`w4a16.ArgumentError` for what no file can hold."""
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if not all(_is_size(size) for size in shape):
        raise ArgumentError(f"shape is {list(shape)}: expected integers from 0 up")
    bits = bits_of(dtype, shape)
    if bits is None or bits % 8:
        raise ArgumentError(f"{dtype} {list(shape)} is no whole number of bytes below 2**61")
    return bits // 8


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(path: Path, reason: str) -> FormatError:
    return FormatError(f"{path} is no safetensors file: {reason}")


# ---- Writing ----


class Writer:
    """Writes a file tensor by tensor, without knowing all of them before.

    Space for the header is kept free and padded with blanks, as the format allows; tensors begin
    at a multiple of 64 bytes. The file appears under its name when :meth:`finish` returns, whole;
    until then, and after an error, nothing is there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        reserve: int,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """``reserve``: bytes for the header, see :func:`header_bound`. Raises
        :class:`w4a16.files.OutputError`."""
        self.path = Path(path)
        self.reserve = reserve
        self._metadata = _checked_metadata(metadata)
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._position = 0
        self._name = temporary_name(self.path)
        self._descriptor = -1
        with self._reporting():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._name, flags, 0o666)
            os.lseek(self._descriptor, _LENGTH_BYTES + reserve, os.SEEK_SET)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._descriptor >= 0:
            self.finish()
        else:
            self.abort()

    def add(
        self, name: str, dtype: str, shape: Sequence[int], data: Bytes | Iterable[Bytes]
    ) -> None:
        """Appends a tensor; ``data`` is its bytes, in one piece or several.

        Raises :class:`w4a16.ArgumentError` for bytes that are not as many as dtype and shape say.
        """
        _check_name(name, self._entries)
        expected = nbytes_of(dtype, shape)
        written = 0
        with self._reporting():
            pieces: Iterable[Bytes] = [data] if _is_bytes(data) else data
            for piece in pieces:
                view = memoryview(piece)
                written += view.nbytes
                if written > expected:
                    break
                if view.nbytes:
                    self._write(view.cast("B"))
        if written != expected:
            self.abort()
            raise ArgumentError(
                f"{name}: {dtype} {list(shape)} has {expected} bytes, but"
                f" {'more' if written > expected else written} were given"
            )
        begin = self._position
        self._position += expected
        self._entries[name] = (dtype, tuple(shape), begin, self._position)

    def finish(self) -> int:
        """Writes the header, waits for the disk, and gives the file its name. Its bytes."""
        header = _header(self._entries, self._metadata)
        if len(header) > self.reserve:
            self.abort()
            raise ArgumentError(f"the header has {len(header)} bytes, {self.reserve} are reserved")
        start = self.reserve.to_bytes(_LENGTH_BYTES, "little") + header.ljust(self.reserve)
        with self._reporting():
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            self._write(memoryview(start))
            os.fsync(self._descriptor)
            os.replace(self._name, self.path)
        os.close(self._descriptor)
        self._descriptor = -1
        sync_folder(self.path.parent)
        return _LENGTH_BYTES + self.reserve + self._position

    def abort(self) -> None:
        """Takes away what was written; after :meth:`finish` nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):
                os.unlink(self._name)

    def _write(self, view: memoryview) -> None:
        while view.nbytes:
            view = view[os.write(self._descriptor, view[:_MOST_AT_ONCE]) :]

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise output_error(self.path, error) from error
        except BaseException:
            self.abort()
            raise


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[str, Sequence[int], Bytes | Iterable[Bytes]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes ``{name: (dtype, shape, bytes or an iterable of bytes)}``; returns the file's bytes.

    The file is what the reference writes, byte for byte: sorted by alignment, then by name. It is
    whole or absent. Raises :class:`w4a16.ArgumentError` and :class:`w4a16.files.OutputError`.
    """
    for dtype, shape, _ in tensors.values():
        nbytes_of(dtype, shape)
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1][0]], item[0]))
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    end = 0
    for name, (dtype, shape, _) in ordered:
        _check_name(name, entries)
        begin, end = end, end + nbytes_of(dtype, shape)
        entries[name] = (dtype, tuple(shape), begin, end)
    header = _header(entries, _checked_metadata(metadata))
    with Writer(path, reserve=round_up(len(header), 8), metadata=metadata) as writer:
        for name, (dtype, shape, data) in ordered:
            writer.add(name, dtype, shape, data)
        return writer.finish()


def header_bound(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes that suffice for the header of these tensors (name, dtype, shape), or of some of
    them, such that the tensors begin at a multiple of 64 bytes."""
    listed = list(tensors)
    end = sum(nbytes_of(dtype, shape) for _, dtype, shape in listed)
    entries = {name: (dtype, tuple(shape), end, end) for name, dtype, shape in listed}
    length = len(_header(entries, _checked_metadata(metadata)))
    return round_up(_LENGTH_BYTES + length, _ALIGNMENT) - _LENGTH_BYTES


def alignment_order(dtype: str) -> int:
    """Tensors in ascending order of it are all aligned if the first is."""
    return -_ORDER[dtype]


def _header(
    entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, str]
) -> bytes:
    content: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, (dtype, shape, begin, end) in entries.items():
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _check_name(name: str, taken: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not _is_text(name) or name == _METADATA:
        raise ArgumentError(f"{name!r:.120} cannot be a tensor's name")
    if name in taken:
        raise ArgumentError(f"{name} was given twice")


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    for key, value in found.items():
        if not all(isinstance(text, str) and _is_text(text) for text in (key, value)):
            raise ArgumentError(f"metadata holds {key!r:.80}: {value!r:.80}: expected texts")
    return found


def _is_bytes(data: Any) -> bool:
    try:
        memoryview(data).release()
    except TypeError:
        return False
    return True
