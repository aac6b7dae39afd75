"""Random weights in every checkpoint format, for ``w4a16 check``; shares no code with packing.

Formats and their sources: :mod:`w4a16.formats.gptq`, :mod:`~w4a16.formats.awq`,
:mod:`~w4a16.formats.compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = 128
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Subtracted from each word of GPTQ's first version: 1 from every nibble, borrows and all.
_ONES = 0x11111111


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to store a weight."""

    method: str
    """``"gptq"``, ``"gptq_v2"``, ``"awq"`` or ``"compressed-tensors"``."""
    symmetric: bool
    act_order: bool
    bias: bool

    @property
    def name(self) -> str:
        method = {"gptq": "gptq v1", "gptq_v2": "gptq v2"}.get(self.method, self.method)
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{method} {kind}{', act-order' if self.act_order else ''}"


FORMATS = tuple(
    Format(method=method, symmetric=symmetric, act_order=act_order, bias=symmetric == act_order)
    for method in ("gptq", "gptq_v2", "awq", "compressed-tensors")
    for symmetric in (True, False)
    for act_order in (False, True)
    if not (method == "awq" and act_order)
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A weight as a checkpoint has it, and as numbers."""

    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
    q: Any
    """uint8 ``[K, N]``."""
    scales: Any
    """float16 ``[groups, N]``."""
    zeros: Any | None
    """float16 ``[groups, N]``: ``(8 - zero point) * scale``, rounded once; None: all 0."""
    group_of_row: Any
    """int64 ``[K]``."""
    bias: Any | None
    """float16 ``[N]``."""


def checkpoint(format: Format, n: int, k: int, random: np.random.Generator) -> Checkpoint:
    """K is a multiple of 128, N of 8."""
    groups = k // GROUP
    q = random.integers(0, 16, (k, n), np.uint8)
    scales = np.exp2(random.uniform(-9, -7, (groups, n))).astype(np.float16)
    points = np.full((groups, n), 8, np.uint8)
    zeros = None
    if not format.symmetric:
        points = random.integers(0, 16, (groups, n), np.uint8)
        zeros = ((8.0 - points) * scales.astype(np.float64)).astype(np.float16)
    group_of_row = np.arange(k) // GROUP
    if format.act_order:
        group_of_row = random.permutation(group_of_row)
    bias = random.standard_normal(n).astype(np.float16) if format.bias else None
    tensors, config = _stored(format, q, scales, points, group_of_row)
    if bias is not None:
        tensors["bias"] = bias
    return Checkpoint(
        tensors=tensors,
        config=config,
        q=q,
        scales=scales,
        zeros=zeros,
        group_of_row=group_of_row,
        bias=bias,
    )


def _stored(
    format: Format, q: Any, scales: Any, points: Any, group_of_row: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    if format.method == "awq":
        tensors = {"qweight": words(q, _AWQ_ORDER), "qzeros": words(points, _AWQ_ORDER)}
        config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
        return {**tensors, "scales": scales}, {**config, "version": "gemm"}
    g_idx = group_of_row.astype(np.int32)
    if format.method == "compressed-tensors":
        return _compressed(format, q, scales, points, g_idx)
    qzeros = words(points)
    if format.method == "gptq":
        qzeros = (qzeros.view(np.uint32) - np.uint32(_ONES)).view(np.int32)
    tensors = {"qweight": columns(q), "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    return tensors, {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": format.symmetric,
        "desc_act": format.act_order,
        "checkpoint_format": format.method,
    }


def _compressed(
    format: Format, q: Any, scales: Any, points: Any, g_idx: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    k, n = q.shape
    tensors = {
        "weight_packed": words(q.T),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array([n, k], np.int64),
    }
    if not format.symmetric:
        tensors["weight_zero_point"] = columns(points.T)
    if format.act_order:
        tensors["weight_g_idx"] = g_idx
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "group",
        "group_size": GROUP,
        "actorder": "group" if format.act_order else None,
    }
    return tensors, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def words(values: Any, order: tuple[int, ...] = _IN_ORDER) -> Any:
    """int32 ``[rows, columns / 8]``: nibble i of a word is column ``order[i]`` of its eight."""
    eights = values.reshape(values.shape[0], -1, 8)[..., list(order)].astype(np.uint32)
    shifted = eights << np.arange(0, 32, 4, dtype=np.uint32)
    return np.ascontiguousarray(np.bitwise_or.reduce(shifted, axis=-1)).view(np.int32)


def columns(values: Any) -> Any:
    """int32 ``[rows / 8, columns]``: nibble i of a word is row i of its eight."""
    return np.ascontiguousarray(words(np.ascontiguousarray(values.T)).T)
