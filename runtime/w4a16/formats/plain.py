"""Weights that are no checkpoint's: numbers, scales and zero points as they are.

======  ======================  ====================================================================
array   shape, dtype            content
======  ======================  ====================================================================
q       uint8 [K, N]            0..15
scales  [groups, N] (or [N])
zeros   [groups, N] (or [N])    zero points, any real numbers; optional: all 8
g_idx   int32 or int64 [K]      group of each input; optional
bias    [N]                     optional
======  ======================  ====================================================================

``w = (q - zero point) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping

from w4a16.arrays import View
from w4a16.formats.config import LayerConfig
from w4a16.formats.layer import (
    FLOATS,
    Layer,
    Points,
    check,
    check_rest,
    check_scales,
    grouping,
    take,
)
from w4a16.library import Source

TENSORS = ("q", "scales", "zeros", "g_idx", "bias")
_NUMBERS = (*FLOATS, "int8", "uint8", "int16", "int32", "int64")


def read(tensors: Mapping[str, View], config: LayerConfig) -> Layer:
    """Raises :class:`w4a16.FormatError` for arrays that do not fit together."""
    take(tensors, TENSORS, ("q", "scales"), "plain")
    q, scales = tensors["q"], tensors["scales"]
    check(q, "q", ("uint8",), (None, None), "[K, N] of 0..15")
    k, n = q.shape
    why = f"since q is {list(q.shape)}, so K is {k} and N is {n}"
    check_scales(scales, "scales", n, False, why)
    found = grouping(k, scales, 0, "scales", config.group_size, why)
    points = None
    zeros = tensors.get("zeros")
    if zeros is not None:
        shape = (n,) if len(zeros.shape) == 1 and found.groups == 1 else (found.groups, n)
        check(zeros, "zeros", _NUMBERS, shape, f"like scales ({why})")
        points = Points(kind="values", stored=zeros)
    check_rest(tensors.get("g_idx"), "g_idx", tensors.get("bias"), k, n, why)
    return Layer(
        source=Source.BYTES,
        q=q,
        q_name="q",
        in_features=k,
        out_features=n,
        source_k=k,
        groups=found.groups,
        group_size=found.group_size,
        scales=scales,
        scales_name="scales",
        scales_by_output=False,
        points=points,
        points_name="zeros",
        g_idx=tensors.get("g_idx"),
        g_idx_name="g_idx",
        bias=tensors.get("bias"),
        config=config,
    )
