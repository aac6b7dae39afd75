"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and AutoRound write them.

=========  ==================  ===================================================================
tensor     shape, dtype        content
=========  ==================  ===================================================================
qweight    int32 [K/8, N]      nibble i of word [r, c] is row 8r + i, 0..15
qzeros     int32 [groups, N/8] nibble i of word [g, c] is output 8c + i: zero point - 1 (``gptq``,
                               v1) or the zero point (``gptq_v2``, v2)
scales     [groups, N]
g_idx      int32 [K]           group of each input; optional
bias       [N]                 optional
=========  ==================  ===================================================================

``w = (q - zero point) * scale``. Source: ``gptqmodel/nn_modules/qlinear/torch.py`` and
``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` (``pack``, ``forward``).

**Zero points of v1.** GPTQModel (``gptqmodel/utils/model.py``, ``convert_gptq_v2_to_v1_format``),
AutoGPTQ 0.8 (pull request 640) and AutoRound (``qlinear_torch_zp.py``, ``pack_248_bits``) write
them by subtracting ``0x11111111`` from each 32-bit word, so that zero point 0 is stored as 15 and
borrows 1 from the next nibble; GPTQModel reads them by adding it. So does this module: modulo
2**32 that is the exact inverse, also where a nibble is 15. Readers that take each nibble alone
differ there: AutoGPTQ's kernels take ``(15 + 1) & 15 = 0`` without undoing the borrow
(``autogptq_extension/exllama/cuda_func/q4_matmul.cu``), vLLM's ``15 + 1 = 16``
(``csrc/quantization/gptq/q_gemm.cu``), which no quantiser means: a zero point is 0..15. AutoGPTQ
up to 0.7 spoilt the words with a zero point 0 when it wrote them (all higher nibbles became 15);
no reader can repair those.

**v1 or v2** is what ``checkpoint_format`` says (absent: v1). Some symmetric checkpoints (Qwen's
Qwen3.5-27B-GPTQ-Int4 is one, vLLM pull request 38966) say v1 but store v2: every nibble is 8, where
v1 would have 7. Those are read as what they are, with a :class:`w4a16.W4A16Warning`.
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

TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def read(tensors: Mapping[str, View], config: LayerConfig) -> Layer:
    """Raises :class:`w4a16.FormatError` for tensors that do not fit together."""
    required = ("qweight", "scales") if config.symmetric else ("qweight", "qzeros", "scales")
    take(tensors, TENSORS, required, "GPTQ")
    qweight, scales = tensors["qweight"], tensors["scales"]
    check(qweight, "qweight", ("int32",), (None, None), "eight rows of 4 bits a word")
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    if len(scales.shape) == 2 and scales.shape[1] == 8 * n:
        raise FormatError(
            f"qweight is {qweight.describe()} and scales is {scales.describe()}, as in an AWQ"
            " checkpoint, not in a GPTQ one: expected format='awq'"
        )
    why = f"since qweight is {list(qweight.shape)}, so K is {k} and N is {n}"
    check_scales(scales, "scales", n, False, why)
    found = grouping(k, scales, 0, "scales", config.group_size, why)
    points = None
    if "qzeros" in tensors:
        qzeros = tensors["qzeros"]
        shape = (found.groups, -(-n // 8))
        check(qzeros, "qzeros", ("int32",), shape, f"eight outputs a word ({why})")
        points = Points(kind="gptq", stored=qzeros)
    check_rest(tensors.get("g_idx"), "g_idx", tensors.get("bias"), k, n, why)
    return Layer(
        source=Source.GPTQ,
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
        g_idx=tensors.get("g_idx"),
        g_idx_name="g_idx",
        bias=tensors.get("bias"),
        config=config,
    )
