"""Stand-ins for what the library does on a GPU: the same results by numpy, in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from w4a16.library import LIBRARY, Device, Problem

WORKSPACE = 4096


def memory(address: int, count: int, dtype: str) -> Any:
    """An array on the memory at an address."""
    size = count * np.dtype(dtype).itemsize
    block: Any = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(block, dtype)


Product = Callable[..., Any]


def product(
    a: Any, q: Any, scales: Any, zeros: Any | None, bias: Any | None, group_size: int
) -> Any:
    """float16: dequantised, rounded once, multiplied in float32, rounded once."""
    group_of_row = np.arange(q.shape[0]) // (group_size or q.shape[0])
    weight = (q.astype(np.float64) - 8) * scales.astype(np.float64)[group_of_row]
    if zeros is not None:
        weight += zeros.astype(np.float64)[group_of_row]
    result = a.astype(np.float32) @ weight.astype(np.float16).astype(np.float32)
    return (result if bias is None else result + bias.astype(np.float32)).astype(np.float16)


class FakeKernels:
    """Launches; ``after`` is called with the arguments of each and the output as an array."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, Problem]] = []
        self.after: Callable[[int, Problem, Any, int], None] = lambda *_: None
        self.product: Product = product

    def run(self, *arguments: Any) -> None:
        (tactic, quant_op, m, n, k, group, a, b, scales, zeros, bias, c, work, size, *_) = arguments
        problem = Problem(
            quant_op=quant_op, m=m, n=n, k=k, group_size=group, has_bias=bias is not None
        )
        assert (work is None) == (size == 0)
        self.launches.append((tactic, problem))
        plain = np.empty((k, n // 2), np.uint8)
        LIBRARY.unpack(b, k, n, plain.ctypes.data)
        q = np.stack([plain & 15, plain >> 4], axis=-1).reshape(k, n)
        groups = k // group if group else 1
        table = memory(scales, groups * n, "float16").reshape(groups, n)
        added = None if not zeros else memory(zeros, groups * n, "float16").reshape(groups, n)
        last = None if bias is None else memory(bias, n, "float16")
        rows = memory(a, m * k, "float16").reshape(m, k)
        out = memory(c, m * n, "float16").reshape(m, n)
        out[...] = self.product(rows, q, table, added, last, group)
        self.after(tactic, problem, out, c)


def install(patch: pytest.MonkeyPatch) -> FakeKernels:
    """Lets the loaded library run on the stand-in for libcuda."""
    made = FakeKernels()
    found = Device(
        device=0,
        cc_major=9,
        cc_minor=0,
        sm_count=132,
        driver_version=13000,
        name="Fake H200",
        problem="",
    )

    def workspace_size(tactic: int, problem: Problem) -> int:
        return WORKSPACE if LIBRARY.tactics[tactic].uses_workspace else 0

    def pack_device(*arguments: Any, stream: int, **options: Any) -> None:
        LIBRARY.pack(*arguments, **options)

    def unpack_device(packed: int, k: int, n: int, q: int, **options: Any) -> None:
        LIBRARY.unpack(packed, k, n, q)

    def gather_columns(
        x: int, m: int, stride: int, k_in: int, columns: int | None, k: int, out: int, _: int
    ) -> None:
        order = np.arange(k) if columns is None else memory(columns, k, "int32")
        rows = memory(x, (m - 1) * stride + k_in, "float16")
        for row in range(m):
            source = rows[row * stride : row * stride + k_in]
            moved = np.where(order >= 0, source[np.clip(order, 0, k_in - 1)], np.float16(0))
            memory(out + 2 * row * k, k, "float16")[:] = moved

    patch.setattr(LIBRARY, "check_device", lambda device=-1: None)
    patch.setattr(LIBRARY, "device", lambda device=-1: found)
    patch.setattr(LIBRARY, "run", made.run)
    patch.setattr(LIBRARY, "workspace_size", workspace_size)
    patch.setattr(LIBRARY, "pack_device", pack_device)
    patch.setattr(LIBRARY, "unpack_device", unpack_device)
    patch.setattr(LIBRARY, "gather_columns", gather_columns)
    return made
