"""``torch.ops.w4a16``: the product and its weights as operators of PyTorch (2.4 or later).

====================== =========================================================================
``linear``             ``x @ W + bias``: float16 ``[..., in_features]`` → ``[..., out_features]``
``linear_out``         the same into ``out``
``dequantize``         ``W`` as float16 ``[in_features, out_features]``
``not_differentiable`` raises: what a backward pass through ``linear`` runs into
====================== =========================================================================

:mod:`w4a16.fused_ops` adds ``layernorm_qkv`` and its like.

On CUDA they launch the library's kernels on the current stream; the only memory they take is the
output and the tactic's workspace, from torch's allocator. On a CPU they are a slow reference:
dequantise, multiply in float32, round once. ``tactic`` is an index of :func:`w4a16.tactic_names`;
-1 takes the fastest one known.

Where ``out_features`` is no multiple of 8, ``linear`` returns the first columns of a wider buffer:
the last dimension is dense, rows are not adjacent. Every other result is contiguous.

Importing this module needs torch; :func:`register_torch_ops` does the registration.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w4a16 import overlap
from w4a16.arguments import Argument, check_linear, check_weight, round_up
from w4a16.arrays import dense_strides
from w4a16.errors import ArgumentError, W4A16Error
from w4a16.library import AUTO, LIBRARY, Launch, Problem, QuantOp
from w4a16.packed import PackedWeight
from w4a16.packing import dequantize
from w4a16.tactics import generation, plan, resolve

_WEIGHT = "Tensor packed, Tensor scales, Tensor? zeros"
# Defaults are not handed to Python: a call that leaves them out is microseconds faster.
_OPTIONS = "Tensor? columns=None, Tensor? bias=None, int in_features=0, int out_features=0"
_SCHEMAS = {
    "linear": f"(Tensor x, {_WEIGHT}=None, {_OPTIONS}, int tactic=-1) -> Tensor",
    "linear_out": (
        f"(Tensor x, {_WEIGHT}, Tensor? columns, Tensor? bias, int in_features, int out_features,"
        " Tensor(a!) out, int tactic=-1) -> ()"
    ),
    "dequantize": (
        f"({_WEIGHT}=None, Tensor? columns=None, int in_features=0, int out_features=0) -> Tensor"
    ),
    "not_differentiable": "(Tensor grad, SymInt[] shape) -> Tensor",
}

# Bound once: each of these is looked up in every launch.
_HALF = torch.float16
_BYTE = torch.uint8
_PER_COLUMN = int(QuantOp.PER_COLUMN)
_GROUP_SCALE = int(QuantOp.GROUP_SCALE)
_GROUP_SCALE_ZERO = int(QuantOp.GROUP_SCALE_ZERO)
_grad_enabled = torch.is_grad_enabled
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
_mode_count: Any = torch._C._len_torch_dispatch_stack
_in_functorch: Any = torch._C._are_functorch_transforms_active
_capturing: Any = torch.cuda.is_current_stream_capturing
# Absent in builds of torch without CUDA, which have no tensor to call them for.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
try:  # what torch.compile's own code allocates with: half the time of Tensor.new_empty
    _empty_cuda: Any = torch._C._dynamo.guards._empty_strided_cuda
except AttributeError:

    def _empty_cuda(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")


# Of a weight, in place of what _version() gives: do not overlap.
UNKNOWN = -2

# An address that CUDA's allocators would give.
_ALIGNMENT = 256

# Of one weight; each takes more than a kilobyte, and a model has hundreds of weights.
_MOST_LAUNCHES = 256

_LOCK = threading.Lock()
_library: Any = None


def register_torch_ops() -> None:
    """Registers ``torch.ops.w4a16``. May be called again, and from any thread.

    ``import w4a16`` does it if torch was imported before; so does whatever here needs torch.
    """
    global _library
    with _LOCK:
        if _library is None:
            _library = _register()


def is_registered() -> bool:
    """Without the lock, which ``torch.compile`` cannot trace."""
    return _library is not None


def _register() -> Any:
    """The registrations live as long as what is returned."""
    library: Any = torch.library.Library("w4a16", "DEF")
    tags = [torch.Tag.pt2_compliant_tag]
    if hasattr(torch.Tag, "needs_fixed_stride_order"):
        tags.append(torch.Tag.needs_fixed_stride_order)
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=tags)
    kernels: dict[str, dict[str, Any]] = {
        "linear": {"CUDA": _linear_cuda, "CPU": _linear_cpu, "Autograd": _linear_autograd},
        "linear_out": {
            "CUDA": _linear_out_cuda,
            "CPU": _linear_out_cpu,
            "Autograd": _linear_out_autograd,
        },
        "dequantize": {"CUDA": _dequantize, "CPU": _dequantize},
        "not_differentiable": {"CUDA": _not_differentiable, "CPU": _not_differentiable},
    }
    fakes = {
        "linear": _linear_fake,
        "linear_out": _linear_out_fake,
        "dequantize": _dequantize_fake,
        "not_differentiable": _not_differentiable_fake,
    }
    for name, by_key in kernels.items():
        for key, kernel in by_key.items():
            library.impl(name, kernel, key)
        torch.library.register_fake(f"w4a16::{name}", fakes[name], lib=library)
    fused_ops = import_module("w4a16.fused_ops")  # it imports this module
    fused_ops.register(library, tags)
    return library


def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    tactic: int,
    out: Tensor | None,
    stream: int | None,
) -> Tensor:
    """:func:`w4a16.linear` where everything is a tensor of torch."""
    if _library is None:
        register_torch_ops()
    arguments = (
        x,
        packed.packed,
        packed.scales,
        packed.zeros,
        packed.columns,
        packed.bias if bias is None else bias,
        packed.in_features,
        packed.out_features,
    )
    if stream is not None and x.is_cuda:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=x.device)):
            return linear(x, packed, bias, tactic, out, None)
    if out is None:
        return torch.ops.w4a16.linear.default(*arguments, tactic)
    torch.ops.w4a16.linear_out.default(*arguments, out, tactic)
    return out


# ---- CUDA: every microsecond counts ----


class _Prepared(NamedTuple):
    """What every product of a weight with activations of one shape has in common."""

    generation: object
    """Of the plans that the tactic was chosen from."""
    launch: Launch | None
    """None: x does not go to the kernel, or the product not to the caller, as it is."""
    inner: Launch | None
    """The same for what is done to x first; None: without rows, or with a bias that must be padded
    first."""
    workspace: int
    """Bytes."""
    size: tuple[int, ...]
    """Of the output, with all n columns."""
    strides: tuple[int, ...]
    m: int


class Remembered:
    """What is kept with a tensor for its next launch, and not copied or saved with it."""

    __slots__ = ("launched",)

    launched: int
    """The version of the weight that was last launched without overlap; -1: none was."""

    def ran_plainly(self, version: int) -> None:
        """The weight of that version was launched without overlap: later launches may overlap."""
        if version >= 0 and not _capturing():  # a launch that is captured does not run now
            self.launched = version

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of the tensor are checked anew. Whatever torch.load trusts, and is not true."""
        return OrderedDict, ()


class _Checked(Remembered):
    """Arrays that were found to make up a weight, kept with the tensor of its packed values.

    A launch with the same tensors, still at the same place and as large, need not look at their
    shapes and dtypes again.
    """

    __slots__ = (
        *("scales", "zeros", "columns", "bias", "in_given", "out_given"),
        *("bytes", "scale_count", "addresses", "device", "n", "k", "in_features", "out_features"),
        *("quant_op", "group_size", "pads_bias", "launches", "counts_changes"),
    )

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        columns: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> None:
        """Arguments that are right."""
        self.scales = scales
        self.zeros = zeros
        self.columns = columns
        self.bias = bias
        self.in_given = in_features
        self.out_given = out_features
        self.bytes = packed.numel()
        self.scale_count = scales.numel()
        self.addresses = (
            packed.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if columns is None else columns.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        self.device = packed.get_device()
        self.n = packed.shape[0]
        self.k = packed.shape[1] * 2
        self.in_features = in_features or self.k
        self.out_features = out_features or self.n
        groups = scales.shape[0]
        per_column = zeros is None and groups == 1
        self.group_size = 0 if per_column else self.k // groups
        self.quant_op = (
            _PER_COLUMN if per_column else _GROUP_SCALE if zeros is None else _GROUP_SCALE_ZERO
        )
        read_early = (packed, scales) if zeros is None else (packed, scales, zeros)
        self.counts_changes = not any(tensor.is_inference() for tensor in read_early)
        self.launched = -1
        self.pads_bias = bias is not None and bias.shape[0] != self.n
        self.launches: dict[Any, _Prepared] = {}

    def prepare(self, x: Tensor, key: Any, tactic: int) -> _Prepared:
        """For activations that are right, on the weight's device, which is the current one; found
        in ``launches`` by the key from then on."""
        known = generation()  # before the plan: who forgets meanwhile forgets this one, too
        m = x.numel() // self.in_features
        launch: Launch | None = None
        workspace = 0
        if m and not self.pads_bias:
            found, workspace = self.plan(m, tactic)
            launch = LIBRARY.prepared(
                found,
                self.quant_op,
                m,
                self.n,
                self.k,
                self.group_size,
                *self.addresses[:3],
                self.addresses[4],
                workspace,
            )
        size = (*x.shape[:-1], self.n)
        whole = self.columns is None and self.n == self.out_features
        if len(self.launches) >= _MOST_LAUNCHES:
            self.launches.clear()
        made = self.launches[key] = _Prepared(
            generation=known,
            launch=launch if whole else None,
            inner=launch,
            workspace=workspace,
            size=size,
            strides=dense_strides(size),
            m=m,
        )
        return made

    def plan(self, m: int, tactic: int) -> tuple[int, int]:
        """The tactic, and bytes of its workspace."""
        problem = (m, self.n, self.k, self.group_size, self.bias is not None)
        if tactic == AUTO:
            return plan(self.device, self.quant_op, *problem)
        return tactic, _workspace_size(self.device, tactic, self.quant_op, *problem)


def _linear_cuda(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
    tactic: int = -1,
    target: Tensor | None = None,
) -> Tensor:
    """``target`` [..., n] receives the product in place of a tensor made here."""
    weight = getattr(packed, "_w4a16", None)
    if (
        not weight
        or weight.scales is not scales
        or weight.zeros is not zeros
        or weight.columns is not columns
        or weight.bias is not bias
        or weight.in_given != in_features
        or weight.out_given != out_features
        or weight.bytes != packed.numel()
        or weight.scale_count != scales.numel()
        or weight.addresses
        != (
            packed.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if columns is None else columns.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
    ):
        sizes = _sizes(packed, in_features, out_features)
        _check(x, packed, scales, zeros, columns, bias, *sizes)
        weight = _Checked(packed, scales, zeros, columns, bias, in_features, out_features)
        packed._w4a16 = weight
    device = weight.device
    shape = x.shape
    key = shape if tactic == AUTO else (shape, tactic)
    prepared = weight.launches.get(key)
    if x.dtype is not _HALF or x.get_device() != device:
        prepared = None
    if prepared is None:
        sizes = weight.in_features, weight.out_features
        _check(x, packed, scales, zeros, columns, bias, *sizes)
    if _current_device() != device:
        with torch.cuda.device(device):
            return _linear_cuda(
                *(x, packed, scales, zeros, columns, bias, in_features, out_features, tactic),
                target,
            )
    if prepared is None or prepared[0] is not generation():
        prepared = weight.prepare(x, key, tactic)
    _, launch, _, bytes_needed, size, strides, _ = prepared
    out = _empty_cuda(size, strides, _HALF) if target is None else target
    # A launch overlaps once the same version was launched without.
    version = _version(packed, weight) if overlap.enabled else UNKNOWN
    overlaps = version == weight.launched
    a = x.data_ptr()
    if launch is None or a & 15 or not x.is_contiguous():
        _launch_any(x, weight, prepared, out, tactic, overlaps)
        if prepared.m and not overlaps:
            weight.ran_plainly(version)
        return out if weight.n == weight.out_features else out[..., : weight.out_features]
    if bytes_needed:  # memory freed here is reused in stream order
        memory = _empty_cuda((bytes_needed,), (1,), _BYTE)
        launch(a, out.data_ptr(), memory.data_ptr(), _raw_stream(device), overlaps)
    else:
        launch(a, out.data_ptr(), 0, _raw_stream(device), overlaps)
    if not overlaps:
        weight.ran_plainly(version)
    return out


def _linear_out_cuda(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor,
    tactic: int = -1,
) -> None:
    in_features, out_features = _sizes(packed, in_features, out_features)
    _check(x, packed, scales, zeros, columns, bias, in_features, out_features, out)
    n = packed.shape[0]
    direct = n == out_features and out.data_ptr() % 16 == 0
    target = out if direct else x.new_empty((*x.shape[:-1], n))
    found = _linear_cuda(
        *(x, packed, scales, zeros, columns, bias, in_features, out_features, tactic), target
    )
    if not direct:
        out.copy_(found)


def _version(packed: Tensor, weight: _Checked) -> int:
    """Grows whenever torch changes what a launch with overlap reads early."""
    if not weight.counts_changes:
        return UNKNOWN
    version: int = packed._version + weight.scales._version
    return version if weight.zeros is None else version + weight.zeros._version


def _launch_any(
    x: Tensor,
    weight: _Checked,
    prepared: _Prepared,
    out: Tensor,
    tactic: int,
    overlaps: bool,
) -> None:
    """On the current device, wherever x lies and whatever must be done to it or to the bias first;
    ``out`` has n columns."""
    m, launch, size = prepared.m, prepared.inner, prepared.workspace
    if m == 0:
        return
    if not x.is_contiguous():
        x = x.contiguous()
    device, k = weight.device, weight.k
    packed, scales, zeros, columns, _ = weight.addresses
    if launch is None:
        assert weight.bias is not None
        padded = torch.nn.functional.pad(weight.bias, (0, weight.n - weight.out_features))
        chosen, size = weight.plan(m, tactic)
        launch = LIBRARY.prepared(
            *(chosen, weight.quant_op, m, weight.n, k, weight.group_size),
            *(packed, scales, zeros, padded.data_ptr(), size),
        )
    stream = _raw_stream(device)
    a = x.data_ptr()
    workspace = 0
    if columns:
        gathered = round_up(m * k * 2, _ALIGNMENT)
        memory = _empty_cuda((gathered + size,), (1,), _BYTE)
        moved = memory.data_ptr()
        inputs = weight.in_features
        LIBRARY.gather_columns(a, m, inputs, inputs, columns, k, moved, stream)
        a = moved
        if size:
            workspace = moved + gathered
    else:
        if a & 15:
            x = x.clone()
            a = x.data_ptr()
        if size:
            memory = _empty_cuda((size,), (1,), _BYTE)
            workspace = memory.data_ptr()
    launch(a, out.data_ptr(), workspace, stream, overlaps)


@lru_cache(maxsize=4096)
def _workspace_size(
    device: int,
    tactic: int,
    quant_op: int,
    m: int,
    n: int,
    k: int,
    group_size: int,
    has_bias: bool,
) -> int:
    """Of a tactic that the caller named, on ``device``, which is the current one."""
    problem = Problem(
        quant_op=QuantOp(quant_op), m=m, n=n, k=k, group_size=group_size, has_bias=has_bias
    )
    return LIBRARY.workspace_size(tactic, problem)


# ---- CPU: the definition ----


def _linear_cpu(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
    tactic: int = -1,
) -> Tensor:
    resolve(tactic)
    in_features, out_features = _sizes(packed, in_features, out_features)
    _check(x, packed, scales, zeros, columns, bias, in_features, out_features)
    out = _empty_output(x, packed, out_features)
    _reference(x, packed, scales, zeros, columns, bias, in_features, out_features, out)
    return out


def _linear_out_cpu(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor,
    tactic: int = -1,
) -> None:
    in_features, out_features = _sizes(packed, in_features, out_features)
    _check(x, packed, scales, zeros, columns, bias, in_features, out_features, out)
    _reference(x, packed, scales, zeros, columns, bias, in_features, out_features, out)


def _reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor,
) -> None:
    weight = _dequantize(packed, scales, zeros, columns, in_features, out_features)
    product = x.float() @ weight.float()
    if bias is not None:
        product += bias[:out_features].float()
    out.copy_(product)


def _empty_output(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    n = packed.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    return out if n == out_features else out[..., :out_features]


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
) -> Tensor:
    in_features, out_features = _sizes(packed, in_features, out_features)
    weight = arguments_of(packed=packed, scales=scales, zeros=zeros, columns=columns)
    check_weight(**weight, in_features=in_features, out_features=out_features)
    return dequantize(
        PackedWeight(
            packed=packed,
            scales=scales,
            zeros=zeros,
            columns=columns,
            bias=None,
            in_features=in_features,
            out_features=out_features,
        )
    )


# ---- Autograd ----


def _linear_autograd(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
    tactic: int = -1,
) -> Tensor:
    if _grad_enabled() and (
        x.requires_grad
        or scales.requires_grad
        or (zeros is not None and zeros.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _NotDifferentiable.apply(
            x, packed, scales, zeros, columns, bias, in_features, out_features, tactic
        )
    # Straight on where the dispatcher has nothing left to do: another turn through it and back
    # into Python costs as much as a launch.
    if (
        x.is_cuda
        and type(x) is Tensor
        and type(packed) is Tensor
        and _mode_count() == 0
        and not _in_functorch()
    ):
        return _linear_cuda(
            x, packed, scales, zeros, columns, bias, in_features, out_features, tactic
        )
    with _below_autograd():
        return torch.ops.w4a16.linear.default(
            x, packed, scales, zeros, columns, bias, in_features, out_features, tactic
        )


def _linear_out_autograd(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor,
    tactic: int = -1,
) -> None:
    if _grad_enabled():
        for name, array in (("x", x), ("bias", bias), ("out", out)):
            if array is not None and array.requires_grad:
                raise ArgumentError(
                    f"{name} requires a gradient, which out= cannot give: call this under"
                    " torch.no_grad(), or without out="
                )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    with _below_autograd():
        torch.ops.w4a16.linear_out.default(
            x, packed, scales, zeros, columns, bias, in_features, out_features, out, tactic
        )


class _NotDifferentiable(torch.autograd.Function):
    """Lets the forward pass through, and puts ``not_differentiable`` in the way of the backward.

    It is an operator, not a ``raise``, because ``torch.compile`` traces the backward pass of every
    forward pass, also of one that is never run.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        with _below_autograd():
            return torch.ops.w4a16.linear.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse = torch.ops.w4a16.not_differentiable.default
        return tuple(
            refuse(grads[0], shape) if wanted else None
            for shape, wanted in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


def _not_differentiable(grad: Tensor, shape: Sequence[int]) -> Tensor:
    raise W4A16Error(
        "torch.ops.w4a16 is not differentiable: its kernels only run forward. Run inference under"
        " torch.no_grad(), detach the layer's input, or train with x @ w4a16.dequantize(packed)"
    )


# ---- What torch.compile sees ----


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
    tactic: int = -1,
) -> Tensor:
    in_features, out_features = _sizes(packed, in_features, out_features)
    _check(x, packed, scales, zeros, columns, bias, in_features, out_features)
    return _empty_output(x, packed, out_features)


def _linear_out_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor,
    tactic: int = -1,
) -> None:
    in_features, out_features = _sizes(packed, in_features, out_features)
    _check(x, packed, scales, zeros, columns, bias, in_features, out_features, out)


def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    columns: Tensor | None = None,
    in_features: int = 0,
    out_features: int = 0,
) -> Tensor:
    in_features, out_features = _sizes(packed, in_features, out_features)
    weight = arguments_of(packed=packed, scales=scales, zeros=zeros, columns=columns)
    check_weight(**weight, in_features=in_features, out_features=out_features)
    return packed.new_empty((in_features, out_features), dtype=_HALF)


def _not_differentiable_fake(grad: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(shape)


# ---- Checks ----


def arguments_of(**tensors: Tensor | None) -> dict[str, Any]:
    """What the checks see of tensors; None stays None."""
    return {
        name: None
        if tensor is None
        else Argument(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tensor.shape,
            str(tensor.device),
            tensor.is_contiguous(),
        )
        for name, tensor in tensors.items()
    }


def _sizes(packed: Tensor, in_features: int, out_features: int) -> tuple[int, int]:
    """0 stands for the size of the packed weight."""
    if packed.dim() != 2:
        return in_features, out_features  # refused later
    return in_features or packed.shape[1] * 2, out_features or packed.shape[0]


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    out: Tensor | None = None,
) -> None:
    given = arguments_of(
        x=x, packed=packed, scales=scales, zeros=zeros, columns=columns, bias=bias, out=out
    )
    check_linear(**given, in_features=in_features, out_features=out_features)
