"""``nn.Linear`` on the library's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from w4a16 import packing
from w4a16.arguments import K_MULTIPLE, N_MULTIPLE, check_weight, is_group_size, round_up
from w4a16.errors import ArgumentError
from w4a16.formats.config import ZeroPoints
from w4a16.packed import PackedWeight, require_packed
from w4a16.support import require_kernel
from w4a16.torch_ops import arguments_of, register_torch_ops

register_torch_ops()

_NAMES = ("packed", "scales", "zeros", "columns", "bias")
_DTYPES = {
    "packed": torch.uint8,
    "scales": torch.float16,
    "zeros": torch.float16,
    "columns": torch.int32,
    "bias": torch.float16,
}


class W4A16Linear(nn.Module):
    """``nn.Linear`` with a packed INT4 weight: float16 ``[..., in_features]`` in,
    float16 ``[..., out_features]`` out, inference only.

    Its arrays (:class:`w4a16.PackedWeight`) are buffers, None where absent, and make up its state
    dict. They move between devices with the module and keep their dtypes: ``.half()``,
    ``.float()`` and ``.to(dtype)`` change nothing.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight) -> None:
        """Takes the arrays as they are, without a copy if they are torch tensors.

        Raises :class:`w4a16.ArgumentError` unless they fit together.
        """
        super().__init__()
        require_packed(weight)
        self.in_features = int(weight.in_features)
        self.out_features = int(weight.out_features)
        arrays = weight.arrays()
        for name in _NAMES:
            self.register_buffer(name, _tensor(name, arrays.get(name)))
        _check(self)
        self._padded = weight.n != self.out_features

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> W4A16Linear:
        """The layer of a packed weight, on its device."""
        return cls(packed)

    @classmethod
    def from_checkpoint(
        cls,
        tensors: Mapping[str, Any],
        config: Any = None,
        *,
        zero_points: ZeroPoints | None = None,
        device: Any = None,
    ) -> W4A16Linear:
        """The layer of a checkpoint's tensors (:func:`w4a16.pack` says which, and what it raises).

        ``config`` is the checkpoint's ``quantization_config``.
        """
        packed = packing.pack(tensors, config=config, zero_points=zero_points, device=device)
        return cls(packed)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 128,
        zeros: bool = False,
        act_order: bool = False,
        bias: bool = False,
        k: int | None = None,
        n: int | None = None,
        device: Any = None,
    ) -> W4A16Linear:
        """A layer to load a state dict into; on the meta device with ``assign=True``.

        ``group_size`` 0 or -1 is per column; :class:`w4a16.UnsupportedError` where no kernel takes
        it, as :func:`w4a16.pack` raises. ``k`` and ``n`` are the padded sizes; by default
        ``in_features`` rounded up to whole groups and multiples of 64, and ``out_features`` to 8.
        """
        sizes = {"in_features": in_features, "out_features": out_features, "k": k, "n": n}
        for size, value in sizes.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{size} is {value!r}: expected an integer from 1 up")
        if not is_group_size(group_size, per_column=(0, -1)):
            raise ArgumentError(
                f"group_size is {group_size!r}: expected a positive number, or 0 or -1 for one"
                " scale a column"
            )
        unit = math.lcm(K_MULTIPLE, group_size) if group_size > 0 else K_MULTIPLE
        k = round_up(in_features, unit) if k is None else k
        n = round_up(out_features, N_MULTIPLE) if n is None else n
        if k < in_features or k % unit or n < out_features or n % N_MULTIPLE:
            raise ArgumentError(
                f"k is {k} and n is {n}: expected multiples of {unit} and {N_MULTIPLE}, from"
                f" in_features = {in_features} and out_features = {out_features} on"
            )
        groups = (k // group_size, n) if group_size > 0 else (1, n)
        require_kernel(
            n,
            k,
            groups[0],
            zeros=zeros,
            bias=bias,
            described=f"K = {in_features}, N = {out_features} and group size {group_size}",
        )
        shapes: dict[str, tuple[int, ...]] = {"packed": (n, k // 2), "scales": groups}
        if zeros:
            shapes["zeros"] = groups
        if act_order or k != in_features:
            shapes["columns"] = (k,)
        if bias:
            shapes["bias"] = (n,)
        arrays = {
            name: torch.empty(shapes[name], dtype=dtype, device=device) if name in shapes else None
            for name, dtype in _DTYPES.items()
        }
        return cls(PackedWeight(**arrays, in_features=in_features, out_features=out_features))

    @property
    def packed_weight(self) -> PackedWeight:
        """The layer's arrays as a :class:`w4a16.PackedWeight`, not copied."""
        arrays = {name: self._buffers[name] for name in _NAMES}
        return PackedWeight(**arrays, in_features=self.in_features, out_features=self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W + bias`` as :func:`w4a16.linear` has it: float16 ``[..., out_features]``."""
        # Each attribute that is a buffer costs a call of nn.Module.__getattr__, and each argument
        # that is not left out a conversion.
        buffers = self._buffers
        packed, scales, zeros = buffers["packed"], buffers["scales"], buffers["zeros"]
        columns, bias = buffers["columns"], buffers["bias"]
        linear = torch.ops.w4a16.linear.default
        if columns is not None or bias is not None or self._padded:
            sizes = self.in_features, self.out_features
            return linear(x, packed, scales, zeros, columns, bias, *sizes)
        if zeros is not None:
            return linear(x, packed, scales, zeros)
        return linear(x, packed, scales)

    def extra_repr(self) -> str:
        packed = self.packed_weight
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"group_size={packed.group_size or packed.k}",
            f"zeros={packed.zeros is not None}",
            f"columns={packed.columns is not None}",
            f"bias={packed.bias is not None}",
        ]
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W4A16Linear:
        """Follows ``fn`` to another device, never to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        moved: W4A16Linear = super()._apply(move, recurse)
        return moved

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module's, but what would be converted (and so corrupted) is an error."""
        wrong = [
            f"{prefix}{name} is {given.dtype}: expected {dtype}"
            for name, dtype in _DTYPES.items()
            if isinstance(given := state_dict.get(prefix + name), Tensor) and given.dtype != dtype
        ]
        columns = state_dict.get(prefix + "columns")
        if not wrong and isinstance(columns, Tensor) and not columns.is_meta:
            used = int((columns >= 0).sum())
            if used != self.in_features:
                wrong = [f"{prefix}columns is of {used} inputs: expected {self.in_features}"]
        if wrong:
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _tensor(name: str, value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value.detach() if isinstance(value, nn.Parameter) else value
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise ArgumentError(
        f"{name} is a {type(value).__name__}: expected a torch tensor, or an array with __dlpack__"
    )


def _check(layer: W4A16Linear) -> None:
    given = arguments_of(**{name: layer._buffers[name] for name in _NAMES})
    bias = given.pop("bias")
    check_weight(**given, in_features=layer.in_features, out_features=layer.out_features)
    n = given["packed"].shape[0]
    if bias is not None and (bias.dtype != "float16" or tuple(bias.shape) != (n,)):
        raise ArgumentError(f"{bias}: expected float16 [{n}]")
