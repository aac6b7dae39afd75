"""Memory, streams, events and graphs through the NVIDIA driver (``libcuda.so.1``), by ctypes.

Nothing is loaded before the first call; where there is no driver, that call raises
:class:`w4a16.DeviceError`. Streams are integers (a ``cudaStream_t``; 0 and 1 are the legacy default
stream, 2 the calling thread's) or :class:`Stream`; devices are CUDA ordinals. All functions work on
the context that is current in the calling thread: :func:`use_device` makes a device's primary
context current, the one that the CUDA runtime, torch, CuPy, JAX and numba use.

Sources: the CUDA driver API's reference, and ``cuda.h`` for the values of its enumerators.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from w4a16.errors import DeviceError

LIBRARY_NAME = "libcuda.so.1"

#: How much freed memory the package keeps for its next allocations on a device, in bytes.
POOL_BYTES = 256 << 20

_u64 = ctypes.c_uint64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuCtxSynchronize": (),
    "cuPointerGetAttribute": (c_void_p, c_int, _u64),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemPoolCreate": (POINTER(c_void_p), c_void_p),
    "cuMemPoolSetAttribute": (c_void_p, c_int, c_void_p),
    "cuMemPoolTrimTo": (c_void_p, c_size_t),
    "cuMemAllocFromPoolAsync": (POINTER(_u64), c_size_t, c_void_p, c_void_p),
    "cuMemAllocAsync": (POINTER(_u64), c_size_t, c_void_p),
    "cuMemFreeAsync": (_u64, c_void_p),
    "cuMemAlloc_v2": (POINTER(_u64), c_size_t),
    "cuMemFree_v2": (_u64,),
    "cuMemcpyHtoDAsync_v2": (_u64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _u64, c_size_t, c_void_p),
    "cuMemcpyAsync": (_u64, _u64, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (c_void_p, c_void_p),
    "cuMemsetD8Async": (_u64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuStreamGetCaptureInfo_v2": (
        *(c_void_p, POINTER(c_int), POINTER(_u64)),
        *(c_void_p, c_void_p, c_void_p),
    ),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, ctypes.c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}

_ERROR_OUT_OF_MEMORY = 2
_ERROR_CAPTURE_IMPLICIT = 906
_ATTRIBUTES = {
    "clock_khz": 13,
    "sm_count": 16,
    "compute_mode": 20,
    "memory_clock_khz": 36,
    "l2_bytes": 38,
    "cc_major": 75,
    "cc_minor": 76,
    "memory_pools": 115,
}
_POINTER_DEVICE = 9
_POOL_RELEASE_THRESHOLD = 4
_STREAM_NON_BLOCKING = 1
_EVENT_NO_TIMING = 2
_CAPTURE_THREAD_LOCAL = 1
_CAPTURE_NONE = 0
_FREE_ON_LAUNCH = 1
_MEMORY_UNIFIED = 4

_RESTART = "the context is lost: start the process anew, and look for the launch that went wrong"
_FORKED = (
    "CUDA was in use before this process was forked: start it with multiprocessing's 'spawn', or"
    " fork before the first use of the GPU"
)
_NEXT_STEPS = {
    1: "",
    _ERROR_OUT_OF_MEMORY: "free device memory: see nvidia-smi for who holds it",
    3: _FORKED,
    34: "a stub of libcuda was loaded: put the driver's own libcuda.so.1 first on the library path",
    46: "the GPU is busy or in exclusive mode: see nvidia-smi",
    100: "see whether nvidia-smi lists a GPU, and whether CUDA_VISIBLE_DEVICES hides it",
    101: "",
    201: "make a device current: with w4a16.driver.use_device(0)",
    700: _RESTART,
    709: _RESTART,
    719: _RESTART,
    802: "the GPU is not ready yet (on HGX systems: is nvidia-fabricmanager running?)",
    803: "the driver was updated: reboot, or load its new kernel module",
    804: "the driver does not support this GPU with forward compatibility: unset it, or update",
    999: "see dmesg and nvidia-smi for the state of the GPU",
}


class _PoolProperties(ctypes.Structure):
    """``CUmemPoolProps``."""

    _fields_ = (
        ("allocation_type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("location_id", c_int),
        ("reserved", ctypes.c_char * 72),
    )


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D``."""

    _fields_ = (
        ("source_x", c_size_t),
        ("source_y", c_size_t),
        ("source_type", c_int),
        ("source_host", c_void_p),
        ("source_device", _u64),
        ("source_array", c_void_p),
        ("source_pitch", c_size_t),
        ("target_x", c_size_t),
        ("target_y", c_size_t),
        ("target_type", c_int),
        ("target_host", c_void_p),
        ("target_device", _u64),
        ("target_array", c_void_p),
        ("target_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


# ---- The library ----


class _Driver:
    """libcuda and what is kept of it: primary contexts, memory pools and streams, by device."""

    def __init__(self) -> None:
        try:
            dll = ctypes.CDLL(LIBRARY_NAME)
        except OSError as error:
            raise DeviceError(
                f"there is no NVIDIA driver here: {error}; install one, or give the container the"
                " GPU (docker run --gpus all)"
            ) from error
        self._dll = dll
        self._functions: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.contexts: dict[int, int] = {}
        self.pools: dict[int, int] = {}
        self.streams: dict[int, Stream] = {}
        self.ready = False

    def initialise(self) -> None:
        """Once a process."""
        self.call("cuInit", 0)
        self.ready = True

    def try_call(self, name: str, *arguments: Any) -> int:
        function = self._functions.get(name) or self._resolve(name)
        status: int = function(*arguments)
        return status

    def call(self, name: str, *arguments: Any) -> None:
        status = self.try_call(name, *arguments)
        if status != 0:
            raise self.error(name, status)

    def _resolve(self, name: str) -> Any:
        try:
            function = getattr(self._dll, name)
        except AttributeError as error:
            raise DeviceError(
                f"the NVIDIA driver is too old: {LIBRARY_NAME} has no {name}; install a newer one"
            ) from error
        function.restype = c_int
        function.argtypes = list(_FUNCTIONS[name])
        self._functions[name] = function
        return function

    def error(self, name: str, status: int, detail: str = "") -> DeviceError:
        code, text = c_char_p(), c_char_p()
        self.try_call("cuGetErrorName", status, byref(code))
        self.try_call("cuGetErrorString", status, byref(text))
        said = (text.value or b"unknown error").decode("utf-8", "replace")
        label = (code.value or str(status).encode()).decode("utf-8", "replace")
        step = detail or _NEXT_STEPS.get(status, "")
        if status == 100 and (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            step += f" (it is {hidden!r})"
        called = name.partition("_v")[0]
        return DeviceError(f"{called}: {said} ({label})" + (f"; {step}" if step else ""))


_loaded: _Driver | None = None
_forked = False
_lock = threading.Lock()


def _library() -> _Driver:
    """libcuda, not initialised."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _Driver()
    return _loaded


def _driver() -> _Driver:
    """libcuda, initialised."""
    driver = _loaded
    if driver is not None and driver.ready and not _forked:
        return driver
    if _forked:
        raise DeviceError(_FORKED)
    driver = _library()
    with driver.lock:
        if not driver.ready:
            driver.initialise()
            os.register_at_fork(after_in_child=_note_fork)
    return driver


def _note_fork() -> None:
    global _forked
    _forked = True


def usable() -> bool:
    """Whether the driver has been used by this process, and still can be; loads nothing."""
    loaded = _loaded
    return loaded is not None and loaded.ready and not _forked and not sys.is_finalizing()


# ---- Devices ----


def driver_version() -> int:
    """The CUDA version that the driver supports, 1000 * major + 10 * minor; needs no GPU."""
    version = c_int()
    _library().call("cuDriverGetVersion", byref(version))
    return version.value


def device_count() -> int:
    """How many GPUs the process sees; raises :class:`w4a16.DeviceError` where there is none."""
    count = c_int()
    _driver().call("cuDeviceGetCount", byref(count))
    return count.value


def current_device() -> int:
    """The device of the calling thread's context; 0 if it has none, as in the CUDA runtime."""
    driver = _driver()
    device = c_int()
    return device.value if driver.try_call("cuCtxGetDevice", byref(device)) == 0 else 0


def _current(driver: _Driver) -> int:
    """The current device, where there must be one."""
    device = c_int()
    driver.call("cuCtxGetDevice", byref(device))
    return device.value


def device_name(device: int) -> str:
    name = ctypes.create_string_buffer(256)
    _driver().call("cuDeviceGetName", name, len(name), _checked(device))
    return name.value.decode("utf-8", "replace")


def total_memory(device: int) -> int:
    """Bytes of device memory."""
    size = c_size_t()
    _driver().call("cuDeviceTotalMem_v2", byref(size), _checked(device))
    return size.value


def compute_capability(device: int) -> tuple[int, int]:
    return _attribute("cc_major", device), _attribute("cc_minor", device)


def sm_count(device: int) -> int:
    return _attribute("sm_count", device)


def l2_bytes(device: int) -> int:
    return _attribute("l2_bytes", device)


def clock_khz(device: int) -> int:
    """The highest clock of the SMs."""
    return _attribute("clock_khz", device)


def memory_clock_khz(device: int) -> int:
    """The highest clock of the memory."""
    return _attribute("memory_clock_khz", device)


def compute_mode(device: int) -> str:
    """``"default"``, ``"prohibited"`` or ``"exclusive"`` (one process)."""
    modes = {0: "default", 2: "prohibited", 3: "exclusive"}
    return modes.get(_attribute("compute_mode", device), "unknown")


def has_pools(device: int) -> bool:
    """Whether memory can be allocated in the order of a stream."""
    return bool(_attribute("memory_pools", device))


def _attribute(name: str, device: int) -> int:
    value = c_int()
    driver = _driver()
    driver.call("cuDeviceGetAttribute", byref(value), _ATTRIBUTES[name], _checked(device))
    return value.value


def _checked(device: int) -> int:
    """The driver's handle of a device, which is its ordinal."""
    handle = c_int()
    driver = _driver()
    status = driver.try_call("cuDeviceGet", byref(handle), device)
    if status != 0:
        count = device_count()
        known = "only device 0" if count == 1 else f"devices 0 to {count - 1}"
        raise driver.error("cuDeviceGet", status, f"there is no device {device}, but {known}")
    return handle.value


def device_of(address: int) -> int | None:
    """The device whose memory an address is; None if CUDA does not know it."""
    device = c_int()
    driver = _driver()
    status = driver.try_call(
        "cuPointerGetAttribute", ctypes.addressof(device), _POINTER_DEVICE, address
    )
    return device.value if status == 0 and device.value >= 0 else None


class use_device:  # noqa: N801
    """``with use_device(0):`` the device's primary context is current in this thread."""

    __slots__ = ("_before", "_device", "_switched")

    def __init__(self, device: int) -> None:
        self._device = device
        self._before: int | None = None
        self._switched = False

    def __enter__(self) -> int:
        driver = _driver()
        context = driver.contexts.get(self._device) or _retain(driver, self._device)
        before = c_void_p()
        driver.call("cuCtxGetCurrent", byref(before))
        if before.value != context:
            driver.call("cuCtxSetCurrent", context)
            self._before, self._switched = before.value, True
        return self._device

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._switched:
            self._switched = False
            _driver().call("cuCtxSetCurrent", self._before)


def _retain(driver: _Driver, device: int) -> int:
    handle = _checked(device)
    with driver.lock:
        if device not in driver.contexts:
            context = c_void_p()
            driver.call("cuDevicePrimaryCtxRetain", byref(context), handle)
            # Never released: memory and streams of others live in it, as with the CUDA runtime.
            driver.contexts[device] = int(context.value or 0)
        return driver.contexts[device]


def synchronize() -> None:
    """Waits for all work of the current context."""
    _driver().call("cuCtxSynchronize")


# ---- Streams, events, graphs ----


class Stream:
    """A stream of the current device, which does not wait for the legacy default stream."""

    __slots__ = ("handle",)

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def create(cls) -> Stream:
        """Use as a context manager, or :meth:`destroy` it."""
        handle = c_void_p()
        _driver().call("cuStreamCreate", byref(handle), _STREAM_NON_BLOCKING)
        return cls(int(handle.value or 0))

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        synchronize_stream(self)

    def wait(self, event: Event) -> None:
        """Work put on the stream from now on begins after the event."""
        _driver().call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def destroy(self) -> None:
        """What is on the stream still completes."""
        handle, self.handle = self.handle, 0
        if handle > 2 and usable():
            _driver().call("cuStreamDestroy_v2", handle)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


AnyStream: TypeAlias = "Stream | int"


def _handle(stream: AnyStream) -> int:
    return stream.handle if isinstance(stream, Stream) else stream


def same_stream(one: AnyStream, other: AnyStream) -> bool:
    """0 and 1 are the legacy default stream."""
    first, second = _handle(one), _handle(other)
    return first == second or {first, second} == {0, 1}


def own_stream() -> Stream:
    """The package's own stream on the current device: what is put there waits for others, and
    nobody waits for it. Never destroyed."""
    driver = _driver()
    device = _current(driver)
    if device not in driver.streams:
        with driver.lock:
            if device not in driver.streams:
                driver.streams[device] = Stream.create()
    return driver.streams[device]


def synchronize_stream(stream: AnyStream) -> None:
    """Waits for all work on a stream."""
    _driver().call("cuStreamSynchronize", _handle(stream))


def order(first: AnyStream, second: AnyStream) -> None:
    """What is put on ``second`` from now on begins after what is on ``first``; waits for nothing.

    Does nothing if they are one stream, or if they are not in the same capture of a graph: a graph
    neither depends on what is outside of it nor has anything wait for it.
    """
    if same_stream(first, second) or capture_id(first) != capture_id(second):
        return
    event = Event.create(timing=False)
    try:
        event.record(first)
        Stream(_handle(second)).wait(event)
    finally:
        event.destroy()


class Event:
    """A point in a stream's work."""

    __slots__ = ("handle",)

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def create(cls, *, timing: bool = True) -> Event:
        """In the current context; :meth:`destroy` it. ``timing``: it knows when it happened."""
        handle = c_void_p()
        _driver().call("cuEventCreate", byref(handle), 0 if timing else _EVENT_NO_TIMING)
        return cls(int(handle.value or 0))

    def record(self, stream: AnyStream) -> None:
        _driver().call("cuEventRecord", self.handle, _handle(stream))

    def synchronize(self) -> None:
        """Waits for what was on the stream when the event was recorded."""
        _driver().call("cuEventSynchronize", self.handle)

    def elapsed_ms(self, begin: Event) -> float:
        """Milliseconds since ``begin``; both must have happened."""
        time = c_float()
        _driver().call("cuEventElapsedTime", byref(time), begin.handle, self.handle)
        return time.value

    def destroy(self) -> None:
        handle, self.handle = self.handle, 0
        if handle and usable():
            _driver().call("cuEventDestroy_v2", handle)


class Graph:
    """A captured graph, ready to be launched."""

    __slots__ = ("_executable", "_graph")

    def __init__(self, graph: int) -> None:
        """Takes over the graph."""
        self._graph = graph
        self._executable = 0
        executable = c_void_p()
        try:
            # Memory that was allocated in the capture and not freed there would make the second
            # launch an error.
            _driver().call("cuGraphInstantiateWithFlags", byref(executable), graph, _FREE_ON_LAUNCH)
        except DeviceError:
            self.close()
            raise
        self._executable = int(executable.value or 0)

    def launch(self, stream: AnyStream) -> None:
        _driver().call("cuGraphLaunch", self._executable, _handle(stream))

    def close(self) -> None:
        """Destroys the graph, after launches that are under way."""
        executable, self._executable = self._executable, 0
        graph, self._graph = self._graph, 0
        if usable():
            if executable:
                _driver().call("cuGraphExecDestroy", executable)
            if graph:
                _driver().call("cuGraphDestroy", graph)

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Capture:
    """What :func:`capture` gives: ``graph`` is there when its block has ended."""

    __slots__ = ("_graph",)

    def __init__(self) -> None:
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        if self._graph is None:
            raise DeviceError("the graph is still being captured: take it after the with block")
        return self._graph


_captures = threading.local()


@contextmanager
def capture(stream: AnyStream) -> Iterator[Capture]:
    """What the block puts on ``stream`` becomes a graph instead of running.

    The stream is not the default one; the caller closes the graph.
    """
    driver = _driver()
    handle = _handle(stream)
    driver.call("cuStreamBeginCapture_v2", handle, _CAPTURE_THREAD_LOCAL)
    _captures.depth = getattr(_captures, "depth", 0) + 1
    capture = Capture()
    graph = c_void_p()
    try:
        yield capture
    except BaseException:
        _captures.depth -= 1
        if driver.try_call("cuStreamEndCapture", handle, byref(graph)) == 0 and graph.value:
            driver.try_call("cuGraphDestroy", graph)
        raise
    _captures.depth -= 1
    driver.call("cuStreamEndCapture", handle, byref(graph))
    capture._graph = Graph(int(graph.value or 0))


def capture_id(stream: AnyStream) -> int | None:
    """A number of the capture that a stream is in; None if it is in none."""
    status, number = c_int(), _u64()
    driver = _driver()
    result = driver.try_call(
        *("cuStreamGetCaptureInfo_v2", _handle(stream), byref(status), byref(number)),
        *(None, None, None),
    )
    if result == _ERROR_CAPTURE_IMPLICIT:  # the legacy stream, while another one is captured
        return 0
    if result != 0:
        raise driver.error("cuStreamGetCaptureInfo", result)
    return None if status.value == _CAPTURE_NONE else int(number.value)


def is_capturing(stream: AnyStream | None = None) -> bool:
    """Whether a stream is being captured into a graph.

    None: whether one is as far as can be seen, which is by :func:`capture` in this thread, on
    torch's current stream, or on a stream that the default stream waits for. Never fails, and
    loads no driver.
    """
    if not usable() and stream is None:
        return _torch_captures()
    if stream is not None:
        return capture_id(stream) is not None
    if getattr(_captures, "depth", 0) or _torch_captures():
        return True
    current = c_void_p()
    driver = _driver()
    if driver.try_call("cuCtxGetCurrent", byref(current)) != 0 or not current.value:
        return False
    return capture_id(0) is not None


def _torch_captures() -> bool:
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return False
    try:
        return bool(cuda.is_current_stream_capturing())
    except RuntimeError:  # of the legacy default stream, while one that waits for it is captured
        return True


# ---- Memory ----


class MemoryInfo(NamedTuple):
    """Bytes of device memory."""

    free: int
    total: int


def memory_info() -> MemoryInfo:
    """Of the current device."""
    free, total = c_size_t(), c_size_t()
    _driver().call("cuMemGetInfo_v2", byref(free), byref(total))
    return MemoryInfo(free.value, total.value)


def allocate(size: int, stream: AnyStream) -> int:
    """The address of ``size`` bytes on the current device, usable on ``stream`` from now on.

    Aligned to 256 bytes or more. 0 bytes are address 0. In a capture the memory is the graph's.
    """
    if size == 0:
        return 0
    driver = _driver()
    device = _current(driver)
    address = _u64()
    pool = driver.pools.get(device)
    name = "cuMemAllocFromPoolAsync"
    place: tuple[int, ...]
    if pool is None and capture_id(stream) is not None:
        name, place = "cuMemAllocAsync", (_handle(stream),)
    else:
        if pool is None:
            pool = _create_pool(driver, device)
        place = (pool, _handle(stream))
        if not pool:
            name, place = "cuMemAlloc_v2", ()
    status = driver.try_call(name, byref(address), size, *place)
    if status == _ERROR_OUT_OF_MEMORY and pool and capture_id(stream) is None:
        for where in (stream, own_stream()):
            driver.try_call("cuStreamSynchronize", _handle(where))
        driver.try_call("cuMemPoolTrimTo", pool, 0)
        status = driver.try_call(name, byref(address), size, *place)
    if status == _ERROR_OUT_OF_MEMORY:
        raise driver.error(name, status, _memory_message(driver, size))
    if status != 0:
        raise driver.error(name, status)
    return int(address.value)


def _memory_message(driver: _Driver, size: int) -> str:
    free, total = c_size_t(), c_size_t()
    if driver.try_call("cuMemGetInfo_v2", byref(free), byref(total)) != 0:
        return f"{size} bytes were asked for"
    return (
        f"{size} bytes were asked for, {free.value} of {total.value} are free: see nvidia-smi for"
        " who holds the rest, or take smaller batches"
    )


def _create_pool(driver: _Driver, device: int) -> int:
    """The package's own memory pool on a device; 0 if the device has none.

    The default pool gives all memory back whenever somebody waits for the GPU, and is shared with
    others, whose setting it is to change that.
    """
    supported = has_pools(device)
    with driver.lock:
        if device in driver.pools:
            return driver.pools[device]
        if supported:
            pool = c_void_p()
            properties = _PoolProperties(
                allocation_type=1, handle_types=0, location_type=1, location_id=device
            )
            driver.call("cuMemPoolCreate", byref(pool), byref(properties))
            keep = _u64(POOL_BYTES)
            driver.call("cuMemPoolSetAttribute", pool, _POOL_RELEASE_THRESHOLD, byref(keep))
            driver.pools[device] = int(pool.value or 0)
        else:
            driver.pools[device] = 0
        return driver.pools[device]


def free(address: int, stream: AnyStream) -> None:
    """Frees what :func:`allocate` gave, once what is on ``stream`` is done."""
    if not address:
        return
    driver = _driver()
    if driver.pools.get(_current(driver)) == 0:
        driver.call("cuMemFree_v2", address)
    else:
        driver.call("cuMemFreeAsync", address, _handle(stream))


def copy_to_device(address: int, array: np.ndarray[Any, Any], stream: AnyStream) -> None:
    """Copies a C-contiguous array in the order of ``stream``; waits until it is done."""
    if not array.flags.c_contiguous:
        raise ValueError("array is not C-contiguous")
    _refuse_capture(stream)
    if array.nbytes:
        driver = _driver()
        driver.call(
            "cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, _handle(stream)
        )
        driver.call("cuStreamSynchronize", _handle(stream))


def copy_to_host(array: np.ndarray[Any, Any], address: int, stream: AnyStream) -> None:
    """Fills a C-contiguous array in the order of ``stream``; waits until it is there."""
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError("array is not C-contiguous or not writable")
    _refuse_capture(stream)
    if array.nbytes:
        driver = _driver()
        driver.call(
            "cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, _handle(stream)
        )
        driver.call("cuStreamSynchronize", _handle(stream))


def _refuse_capture(stream: AnyStream) -> None:
    if capture_id(stream) is not None:
        raise DeviceError(
            "a CUDA graph is being captured: copy between host and device before, or after"
        )


def copy(target: int, source: int, size: int, stream: AnyStream) -> None:
    """Copies ``size`` bytes on the device; waits for nothing."""
    if size:
        _driver().call("cuMemcpyAsync", target, source, size, _handle(stream))


def copy_2d(
    target: int,
    target_pitch: int,
    source: int,
    source_pitch: int,
    width: int,
    height: int,
    stream: AnyStream,
) -> None:
    """Copies ``height`` rows of ``width`` bytes, which lie a pitch apart (bytes); waits for
    nothing."""
    if width and height:
        plan = _Copy2D(
            source_type=_MEMORY_UNIFIED,
            source_device=source,
            source_pitch=source_pitch,
            target_type=_MEMORY_UNIFIED,
            target_device=target,
            target_pitch=target_pitch,
            width=width,
            height=height,
        )
        _driver().call("cuMemcpy2DAsync_v2", ctypes.addressof(plan), _handle(stream))


def memset(address: int, value: int, size: int, stream: AnyStream) -> None:
    """Sets ``size`` bytes to ``value`` (0..255); waits for nothing."""
    if size:
        _driver().call("cuMemsetD8Async", address, value, size, _handle(stream))
