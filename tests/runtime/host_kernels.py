"""Stand-ins for what launches kernels, on host memory: every address is read as the real ones read
it, so that what leads to a launch is tested without a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from w4a16.library import LIBRARY, QuantOp
from w4a16.tactics import Plan

WORKSPACE = 777


def memory(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Host memory as an array."""
    count = int(np.prod(shape))
    kind = np.dtype(dtype)
    buffer = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(buffer, kind, count).reshape(shape)


@dataclass
class HostKernels:
    """Replaces ``run`` and ``gather_columns`` of the library, and the choice of tactics."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    gathers: list[dict[str, Any]] = field(default_factory=list)
    plans: list[tuple[Any, ...]] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch, *modules: Any) -> HostKernels:
        patch.setattr(LIBRARY, "run", self.run)
        patch.setattr(LIBRARY, "prepared", self.prepared)
        patch.setattr(LIBRARY, "gather_columns", self.gather_columns)
        for module in modules:
            patch.setattr(module, "plan", self.plan)
        return self

    def prepared(self, *arguments: Any) -> Any:
        tactic, quant_op, m, n, k, group_size, b, scales, zeros, bias, size = arguments

        def launch(a: int, c: int, workspace: int, stream: int, overlap: bool) -> None:
            weight = (b, scales, zeros or None, bias or None)
            given = (a, *weight, c, workspace or None, size)
            self.run(tactic, quant_op, m, n, k, group_size, *given, stream, overlap)

        return launch

    def plan(self, *problem: Any) -> Plan:
        self.plans.append(problem)
        return Plan(3, WORKSPACE)

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
        assert out % 16 == 0
        assert k_out % 8 == 0
        assert x_stride >= k_in
        self.gathers.append({"columns": columns, "x_stride": x_stride, "stream": stream})
        source = memory(x, ((m - 1) * x_stride + k_in,), np.float16)
        order = np.arange(k_out) if columns is None else memory(columns, (k_out,), np.int32)
        target = memory(out, (m, k_out), np.float16)
        for row in range(m):
            values = source[row * x_stride : row * x_stride + k_in]
            inside = (order >= 0) & (order < k_in)
            target[row] = np.where(inside, values[np.where(inside, order, 0)], 0)

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
        for address in (a, b, scales, zeros or 0, bias or 0, c, workspace or 0):
            assert address % 16 == 0
        assert (zeros is not None) == (quant_op == QuantOp.GROUP_SCALE_ZERO)
        self.launches.append(
            {"tactic": tactic, "stream": stream, "a": a, "c": c, "m": m, "overlap": overlap}
        )
        if workspace_bytes:
            assert workspace is not None
            memory(workspace, (workspace_bytes,), np.uint8)[...] = 0x7E
        plain = np.empty((k, n // 2), np.uint8)
        LIBRARY.unpack(b, k, n, plain.ctypes.data)
        q = np.stack([plain & 15, plain >> 4], axis=-1).reshape(k, n).astype(np.float64)
        groups = k // group_size if group_size else 1
        w = (q - 8) * memory(scales, (groups, n), np.float16).repeat(k // groups, axis=0)
        if zeros is not None:
            w += memory(zeros, (groups, n), np.float16).repeat(k // groups, axis=0)
        product = memory(a, (m, k), np.float16).astype(np.float64) @ w
        if bias is not None:
            product += memory(bias, (n,), np.float16)
        memory(c, (m, n), np.float16)[...] = product
