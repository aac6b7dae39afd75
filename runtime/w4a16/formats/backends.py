"""The few array operations that conversions need, the same for numpy and for torch on a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

_ALIGNMENT = 64


class Backend(Protocol):
    """What numpy's arrays and torch's tensors do not spell alike."""

    chunk: int
    """How many numbers are best worked on at a time."""
    speculates: bool
    """Whether to compute what may not be wanted costs less than to wait for what says so."""

    def cast(self, array: Any, dtype: str) -> Any:
        """A conversion; float32 to float16 is rounded half to even."""
        ...

    def bits(self, array: Any) -> Any:
        """float16 as int16."""
        ...

    def filled(self, shape: Sequence[int], value: int, dtype: str) -> Any:
        """A new dense array, aligned to 16 bytes at least."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """The same, not initialised."""
        ...

    def constant(self, values: Sequence[int]) -> Any:
        """int32."""
        ...

    def index(self, rows: Any) -> Any:
        """numpy integers, to index the backend's arrays with."""
        ...

    def where(self, mask: Any, one: Any, other: Any) -> Any: ...

    def rounded(self, array: Any) -> Any:
        """To integers, half to even."""
        ...

    def half(self, array: Any) -> Any:
        """float32 or float64 to float16, rounded once, half to even."""
        ...

    def product(self, points: Any, scales: Any, out: Any) -> None:
        """``(8 - points) * scales``, in float32 and then rounded once, to ``out``; scales and out
        are float16."""
        ...

    def sorted_rows(self, g_idx: Any, groups: int, group_size: int, k: int) -> SortedRows:
        """As :func:`w4a16.formats.order.extent` puts them, without a wait and without any check:
        where ``g_idx`` is not in 0..groups - 1, or a group too large, they are of no use. Only of a
        backend that speculates."""
        ...

    def counts(self, masks: Sequence[Any]) -> list[int]:
        """How many elements of each are true; on a GPU this waits, once."""
        ...

    def extremes(self, arrays: Sequence[Any]) -> list[tuple[float, float]]:
        """The least and the greatest number of each, NaN if there is one; on a GPU this waits,
        once."""
        ...

    def ignoring_overflow(self) -> contextlib.AbstractContextManager[Any]: ...


class Numpy:
    """Arrays in host memory."""

    chunk = 1 << 18  # 2 MB of float64: a core's cache
    speculates = False

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype, copy=False)

    def bits(self, array: Any) -> Any:
        return array.view(np.int16)

    def filled(self, shape: Sequence[int], value: int, dtype: str) -> Any:
        array = aligned(shape, dtype)
        array.fill(value)
        return array

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return aligned(shape, dtype)

    def constant(self, values: Sequence[int]) -> Any:
        return np.array(values, np.int32)

    def index(self, rows: Any) -> Any:
        return rows

    def where(self, mask: Any, one: Any, other: Any) -> Any:
        return np.where(mask, one, other)

    def rounded(self, array: Any) -> Any:
        return np.rint(array)

    def half(self, array: Any) -> Any:
        return array.astype(np.float16)

    def product(self, points: Any, scales: Any, out: Any) -> None:
        out[...] = self.cast(8 - points, "float32") * self.cast(scales, "float32")

    def sorted_rows(self, g_idx: Any, groups: int, group_size: int, k: int) -> SortedRows:
        raise NotImplementedError("numpy's rows are sorted by order.extent, which checks first")

    def counts(self, masks: Sequence[Any]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]

    def extremes(self, arrays: Sequence[Any]) -> list[tuple[float, float]]:
        return [(array.min().item(), array.max().item()) for array in arrays]

    def ignoring_overflow(self) -> contextlib.AbstractContextManager[Any]:
        return np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Torch:
    """Tensors on one GPU, on the current stream."""

    chunk = 1 << 24
    speculates = True

    def __init__(self, device: int) -> None:
        self._torch = sys.modules["torch"]
        self._device = f"cuda:{device}"

    def cast(self, array: Any, dtype: str) -> Any:
        return array.to(getattr(self._torch, dtype))

    def bits(self, array: Any) -> Any:
        return array.view(self._torch.int16)

    def filled(self, shape: Sequence[int], value: int, dtype: str) -> Any:
        torch = self._torch
        return torch.full(tuple(shape), value, dtype=getattr(torch, dtype), device=self._device)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        torch = self._torch
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=self._device)

    def constant(self, values: Sequence[int]) -> Any:
        return _on_device(tuple(values), self._device)

    def index(self, rows: Any) -> Any:
        return self._torch.from_numpy(rows).to(self._device)

    def where(self, mask: Any, one: Any, other: Any) -> Any:
        return self._torch.where(mask, one, other)

    def rounded(self, array: Any) -> Any:
        return self._torch.round(array)

    def half(self, array: Any) -> Any:
        torch = self._torch
        if array.dtype != torch.float64:
            return array.to(torch.float16)
        # torch goes through float32, which rounds twice.  So: to a multiple of the last place
        # that float16 has at this magnitude, exactly, from the exponent's bits.
        exponent = (array.view(torch.int64) >> 52 & 0x7FF) - 1022
        unit = ((exponent - 11).clamp_min(-24) + 1023 << 52).view(torch.float64)
        return (torch.round(array / unit) * unit).to(torch.float16)

    def product(self, points: Any, scales: Any, out: Any) -> None:
        torch = self._torch
        if points.is_floating_point():
            out.copy_((8 - points) * scales.float())
        else:  # integers of few bits are exact in float16, whose products torch makes in float32
            torch.mul(8 - points, scales, out=out)

    def sorted_rows(self, g_idx: Any, groups: int, group_size: int, k: int) -> SortedRows:
        torch = self._torch
        inputs = torch.arange(len(g_idx), device=self._device)
        group, order = torch.sort(g_idx.clamp(0, groups - 1).int(), stable=True)
        starts = torch.searchsorted(group, torch.arange(groups, device=self._device).int())
        within = inputs - starts.index_select(0, group)
        place = (group * group_size + within).clamp_max(k - 1)
        columns = torch.full((k,), -1, dtype=torch.int32, device=self._device)
        columns.scatter_(0, place, order.int())
        return SortedRows(columns, within, g_idx - inputs // group_size)

    def counts(self, masks: Sequence[Any]) -> list[int]:
        torch = self._torch
        return [int(n) for n in torch.stack([torch.count_nonzero(m) for m in masks]).tolist()]

    def extremes(self, arrays: Sequence[Any]) -> list[tuple[float, float]]:
        torch = self._torch
        both = [end.reshape(1) for array in arrays for end in torch.aminmax(array)]
        found = torch.cat(both).tolist()
        return list(zip(found[::2], found[1::2], strict=True))

    @contextlib.contextmanager
    def ignoring_overflow(self) -> Iterator[None]:
        yield


class SortedRows(NamedTuple):
    """Rows by group, and what tells whether they are right."""

    columns: Any
    """int32 [k]: the input that each row multiplies, -1 for none."""
    within: Any
    """The place of each within its group."""
    moved: Any
    """For each input its group minus that of a weight in order."""


class Extremes:
    """Least and greatest numbers of named arrays: all that were added are looked at when the first
    is asked for, on a GPU with a single wait."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: dict[str, Any] = {}
        self._found: dict[str, tuple[float, float]] = {}

    def add(self, name: str, array: Any) -> None:
        self._waiting[name] = array

    def __getitem__(self, name: str) -> tuple[float, float]:
        if self._waiting:
            found = self._backend.extremes(list(self._waiting.values()))
            self._found.update(zip(self._waiting, found, strict=True))
            self._waiting = {}
        return self._found[name]


@lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], device: str) -> Any:
    """int32; made once, since copying it there waits for the GPU. Nobody writes to it."""
    torch = sys.modules["torch"]
    return torch.tensor(values, dtype=torch.int32, device=device)


def aligned(shape: Sequence[int], dtype: str) -> Any:
    """A new numpy array that begins at a multiple of 64 bytes; not initialised."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    storage = np.empty(size + _ALIGNMENT, np.uint8)
    start = -storage.ctypes.data % _ALIGNMENT
    return storage[start : start + size].view(dtype).reshape(shape)


def first(mask: Any) -> list[int]:
    """Where the first true element of ``mask`` is; there is one."""
    place = mask.nonzero()
    if isinstance(place, tuple):
        return [int(axis[0]) for axis in place]
    return [int(index) for index in place[0].tolist()]
