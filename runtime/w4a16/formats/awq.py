"""AWQ checkpoints of AutoAWQ's version ``gemm``.

=========  ==================  ===================================================================
tensor     shape, dtype        content
=========  ==================  ===================================================================
qweight    int32 [K, N/8]      nibbles 0..7 of word [k, c] are the outputs 8c + 0 2 4 6 1 3 5 7
qzeros     int32 [groups, N/8] zero points, in the same order
scales     [groups, N]
bias       [N]                 optional
=========  ==================  ===================================================================

``w = (q - zero point) * scale``. Source: ``awq/modules/linear/gemm.py`` and
``awq/utils/packing_utils.py`` of AutoAWQ. Without zero points (``zero_point: false``) every one
is 8.
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

TENSORS = ("qweight", "qzeros", "scales", "bias")


def read(tensors: Mapping[str, View], config: LayerConfig) -> Layer:
    """Raises :class:`w4a16.FormatError` for tensors that do not fit together."""
    required = ("qweight", "scales") if config.symmetric else ("qweight", "qzeros", "scales")
    take(tensors, TENSORS, required, "AWQ")
    qweight, scales = tensors["qweight"], tensors["scales"]
    check(qweight, "qweight", ("int32",), (None, None), "eight outputs of 4 bits a word")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    if len(scales.shape) == 2 and scales.shape[1] * 8 == n:
        raise FormatError(
            f"qweight is {qweight.describe()} and scales is {scales.describe()}, as in a GPTQ"
            " checkpoint, not in an AWQ one: expected format='gptq'"
        )
    why = f"since qweight is {list(qweight.shape)}, so K is {k} and N is {n}"
    check_scales(scales, "scales", n, False, why)
    found = grouping(k, scales, 0, "scales", config.group_size, why)
    points = None
    if "qzeros" in tensors:
        qzeros = tensors["qzeros"]
        check(qzeros, "qzeros", ("int32",), (found.groups, n // 8), f"eight outputs a word ({why})")
        points = Points(kind="awq", stored=qzeros)
    check_rest(None, "", tensors.get("bias"), k, n, why)
    return Layer(
        source=Source.AWQ,
        q=qweight,
        q_name="qweight",
        in_features=k,
        out_features=n,
        source_k=k,
        groups=found.groups,
        group_size=found.group_size,
        scales=scales,
        scales_name="scales",
        scales_by_output=False,
        points=points,
        points_name="qzeros",
        g_idx=None,
        g_idx_name="",
        bias=tensors.get("bias"),
        config=config,
    )
