"""FP16 activations × INT4 weights (W4A16) on NVIDIA Hopper.

Importing this package loads the library and nothing else: no GPU is touched, and torch is used only
if the program imports it. ``torch.ops.w4a16`` is there if torch was imported before this package,
and from the first use of anything here that needs torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w4a16.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    InternalError,
    OutOfMemoryError,
    UnsupportedError,
    W4A16Error,
    W4A16Warning,
)
from w4a16.program import is_program

try:
    from w4a16 import fused
    from w4a16.arrays import DeviceArray
    from w4a16.convert import convert
    from w4a16.formats.config import LayerConfig, QuantizationConfig
    from w4a16.library import LIBRARY, QuantOp
    from w4a16.linear import linear
    from w4a16.overlap import set_overlap
    from w4a16.packed import PackedWeight
    from w4a16.packing import Unpacked, dequantize, pack, unpack
    from w4a16.tune import tune
except ImportError:
    if not is_program():
        raise

if TYPE_CHECKING:
    from w4a16.models import load_converted, replace_linears
    from w4a16.modules import W4A16Linear
    from w4a16.torch_ops import register_torch_ops

__all__ = [
    "ArgumentError",
    "DeviceArray",
    "DeviceError",
    "FormatError",
    "InternalError",
    "LayerConfig",
    "OutOfMemoryError",
    "PackedWeight",
    "QuantOp",
    "QuantizationConfig",
    "Unpacked",
    "UnsupportedError",
    "W4A16Error",
    "W4A16Linear",
    "W4A16Warning",
    "cmake_dir",
    "convert",
    "dequantize",
    "fused",
    "include_dir",
    "library_path",
    "linear",
    "load_converted",
    "pack",
    "register_torch_ops",
    "replace_linears",
    "set_overlap",
    "tactic_names",
    "tune",
    "unpack",
]

# What needs torch, and the module where it is; imported at its first use.
_NEEDS_TORCH = {
    "W4A16Linear": "modules",
    "load_converted": "models",
    "register_torch_ops": "torch_ops",
    "replace_linears": "models",
}


def tactic_names() -> tuple[str, ...]:
    """Names of the tactics of this library, in the order of their indices."""
    return tuple(tactic.name for tactic in LIBRARY.tactics)


def library_path() -> Path:
    """The loaded ``libw4a16.so``."""
    return LIBRARY.path


def include_dir() -> Path:
    """The folder of ``w4a16.h``."""
    return Path(__file__).resolve().parent / "include"


def cmake_dir() -> Path:
    """The folder of ``w4a16Config.cmake``, for ``find_package(w4a16 PATHS …)``."""
    return Path(__file__).resolve().parent / "cmake"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = LIBRARY.build.version
    elif name in _NEEDS_TORCH:
        value = getattr(import_module(f"w4a16.{_NEEDS_TORCH[name]}"), name)
    else:
        raise AttributeError(f"module 'w4a16' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    import_module("w4a16.torch_ops").register_torch_ops()
