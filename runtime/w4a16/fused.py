"""LayerNorm or RMSNorm and the quantised Q, K and V projections behind it, in one call.

The normalised input goes straight to the projections' kernels; on a GPU those for few rows read
their weights while the normalisation runs. Importing this module needs nothing; calling it needs
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from w4a16.errors import ArgumentError
from w4a16.fused_weights import FusedQKV, GPTQTensors, fuse_qkv
from w4a16.library import Norm

__all__ = ["FusedQKV", "GPTQTensors", "fuse_qkv", "layernorm_qkv", "rmsnorm_qkv"]


def layernorm_qkv(
    x: Any,
    weight: FusedQKV | GPTQTensors,
    ln_weight: Any = None,
    ln_bias: Any = None,
    eps: float = 1e-5,
    *,
    out: Any = None,
    tactic: int | str | None = None,
    joined: bool | None = None,
    one_kernel: bool = False,
) -> Any:
    """``layer_norm(x) @ W + bias`` for the Q, K and V projections of one input.

    ``x`` is a float16 torch tensor ``[..., hidden]``; mean and variance are of two passes in
    float32, ``(x - mean) / sqrt(variance + eps) * ln_weight + ln_bias`` is rounded to float16 once.
    ``weight`` is what :func:`fuse_qkv` packs, or a checkpoint's own tensors (:class:`GPTQTensors`),
    which run as they are.

    Returns ``[segments, ..., n]`` where all projections have n outputs, otherwise a tuple of
    ``[..., n_q]``, ``[..., n_k]``, ``[..., n_v]``; either way they lie in one buffer. ``out`` (such
    a tensor, or a sequence of one contiguous tensor for each projection) receives the result and
    is returned.

    ``tactic`` is a name or an index of :func:`w4a16.tactic_names` for all projections; None takes
    the fastest one known for each. For :class:`GPTQTensors` the only one is ``gptq:plain``.
    ``joined`` runs one product over all columns and splits it, in place of one product for each
    projection; None lets the sizes and the tactic decide. ``one_kernel`` has each product's kernel
    normalise the rows by itself, which some for few rows can; by default a kernel of its own does
    that, which takes less time unless overlap is off (:func:`w4a16.set_overlap`) and there are 1 or
    2 rows of up to 2048.

    Nothing waits for the GPU; all memory comes from torch's allocator, and calls may be captured
    into a CUDA graph. On a CPU it is a slow reference.

    Raises :class:`w4a16.ArgumentError` for arguments that do not fit, before anything is launched,
    :class:`w4a16.UnsupportedError` for a tactic that has no kernel for them, and
    :class:`w4a16.DeviceError` where no kernel can run.
    """
    options = (tactic, joined, one_kernel)
    return _call(Norm.LAYER, x, weight, ln_weight, ln_bias, eps, out, *options)


def rmsnorm_qkv(
    x: Any,
    weight: FusedQKV | GPTQTensors,
    ln_weight: Any = None,
    ln_bias: Any = None,
    eps: float = 1e-6,
    *,
    out: Any = None,
    tactic: int | str | None = None,
    joined: bool | None = None,
    one_kernel: bool = False,
) -> Any:
    """:func:`layernorm_qkv` with ``x / sqrt(mean(x * x) + eps) * ln_weight + ln_bias``."""
    options = (tactic, joined, one_kernel)
    return _call(Norm.RMS, x, weight, ln_weight, ln_bias, eps, out, *options)


def _call(
    norm: Norm,
    x: Any,
    weight: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: float,
    out: Any,
    tactic: int | str | None,
    joined: bool | None,
    one_kernel: bool,
) -> Any:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise ArgumentError(f"x is a {type(x).__name__}: expected a torch tensor")
    if not isinstance(weight, FusedQKV | GPTQTensors):
        raise ArgumentError(
            f"weight is a {type(weight).__name__}: expected a FusedQKV (w4a16.fused.fuse_qkv makes"
            " it) or a GPTQTensors"
        )
    _check_options(eps, ln_weight, ln_bias, joined, one_kernel, torch.Tensor)
    from w4a16 import fused_ops

    if out is None:
        call = (norm, x, weight, ln_weight, ln_bias, eps, tactic, joined, one_kernel)
        found = fused_ops.call(*call)
        return fused_ops.segments(found, x.shape[:-1], weight.widths)
    targets = _targets(out, x, weight.widths)
    call = (norm, x, weight, ln_weight, ln_bias, eps, tactic, joined, one_kernel)
    fused_ops.call_out(*call, targets)
    return out


def _check_options(
    eps: Any, ln_weight: Any, ln_bias: Any, joined: Any, one_kernel: Any, tensor: type
) -> None:
    """What torch's dispatcher would refuse with the operator's signature."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise ArgumentError(f"eps is {eps!r:.40}: expected a number")
    for name, value in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if value is not None and not isinstance(value, tensor):
            raise ArgumentError(
                f"{name} is a {type(value).__name__}: expected a torch tensor, or None"
            )
    if joined is not None and not isinstance(joined, bool):
        raise ArgumentError(f"joined is {joined!r:.40}: expected True, False or None")
    if not isinstance(one_kernel, bool):
        raise ArgumentError(f"one_kernel is {one_kernel!r:.40}: expected True or False")


def _targets(out: Any, x: Any, widths: Sequence[int]) -> list[Any]:
    """One tensor for each segment; a view where ``out`` is one buffer."""
    try:
        given = list(out)  # a tensor: along its first dimension
    except TypeError:
        raise ArgumentError(
            f"out is a {type(out).__name__}: expected {len(widths)} tensors, one for each"
            " projection"
        ) from None
    if len(given) != len(widths):
        raise ArgumentError(
            f"out is {len(given)} tensors: expected {len(widths)}, one for each projection, or one"
            f" tensor [{len(widths)}, ...] if all have the same width"
        )
    for value in given:
        if not hasattr(value, "data_ptr"):
            raise ArgumentError(f"out holds a {type(value).__name__}: expected torch tensors")
    return given
