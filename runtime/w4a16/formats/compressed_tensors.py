"""compressed-tensors checkpoints of the format ``pack-quantized``, as llm-compressor writes them.

=================  =======================  =======================================================
tensor             shape, dtype             content
=================  =======================  =======================================================
weight_packed      int32 [N, ceil(K/8)]     nibble i of word [c, r] is input 8r + i of output c,
                                            plus 8
weight_scale       [N, groups]
weight_zero_point  int32 [ceil(N/8), groups]  nibble i of word [r, g] is output 8r + i, plus 8; or
                                            int8 [N, groups], not packed (older versions)
weight_shape       int [2]                  N, K; optional
weight_g_idx       int32 [K]                group of each input; optional; all -1: none
bias               [N]                      optional
=================  =======================  =======================================================

``w = (q - zero point) * scale`` with signed ``q`` and zero point in -8..7; both are stored plus 8,
so the difference is that of the stored numbers. Source:
``compressors/quantized_compressors/pack_quantized.py`` (``pack_to_int32``: offset, padding, packing
along dimension 0 for zero points) and ``quantization/lifecycle/forward.py`` (``-1 in g_idx``).
"""

from __future__ import annotations

from collections.abc import Mapping

from w4a16.arrays import View
from w4a16.errors import FormatError
from w4a16.formats.config import LayerConfig
from w4a16.formats.layer import (
    Layer,
    Points,
    check,
    check_rest,
    check_scales,
    grouping,
    take,
)
from w4a16.library import Source

TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "bias",
)


def read(
    tensors: Mapping[str, View], config: LayerConfig, shape: tuple[int, int] | None = None
) -> Layer:
    """``shape`` is the content of ``weight_shape``. Raises :class:`w4a16.FormatError` for tensors
    that do not fit together."""
    required = ["weight_packed", "weight_scale"]
    if config.symmetric is False:
        required.append("weight_zero_point")
    take(tensors, TENSORS, tuple(required), "compressed-tensors")
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    check(packed, "weight_packed", ("int32",), (None, None), "eight inputs of 4 bits a word")
    n, source_k = packed.shape[0], packed.shape[1] * 8
    k = source_k
    if shape is not None:
        if shape[0] != n or -(-shape[1] // 8) != packed.shape[1]:
            raise FormatError(
                f"weight_shape is {list(shape)}, but weight_packed is {packed.describe()}:"
                f" expected [{n}, {source_k - 7} to {source_k}]"
            )
        k = shape[1]
    why = f"since weight_packed is {list(packed.shape)}, so K is {k} and N is {n}"
    check_scales(scales, "weight_scale", n, True, why)
    found = grouping(k, scales, 1, "weight_scale", config.group_size, why)
    points = None
    stored = tensors.get("weight_zero_point")
    if stored is not None and not config.symmetric:
        if stored.dtype == "int8":
            check(stored, "weight_zero_point", ("int8",), (n, found.groups), why)
            points = Points(kind="signed", stored=stored)
        else:
            extent = (-(-n // 8), found.groups)
            why_points = f"eight outputs a word ({why})"
            check(stored, "weight_zero_point", ("int32",), extent, why_points)
            points = Points(kind="outputs", stored=stored)
    g_idx = tensors.get("weight_g_idx")
    check_rest(g_idx, "weight_g_idx", tensors.get("bias"), k, n, why)
    return Layer(
        source=Source.COMPRESSED_TENSORS,
        q=packed,
        q_name="weight_packed",
        in_features=k,
        out_features=n,
        source_k=source_k,
        groups=found.groups,
        group_size=found.group_size,
        scales=scales,
        scales_name="weight_scale",
        scales_by_output=True,
        points=points,
        points_name="weight_zero_point",
        g_idx=g_idx,
        g_idx_name="weight_g_idx",
        bias=tensors.get("bias"),
        config=config,
    )
