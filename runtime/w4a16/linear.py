"""``x @ W + bias`` for activations of any framework."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import numpy as np

from w4a16 import arrays, driver, overlap
from w4a16.arguments import Argument, check_linear, round_up
from w4a16.arrays import View
from w4a16.errors import ArgumentError
from w4a16.library import LIBRARY, Problem
from w4a16.packed import PackedWeight, require_packed
from w4a16.packing import dequantize
from w4a16.tactics import Plan, plan, resolve

_ALIGNMENT = 256

# Weights that were launched without overlap, outside of a capture.
_launched: WeakSet[PackedWeight] = WeakSet()


def linear(
    x: Any,
    packed: PackedWeight,
    bias: Any = None,
    *,
    tactic: int | str | None = None,
    out: Any = None,
    stream: int | None = None,
) -> Any:
    """``x @ W + bias``, float16 ``[..., in_features]`` → float16 ``[..., out_features]``.

    ``x`` is a torch tensor, or anything with ``__cuda_array_interface__`` or ``__dlpack__`` (CuPy,
    JAX, numba, :class:`w4a16.DeviceArray`), on the GPU of ``packed``. The result belongs to x's
    framework if that is torch or numpy and is a :class:`w4a16.DeviceArray` otherwise, which all of
    them take back. Rows of ``x`` may lie apart; other strides are copied (torch) or refused.

    ``bias`` (float16 ``[out_features]``) stands in for ``packed.bias``. ``tactic`` is a name or an
    index of :func:`w4a16.tactic_names`; None takes the fastest one known. ``out`` (float16
    ``[..., out_features]``, contiguous) receives the result and is returned.

    Nothing waits for the GPU. The launch is put on ``stream`` (a ``cudaStream_t`` as an integer) or
    else on the one that ``x`` comes with: torch's current stream, what the array's interface names,
    or the default stream. ``packed``, ``bias`` and ``out`` must be ready there, as every
    :class:`w4a16.DeviceArray` is.

    The launch may be captured into a CUDA graph, with ``out`` unless ``x`` is a torch tensor; all
    arrays must be ready before the capture begins.

    numpy arrays are multiplied on the CPU, slowly, for reference: dequantised, multiplied in
    float32, rounded once. Torch tensors on a CPU likewise.

    Raises :class:`w4a16.ArgumentError` for arguments that do not fit, before anything is launched,
    :class:`w4a16.UnsupportedError` for a tactic that has no kernel for them, and
    :class:`w4a16.DeviceError` where no kernel can run.
    """
    require_packed(packed)
    index = resolve(tactic)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        given = (packed.packed, packed.scales, packed.zeros, packed.columns, packed.bias, bias, out)
        if all(value is None or isinstance(value, torch.Tensor) for value in given):
            from w4a16 import torch_ops

            return torch_ops.linear(x, packed, bias, index, out, stream)
    weight = packed if bias is None else replace(packed, bias=bias)
    return _linear(x, weight, packed, index, out, stream)


def _linear(
    x: Any, weight: PackedWeight, given: PackedWeight, tactic: int, out: Any, stream: int | None
) -> Any:
    """``given`` is ``weight``, perhaps with another bias."""
    a = arrays.view(x, "x", stream=stream)
    a = replace(a, stream=(a.stream or 0) if stream is None else stream)
    operands = {
        name: arrays.view(value, name, stream=a.stream) for name, value in weight.arrays().items()
    }
    target = None if out is None else arrays.view(out, "out", stream=a.stream, writable=True)
    check_linear(
        x=Argument.of("x", a),
        packed=Argument.of("packed", operands["packed"]),
        scales=Argument.of("scales", operands["scales"]),
        zeros=_optional("zeros", operands),
        columns=_optional("columns", operands),
        bias=_optional("bias", operands),
        in_features=weight.in_features,
        out_features=weight.out_features,
        out=None if target is None else Argument.of("out", target),
    )
    if a.device < 0:
        return _reference(x, a, weight, out)
    with driver.use_device(a.device):
        result = out
        if target is None:
            result = arrays.empty((*a.shape[:-1], weight.out_features), "float16", like=a)
            target = arrays.view(result, "out", stream=a.stream)
        if math.prod(a.shape[:-1]) > 0:
            known = given in _launched
            runs_now = known or (_stays(given) and driver.capture_id(a.stream or 0) is None)
            _launch(a, operands, weight, target, tactic, known and overlap.enabled)
            if runs_now and not known:
                _launched.add(given)
    return result


def _stays(weight: PackedWeight) -> bool:
    """Whether its arrays are taken to stay as they are; tensors of torch may be changed in place,
    which is counted only where x is one, too."""
    torch = sys.modules.get("torch")
    read_early = (weight.packed, weight.scales, weight.zeros)
    return torch is None or not any(isinstance(array, torch.Tensor) for array in read_early)


def _launch(
    a: View,
    operands: dict[str, View],
    weight: PackedWeight,
    out: View,
    tactic: int,
    overlaps: bool,
) -> None:
    """On the current device. All that is needed beside ``out`` is one stream-ordered allocation."""
    stream = a.stream or 0
    rows = _row_stride(a)
    if rows is None:
        raise ArgumentError(
            f"x is {a.describe()}: expected rows that are dense and evenly spaced; make it"
            " contiguous"
        )
    m, n, k = math.prod(a.shape[:-1]), weight.n, weight.k
    columns, bias = operands.get("columns"), operands.get("bias")
    problem = Problem(
        quant_op=weight.quant_op,
        m=m,
        n=n,
        k=k,
        group_size=weight.group_size,
        has_bias=bias is not None,
    )
    chosen = _plan(a.device, problem, tactic)
    gathers = columns is not None or rows != k or a.address % 16 != 0
    pads_bias = bias is not None and bias.shape[0] != n
    narrows = n != weight.out_features or out.address % 16 != 0
    memory = _Memory()
    workspace = memory.reserve(chosen.workspace)
    gathered = memory.reserve(m * k * 2 if gathers else 0)
    padded_bias = memory.reserve(n * 2 if pads_bias else 0)
    wide = memory.reserve(m * n * 2 if narrows else 0)
    base = driver.allocate(memory.size, stream) if memory.size else 0
    try:
        if gathers:
            LIBRARY.gather_columns(
                a.address,
                m,
                rows,
                weight.in_features,
                None if columns is None else columns.address,
                k,
                base + gathered,
                stream,
            )
        if bias is not None and pads_bias:
            driver.memset(base + padded_bias, 0, n * 2, stream)
            driver.copy(base + padded_bias, bias.address, bias.nbytes, stream)
        LIBRARY.run(
            chosen.tactic,
            int(problem.quant_op),
            m,
            n,
            k,
            problem.group_size,
            base + gathered if gathers else a.address,
            operands["packed"].address,
            operands["scales"].address,
            operands["zeros"].address if "zeros" in operands else None,
            None if bias is None else base + padded_bias if pads_bias else bias.address,
            base + wide if narrows else out.address,
            base + workspace if chosen.workspace else None,
            chosen.workspace,
            stream,
            overlaps,
        )
        if narrows:
            row = weight.out_features * 2
            driver.copy_2d(out.address, row, base + wide, n * 2, row, m, stream)
    finally:
        if base:
            driver.free(base, stream)
        arrays.used(stream, (a, *operands.values()), out)


class _Memory:
    """Places in one allocation."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, size: int) -> int:
        start = self.size
        self.size += round_up(size, _ALIGNMENT)
        return start


def _plan(device: int, problem: Problem, tactic: int) -> Plan:
    if tactic >= 0:
        return Plan(tactic, LIBRARY.workspace_size(tactic, problem))
    return plan(
        device,
        int(problem.quant_op),
        problem.m,
        problem.n,
        problem.k,
        problem.group_size,
        problem.has_bias,
    )


def _row_stride(view: View) -> int | None:
    """Elements from one row to the next if all are dense and evenly spaced, otherwise None."""
    *rows, columns = zip(view.shape, view.strides, strict=True)
    if columns[0] > 1 and columns[1] != 1:
        return None
    apart: int | None = None
    expected: int | None = None
    for size, stride in reversed(rows):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return None
        apart = stride if apart is None else apart
        expected = stride * size
    if apart is None:
        return columns[0]
    return apart if apart >= columns[0] else None


def _reference(x: Any, a: View, weight: PackedWeight, out: Any) -> Any:
    """On the CPU: dequantised, multiplied in float32, rounded once."""
    w = np.asarray(dequantize(replace(weight, bias=None))).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.asarray(x).astype(np.float32) @ w
        if weight.bias is not None:
            product += np.asarray(weight.bias)[: weight.out_features].astype(np.float32)
        rounded = product.astype(np.float16)
    if out is None:
        out = arrays.empty(rounded.shape, "float16", like=a)
    np.asarray(out)[...] = rounded
    return out


def _optional(name: str, views: dict[str, View]) -> Argument | None:
    return Argument.of(name, views[name]) if name in views else None
