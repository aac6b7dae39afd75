"""The C API of w4a16.h through ctypes, for the tests only: needs neither numpy nor torch."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AUTO = -1
#: ``W4A16_RUN_OVERLAP``, for ``flags``
RUN_OVERLAP = 1
#: ``W4A16_RUN_ONE_KERNEL``, for ``norm_qkv`` alone
RUN_ONE_KERNEL = 2


class Status(IntEnum):
    """``w4a16_status``, without its prefix."""

    OK = 0
    ERROR_INVALID_ARGUMENT = 1
    ERROR_MISALIGNED = 2
    ERROR_UNSUPPORTED = 3
    ERROR_UNKNOWN_TACTIC = 4
    ERROR_WORKSPACE = 5
    ERROR_NO_DEVICE = 6
    ERROR_OLD_DRIVER = 7
    ERROR_WRONG_DEVICE = 8
    ERROR_CUDA = 9
    ERROR_OUT_OF_MEMORY = 10
    ERROR_INTERNAL = 11


class QuantOp(IntEnum):
    PER_COLUMN = 0
    GROUP_SCALE = 1
    GROUP_SCALE_ZERO = 2

    @property
    def label(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, label: str) -> QuantOp:
        return cls[label.upper()]


class Source(IntEnum):
    """``w4a16_source``: how unpacked 4-bit values lie."""

    PLAIN = 0
    GPTQ = 1
    AWQ = 2
    COMPRESSED_TENSORS = 3
    BYTES = 4

    @property
    def label(self) -> str:
        return self.name.lower()


class ApiError(Exception):
    """A status other than OK, with what ``w4a16_last_error`` said."""

    def __init__(self, function: str, status: Status, message: str) -> None:
        super().__init__(f"{function}: {status.name}: {message}")
        self.status = status
        self.message = message


class LibraryNotFoundError(Exception):
    pass


class Versioned(ctypes.Structure):
    """A struct whose first member is its own size."""

    def __init__(self, **members: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(type(self)), **members})


class Build(Versioned):
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


class Device(Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("cc_major", ctypes.c_int32),
        ("cc_minor", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
        ("name", ctypes.c_char * 256),
    )


class TacticInfo(Versioned):
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


class Problem(Versioned):
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


class Args(Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("problem", ctypes.POINTER(Problem)),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


class PackArgs(Versioned):
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


SEGMENTS = 3


class NormQkvArgs(Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("norm", ctypes.c_int32),
        ("quant_op", ctypes.c_int32),
        ("m", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64 * SEGMENTS),
        ("split", ctypes.c_int64 * SEGMENTS),
        ("x_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("tactic", ctypes.c_int32 * SEGMENTS),
        ("x", ctypes.c_void_p),
        ("ln_weight", ctypes.c_void_p),
        ("ln_bias", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scales", ctypes.c_void_p * SEGMENTS),
        ("zeros", ctypes.c_void_p * SEGMENTS),
        ("bias", ctypes.c_void_p * SEGMENTS),
        ("c", ctypes.c_void_p * SEGMENTS),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


class GptqArgs(Versioned):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64 * SEGMENTS),
        ("zero_offset", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("qweight", ctypes.c_void_p),
        ("qzeros", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("g_idx", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("c", ctypes.c_void_p * SEGMENTS),
    )


@dataclass(frozen=True, kw_only=True)
class Tactic:
    """``w4a16_tactic_info`` as plain values."""

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

    @property
    def is_gemv(self) -> bool:
        return self.kind == "gemv"

    @property
    def is_decode(self) -> bool:
        return self.kind == "decode"


_STATUS = ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, Sequence[Any]]] = {
    "last_error": (ctypes.c_char_p, ()),
    "status_name": (ctypes.c_char_p, (_STATUS,)),
    "api_version": (ctypes.c_uint32, ()),
    "version": (ctypes.c_char_p, ()),
    "build_info": (_STATUS, (ctypes.c_void_p,)),
    "check_device": (_STATUS, (ctypes.c_int32, ctypes.c_void_p)),
    "tactic_count": (ctypes.c_int32, ()),
    "tactic": (_STATUS, (ctypes.c_int32, ctypes.c_void_p)),
    "find_tactic": (_STATUS, (ctypes.c_char_p, ctypes.c_void_p)),
    "supports": (_STATUS, (ctypes.c_int32, ctypes.c_void_p)),
    "auto_tactic": (_STATUS, (ctypes.c_void_p, ctypes.c_void_p)),
    "workspace_size": (_STATUS, (ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)),
    "run": (_STATUS, (ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)),
    "run_named": (_STATUS, (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)),
    "packed_size": (
        _STATUS,
        (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ),
    "pack": (
        _STATUS,
        (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
        ),
    ),
    "unpack": (
        _STATUS,
        (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
        ),
    ),
    "pack_weight": (_STATUS, (ctypes.c_void_p, ctypes.c_int32)),
    "pack_weight_device": (_STATUS, (ctypes.c_void_p, ctypes.c_void_p)),
    "unpack_device": (
        _STATUS,
        (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ),
    ),
    "gather_columns": (
        _STATUS,
        (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ),
    ),
    "norm_qkv": (_STATUS, (ctypes.c_void_p, ctypes.c_void_p)),
    "norm_qkv_supports": (_STATUS, (ctypes.c_void_p,)),
    "norm_qkv_workspace": (_STATUS, (ctypes.c_void_p, ctypes.c_void_p)),
    "gptq_linear": (_STATUS, (ctypes.c_void_p, ctypes.c_void_p)),
    "gptq_supports": (_STATUS, (ctypes.c_void_p,)),
    "normalize_rows": (
        _STATUS,
        (
            *(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p),
        ),
    ),
}


class Library:
    """A loaded libw4a16.so; a status other than OK becomes a :class:`ApiError`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._dll = ctypes.CDLL(str(self.path))
        self._functions: dict[str, Any] = {}
        for name, (result, parameters) in _FUNCTIONS.items():
            function = getattr(self._dll, f"w4a16_{name}")
            function.restype = result
            function.argtypes = list(parameters)
            self._functions[name] = function
        self.tactics = tuple(self.tactic(i) for i in range(self.raw("tactic_count")))

    def raw(self, name: str, *arguments: Any) -> Any:
        """Calls ``w4a16_NAME`` and returns whatever it returns."""
        return self._functions[name](*arguments)

    def call(self, name: str, *arguments: Any) -> None:
        status = self.raw(name, *arguments)
        if status != Status.OK:
            raise ApiError(f"w4a16_{name}", Status(status), self.last_error())

    def last_error(self) -> str:
        return _text(self.raw("last_error"))

    @property
    def version(self) -> str:
        return _text(self.raw("version"))

    def build(self) -> dict[str, Any]:
        info = Build()
        self.call("build_info", ctypes.byref(info))
        return {
            str(field[0]): _text(value) if isinstance(value, bytes) else value
            for field in Build._fields_
            for value in [getattr(info, str(field[0]))]
        }

    def check_device(self, device: int = -1) -> Device:
        info = Device()
        self.call("check_device", device, ctypes.byref(info))
        return info

    def tactic(self, index: int) -> Tactic:
        info = TacticInfo()
        self.call("tactic", index, ctypes.byref(info))
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

    def find_tactic(self, name: str) -> int:
        index = ctypes.c_int32(-99)
        self.call("find_tactic", name.encode(), ctypes.byref(index))
        return index.value

    def status_of_supports(self, tactic: int, problem: Problem) -> Status:
        return Status(self.raw("supports", tactic, ctypes.byref(problem)))

    def auto_tactic(self, problem: Problem) -> Tactic:
        index = ctypes.c_int32(-99)
        self.call("auto_tactic", ctypes.byref(problem), ctypes.byref(index))
        return self.tactics[index.value]

    def workspace_size(self, tactic: int, problem: Problem) -> int:
        size = ctypes.c_size_t(0)
        self.call("workspace_size", tactic, ctypes.byref(problem), ctypes.byref(size))
        return size.value

    def run(self, tactic: int | str, args: Args, stream: int = 0) -> None:
        """By index, or by name through ``w4a16_run_named``."""
        if isinstance(tactic, str):
            self.call("run_named", tactic.encode(), ctypes.byref(args), stream)
        else:
            self.call("run", tactic, ctypes.byref(args), stream)

    def packed_size(self, arch: str | None, k: int, n: int) -> int:
        size = ctypes.c_size_t(0)
        self.call("packed_size", _name(arch), k, n, ctypes.byref(size))
        return size.value

    def pack(
        self, arch: str | None, plain: int, k: int, n: int, out: int, threads: int = 0
    ) -> None:
        """``plain`` and ``out`` are addresses."""
        self.call("pack", _name(arch), plain, k, n, out, threads)

    def unpack(
        self, arch: str | None, packed: int, k: int, n: int, out: int, threads: int = 0
    ) -> None:
        self.call("unpack", _name(arch), packed, k, n, out, threads)

    def pack_weight(self, args: PackArgs, threads: int = 0) -> None:
        self.call("pack_weight", ctypes.byref(args), threads)

    def pack_weight_device(self, args: PackArgs, stream: int = 0) -> None:
        self.call("pack_weight_device", ctypes.byref(args), stream)

    def unpack_device(
        self, arch: str | None, packed: int, k: int, n: int, out: int, stream: int = 0
    ) -> None:
        self.call("unpack_device", _name(arch), packed, k, n, out, stream)

    def gather_columns(
        self,
        x: int,
        m: int,
        x_stride: int,
        k_in: int,
        columns: int | None,
        k_out: int,
        out: int,
        stream: int = 0,
    ) -> None:
        self.call("gather_columns", x, m, x_stride, k_in, columns, k_out, out, stream)

    def normalize_rows(
        self,
        norm: int,
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
        flags: int = 0,
        stream: int = 0,
    ) -> None:
        self.call(
            "normalize_rows",
            *(norm, x, m, x_stride, hidden, ln_weight, ln_bias, eps),
            *(columns, k, out, flags, stream),
        )

    def norm_qkv(self, args: NormQkvArgs, stream: int = 0) -> None:
        self.call("norm_qkv", ctypes.byref(args), stream)

    def norm_qkv_workspace(self, args: NormQkvArgs) -> int:
        size = ctypes.c_size_t(0)
        self.call("norm_qkv_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    def gptq_linear(self, args: GptqArgs, stream: int = 0) -> None:
        self.call("gptq_linear", ctypes.byref(args), stream)


def pack_args(
    source: Source,
    arch: str | None,
    shape: tuple[int, int],
    source_shape: tuple[int, int],
    q: int,
    rows: int | None,
    out: int,
) -> PackArgs:
    """Shapes are (K, N); ``q``, ``rows`` and ``out`` are addresses."""
    return PackArgs(
        source=int(source),
        arch=_name(arch),
        k=shape[0],
        n=shape[1],
        source_k=source_shape[0],
        source_n=source_shape[1],
        q=q,
        rows=rows,
        out=out,
    )


def problem(
    quant_op: QuantOp, m: int, n: int, k: int, group: int = 0, bias: bool = False
) -> Problem:
    return Problem(
        quant_op=int(quant_op), m=m, n=n, k=k, group_size=group, has_bias=int(bias), reserved=0
    )


def find_library() -> Path:
    """``W4A16_LIBRARY`` (a file or an install tree), else the newest that the pipeline built."""
    given = os.environ.get("W4A16_LIBRARY")
    if given:
        path = Path(given)
        if path.is_file():
            return path
        found = _newest(path.glob("libw4a16.so"), path.glob("lib*/libw4a16.so"))
        found = found or _newest(path.glob("dist/install/lib*/libw4a16.so"))
        if found is None:
            raise LibraryNotFoundError(f"W4A16_LIBRARY={given}: no libw4a16.so there")
        return found
    found = _newest((ROOT / "artifacts").glob("*/*/dist/install/lib*/libw4a16.so"))
    if found is None:
        raise LibraryNotFoundError(
            "no built library: set W4A16_LIBRARY to libw4a16.so or an install tree,"
            " or run `nox -s extract build`"
        )
    return found


def point_package_at_library() -> None:
    """For the Python package, which loads its library when it is imported: here, where
    ``pyproject.toml`` names its folder, and in processes that tests start."""
    os.environ["W4A16_LIBRARY"] = str(find_library())
    folders = [str(ROOT / "runtime"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


def find_manifest(library: Path) -> dict[str, Any] | None:
    """The ``manifest.json`` of the run that built the library: ``W4A16_MANIFEST``, or above it."""
    given = os.environ.get("W4A16_MANIFEST")
    places = [Path(given)] if given else [p / "manifest.json" for p in library.parents[:5]]
    for place in places:
        if place.is_file():
            content = json.loads(place.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "selected" in content and "gemv" in content:
                return content
    if given:
        raise LibraryNotFoundError(f"W4A16_MANIFEST={given} is no manifest of this pipeline")
    return None


def _newest(*groups: Any) -> Path | None:
    paths = [path for group in groups for path in group]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _name(arch: str | None) -> bytes | None:
    return None if arch is None else arch.encode()
