"""Arrays of any framework as address, shape, strides and dtype; and arrays of the package's own.

Read are numpy's arrays, torch's tensors, :class:`DeviceArray`, and whatever has
``__cuda_array_interface__`` (CuPy, numba), ``__dlpack__`` (JAX, CuPy) or ``__array_interface__``.
Nothing is copied.

Sources: ``dlpack.h`` (DLPack 1.1) and the Python specification of DLPack; the CUDA array interface
(version 3) as numba documents it; numpy's ``__array_interface__``.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from w4a16 import driver
from w4a16.errors import ArgumentError, DeviceError

_EXPECTED = (
    "expected a numpy array, a torch tensor, or an array with __dlpack__ or"
    " __cuda_array_interface__ (CuPy, JAX, numba)"
)


@dataclass(frozen=True, slots=True)
class View:
    """An array as far as the C library needs to know it."""

    address: int
    """Of the first element."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    dtype: str
    """As numpy names it: ``"float16"``, ``"bfloat16"``, ``"uint8"``, …"""
    device: int
    """CUDA ordinal; -1: the CPU."""
    framework: str
    """``"numpy"``, ``"torch"``, ``"device"`` (:class:`DeviceArray`) or ``"other"``."""
    owner: object
    """Keeps the memory alive; the array itself, or what stands for it in :func:`view`."""
    stream: int | None
    """On a GPU: the stream on which the memory is ready, as far as that is known. 0: the legacy
    default stream, 2: the per-thread default stream, otherwise a ``cudaStream_t``, which need not
    outlive the call that the array was passed to."""
    readonly: bool = False
    """Whether the owner forbids writing."""

    @property
    def contiguous(self) -> bool:
        """Whether the elements are dense and in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size == 0:
                return True
            if size != 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True

    @property
    def nbytes(self) -> int:
        """Of the elements, without gaps."""
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def device_name(self) -> str:
        """``"cpu"`` or ``"cuda:0"``."""
        return "cpu" if self.device < 0 else f"cuda:{self.device}"

    def describe(self) -> str:
        """Like ``float16 [3, 4096] on cuda:0``, with strides if it is not contiguous."""
        text = f"{self.dtype} {list(self.shape)} on {self.device_name}"
        return text if self.contiguous else f"{text}, strides {list(self.strides)}"


def itemsize(dtype: str) -> int:
    """Bytes of an element: the first number in a dtype's name is its bits."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits.group()) // 8) if bits else 1


# ---- Views ----


def view(value: object, name: str, *, stream: int | None = None, writable: bool = False) -> View:
    """What ``value`` is; ``name`` is the argument's name for errors.

    With ``stream`` (a ``cudaStream_t`` as an integer), a GPU array is made ready there: work that
    is put on ``stream`` later begins after what its owner says must come first. Without one, a
    :class:`DeviceArray` is made ready on the legacy default stream. ``writable`` refuses arrays
    that may not be written to, such as JAX's. Of work on a :class:`DeviceArray`, tell
    :func:`used`.

    Raises :class:`w4a16.ArgumentError` for what is no array, or none that can be read in place, and
    :class:`w4a16.DeviceError` for GPU arrays where there is no driver.
    """
    if isinstance(value, _Borrowed):
        value = value.value
    made = _view(value, name, stream)
    if writable and made.readonly:
        raise ArgumentError(
            f"{name} is a {_type_name(value)} that may not be written to: expected a writable array"
        )
    if isinstance(value, DeviceArray):
        value._order(_normal(stream) or 0)
    elif stream is not None and made.stream not in (None, _normal(stream)):
        with driver.use_device(made.device):
            driver.order(made.stream, stream)
    if stream is None or made.device < 0:
        return made
    return replace(made, stream=_normal(stream))


def _view(value: object, name: str, stream: int | None) -> View:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        return _of_torch(value, name)
    if isinstance(value, np.ndarray):
        return _of_numpy(value, name, "numpy", value)
    if isinstance(value, DeviceArray):
        return value._view()
    if type(value).__name__ == "PyCapsule":
        return _of_capsule(value, value, name, 0)
    if not isinstance(value, type):
        # JAX says with DLPack when an array is ready; its __cuda_array_interface__ does not.
        if _is_jax(value) and hasattr(value, "__dlpack__"):
            return replace(_of_dlpack(value, name, stream), readonly=True)
        interface = _attribute(value, "__cuda_array_interface__")
        if interface is not None:
            return _of_cuda(value, interface, name)
        if hasattr(value, "__array_interface__"):
            return _of_numpy(np.asarray(value), name, "other", value)
        if hasattr(value, "__dlpack__"):
            return _of_dlpack(value, name, stream)
    raise ArgumentError(f"{name} is a {_type_name(value)}: {_EXPECTED}")


def _attribute(value: object, name: str) -> Any:
    """An attribute, None where it is missing; some frameworks raise for arrays on a CPU."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _is_jax(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in ("jax", "jaxlib")


def _type_name(value: object) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    return f"{module}{kind.__qualname__}"


def _normal(stream: int | None) -> int | None:
    """0 for both names of the legacy default stream."""
    return 0 if stream == 1 else stream


# ---- torch ----


def _of_torch(tensor: Any, name: str) -> View:
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(
            f"{name} is a torch tensor on {tensor.device}: expected one on a CPU or a CUDA GPU"
        )
    if str(tensor.layout) != "torch.strided":
        raise ArgumentError(f"{name} is a {tensor.layout} tensor: expected a dense one")
    if tensor.is_neg():
        raise ArgumentError(
            f"{name} is a torch tensor with a pending negation: expected {name}.resolve_neg()"
        )
    try:
        address = int(tensor.data_ptr())
    except RuntimeError as error:
        raise ArgumentError(f"{name} is a torch tensor without memory: {error}") from error
    device = -1
    stream = None
    if kind == "cuda":
        device = tensor.device.index
        stream = int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)
    return View(
        address=address,
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=device,
        framework="torch",
        owner=tensor,
        stream=_normal(stream),
    )


# ---- numpy ----


def _of_numpy(array: np.ndarray[Any, Any], name: str, framework: str, owner: object) -> View:
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentError(f"{name} is a masked array: expected one without a mask")
    if array.dtype.hasobject or array.dtype.names or not array.dtype.isnative:
        raise ArgumentError(
            f"{name} is a numpy array of {array.dtype}: expected native numbers, such as float16"
        )
    return View(
        address=array.ctypes.data,
        shape=array.shape,
        strides=_in_elements(array.strides, array.itemsize, name),
        dtype=array.dtype.name,
        device=-1,
        framework=framework,
        owner=owner,
        stream=None,
        readonly=not array.flags.writeable,
    )


def _in_elements(strides: Sequence[int], size: int, name: str) -> tuple[int, ...]:
    if any(stride % size for stride in strides):
        raise ArgumentError(
            f"{name} has strides of {list(strides)} bytes: expected multiples of the {size} bytes"
            " of an element"
        )
    return tuple(stride // size for stride in strides)


# ---- __cuda_array_interface__ ----


def _of_cuda(value: object, interface: Any, name: str) -> View:
    given = f"{name} is a {_type_name(value)} whose __cuda_array_interface__"
    try:
        version = int(interface["version"])
        shape = tuple(int(size) for size in interface["shape"])
        kind = np.dtype(interface["typestr"])
        address, readonly = int(interface["data"][0] or 0), bool(interface["data"][1])
        strides = interface.get("strides")
        stream = interface.get("stream")
        strides = None if strides is None else tuple(int(stride) for stride in strides)
        stream = None if stream is None else int(stream)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArgumentError(
            f"{given} cannot be read ({type(error).__name__}: {error}): expected shape, typestr,"
            " data and version as its specification says"
        ) from error
    if version < 2:
        raise ArgumentError(f"{given} has version {version}: expected 2 or later")
    if interface.get("mask") is not None:
        raise ArgumentError(f"{given} has a mask: expected an array without one")
    if stream == 0:
        raise ArgumentError(f"{given} has the stream 0, which is ambiguous: expected 1 or 2")
    if kind.hasobject or kind.names or not kind.isnative or kind.kind not in "biufc":
        raise ArgumentError(f"{given} has the type {interface['typestr']!r}: expected numbers")
    if any(size < 0 for size in shape) or (strides is not None and len(strides) != len(shape)):
        raise ArgumentError(f"{given} has the shape {list(shape)} and strides {strides}")
    return View(
        address=address,
        shape=shape,
        strides=dense_strides(shape)
        if strides is None
        else _in_elements(strides, kind.itemsize, name),
        dtype=kind.name,
        device=_device_of(address, shape, given),
        framework="other",
        owner=value,
        stream=_normal(stream),
        readonly=readonly,
    )


def _device_of(address: int, shape: tuple[int, ...], given: str) -> int:
    if math.prod(shape) == 0:
        return driver.current_device()
    device = driver.device_of(address)
    if device is None:
        raise ArgumentError(
            f"{given} has the address {address:#x}, which CUDA does not know: expected memory of a"
            " GPU"
        )
    return device


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


# ---- DLPack ----

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_DEVICE_TYPES = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm host memory",
    14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA", 18: "Trainium",
}  # fmt: skip
_NUMBERS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_VERSION = (1, 0)
_READ_ONLY = 1


class _Tensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned``; without a version the tensor comes first."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class _Borrowed:
    """An array and the capsule it gave.

    The capsule is never marked as consumed: when it dies, it calls the producer's deleter itself.
    That is what renaming it and calling the deleter here would do, but in the producer's own code
    and also when the interpreter ends.
    """

    __slots__ = ("capsule", "value")

    def __init__(self, value: object, capsule: object) -> None:
        self.value = value
        self.capsule = capsule


# A private handle of the interpreter: the types of ctypes.pythonapi belong to everybody.
_python = ctypes.PyDLL(None)
_python.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_python.PyCapsule_IsValid.restype = ctypes.c_int
_python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p


def _of_dlpack(value: Any, name: str, stream: int | None) -> View:
    given = f"{name} is a {_type_name(value)}"
    ready: int | None = None
    arguments: dict[str, Any] = {}
    try:
        device_type = _CPU
        if hasattr(value, "__dlpack_device__"):
            device_type = int(value.__dlpack_device__()[0])
        _check_device_type(device_type, given)
        if device_type in (_CUDA, _CUDA_MANAGED):
            ready = _normal(stream) or 0
            arguments["stream"] = ready or 1
        capsule = _capsule(value.__dlpack__, arguments)
    except ArgumentError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(f"{given} that cannot be exported: {error}") from error
    return _of_capsule(capsule, _Borrowed(value, capsule), name, ready)


def _capsule(export: Callable[..., object], arguments: dict[str, Any]) -> object:
    try:
        return export(max_version=_VERSION, **arguments)
    except TypeError:  # from before DLPack had versions
        return export(**arguments)


def _check_device_type(device_type: int, given: str) -> None:
    if device_type not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        place = _DEVICE_TYPES.get(device_type, f"a device of DLPack's type {device_type}")
        raise ArgumentError(f"{given} on {place}: expected one on a CPU or a CUDA GPU")


def _of_capsule(capsule: object, owner: object, name: str, ready: int | None) -> View:
    source = owner.value if isinstance(owner, _Borrowed) else owner
    given = f"{name} is a {_type_name(source)}"
    tensor, readonly = _tensor_of(capsule, given)
    device_type = int(tensor.device_type)
    _check_device_type(device_type, given)
    dtype = _dlpack_dtype(tensor, given)
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = dense_strides(shape)
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    on_gpu = device_type in (_CUDA, _CUDA_MANAGED)
    return View(
        address=(tensor.data or 0) + int(tensor.byte_offset),
        shape=shape,
        strides=strides,
        dtype=dtype,
        device=int(tensor.device_id) if on_gpu else -1,
        framework="other",
        owner=owner,
        stream=ready if on_gpu else None,
        readonly=readonly,
    )


def _tensor_of(capsule: object, given: str) -> tuple[_Tensor, bool]:
    if _python.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        pointer = _python.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        managed = _Versioned.from_address(pointer)
        if managed.major != _VERSION[0]:
            raise ArgumentError(
                f"{given} with version {managed.major}.{managed.minor} of DLPack: expected 1"
            )
        return managed.tensor, bool(managed.flags & _READ_ONLY)
    if _python.PyCapsule_IsValid(capsule, b"dltensor"):
        pointer = _python.PyCapsule_GetPointer(capsule, b"dltensor")
        return _Tensor.from_address(pointer), False
    raise ArgumentError(f"{given} without a DLPack tensor, or one that was consumed: {_EXPECTED}")


def _dlpack_dtype(tensor: _Tensor, given: str) -> str:
    code, bits, lanes = int(tensor.code), int(tensor.bits), int(tensor.lanes)
    if code not in _NUMBERS or lanes != 1 or bits % 8:
        raise ArgumentError(
            f"{given} of DLPack's type {code} with {bits} bits and {lanes} lanes: expected numbers"
            " of whole bytes, such as float16"
        )
    return "bool" if code == 6 else f"{_NUMBERS[code]}{bits}"


# ---- The package's own arrays ----


class DeviceArray:
    """A contiguous array in GPU memory, for programs without a framework of their own.

    torch, CuPy, JAX and numba take it without a copy (``torch.from_dlpack``, ``cupy.asarray``,
    ``jax.dlpack.from_dlpack``, ``numba.cuda.as_cuda_array``).

    The array is ready once what was put on a stream for it is done: its allocation, the product
    that :func:`w4a16.linear` writes. Who takes it waits for that, on the GPU; the stream itself may
    be gone by then. When the array dies, its memory is freed after that, after all that
    :mod:`w4a16` has read of it, and after what is on the legacy default stream and on streams that
    wait for that one (torch's and CuPy's default streams, ``cupy.cuda.Stream()``). Who uses it on
    any other stream keeps it until that is done, or calls :meth:`record_stream`.

    While a stream is captured into a CUDA graph, no array can be made on it. Arrays that a graph
    uses are ready before the capture begins and live as long as the graph.
    """

    __slots__ = ("__weakref__", "_address", "_dtype", "_ready", "_shape", "device")

    device: int
    """CUDA ordinal."""

    def __init__(
        self,
        shape: int | Sequence[int],
        dtype: Any = "float16",
        *,
        device: int = 0,
        stream: int = 0,
    ) -> None:
        """Not initialised. ``dtype`` is any name or dtype of numpy's numbers; ``stream`` (a
        ``cudaStream_t``) is the first on which the array is ready.

        Raises :class:`w4a16.ArgumentError` and :class:`w4a16.DeviceError`.
        """
        self._address = 0
        self._ready: driver.Event | None = None  # none: everywhere
        self.device = device
        self._shape = _shape(shape)
        self._dtype = _dtype(dtype)
        with driver.use_device(device):
            if driver.capture_id(stream) is not None:
                raise DeviceError(
                    "a CUDA graph is being captured: make the array before, and have results"
                    " written to it (out=)"
                )
            driver.own_stream()  # made here, not when the array dies
            _free_dead()
            self._address = driver.allocate(self.nbytes, stream)
            self.record_stream(stream)

    @classmethod
    def from_numpy(
        cls, array: np.ndarray[Any, Any], device: int = 0, stream: int = 0
    ) -> DeviceArray:
        """A copy of a numpy array; it is there when this returns.

        Raises :class:`w4a16.ArgumentError` and :class:`w4a16.DeviceError`.
        """
        if not isinstance(array, np.ndarray):
            raise ArgumentError(f"array is a {_type_name(array)}: expected a numpy array")
        _of_numpy(array, "array", "numpy", array)  # refuses what is no plain numbers
        dense = np.ascontiguousarray(array).reshape(array.shape)
        made = cls(dense.shape, dense.dtype, device=device, stream=stream)
        with driver.use_device(device):
            driver.copy_to_device(made._address, dense, stream)
            if made._ready is not None:
                made._ready.destroy()
                made._ready = None
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        return self.size * self._dtype.itemsize

    @property
    def address(self) -> int:
        """Of the first element; 0 if there is none."""
        return self._address

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy in host memory; waits until the array is ready, and for what is on the legacy
        default stream."""
        host = np.empty(self._shape, self._dtype)
        with driver.use_device(self.device):
            self._order(0)
            driver.copy_to_host(host, self._address, 0)
        return host

    def record_stream(self, stream: int) -> None:
        """Says that what is on a stream now uses the array, for work that others have put there.

        The array is ready, and its memory freed, not before that is done. Does nothing while the
        stream is captured into a CUDA graph.
        """
        if not self._address:
            return
        with driver.use_device(self.device):
            if driver.capture_id(stream) is None:
                if self._ready is None:
                    self._ready = driver.Event.create(timing=False)
                else:  # what was said before still holds
                    driver.Stream(stream).wait(self._ready)
                self._ready.record(stream)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """As :meth:`numpy`."""
        if copy is False:
            raise ValueError(f"{self!r} cannot be read in place: it is in GPU memory")
        host = self.numpy()
        return host if dtype is None else host.astype(dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also with ``copy`` and ``pickle``, are on the same device."""
        return DeviceArray.from_numpy, (self.numpy(), self.device)

    def __repr__(self) -> str:
        return f"DeviceArray({self._dtype.name} {list(self._shape)} on cuda:{self.device})"

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("a DeviceArray without dimensions has no length")
        return self._shape[0]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Of version 3, ready on the legacy default stream."""
        self._order(0)
        return {
            "version": 3,
            "shape": self._shape,
            "typestr": self._dtype.str,
            "data": (self._address, False),
            "strides": None,
            "stream": 1,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule whose memory is ready on ``stream`` (None and 1: the legacy default stream, 2:
        the per-thread default stream, -1: do not wait)."""
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on cuda:{self.device}; copy it with numpy()")
        if copy:
            raise BufferError("the array is not copied for DLPack; copy it with numpy()")
        if stream != -1:
            self._order(_normal(stream) or 0)
        return _export(self, max_version)

    def _view(self) -> View:
        return View(
            address=self._address,
            shape=self._shape,
            strides=dense_strides(self._shape),
            dtype=self._dtype.name,
            device=self.device,
            framework="device",
            owner=self,
            stream=0,
        )

    def _order(self, stream: int) -> None:
        """What is put on a stream from now on begins when the array is ready.

        Not while the stream is captured: a graph cannot depend on what is outside of it.
        """
        if self._ready is not None:
            with driver.use_device(self.device):
                if driver.capture_id(stream) is None:
                    driver.Stream(stream).wait(self._ready)

    def __del__(self) -> None:
        if getattr(self, "_address", 0) and driver.usable():
            _dead.append(_Memory(self._address, self.device, self._ready))
            self._address = 0
            _free_dead()


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a dead array leaves."""

    address: int
    device: int
    ready: driver.Event | None

    def free(self) -> None:
        """On the current device."""
        stream = driver.own_stream()
        if self.ready is not None:
            stream.wait(self.ready)
            self.ready.destroy()
        driver.order(0, stream)
        driver.free(self.address, stream)


_dead: deque[_Memory] = deque()


def _free_dead() -> None:
    """Frees what dead arrays left; while a graph is captured, which that might spoil, it waits."""
    for _ in range(len(_dead)):
        try:
            memory = _dead.popleft()
        except IndexError:  # another thread was faster
            return
        try:
            with driver.use_device(memory.device):
                if driver.is_capturing():
                    _dead.append(memory)
                else:
                    memory.free()
        except DeviceError:  # a context that is lost took the memory with it
            pass


def used(stream: int, inputs: Iterable[View], output: View) -> None:
    """Says that what is on a stream now reads and writes these arrays, where they are of
    :class:`DeviceArray`.

    Other than :meth:`DeviceArray.record_stream`, it does not make readers wait for each other.
    """
    if isinstance(output.owner, DeviceArray):
        output.owner.record_stream(stream)
    # Memory is never freed before what is on the legacy default stream.
    if _normal(stream) and any(isinstance(read.owner, DeviceArray) for read in inputs):
        with driver.use_device(output.device):
            driver.order(stream, driver.own_stream())


class _HostAlias:
    """Device memory under the name of host memory, so that numpy makes a DLPack tensor of it."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.address, False),
            "strides": None,
        }


def _export(array: DeviceArray, max_version: tuple[int, int] | None) -> object:
    """A DLPack capsule.

    numpy makes it, of an array that nobody reads, and the device is put right afterwards. So its
    deleter is numpy's, which is C: a consumer may call it from any thread, in any state of the
    interpreter, which a Python function would not survive.
    """
    alias = np.asarray(_HostAlias(array)) if array.size else np.empty(array.shape, array.dtype)
    arguments = {} if max_version is None else {"max_version": max_version}
    capsule: object
    try:
        capsule = alias.__dlpack__(**arguments)  # type: ignore[arg-type]
    except TypeError:  # numpy before 2.1
        capsule = alias.__dlpack__()
    tensor, _ = _tensor_of(capsule, "array")
    tensor.device_type, tensor.device_id = array.__dlpack_device__()
    if not array.size:
        tensor.data = None
    return capsule


def empty(shape: Sequence[int], dtype: str, like: View) -> Any:
    """An array that is not initialised, of ``like``'s framework and on its device: a torch tensor,
    a :class:`DeviceArray` (on ``like.stream``), or a numpy array."""
    if like.framework == "torch":
        torch: Any = sys.modules["torch"]
        place = "cpu" if like.device < 0 else f"cuda:{like.device}"
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=place)
    if like.device < 0:
        return np.empty(tuple(shape), _dtype(dtype))
    return DeviceArray(shape, dtype, device=like.device, stream=like.stream or 0)


def to_host(array: Any) -> Any:
    """The array in host memory: torch tensors stay torch tensors, all else becomes a numpy array,
    which shares the memory of what is there already. Waits until the array is ready."""
    seen = view(array, "array")
    if seen.framework == "torch":
        return array.cpu()
    kind = _dtype(seen.dtype)
    if seen.device < 0:
        return np.asarray(_HostMemory(seen, kind))
    # All from the lowest element to the highest, whatever lies between.
    reach = [(size - 1) * stride for size, stride in zip(seen.shape, seen.strides, strict=True)]
    lowest = sum(min(step, 0) for step in reach)
    count = sum(max(step, 0) for step in reach) - lowest + 1 if math.prod(seen.shape) else 0
    host = np.empty(count, kind)
    with driver.use_device(seen.device):
        address = seen.address + lowest * kind.itemsize
        driver.copy_to_host(host, address, seen.stream or 0)
    if seen.contiguous:
        return host.reshape(seen.shape)
    strides = [stride * kind.itemsize for stride in seen.strides]
    return np.lib.stride_tricks.as_strided(host[-lowest:], seen.shape, strides).copy()


class _HostMemory:
    """A view on the CPU as numpy reads it; keeps the owner alive."""

    def __init__(self, seen: View, kind: np.dtype[Any]) -> None:
        self.owner = seen.owner
        self.__array_interface__ = {
            "version": 3,
            "shape": seen.shape,
            "typestr": kind.str,
            "data": (seen.address, seen.readonly),
            "strides": tuple(stride * kind.itemsize for stride in seen.strides),
        }


def _dtype(dtype: Any) -> np.dtype[Any]:
    try:
        kind: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(
            f"dtype is {dtype!r}: expected one of numpy's numbers, such as 'float16'"
        ) from error
    if kind.kind not in "biufcV" or kind.names or kind.hasobject or not kind.isnative:
        raise ArgumentError(f"dtype is {dtype!r}: expected numbers, such as 'float16'")
    return kind


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = (int(shape),) if isinstance(shape, int) else tuple(int(size) for size in shape)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"shape is {shape!r}: expected integers") from error
    if any(size < 0 for size in sizes):
        raise ArgumentError(f"shape is {list(sizes)}: expected sizes of 0 or more")
    return sizes
