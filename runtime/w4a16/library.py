"""The C library (``w4a16.h``) through ctypes: loading, structs, a Python function for each in C.

Addresses and streams are plain integers here; whoever calls keeps the memory alive.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from w4a16.errors import ArgumentError, from_status

API_VERSION = 3
AUTO = -1
#: ``W4A16_RUN_OVERLAP``: a launch may begin before the kernel before it has ended.
RUN_OVERLAP = 1
#: ``W4A16_RUN_ONE_KERNEL``: of ``w4a16_norm_qkv`` alone.
RUN_ONE_KERNEL = 2

_ENVIRONMENT = "W4A16_LIBRARY"
_PACKAGED = Path(__file__).resolve().parent / "lib" / "libw4a16.so"


class QuantOp(IntEnum):
    """How weights are scaled (``w4a16_quant_op``)."""

    PER_COLUMN = 0
    GROUP_SCALE = 1
    GROUP_SCALE_ZERO = 2


class Norm(IntEnum):
    """How activations are normalised (``w4a16_norm``)."""

    LAYER = 0
    RMS = 1


class Source(IntEnum):
    """How unpacked 4-bit values lie (``w4a16_source``)."""

    PLAIN = 0
    GPTQ = 1
    AWQ = 2
    COMPRESSED_TENSORS = 3
    BYTES = 4


class _Versioned(ctypes.Structure):
    """A struct whose first member is its own size."""

    def __init__(self, **members: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(type(self)), **members})


class _Build(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
        ("version", ctypes.c_char_p),
        ("profile", ctypes.c_char_p),
        ("architecture", ctypes.c_char_p),
        ("release", ctypes.c_char_p),
        ("trtllm_commit", ctypes.c_char_p),
        ("cutlass_commit", ctypes.c_char_p),
        ("bundle_digest", ctypes.c_char_p),
        ("compiler", ctypes.c_char_p),
        ("compress", ctypes.c_char_p),
        ("cuda_runtime_version", ctypes.c_int32),
        ("tactic_count", ctypes.c_int32),
        ("gemv_reason", ctypes.c_char_p),
    )


class _Device(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("cc_major", ctypes.c_int32),
        ("cc_minor", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
        ("name", ctypes.c_char * 256),
    )


class _TacticInfo(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("index", ctypes.c_int32),
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_char_p),
        ("schedule", ctypes.c_char_p),
        ("tile", ctypes.c_int32 * 3),
        ("cluster", ctypes.c_int32 * 3),
        ("m_min", ctypes.c_int64),
        ("m_max", ctypes.c_int64),
        ("quant_ops", ctypes.c_uint32),
        ("group_multiple", ctypes.c_int32),
        ("groups", ctypes.c_int32 * 8),
        ("uses_workspace", ctypes.c_int32),
    )


class _Problem(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("quant_op", ctypes.c_int32),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("has_bias", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Args(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("problem", ctypes.POINTER(_Problem)),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


class _PackArgs(_Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("source", ctypes.c_int32),
        ("arch", ctypes.c_char_p),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("source_k", ctypes.c_int64),
        ("source_n", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


_SEGMENTS = 3


class NormQkvArgs(_Versioned):
    """``w4a16_norm_qkv_args``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("norm", ctypes.c_int32),
        ("quant_op", ctypes.c_int32),
        ("m", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64 * _SEGMENTS),
        ("split", ctypes.c_int64 * _SEGMENTS),
        ("x_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("tactic", ctypes.c_int32 * _SEGMENTS),
        ("x", ctypes.c_void_p),
        ("ln_weight", ctypes.c_void_p),
        ("ln_bias", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p * _SEGMENTS),
        ("zeros", ctypes.c_void_p * _SEGMENTS),
        ("bias", ctypes.c_void_p * _SEGMENTS),
        ("c", ctypes.c_void_p * _SEGMENTS),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


class GptqArgs(_Versioned):
    """``w4a16_gptq_args``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64 * _SEGMENTS),
        ("zero_offset", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("qweight", ctypes.c_void_p),
        ("qzeros", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("g_idx", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("c", ctypes.c_void_p * _SEGMENTS),
    )


@dataclass(frozen=True, kw_only=True)
class Build:
    """What the library is (``w4a16_build``)."""

    api_version: int
    version: str
    profile: str
    architecture: str
    release: str
    trtllm_commit: str
    cutlass_commit: str
    bundle_digest: str
    compiler: str
    compress: str
    cuda_runtime_version: int
    tactic_count: int
    gemv_reason: str


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU (``w4a16_device``); what is not known is 0 or empty. ``problem`` is why it cannot run
    this library's kernels, or empty."""

    device: int
    cc_major: int
    cc_minor: int
    sm_count: int
    driver_version: int
    name: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Tactic:
    """One way to compute the product (``w4a16_tactic_info``)."""

    index: int
    name: str
    kind: str
    schedule: str
    tile: tuple[int, ...]
    cluster: tuple[int, ...]
    m_min: int
    m_max: int
    quant_ops: frozenset[QuantOp]
    group_multiple: int
    groups: tuple[int, ...]
    uses_workspace: bool


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One product (``w4a16_problem``): M rows of activations, N outputs, K inputs; per column:
    ``group_size`` 0."""

    quant_op: QuantOp
    m: int
    n: int
    k: int
    group_size: int = 0
    has_bias: bool = False


_STATUS = ctypes.c_int
_POINTER = ctypes.c_void_p
_INT = ctypes.c_int32
_SIZE = ctypes.c_int64
_TEXT = ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, Sequence[Any]]] = {
    "last_error": (_TEXT, ()),
    "api_version": (ctypes.c_uint32, ()),
    "build_info": (_STATUS, (_POINTER,)),
    "check_device": (_STATUS, (_INT, _POINTER)),
    "tactic_count": (_INT, ()),
    "tactic": (_STATUS, (_INT, _POINTER)),
    "supports": (_STATUS, (_INT, _POINTER)),
    "auto_tactic": (_STATUS, (_POINTER, _POINTER)),
    "workspace_size": (_STATUS, (_INT, _POINTER, _POINTER)),
    "run": (_STATUS, (_INT, _POINTER, _POINTER)),
    "unpack": (_STATUS, (_TEXT, _POINTER, _SIZE, _SIZE, _POINTER, _INT)),
    "pack_weight": (_STATUS, (_POINTER, _INT)),
    "pack_weight_device": (_STATUS, (_POINTER, _POINTER)),
    "unpack_device": (_STATUS, (_TEXT, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER)),
    "gather_columns": (
        _STATUS,
        (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER),
    ),
    "norm_qkv": (_STATUS, (_POINTER, _POINTER)),
    "norm_qkv_supports": (_STATUS, (_POINTER,)),
    "norm_qkv_workspace": (_STATUS, (_POINTER, _POINTER)),
    "gptq_linear": (_STATUS, (_POINTER, _POINTER)),
    "gptq_supports": (_STATUS, (_POINTER,)),
    "normalize_rows": (
        _STATUS,
        (
            *(_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, ctypes.c_float),
            *(_POINTER, _SIZE, _POINTER, ctypes.c_uint32, _POINTER),
        ),
    ),
}


# A _Problem and the _Args that point to it, one after the other.
_LAUNCH = struct.Struct("=Ii4qii2I9Q")
_PROBLEM_SIZE = ctypes.sizeof(_Problem)
_MOST_STREAMS = 1024
_ARGS_SIZE = ctypes.sizeof(_Args)
assert _LAUNCH.size == _PROBLEM_SIZE + _ARGS_SIZE, "the structs have no padding"


# The same apart, for launches that are prepared: the problem, and the arguments with the addresses
# of the weight's arrays as one piece.
_PREPARED_PROBLEM = struct.Struct("=Ii4qii")
_WEIGHT = struct.Struct("=4Q")
_PREPARED = struct.Struct("=2I2Q32s3Q")
assert _PREPARED_PROBLEM.size == _PROBLEM_SIZE, "the struct has no padding"
assert _PREPARED.size == _ARGS_SIZE, "the struct has no padding"

Launch = Callable[[int, int, int, int, bool], None]
"""Launches on the current device: addresses of a, c and workspace (0: none), and the stream."""


class _Frame(threading.local):
    """The structs of a launch, reused by the calling thread and written in one go: making them
    anew, or setting their fields one by one, costs microseconds."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(_LAUNCH.size)
        self.problem = ctypes.addressof(self.memory)
        self.args = self.problem + _PROBLEM_SIZE


class Library:
    """A loaded ``libw4a16.so``. A status other than OK becomes a :class:`w4a16.W4A16Error`."""

    def __init__(self, path: Path) -> None:
        """Loads the library; never touches a GPU. Raises ``ImportError``."""
        self.path = path
        try:
            dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(f"{path} cannot be loaded: {error}") from error
        self._functions: dict[str, Any] = {}
        try:
            version = dll.w4a16_api_version()
            if version < API_VERSION:
                raise ImportError(
                    f"{path} has version {version} of the C API, this package needs {API_VERSION}:"
                    f" build the library anew, or unset {_ENVIRONMENT}"
                )
            for name, (result, parameters) in _FUNCTIONS.items():
                function = getattr(dll, f"w4a16_{name}")
                function.restype = result
                function.argtypes = list(parameters)
                self._functions[name] = function
        except AttributeError as error:
            raise ImportError(f"{path} is not a library of this package: {error}") from error
        self._run = self._functions["run"]
        self._gather = self._functions["gather_columns"]
        # Without declared parameters, which ctypes is quicker to call: only with what it passes
        # right by itself.
        self._quick_run = dll["w4a16_run"]
        self._streams: dict[int, ctypes.c_void_p] = {}
        self._frame = _Frame()
        self.build = self._build()
        self.tactics = tuple(self._tactic(i) for i in range(self.build.tactic_count))
        self.tactic_index = {tactic.name: tactic.index for tactic in self.tactics}

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status != 0:
            raise from_status(status, self._last_error())

    def _last_error(self) -> str:
        return _text(self._functions["last_error"]())

    def _build(self) -> Build:
        info = _Build()
        self._call("build_info", ctypes.byref(info))
        members: dict[str, Any] = {
            name: _text(value) if isinstance(value, bytes) else value
            for name, value in _members(info).items()
        }
        return Build(**members)

    def _tactic(self, index: int) -> Tactic:
        info = _TacticInfo()
        self._call("tactic", index, ctypes.byref(info))
        return Tactic(
            index=info.index,
            name=_text(info.name),
            kind=_text(info.kind),
            schedule=_text(info.schedule),
            tile=tuple(info.tile),
            cluster=tuple(info.cluster),
            m_min=info.m_min,
            m_max=info.m_max,
            quant_ops=frozenset(op for op in QuantOp if info.quant_ops >> op & 1),
            group_multiple=info.group_multiple,
            groups=tuple(group for group in info.groups if group),
            uses_workspace=bool(info.uses_workspace),
        )

    def device(self, ordinal: int = -1) -> Device:
        """What is known of a GPU (-1: the current one), and whether the kernels run on it."""
        info = _Device()
        status = self._functions["check_device"](ordinal, ctypes.byref(info))
        members = {**_members(info), "name": _text(info.name)}
        return Device(**members, problem=self._last_error() if status != 0 else "")

    def check_device(self, ordinal: int = -1) -> None:
        """Raises :class:`w4a16.DeviceError` if the kernels do not run on the GPU."""
        self._call("check_device", ordinal, None)

    def why_unsupported(self, tactic: int, problem: Problem) -> str:
        """Why ``tactic`` has no kernel for the problem; empty if it has one. Needs no GPU."""
        given = _problem(problem)
        if self._functions["supports"](tactic, ctypes.byref(given)) == 0:
            return ""
        return self._last_error()

    def auto_tactic(self, problem: Problem) -> int:
        """The tactic that the library's fixed rule takes."""
        index = ctypes.c_int32(AUTO)
        self._call("auto_tactic", ctypes.byref(_problem(problem)), ctypes.byref(index))
        return index.value

    def workspace_size(self, tactic: int, problem: Problem) -> int:
        """Bytes that a launch needs on the current device."""
        size = ctypes.c_size_t(0)
        self._call("workspace_size", tactic, ctypes.byref(_problem(problem)), ctypes.byref(size))
        return size.value

    def run(
        self,
        tactic: int,
        quant_op: int,
        m: int,
        n: int,
        k: int,
        group_size: int,
        a: int,
        b: int,
        scales: int,
        zeros: int | None,
        bias: int | None,
        c: int,
        workspace: int | None,
        workspace_bytes: int,
        stream: int,
        overlap: bool = False,
    ) -> None:
        """Launches on the current device and the given stream. ``None`` is a NULL pointer.

        ``overlap`` is ``W4A16_RUN_OVERLAP``, with what the caller promises for it.
        """
        frame = self._frame
        _LAUNCH.pack_into(
            frame.memory,
            0,
            _PROBLEM_SIZE,
            quant_op,
            m,
            n,
            k,
            group_size,
            bias is not None,
            0,
            _ARGS_SIZE,
            overlap,
            frame.problem,
            a,
            b,
            scales,
            zeros or 0,
            bias or 0,
            c,
            workspace or 0,
            workspace_bytes,
        )
        status = self._run(tactic, frame.args, stream)
        if status != 0:
            raise from_status(status, self._last_error())

    def prepared(
        self,
        tactic: int,
        quant_op: int,
        m: int,
        n: int,
        k: int,
        group_size: int,
        b: int,
        scales: int,
        zeros: int,
        bias: int,
        workspace_bytes: int,
    ) -> Launch:
        """:meth:`run` for many launches of one product: all that stays the same is written down
        here. What is returned may be called from any thread at any time. 0 is a NULL pointer."""
        problem = ctypes.create_string_buffer(
            _PREPARED_PROBLEM.pack(_PROBLEM_SIZE, quant_op, m, n, k, group_size, bias != 0, 0),
            _PROBLEM_SIZE,
        )
        weight = _WEIGHT.pack(b, scales, zeros, bias)
        address, size = ctypes.addressof(problem), _ARGS_SIZE
        run, pack, streams = self._quick_run, _PREPARED.pack, self._streams

        def launch(a: int, c: int, workspace: int, stream: int, overlap: bool) -> None:
            # Bytes of its own for each call: other threads may be launching the same product.
            args = pack(size, overlap, address, a, weight, c, workspace, workspace_bytes)
            try:
                on = streams[stream]
            except KeyError:
                on = self._stream(stream)
            status = run(tactic, args, on)
            if status != 0:
                self._refused(status, problem)

        return launch

    def _stream(self, stream: int) -> ctypes.c_void_p:
        if len(self._streams) >= _MOST_STREAMS:
            self._streams.clear()
        pointer = self._streams[stream] = ctypes.c_void_p(stream)
        return pointer

    def _refused(self, status: int, problem: object) -> None:
        """``problem`` is what a launch's arguments point to: named here, it lives as long as the
        launch."""
        raise from_status(status, self._last_error())

    def pack(
        self,
        source: Source,
        q: int,
        k: int,
        n: int,
        out: int,
        *,
        source_k: int | None = None,
        source_n: int | None = None,
        rows: int | None = None,
        threads: int = 0,
        arch: str | None = None,
    ) -> None:
        """``w4a16_pack_weight``: addresses in host memory."""
        args = _pack_args(source, q, k, n, out, source_k, source_n, rows, arch)
        self._call("pack_weight", ctypes.byref(args), threads)

    def pack_device(
        self,
        source: Source,
        q: int,
        k: int,
        n: int,
        out: int,
        *,
        stream: int,
        source_k: int | None = None,
        source_n: int | None = None,
        rows: int | None = None,
        arch: str | None = None,
    ) -> None:
        """``w4a16_pack_weight_device``: addresses in the memory of the current device."""
        args = _pack_args(source, q, k, n, out, source_k, source_n, rows, arch)
        self._call("pack_weight_device", ctypes.byref(args), stream)

    def unpack(
        self, packed: int, k: int, n: int, q: int, *, threads: int = 0, arch: str | None = None
    ) -> None:
        """``w4a16_unpack``: to :attr:`Source.PLAIN`, in host memory."""
        self._call("unpack", _name(arch), packed, k, n, q, threads)

    def unpack_device(
        self, packed: int, k: int, n: int, q: int, *, stream: int, arch: str | None = None
    ) -> None:
        """``w4a16_unpack_device``: to :attr:`Source.PLAIN`, on the current device."""
        self._call("unpack_device", _name(arch), packed, k, n, q, stream)

    def gather_columns(
        self,
        x: int,
        m: int,
        x_stride: int,
        k_in: int,
        columns: int | None,
        k_out: int,
        out: int,
        stream: int,
    ) -> None:
        """``w4a16_gather_columns``: ``out[i, j] = x[i, columns[j]]``, 0 where there is none."""
        status = self._gather(x, m, x_stride, k_in, columns, k_out, out, stream)
        if status != 0:
            raise from_status(status, self._last_error())

    def norm_qkv(self, args: NormQkvArgs, stream: int) -> None:
        """``w4a16_norm_qkv``: normalises rows, and multiplies them with up to three weights."""
        self._call("norm_qkv", ctypes.byref(args), stream)

    def norm_qkv_workspace(self, args: NormQkvArgs) -> int:
        """Bytes that :meth:`norm_qkv` needs on the current device."""
        size = ctypes.c_size_t(0)
        self._call("norm_qkv_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    def check_norm_qkv(self, args: NormQkvArgs) -> None:
        """Raises :class:`w4a16.W4A16Error` unless there are kernels. Needs no GPU."""
        self._call("norm_qkv_supports", ctypes.byref(args))

    def gptq_linear(self, args: GptqArgs, stream: int) -> None:
        """``w4a16_gptq_linear``: multiplies with GPTQ's own layout."""
        self._call("gptq_linear", ctypes.byref(args), stream)

    def check_gptq(self, args: GptqArgs) -> None:
        """Raises :class:`w4a16.W4A16Error` unless the kernel takes the sizes. Needs no GPU."""
        self._call("gptq_supports", ctypes.byref(args))

    def normalize_rows(
        self,
        norm: Norm,
        x: int,
        m: int,
        x_stride: int,
        hidden: int,
        ln_weight: int | None,
        ln_bias: int | None,
        eps: float,
        columns: int | None,
        k: int,
        out: int,
        stream: int,
        *,
        flags: int = 0,
    ) -> None:
        """``w4a16_normalize_rows``: rows of x normalised, their columns picked."""
        self._call(
            "normalize_rows",
            *(int(norm), x, m, x_stride, hidden, ln_weight, ln_bias, eps),
            *(columns, k, out, flags, stream),
        )


def find_library() -> Path:
    """``W4A16_LIBRARY`` if it is set, otherwise the library in this package."""
    given = os.environ.get(_ENVIRONMENT)
    path = Path(given) if given else _PACKAGED
    if path.is_file():
        return path
    if given:
        raise ImportError(f"{_ENVIRONMENT}={given} is not a file: expected a libw4a16.so")
    raise ImportError(
        f"{path} is missing: install a wheel of w4a16, or set {_ENVIRONMENT} to a libw4a16.so"
    )


def _problem(problem: Problem) -> _Problem:
    for name in ("m", "n", "k", "group_size"):
        value = getattr(problem, name)
        if not -(2**63) <= value < 2**63:  # else ctypes takes what is left of it
            raise ArgumentError(f"{name} is {value!r:.40}: expected 0 to 2147483647")
    return _Problem(
        quant_op=int(problem.quant_op),
        m=problem.m,
        n=problem.n,
        k=problem.k,
        group_size=problem.group_size,
        has_bias=int(problem.has_bias),
    )


def _pack_args(
    source: Source,
    q: int,
    k: int,
    n: int,
    out: int,
    source_k: int | None,
    source_n: int | None,
    rows: int | None,
    arch: str | None,
) -> _PackArgs:
    return _PackArgs(
        source=int(source),
        arch=_name(arch),
        k=k,
        n=n,
        source_k=k if source_k is None else source_k,
        source_n=n if source_n is None else source_n,
        q=q,
        rows=rows,
        out=out,
    )


def _members(struct: ctypes.Structure) -> dict[str, Any]:
    names = [str(field[0]) for field in struct._fields_]
    return {name: getattr(struct, name) for name in names if name != "struct_size"}


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _name(arch: str | None) -> bytes | None:
    return None if arch is None else arch.encode()


LIBRARY = Library(find_library())
"""The library of this process."""
