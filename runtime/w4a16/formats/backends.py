"""The few array operations that conversions need, the same for numpy and for torch on a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

_ALIGNMENT = 64


class Backend(Protocol):
    """What numpy's arrays and torch's tensors do not spell alike."""

    chunk: int
    """How many numbers are best worked on at a time."""

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

    def counts(self, masks: Sequence[Any]) -> list[int]:
        """How many elements of each are true; on a GPU this waits, once."""
        ...

    def ignoring_overflow(self) -> contextlib.AbstractContextManager[Any]: ...


class Numpy:
    """Arrays in host memory."""

    chunk = 1 << 18  # 2 MB of float64: a core's cache

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

    def counts(self, masks: Sequence[Any]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]

    def ignoring_overflow(self) -> contextlib.AbstractContextManager[Any]:
        return np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Torch:
    """Tensors on one GPU, on the current stream."""

    chunk = 1 << 24

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
        return self._torch.tensor(values, dtype=self._torch.int32, device=self._device)

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

    def counts(self, masks: Sequence[Any]) -> list[int]:
        torch = self._torch
        return [int(n) for n in torch.stack([torch.count_nonzero(m) for m in masks]).tolist()]

    @contextlib.contextmanager
    def ignoring_overflow(self) -> Iterator[None]:
        yield


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
