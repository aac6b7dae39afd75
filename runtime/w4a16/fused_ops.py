"""``torch.ops.w4a16`` for normalisation with projections; :mod:`w4a16.torch_ops` registers them.

Each comes for ``layernorm`` and ``rmsnorm``, and with ``_out`` for tensors that receive the result:

============================ ===================================================================
``layernorm_qkv``            with a packed weight (:class:`w4a16.fused.FusedQKV`)
``layernorm_qkv_gptq``       with a checkpoint's tensors (:class:`w4a16.fused.GPTQTensors`)
============================ ===================================================================

The result is ``[segments, ..., n]`` where all projections have n outputs; otherwise it has one
dimension, in which the projections' ``[..., n_i]`` follow each other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from w4a16 import overlap, torch_ops
from w4a16.arguments import N_MULTIPLE, Argument, check_weight
from w4a16.errors import ArgumentError
from w4a16.fused_weights import MOST_SEGMENTS, FusedQKV, GPTQTensors, ranges
from w4a16.library import (
    AUTO,
    LIBRARY,
    RUN_ONE_KERNEL,
    RUN_OVERLAP,
    GptqArgs,
    Norm,
    NormQkvArgs,
    QuantOp,
)
from w4a16.tactics import plan, resolve
from w4a16.torch_ops import arguments_of

#: The one tactic that runs a checkpoint's own tensors.
GPTQ_PLAIN = "gptq:plain"

_NORM = "Tensor x, Tensor? ln_weight, Tensor? ln_bias, float eps"
_PACKED = (
    "Tensor packed, Tensor[] scales, Tensor[] zeros, Tensor[] bias, Tensor? columns,"
    " Tensor?[] joined, int in_features, int[] widths"
)
_GPTQ = (
    "Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? g_idx, Tensor? bias, int group_size,"
    " bool stored_minus_1, int[] widths"
)
_TACTIC = "int tactic=-1, int join=-1, bool one_kernel=False"
_SCHEMAS = {
    "qkv": f"({_NORM}, {_PACKED}, {_TACTIC}) -> Tensor",
    "qkv_out": f"({_NORM}, {_PACKED}, Tensor(a!)[] out, {_TACTIC}) -> ()",
    "qkv_gptq": f"({_NORM}, {_GPTQ}) -> Tensor",
    "qkv_gptq_out": f"({_NORM}, {_GPTQ}, Tensor(a!)[] out) -> ()",
}
_NAMES = {Norm.LAYER: "layernorm", Norm.RMS: "rmsnorm"}

_HALF = torch.float16
#: Rows and columns of the GEMM's tiles, about.
_TILE = 128


def register(library: Any, tags: Sequence[Any]) -> None:
    """Defines the operators in torch's ``library``."""
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
        "qkv": (_qkv_cuda, _qkv_cpu, _qkv_fake),
        "qkv_out": (_qkv_out_cuda, _qkv_out_cpu, _qkv_out_fake),
        "qkv_gptq": (_gptq_cuda, _gptq_cpu, _gptq_fake),
        "qkv_gptq_out": (_gptq_out_cuda, _gptq_out_cpu, _gptq_out_fake),
    }
    for norm, prefix in _NAMES.items():
        for suffix, schema in _SCHEMAS.items():
            name = f"{prefix}_{suffix}"
            on_cuda, on_cpu, fake = kernels[suffix]
            library.define(name + schema, tags=tags)
            library.impl(name, partial(on_cuda, norm), "CUDA")
            library.impl(name, partial(on_cpu, norm), "CPU")
            torch.library.register_fake(f"w4a16::{name}", fake, lib=library)
            if suffix.endswith("_out"):
                library.impl(name, partial(_out_autograd, name), "Autograd")
            else:
                torch.library.register_autograd(
                    f"w4a16::{name}", _backward, setup_context=_keep_shapes, lib=library
                )


def call(
    norm: Norm,
    x: Tensor,
    weight: FusedQKV | GPTQTensors,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    tactic: int | str | None,
    joined: bool | None,
    one_kernel: bool,
) -> Tensor:
    """The operator for the kind of ``weight``."""
    name, arguments, options = _request(norm, weight, tactic, joined, one_kernel)
    op = getattr(torch.ops.w4a16, name).default
    found: Tensor = op(x, ln_weight, ln_bias, eps, *arguments, *options)
    return found


def call_out(
    norm: Norm,
    x: Tensor,
    weight: FusedQKV | GPTQTensors,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    tactic: int | str | None,
    joined: bool | None,
    one_kernel: bool,
    out: list[Tensor],
) -> None:
    """The same into tensors."""
    name, arguments, options = _request(norm, weight, tactic, joined, one_kernel)
    op = getattr(torch.ops.w4a16, f"{name}_out").default
    op(x, ln_weight, ln_bias, eps, *arguments, out, *options)


def segments(found: Tensor, leading: Sequence[int], widths: Sequence[int]) -> Any:
    """What a caller of the function gets of an operator's result."""
    if len(set(widths)) == 1:
        return found
    rows = math.prod(leading)
    return tuple(
        found[rows * begin : rows * end].view(*leading, end - begin)
        for begin, end in ranges(widths)
    )


def _request(
    norm: Norm,
    weight: FusedQKV | GPTQTensors,
    tactic: int | str | None,
    joined: bool | None,
    one_kernel: bool = False,
) -> tuple[str, tuple[Any, ...], tuple[int, ...]]:
    if not torch_ops.is_registered():
        torch_ops.register_torch_ops()
    if isinstance(weight, GPTQTensors):
        if joined is not None or one_kernel:
            given = f"joined is {joined}" if joined is not None else "one_kernel is True"
            raise ArgumentError(
                f"{given}, but the weight is a checkpoint's own tensors, for which there is one"
                " form: leave joined and one_kernel out, or pass a weight that"
                " w4a16.fused.fuse_qkv packed"
            )
        if tactic not in (None, "auto", GPTQ_PLAIN):
            raise ArgumentError(
                f"tactic is {tactic!r}, but the weight is a checkpoint's own tensors: expected"
                f" {GPTQ_PLAIN!r} or None, or a weight that w4a16.fused.fuse_qkv packed"
            )
        tensors = (weight.qweight, weight.scales, weight.qzeros, weight.g_idx, weight.bias)
        stored_minus_1 = weight.zero_points == "v1"
        arguments = (*tensors, weight.group_size, stored_minus_1, list(weight.widths))
        return f"{_NAMES[norm]}_qkv_gptq", arguments, ()
    if tactic == GPTQ_PLAIN:
        raise ArgumentError(
            f"tactic is {GPTQ_PLAIN!r}, but the weight is packed: expected a GPTQTensors, which"
            " holds a checkpoint's own tensors"
        )
    return (
        f"{_NAMES[norm]}_qkv",
        (
            *(weight.packed, list(weight.scales), list(weight.zeros), list(weight.bias)),
            *(weight.columns, list(weight.joined), weight.in_features, list(weight.widths)),
        ),
        (resolve(tactic), -1 if joined is None else int(joined), one_kernel),
    )


# ---- Packed weights on CUDA ----


class _Known(torch_ops.Remembered):
    """Tensors that were found to make up a weight, kept with that of its quantised values."""

    __slots__ = ("counts_changes", "held", "key")

    def __init__(self, key: tuple[Any, ...], values: Tensor, held: Sequence[Tensor | None]) -> None:
        """``held`` is all but ``values``, which holds this."""
        self.key = key
        #: While they are held, no other tensor has their addresses.
        self.held = tuple(held)
        #: Whether torch counts changes of what a launch with overlap may read early.
        self.counts_changes = not any(t.is_inference() for t in (values, *held) if t is not None)
        #: What the tensors' versions summed to when they were last launched without overlap.
        self.launched = -1

    def is_of(self, key: tuple[Any, ...], held: Sequence[Tensor | None]) -> bool:
        """Whether it was made for these tensors, still at the same places and as large."""
        return self.key == key and all(map(operator.is_, self.held, held))

    def version(self, values: Tensor) -> int:
        """Grows whenever torch changes one of the tensors."""
        return sum(t._version for t in (values, *self.held) if t is not None)


def _key(tensors: Sequence[Tensor | None], *sizes: int) -> tuple[Any, ...]:
    return (*((0, 0) if t is None else (t.data_ptr(), t.numel()) for t in tensors), *sizes)


class _Packed(_Known):
    """A packed weight, with what its launches have in common."""

    __slots__ = ("bias", "columns", "group_size", "joined", "k", "quant_op", "scales", "zeros")

    def __init__(
        self,
        key: tuple[Any, ...],
        packed: Tensor,
        scales: Sequence[Tensor],
        zeros: Sequence[Tensor],
        bias: Sequence[Tensor],
        columns: Tensor | None,
        joined: Sequence[Tensor | None],
    ) -> None:
        """Arguments that are right."""
        super().__init__(key, packed, (*scales, *zeros, *bias, columns, *joined))
        self.k = packed.shape[1] * 2
        groups = scales[0].shape[0]
        per_column = not zeros and groups == 1
        self.group_size = 0 if per_column else self.k // groups
        self.quant_op = (
            QuantOp.PER_COLUMN
            if per_column
            else QuantOp.GROUP_SCALE_ZERO
            if zeros
            else QuantOp.GROUP_SCALE
        )
        self.scales = [tensor.data_ptr() for tensor in scales]
        self.zeros = [tensor.data_ptr() for tensor in zeros]
        self.bias = [tensor.data_ptr() for tensor in bias]
        self.columns = _address(columns)
        self.joined = [_address(tensor) for tensor in joined]


def _packed(
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
) -> _Packed:
    held = (*scales, *zeros, *bias, columns, *joined)
    counts = (len(scales), len(zeros), len(bias))
    key = _key((packed, *held), *counts, in_features, *widths)
    found: Any = getattr(packed, "_w4a16_fused", None)
    if isinstance(found, _Packed) and found.is_of(key, held):
        return found
    _check_packed(packed, scales, zeros, bias, columns, joined, in_features, widths)
    made = _Packed(key, packed, scales, zeros, bias, columns, joined)
    packed._w4a16_fused = made
    return made


def _qkv_cuda(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
    tactic: int = -1,
    join: int = -1,
    one_kernel: bool = False,
) -> Tensor:
    weight = _packed(packed, scales, zeros, bias, columns, joined, in_features, widths)
    _check_norm(x, ln_weight, ln_bias, eps, in_features, packed)
    result = _empty(x, widths)
    targets = _places(result, x, widths)
    call = (norm, x, ln_weight, ln_bias, eps, packed, weight, widths, targets)
    _launch(*call, tactic, join, one_kernel)
    return result


def _qkv_out_cuda(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
    out: Sequence[Tensor],
    tactic: int = -1,
    join: int = -1,
    one_kernel: bool = False,
) -> None:
    weight = _packed(packed, scales, zeros, bias, columns, joined, in_features, widths)
    _check_norm(x, ln_weight, ln_bias, eps, in_features, packed)
    _check_out(out, x, widths)
    targets = _aligned(out)
    places = [target.data_ptr() for target in targets]
    call = (norm, x, ln_weight, ln_bias, eps, packed, weight, widths, places)
    _launch(*call, tactic, join, one_kernel)
    _copy_back(targets, out)


def _launch(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    weight: _Packed,
    widths: Sequence[int],
    places: Sequence[int],
    tactic: int,
    join: int,
    one_kernel: bool,
) -> None:
    """Checked arguments but the tactic; memory freed here is reused in stream order."""
    tactic = resolve(tactic)
    m = math.prod(x.shape[:-1])
    if m == 0:
        return
    device = x.get_device()
    if torch_ops._current_device() != device:
        with torch.cuda.device(device):
            call = (norm, x, ln_weight, ln_bias, eps, packed, weight, widths, places)
            _launch(*call, tactic, join, one_kernel)
            return
    rows, stride = _rows(x)
    args = NormQkvArgs(
        norm=int(norm),
        quant_op=int(weight.quant_op),
        m=m,
        hidden=x.shape[-1],
        k=weight.k,
        group_size=weight.group_size,
        x_stride=stride,
        eps=eps,
        x=rows.data_ptr(),
        ln_weight=_address(ln_weight),
        ln_bias=_address(ln_bias),
        columns=weight.columns,
        b=packed.data_ptr(),
    )
    joins = len(widths) > 1 and join != 0
    if joins and join < 0:
        joins = _joins(device, m, tuple(widths), weight, tactic)
    for i, n in enumerate([sum(widths)] if joins else widths):
        args.n[i] = n
        args.scales[i] = weight.joined[0] if joins else weight.scales[i]
        if weight.zeros:
            args.zeros[i] = weight.joined[1] if joins else weight.zeros[i]
        if weight.bias:
            args.bias[i] = weight.joined[2] if joins else weight.bias[i]
        args.tactic[i] = tactic
    for i, (n, place) in enumerate(zip(widths, places, strict=True)):
        args.split[i] = n if joins else 0
        args.c[i] = place
    args.flags = RUN_ONE_KERNEL if one_kernel else 0
    size = _workspace(device, args, weight)
    memory = torch_ops._empty_cuda((size,), (1,), torch.uint8)
    args.workspace, args.workspace_bytes = memory.data_ptr(), size
    beginning = _Overlap(weight, packed)
    args.flags |= beginning.flags
    LIBRARY.norm_qkv(args, torch_ops._raw_stream(device))
    beginning.launched()


def _workspace(device: int, args: NormQkvArgs, weight: _Packed) -> int:
    """The bytes that the call needs; tactics are chosen here, but those that normalise."""
    if args.tactic[0] != AUTO or args.flags & RUN_ONE_KERNEL:
        return LIBRARY.norm_qkv_workspace(args)
    outputs = sum(part > 0 for part in args.split) or 1
    for i, n in enumerate(args.n):
        if n > 0:
            args.tactic[i] = _planned(device, args.m, n, weight, outputs)
    return LIBRARY.norm_qkv_workspace(args)


def _planned(device: int, m: int, n: int, weight: _Packed, outputs: int) -> int:
    problem = (int(weight.quant_op), m, n, weight.k, weight.group_size, bool(weight.bias))
    return plan(device, *problem, outputs).tactic


def _joins(device: int, m: int, widths: tuple[int, ...], weight: _Packed, tactic: int) -> bool:
    """Whether one product over all columns takes less time than one for each projection: where all
    of them together have few tiles, or nothing needs to be copied."""
    if _few_tiles(device, m, widths):
        return True
    if tactic == AUTO:
        tactic = _planned(device, m, sum(widths), weight, len(widths))
    return LIBRARY.tactics[tactic].kind == "decode"


@lru_cache(maxsize=4096)
def _few_tiles(device: int, m: int, widths: tuple[int, ...]) -> bool:
    sm_count = LIBRARY.device(device).sm_count
    return sum(-(-n // _TILE) for n in widths) * -(-m // _TILE) < 4 * sm_count


class _Overlap:
    """Whether a call may begin before the kernel before it has ended.

    Weights are then read early, so it waits for one call without overlap since torch last changed
    them.
    """

    def __init__(self, weight: _Known, values: Tensor) -> None:
        self._weight = weight
        counted = overlap.enabled and weight.counts_changes
        self._version = weight.version(values) if counted else torch_ops.UNKNOWN
        self.flags = RUN_OVERLAP if self._version == weight.launched else 0

    def launched(self) -> None:
        """The launch succeeded."""
        if self.flags == 0:
            self._weight.ran_plainly(self._version)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with dense rows that are evenly spaced, and their distance."""
    hidden = x.shape[-1]
    if x.is_contiguous():
        return x, hidden
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= hidden:
        return x, x.stride(0)
    return x.contiguous(), hidden


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(out: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that the kernels can write."""
    return [t if t.data_ptr() % 16 == 0 else torch.empty_like(t) for t in out]


def _copy_back(targets: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for target, given in zip(targets, out, strict=True):
        if target is not given:
            given.copy_(target)


# ---- Checkpoints' own tensors on CUDA ----


def _gptq_cuda(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    stored_minus_1: bool,
    widths: Sequence[int],
) -> Tensor:
    tensors = (qweight, scales, qzeros, g_idx, bias)
    weight = _checkpoint(*tensors, group_size, widths)
    _check_norm(x, ln_weight, ln_bias, eps, qweight.shape[0] * 8, qweight)
    result = _empty(x, widths)
    places = _places(result, x, widths)
    _launch_gptq(
        *(norm, x, ln_weight, ln_bias, eps, tensors, weight, group_size, stored_minus_1),
        *(widths, places),
    )
    return result


def _gptq_out_cuda(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    stored_minus_1: bool,
    widths: Sequence[int],
    out: Sequence[Tensor],
) -> None:
    tensors = (qweight, scales, qzeros, g_idx, bias)
    weight = _checkpoint(*tensors, group_size, widths)
    _check_norm(x, ln_weight, ln_bias, eps, qweight.shape[0] * 8, qweight)
    _check_out(out, x, widths)
    places = [target.data_ptr() for target in out]
    _launch_gptq(
        *(norm, x, ln_weight, ln_bias, eps, tensors, weight, group_size, stored_minus_1),
        *(widths, places),
    )


def _checkpoint(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    widths: Sequence[int],
) -> _Known:
    held = (scales, qzeros, g_idx, bias)
    key = _key((qweight, *held), group_size, *widths)
    found: Any = getattr(qweight, "_w4a16_fused", None)
    if isinstance(found, _Known) and found.is_of(key, held):
        return found
    _check_gptq(qweight, *held, group_size, widths)
    made = _Known(key, qweight, held)
    qweight._w4a16_fused = made
    return made


def _launch_gptq(
    norm: Norm,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    tensors: Sequence[Any],
    weight: _Known,
    group_size: int,
    stored_minus_1: bool,
    widths: Sequence[int],
    places: Sequence[int],
) -> None:
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    if m == 0:
        return
    device = x.get_device()
    if torch_ops._current_device() != device:
        with torch.cuda.device(device):
            _launch_gptq(
                *(norm, x, ln_weight, ln_bias, eps, tensors, weight, group_size, stored_minus_1),
                *(widths, places),
            )
            return
    stream = torch_ops._raw_stream(device)
    rows, stride = _rows(x)
    normalised = torch_ops._empty_cuda((m, k), (k, 1), _HALF)
    qweight, scales, qzeros, g_idx, bias = (_address(tensor) for tensor in tensors)
    args = GptqArgs(
        # The kernel that normalises starts after everything that wrote the weight.
        flags=RUN_OVERLAP,
        m=m,
        k=k,
        group_size=group_size,
        zero_offset=int(stored_minus_1),
        a=normalised.data_ptr(),
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        bias=bias,
    )
    for i, (n, place) in enumerate(zip(widths, places, strict=True)):
        args.n[i] = n
        args.c[i] = place
    LIBRARY.check_gptq(args)
    beginning = _Overlap(weight, tensors[0])
    LIBRARY.normalize_rows(
        *(norm, rows.data_ptr(), m, stride, k, _address(ln_weight), _address(ln_bias), eps),
        *(None, k, normalised.data_ptr(), stream),
        flags=beginning.flags,
    )
    LIBRARY.gptq_linear(args, stream)
    beginning.launched()


# ---- CPU: the definition ----


def _qkv_cpu(norm: Norm, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    result = _qkv_fake(x, *rest, **options)
    _reference(norm, x, rest, _views(result, x, rest[_WIDTHS]))
    return result


def _qkv_out_cpu(norm: Norm, x: Tensor, *rest: Any, **options: Any) -> None:
    _qkv_out_fake(x, *rest, **options)
    _reference(norm, x, rest, rest[_WIDTHS + 1])


#: Where ``widths`` is among what follows ``x``, for packed weights and for checkpoints' tensors.
_WIDTHS, _GPTQ_WIDTHS = 10, 10


def _reference(norm: Norm, x: Tensor, rest: Sequence[Any], targets: Sequence[Tensor]) -> None:
    ln_weight, ln_bias, eps, packed, scales, zeros, bias, columns, _, inputs, widths = rest[:11]
    normalised = _normalised(norm, x, ln_weight, ln_bias, eps).float()
    for i, (begin, end) in enumerate(ranges(widths)):
        weight = torch.ops.w4a16.dequantize.default(
            packed[begin:end], scales[i], zeros[i] if zeros else None, columns, inputs, end - begin
        )
        product = normalised @ weight.float()
        targets[i].copy_(product + bias[i].float() if bias else product)


def _gptq_cpu(norm: Norm, x: Tensor, *rest: Any) -> Tensor:
    result = _gptq_fake(x, *rest)
    _gptq_reference(norm, x, rest, _views(result, x, rest[_GPTQ_WIDTHS]))
    return result


def _gptq_out_cpu(norm: Norm, x: Tensor, *rest: Any) -> None:
    _gptq_out_fake(x, *rest)
    _gptq_reference(norm, x, rest, rest[_GPTQ_WIDTHS + 1])


def _gptq_reference(norm: Norm, x: Tensor, rest: Sequence[Any], targets: Sequence[Tensor]) -> None:
    ln_weight, ln_bias, eps, qweight, scales, qzeros, g_idx, bias, group, minus_1, widths = rest[
        :11
    ]
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    q = (qweight[:, None, :] >> shifts[:, None] & 15).reshape(k, n)
    zeros = torch.full(scales.shape, 8)
    if qzeros is not None:
        # Modulo 2**32, borrows and all, as the kernel does.
        words = qzeros + (0x11111111 if minus_1 else 0)
        zeros = (words[:, :, None] >> shifts & 15).reshape(scales.shape)
    groups = torch.arange(k) // group if g_idx is None else g_idx.long()
    weight = (q - zeros[groups]).float() * scales.float()[groups]
    product = _normalised(norm, x, ln_weight, ln_bias, eps).float() @ weight
    if bias is not None:
        product += bias.float()
    for target, (begin, end) in zip(targets, ranges(widths), strict=True):
        target.copy_(product[..., begin:end])


def _normalised(
    norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """float16; all in float32 until then."""
    wide = x.float()
    if norm is Norm.LAYER:
        wide = torch.nn.functional.layer_norm(wide, x.shape[-1:], eps=eps)
    else:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight.float()
    if bias is not None:
        wide = wide + bias.float()
    return wide.half()


# ---- Autograd ----


def _keep_shapes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs[:3]]
    ctx.count = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """An operator, not a ``raise``: ``torch.compile`` traces backward passes that never run."""
    refuse = torch.ops.w4a16.not_differentiable.default
    refused = [
        refuse(grad, shape) if wanted and shape is not None else None
        for shape, wanted in zip(ctx.shapes, ctx.needs_input_grad, strict=False)
    ]
    return (*refused, *(None,) * (ctx.count - len(refused)))


def _out_autograd(name: str, *arguments: Any) -> None:
    x, ln_weight, ln_bias = arguments[:3]
    out = arguments[_GPTQ_WIDTHS + 2 if "gptq" in name else _WIDTHS + 2]
    if torch.is_grad_enabled():
        named = [("x", x), ("ln_weight", ln_weight), ("ln_bias", ln_bias)]
        for label, tensor in (*named, *(("out", tensor) for tensor in out)):
            if tensor is not None and tensor.requires_grad:
                raise ArgumentError(
                    f"{label} requires a gradient, which out= cannot give: call this under"
                    " torch.no_grad(), or without out="
                )
    for tensor in out:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    with torch._C._AutoDispatchBelowAutograd():
        getattr(torch.ops.w4a16, name).default(*arguments)


# ---- What torch.compile sees ----


def _qkv_fake(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
    tactic: int = -1,
    join: int = -1,
    one_kernel: bool = False,
) -> Tensor:
    resolve(tactic)
    _check_packed(packed, scales, zeros, bias, columns, joined, in_features, widths)
    _check_norm(x, ln_weight, ln_bias, eps, in_features, packed)
    return _empty(x, widths)


def _qkv_out_fake(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
    out: Sequence[Tensor],
    tactic: int = -1,
    join: int = -1,
    one_kernel: bool = False,
) -> None:
    resolve(tactic)
    _check_packed(packed, scales, zeros, bias, columns, joined, in_features, widths)
    _check_norm(x, ln_weight, ln_bias, eps, in_features, packed)
    _check_out(out, x, widths)


def _gptq_fake(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    stored_minus_1: bool,
    widths: Sequence[int],
) -> Tensor:
    _check_gptq(qweight, scales, qzeros, g_idx, bias, group_size, widths)
    _check_norm(x, ln_weight, ln_bias, eps, qweight.shape[0] * 8, qweight)
    return _empty(x, widths)


def _gptq_out_fake(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    stored_minus_1: bool,
    widths: Sequence[int],
    out: Sequence[Tensor],
) -> None:
    _check_gptq(qweight, scales, qzeros, g_idx, bias, group_size, widths)
    _check_norm(x, ln_weight, ln_bias, eps, qweight.shape[0] * 8, qweight)
    _check_out(out, x, widths)


def _empty(x: Tensor, widths: Sequence[int]) -> Tensor:
    leading = x.shape[:-1]
    if len(set(widths)) == 1:
        return x.new_empty((len(widths), *leading, widths[0]))
    return x.new_empty((math.prod(leading) * sum(widths),))


def _views(result: Tensor, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    return list(segments(result, x.shape[:-1], widths))


def _places(result: Tensor, x: Tensor, widths: Sequence[int]) -> list[int]:
    """Where each segment of a result begins."""
    rows = math.prod(x.shape[:-1])
    first: int = result.data_ptr()
    return [first + 2 * rows * begin for begin, _ in ranges(widths)]


# ---- Checks ----


def _described(name: str, tensor: Tensor) -> Argument:
    found: Argument = arguments_of(**{name: tensor})[name]
    return found


def _check_norm(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    in_features: int,
    weight: Tensor,
) -> None:
    if x.dtype is not _HALF:
        raise ArgumentError(
            f"{_described('x', x)}: the kernels take float16 activations; convert x to float16"
            " (a model: model.to(torch.float16))"
        )
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ArgumentError(
            f"{_described('x', x)}: expected [..., {in_features}], one column for each input of"
            " the weight"
        )
    if not eps >= 0 or math.isinf(eps):
        raise ArgumentError(f"eps is {eps}: expected a finite number from 0 up")
    if x.device != weight.device:
        raise ArgumentError(
            f"{_described('x', x)}, but the weight is on {weight.device}: expected all arrays on"
            " one device"
        )
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            _check_exactly(name, tensor, _HALF, (in_features,), x)


def _check_exactly(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor
) -> None:
    if (
        tensor.dtype is not dtype
        or tuple(tensor.shape) != shape
        or tensor.device != beside.device
        or not tensor.is_contiguous()
    ):
        kind = str(dtype).removeprefix("torch.")
        raise ArgumentError(
            f"{_described(name, tensor)}: expected {kind} {list(shape)}, contiguous, on"
            f" {beside.device}"
        )


def _check_packed(
    packed: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    columns: Tensor | None,
    joined: Sequence[Tensor | None],
    in_features: int,
    widths: Sequence[int],
) -> None:
    count = len(widths)
    _check_widths(widths, packed.shape[0], _described("packed", packed))
    for name, given, counts in (
        ("scales", scales, (count,)),
        ("zeros", zeros, (0, count)),
        ("bias", bias, (0, count)),
        ("joined", joined, (3,) if count > 1 else (0, 3)),
    ):
        if len(given) not in counts:
            raise ArgumentError(
                f"{name} is {len(given)} tensors: expected {' or '.join(map(str, counts))}, for"
                f" {count} projections"
            )
    for i, (begin, end) in enumerate(ranges(widths)):
        described = arguments_of(
            packed=packed[begin:end],
            scales=scales[i],
            zeros=zeros[i] if zeros else None,
            columns=columns,
        )
        check_weight(**described, in_features=in_features, out_features=end - begin)
        if scales[i].shape[0] != scales[0].shape[0]:
            raise ArgumentError(
                f"scales have {scales[0].shape[0]} groups for the first projection and"
                f" {scales[i].shape[0]} for another: expected as many for all"
            )
        if bias:
            _check_exactly(f"bias[{i}]", bias[i], _HALF, (end - begin,), packed)
    wide = (scales[0].shape[0], sum(widths))
    shapes = (("scales", wide, True), ("zeros", wide, bool(zeros)), ("bias", wide[1:], bool(bias)))
    for (name, shape, wanted), tensor in zip(shapes, joined, strict=False):
        if (tensor is not None) != wanted:
            raise ArgumentError(
                f"joined {name} {'is missing' if wanted else 'were given'}: expected what"
                " w4a16.fused.fuse_qkv makes"
            )
        if tensor is not None:
            _check_exactly(f"joined_{name}", tensor, _HALF, shape, packed)


def _check_gptq(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    widths: Sequence[int],
) -> None:
    if qweight.dim() != 2:
        raise ArgumentError(f"{_described('qweight', qweight)}: expected int32 [K/8, N]")
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    if not 0 < group_size <= k:
        raise ArgumentError(f"group_size is {group_size}: expected 1 to {k}, the inputs")
    groups = -(-k // group_size)
    _check_widths(widths, n, _described("qweight", qweight))
    _check_exactly("qweight", qweight, torch.int32, (k // 8, n), qweight)
    _check_exactly("scales", scales, _HALF, (groups, n), qweight)
    if qzeros is not None:
        _check_exactly("qzeros", qzeros, torch.int32, (groups, n // 8), qweight)
    if g_idx is not None:
        _check_exactly("g_idx", g_idx, torch.int32, (k,), qweight)
    if bias is not None:
        _check_exactly("bias", bias, _HALF, (n,), qweight)


def _check_widths(widths: Sequence[int], n: int, what: Argument) -> None:
    right = all(width > 0 and width % N_MULTIPLE == 0 for width in widths)
    if not right or not 1 <= len(widths) <= MOST_SEGMENTS or sum(widths) != n:
        raise ArgumentError(
            f"widths is {list(widths)} (sum {sum(widths)}), but {what}: expected 1 to"
            f" {MOST_SEGMENTS} multiples of {N_MULTIPLE} that sum to {n}"
        )


def _check_out(out: Sequence[Tensor], x: Tensor, widths: Sequence[int]) -> None:
    if len(out) != len(widths):
        raise ArgumentError(
            f"out is {len(out)} tensors: expected {len(widths)}, one for each projection"
        )
    for i, (tensor, width) in enumerate(zip(out, widths, strict=True)):
        _check_exactly(f"out[{i}]", tensor, _HALF, (*x.shape[:-1], width), x)
