"""Where weights are packed and unpacked: host memory, torch's GPU memory, any other GPU memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from w4a16 import arrays, driver
from w4a16.arrays import DeviceArray, View
from w4a16.errors import ArgumentError
from w4a16.formats.backends import Backend, Extremes, Numpy, Torch, aligned
from w4a16.formats.layer import Layer
from w4a16.formats.order import Extent
from w4a16.library import LIBRARY, Source


class Place(Protocol):
    """Arrays of one framework on one device, and how they are computed with."""

    backend: Backend

    def active(self) -> contextlib.AbstractContextManager[None]:
        """All other methods, and all of the backend, are used within it."""
        ...

    def take(self, view: View) -> Any:
        """Numbers as the backend wants them; bfloat16 may become float32."""
        ...

    def give(self, array: Any) -> Any:
        """What the backend made, or a numpy array, in the result's framework and place."""
        ...

    def pack(self, layer: Layer, extent: Extent, rows: Any, seen: Extremes) -> Any:
        """uint8 ``[n, k/2]`` in the result's framework and place, as are ``rows``."""
        ...

    def check_packed(self, layer: Layer, seen: Extremes) -> None:
        """Raises :class:`w4a16.ArgumentError` for numbers above 15 among those that were packed."""
        ...

    def unpack(self, packed: View) -> Any:
        """uint8 ``[k, n/2]``, two columns a byte, for the backend."""
        ...


class Host:
    """numpy's arrays, and torch's on the CPU."""

    def __init__(self, as_torch: bool, threads: int) -> None:
        self.backend: Backend = Numpy()
        self._as_torch = as_torch
        self._threads = threads

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def take(self, view: View) -> Any:
        return on_host(view)

    def give(self, array: Any) -> Any:
        dense = _aligned(array)
        return sys.modules["torch"].from_numpy(dense) if self._as_torch else dense

    def pack(self, layer: Layer, extent: Extent, rows: Any, seen: Extremes) -> Any:
        q = dense_on_host(layer.q)
        packed = aligned((extent.n, extent.k // 2), "uint8")
        try:
            LIBRARY.pack(
                layer.source,
                q.ctypes.data,
                extent.k,
                extent.n,
                packed.ctypes.data,
                source_k=layer.source_k,
                source_n=layer.out_features,
                rows=None if rows is None else arrays.view(rows, "rows").address,
                threads=self._threads,
            )
        except ArgumentError:
            check_numbers(layer, q)  # says it by its name
            raise
        return self.give(packed)

    def check_packed(self, layer: Layer, seen: Extremes) -> None:
        pass  # by the library

    def unpack(self, packed: View) -> Any:
        return unpacked_on_host(on_host(packed), self._threads)


class TorchGpu:
    """torch's tensors on a GPU, on the given stream or the current one."""

    def __init__(self, device: int, stream: int | None) -> None:
        self.backend: Backend = Torch(device)
        self._device = device
        self._stream = stream
        self._torch = sys.modules["torch"]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        cuda = self._torch.cuda
        with contextlib.ExitStack() as stack:
            stack.enter_context(cuda.device(self._device))
            if self._stream is not None:
                legacy = self._stream in (0, 1)
                stream = (
                    cuda.default_stream(self._device)
                    if legacy
                    else cuda.ExternalStream(self._stream, device=self._device)
                )
                stack.enter_context(cuda.stream(stream))
            stack.enter_context(driver.use_device(self._device))
            yield

    def take(self, view: View) -> Any:
        if view.framework != "torch":
            return self.give(on_host(view))
        tensor: Any = view.owner
        if self._stream is not None and view.device >= 0:
            # The caller's memory must not be used again before this stream has read it.
            tensor.record_stream(self._torch.cuda.current_stream())
        return tensor.detach().to(f"cuda:{self._device}")

    def give(self, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            array = self._torch.from_numpy(array).to(f"cuda:{self._device}")
        return array.contiguous()

    def pack(self, layer: Layer, extent: Extent, rows: Any, seen: Extremes) -> Any:
        torch = self._torch
        q = self.take(layer.q)
        if layer.source is Source.BYTES:
            q = q.contiguous()
        shape = (extent.n, extent.k // 2)
        packed = torch.empty(shape, dtype=torch.uint8, device=f"cuda:{self._device}")
        LIBRARY.pack_device(
            layer.source,
            q.data_ptr(),
            extent.k,
            extent.n,
            packed.data_ptr(),
            stream=self._current(),
            source_k=layer.source_k,
            source_n=layer.out_features,
            rows=None if rows is None else rows.data_ptr(),
        )
        if layer.source is Source.BYTES:
            seen.add("q", q)
        return packed

    def check_packed(self, layer: Layer, seen: Extremes) -> None:
        if layer.source is Source.BYTES and seen["q"][1] > 15:
            q = self.take(layer.q)
            row, column = (q > 15).nonzero()[0].tolist()
            refuse_large(int(q[row, column]), row, column)

    def unpack(self, packed: View) -> Any:
        torch = self._torch
        tensor = self.take(packed)
        n, k = tensor.shape[0], tensor.shape[1] * 2
        plain = torch.empty((k, n // 2), dtype=torch.uint8, device=tensor.device)
        LIBRARY.unpack_device(tensor.data_ptr(), k, n, plain.data_ptr(), stream=self._current())
        return plain

    def _current(self) -> int:
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)


class OtherGpu:
    """GPU arrays of other frameworks; results are :class:`w4a16.DeviceArray`.

    Scales and zero points, which are small, are converted on the host.
    """

    def __init__(self, device: int, stream: int) -> None:
        self.backend: Backend = Numpy()
        self._device = device
        self._stream = stream

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with driver.use_device(self._device):
            yield

    def take(self, view: View) -> Any:
        return on_host(view)

    def give(self, array: Any) -> Any:
        return DeviceArray.from_numpy(
            np.ascontiguousarray(array), device=self._device, stream=self._stream
        )

    def pack(self, layer: Layer, extent: Extent, rows: Any, seen: Extremes) -> Any:
        view = layer.q
        if layer.source is Source.BYTES or view.device < 0:
            q = dense_on_host(view)
            check_numbers(layer, q)
            if view.device < 0 or not view.contiguous:
                view = self._view(q)
        on_gpu = None if rows is None else arrays.view(rows, "rows", stream=self._stream)
        packed = DeviceArray(
            (extent.n, extent.k // 2), "uint8", device=self._device, stream=self._stream
        )
        LIBRARY.pack_device(
            layer.source,
            view.address,
            extent.k,
            extent.n,
            packed.address,
            stream=self._stream,
            source_k=layer.source_k,
            source_n=layer.out_features,
            rows=None if on_gpu is None else on_gpu.address,
        )
        inputs = (view,) if on_gpu is None else (view, on_gpu)
        arrays.used(self._stream, inputs, arrays.view(packed, "packed", stream=self._stream))
        return packed

    def check_packed(self, layer: Layer, seen: Extremes) -> None:
        pass  # before it was packed

    def unpack(self, packed: View) -> Any:
        return unpacked_on_host(on_host(packed), 0)

    def _view(self, array: Any) -> View:
        return arrays.view(self.give(array), "copy", stream=self._stream)


def place_of(like: View, device: int, stream: int | None, threads: int = 0) -> Place:
    """Where arrays of ``like``'s framework are worked on, on the device (-1: the CPU)."""
    if device < 0:
        return Host(as_torch=like.framework == "torch", threads=threads)
    if like.framework == "torch":
        return TorchGpu(device, stream)
    if stream is None:
        stream = like.stream if like.device >= 0 and like.stream is not None else 0
    return OtherGpu(device, stream)


def moved(array: Any, device: int) -> Any:
    """A result on another device, of the same framework (on the CPU, numpy for DeviceArray)."""
    view = arrays.view(array, "result")
    if view.framework == "torch":
        return array.to("cpu" if device < 0 else f"cuda:{device}")
    host = _aligned(on_host(view))
    return host if device < 0 else DeviceArray.from_numpy(host, device=device)


# ---- Host memory ----


class _Memory:
    """Host memory as numpy sees it; keeps its owner alive."""

    def __init__(self, view: View, kind: np.dtype[Any]) -> None:
        self.owner = view.owner
        self.__array_interface__ = {
            "version": 3,
            "data": (view.address, True),
            "shape": view.shape,
            "strides": tuple(stride * kind.itemsize for stride in view.strides),
            "typestr": kind.str,
        }


def on_host(view: View) -> Any:
    """A numpy array of the view's numbers, not copied where it need not be; bfloat16 becomes
    float32."""
    if view.device >= 0:
        return on_host(arrays.view(arrays.to_host(view.owner), "copy"))
    if view.dtype == "bfloat16":
        stored = np.asarray(_Memory(view, np.dtype("uint16")))
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(_Memory(view, np.dtype(view.dtype)))


def unpacked_on_host(packed: Any, threads: int) -> Any:
    """uint8 ``[k, n/2]``."""
    n, k = packed.shape[0], packed.shape[1] * 2
    plain = np.empty((k, n // 2), np.uint8)
    LIBRARY.unpack(packed.ctypes.data, k, n, plain.ctypes.data, threads=threads)
    return plain


def dense_on_host(view: View) -> Any:
    """As :func:`on_host`, without gaps."""
    return np.ascontiguousarray(on_host(view))


def check_numbers(layer: Layer, q: Any) -> None:
    """Raises :class:`w4a16.ArgumentError` for a byte above 15, where each holds one number."""
    if layer.source is Source.BYTES and q.max() > 15:
        row, column = (int(index) for index in np.argwhere(q > 15)[0])
        refuse_large(int(q[row, column]), row, column)


def refuse_large(number: int, row: int, column: int) -> None:
    raise ArgumentError(f"q holds {number} at [{row}, {column}]: expected 0 to 15")


def _aligned(array: Any) -> Any:
    """Dense, writable, at a multiple of 16 bytes; copied only if need be."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 16 == 0:
        return array
    copy = aligned(array.shape, array.dtype.name)
    copy[...] = array
    return copy
