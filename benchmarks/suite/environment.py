"""Where a run takes place: the library, the GPU, the versions."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite.errors import Missing

_RUNTIME = Path(__file__).resolve().parents[2] / "runtime"


def find_library() -> None:
    """Points the package at the library, as the GPU tests do; raises :class:`Missing`."""
    from tests.gpu.library import LibraryNotFoundError, point_package_at_library

    try:
        point_package_at_library()
    except LibraryNotFoundError as error:
        raise Missing(str(error)) from None
    # The tables that ship decide, not what somebody tuned on this machine.
    os.environ["W4A16_CACHE"] = "off"
    if importlib.util.find_spec("w4a16") is None:
        sys.path.insert(0, str(_RUNTIME))
    try:
        importlib.import_module("w4a16.library")
    except ImportError as error:
        raise Missing(f"the package cannot be loaded: {error}") from None


def load_torch() -> Any:
    """torch; raises :class:`Missing` without it or without a GPU."""
    try:
        import torch
    except ImportError as error:
        raise Missing(f"torch cannot be imported ({error}): pip install torch") from None
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device: run this on a machine with a Hopper GPU")
    return torch


def check(device: int) -> None:
    """Raises :class:`Missing` for a GPU that the library was not built for."""
    from w4a16.errors import W4A16Error
    from w4a16.library import LIBRARY

    try:
        LIBRARY.check_device(device)
    except W4A16Error as error:
        raise Missing(str(error)) from None


def describe(gpu: Any, clocks: Any) -> dict[str, Any]:
    """Device, driver, versions and the library's digests, for the result."""
    from w4a16 import tactics
    from w4a16.library import LIBRARY

    build, torch = LIBRARY.build, gpu.torch
    found = tactics.describe(gpu.device)
    return {
        "device": gpu.name,
        "sm_count": gpu.sm_count,
        "l2_bytes": gpu.l2_bytes,
        "memory_bytes": gpu.memory,
        "driver": clocks.driver() or "unknown",
        "torch": str(torch.__version__),
        "torch_cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "library": {
            "version": build.version,
            "api_version": build.api_version,
            "release": build.release,
            "compiler": build.compiler,
            "cuda_runtime": build.cuda_runtime_version,
            "tactics": build.tactic_count,
            "bundle_digest": build.bundle_digest,
            "digest": tactics.library_digest(),
        },
        "table": found.shipped,
    }
