"""Quantised linear modules of other programs in a torch model: their tensors, and what they mean.

They are known by what they hold, not by their classes: ``qweight``, ``qzeros`` and ``scales`` are
what GPTQModel, AutoGPTQ and AutoAWQ call their tensors (transformers loads checkpoints into these
programs' modules), ``weight_packed`` and ``weight_scale`` what compressed-tensors does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from w4a16.errors import FormatError
from w4a16.formats.config import LayerConfig, Method, QuantizationConfig, ZeroPoints

# Tensors that tell, and others that may be there.
_SETS = (
    (("qweight", "qzeros", "scales"), ("g_idx", "bias")),
    (
        ("weight_packed", "weight_scale"),
        ("weight_zero_point", "weight_shape", "weight_g_idx", "bias"),
    ),
)
# What ExLlama's kernels leave in a module once they have shuffled its qweight, which keeps its
# shape (GPTQModel and AutoAWQ, ``post_init``); other kernels change shapes or names.
_SHUFFLED = ("q4", "q_handle")
_FROM_FILES = (
    "load the model with a backend that does not (GPTQConfig(backend='torch'), AwqConfig with"
    " version='gemm'), or pass the checkpoint's folder as source"
)


def tensors_of(module: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of a quantised linear module, by a checkpoint's names; None: it is none."""
    held: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
    for names, others in _SETS:
        if all(_tensor(module, held, name) is not None for name in names):
            found = {name: _tensor(module, held, name) for name in (*names, *others)}
            return {name: tensor for name, tensor in found.items() if tensor is not None}
    return None


def layer_config(
    name: str,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    config: QuantizationConfig | None,
    zero_points: ZeroPoints | None,
) -> LayerConfig:
    """How the tensors of :func:`tensors_of` are stored.

    Shapes say GPTQ or AWQ and the group size; GPTQ's zero points are those of ``zero_points``, of
    the module itself (GPTQModel rewrites them when it loads a model, and says so by
    ``qzero_format()``), or of ``config``. Raises :class:`w4a16.FormatError`.
    """
    method = _method(name, tensors)
    if any(getattr(module, attribute, None) is not None for attribute in _SHUFFLED):
        raise FormatError(
            f"{name} is a {_class(module)} whose kernel has rearranged its weight: {_FROM_FILES}"
        )
    if config is not None and config.method != method:
        raise FormatError(
            f"{name} holds tensors as {method} stores them, but the quantization_config is of"
            f" {config.method}: pass the right one as config"
        )
    layer = None if config is None else config.for_module(name) or config.default
    if layer is None:
        symmetric = "weight_zero_point" not in tensors if method == "compressed-tensors" else None
        layer = LayerConfig(method=method, group_size=_group_size(module), symmetric=symmetric)
    if method != "gptq":
        return layer
    version = zero_points or _version(module)
    if version is None and config is None:
        raise FormatError(
            f"{name} is a {_class(module)}, and nothing says how its zero points are stored: pass"
            " config (the checkpoint's quantization_config), or zero_points, 'v1' (zero point - 1:"
            " AutoGPTQ) or 'v2' (the zero point: gptq_v2, GPTQModel in memory)"
        )
    return layer if version is None else replace(layer, zero_points=version)


def _tensor(module: nn.Module, held: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    # Not getattr alone: a property of that name may compute anything.
    value = held[name] if name in held else module.__dict__.get(name)
    return value if isinstance(value, Tensor) else None


def _method(name: str, tensors: Mapping[str, Tensor]) -> Method:
    if "weight_packed" in tensors:
        return "compressed-tensors"
    qweight, scales = tensors["qweight"], tensors["scales"]
    if qweight.dim() == 2 and scales.dim() == 2:
        n = scales.shape[1]
        if qweight.shape[1] == n:
            return "gptq"
        if qweight.shape[1] * 8 == n:
            return "awq"
    raise FormatError(
        f"{name}.qweight is {list(qweight.shape)} and {name}.scales is {list(scales.shape)}:"
        " expected [K/8, N] (GPTQ) or [K, N/8] (AWQ), and [groups, N]; if a kernel has rearranged"
        f" them, {_FROM_FILES}"
    )


def _version(module: nn.Module) -> ZeroPoints | None:
    stated = getattr(module, "qzero_format", None)
    if callable(stated):
        stated = stated()
    if stated == 1:
        return "v1"
    return "v2" if stated == 2 else None


def _group_size(module: nn.Module) -> int | None:
    """As the module says; else it is read off the shapes."""
    size = getattr(module, "group_size", None)
    if isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0):
        return size
    return None


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
