"""The few CUDA runtime functions that the scripts here need, without torch."""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

_TO_DEVICE, _TO_HOST = 1, 2
_NON_BLOCKING = 1
_CAPTURE_GLOBAL = 0


class CudaError(Exception):
    pass


class Cuda:
    """libcudart through ctypes; it shares its context with the library's own static runtime."""

    def __init__(self) -> None:
        self._dll = _load()
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            getattr(self._dll, name).restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._dll, name)(*arguments)
        if error:
            text = self._dll.cudaGetErrorString(error).decode()
            raise CudaError(f"{name}: {text} ({error})")

    def allocate(self, byte_count: int) -> int:
        """Exactly as many bytes: an access beyond them is one that memcheck sees."""
        address = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(byte_count))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self.call("cudaFree", ctypes.c_void_p(address))

    def upload(self, data: bytes) -> int:
        address = self.allocate(len(data))
        self.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        self.call(
            "cudaMemcpy", ctypes.c_void_p(address), data, ctypes.c_size_t(len(data)), _TO_DEVICE
        )

    def download(self, address: int, byte_count: int) -> bytes:
        data = ctypes.create_string_buffer(byte_count)
        self.call(
            "cudaMemcpy", data, ctypes.c_void_p(address), ctypes.c_size_t(byte_count), _TO_HOST
        )
        return data.raw

    def synchronize(self) -> None:
        self.call("cudaDeviceSynchronize")

    def new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def begin_capture(self, stream: int) -> None:
        self.call("cudaStreamBeginCapture", ctypes.c_void_p(stream), _CAPTURE_GLOBAL)

    def end_capture(self, stream: int) -> int:
        """The captured graph."""
        graph = ctypes.c_void_p()
        self.call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        return int(graph.value or 0)

    def node_count(self, graph: int) -> int:
        count = ctypes.c_size_t(0)
        self.call("cudaGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
        return count.value

    def launch_graph(self, graph: int, stream: int) -> None:
        executable = ctypes.c_void_p()
        self.call(
            "cudaGraphInstantiateWithFlags",
            ctypes.byref(executable),
            ctypes.c_void_p(graph),
            ctypes.c_ulonglong(0),
        )
        self.call("cudaGraphLaunch", executable, ctypes.c_void_p(stream))
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))
        self.call("cudaGraphExecDestroy", executable)


def _load() -> Any:
    tried: list[str] = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path}: {error}")
    raise CudaError("no libcudart.so could be loaded:\n" + "\n".join(tried))


def _candidates() -> Iterator[str]:
    if given := os.environ.get("W4A16_CUDART"):
        yield given
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield from sorted(glob.glob(f"{root}/lib64/libcudart.so*"))
    yield from sorted(glob.glob(f"{root}/targets/*/lib/libcudart.so*"))
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(glob.glob(f"{place}/*/lib/libcudart.so*"))
    yield "libcudart.so"
    if found := ctypes.util.find_library("cudart"):
        yield found
