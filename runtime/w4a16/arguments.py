"""What the arguments of a product must be; messages name the argument and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from w4a16.arrays import View
from w4a16.errors import ArgumentError

K_MULTIPLE = 64
N_MULTIPLE = 8


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def at_least(name: str, value: float | None, least: int) -> None:
    """Raises :class:`w4a16.ArgumentError` for a number on the command line that is too small."""
    if value is not None and value < least:
        raise ArgumentError(f"{name} is {value:g}: expected {least} or more")


def is_group_size(value: Any, per_column: Sequence[int] = (-1,)) -> TypeGuard[int]:
    """Whether it is a positive integer, or one of those that stand for one scale a column."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value > 0 or value in per_column


class Argument(NamedTuple):
    """An array as far as it is checked, whatever framework it comes from."""

    name: str
    dtype: str
    """As numpy names it."""
    shape: Sequence[int]
    device: str
    contiguous: bool = True

    @classmethod
    def of(cls, name: str, view: View) -> Argument:
        return cls(name, view.dtype, view.shape, view.device_name, view.contiguous)

    def __str__(self) -> str:
        gaps = "" if self.contiguous else ", not contiguous"
        return f"{self.name} is {self.dtype} {list(self.shape)} on {self.device}{gaps}"


def check_weight(
    packed: Argument,
    scales: Argument,
    zeros: Argument | None,
    columns: Argument | None,
    in_features: int,
    out_features: int,
) -> None:
    """Raises :class:`w4a16.ArgumentError` for arrays that are no :class:`w4a16.PackedWeight`."""
    if packed.dtype != "uint8" or len(packed.shape) != 2:
        raise ArgumentError(f"{packed}: expected uint8 [n, k/2], as w4a16.pack makes it")
    n, k = packed.shape[0], packed.shape[1] * 2
    if n < N_MULTIPLE or n % N_MULTIPLE or k < K_MULTIPLE or k % K_MULTIPLE:
        raise ArgumentError(
            f"{packed}: expected [n, k/2] with n a multiple of {N_MULTIPLE} and k of {K_MULTIPLE},"
            " as w4a16.pack makes it"
        )
    if not 0 < out_features <= n:
        raise ArgumentError(f"out_features is {out_features}: expected 1 to {n}, since {packed}")
    if not 0 < in_features <= k:
        raise ArgumentError(f"in_features is {in_features}: expected 1 to {k}, since {packed}")
    if columns is None and in_features != k:
        raise ArgumentError(
            f"in_features is {in_features}, but {packed}, so k is {k}: expected {k}, or columns"
            " that say which input each packed row multiplies"
        )
    if scales.dtype != "float16" or len(scales.shape) != 2 or scales.shape[1] != n:
        raise ArgumentError(f"{scales}: expected float16 [groups, {n}]")
    groups = scales.shape[0]
    if groups < 1 or k % groups:
        raise ArgumentError(f"{scales}: expected a number of groups that divides k, which is {k}")
    if zeros is not None and (zeros.dtype != "float16" or tuple(zeros.shape) != (groups, n)):
        raise ArgumentError(f"{zeros}: expected float16 [{groups}, {n}], like scales")
    if columns is not None and (columns.dtype != "int32" or tuple(columns.shape) != (k,)):
        raise ArgumentError(f"{columns}: expected int32 [{k}]")
    for array in (packed, scales, zeros, columns):
        if array is not None:
            _check_place(array, packed)


def check_linear(
    x: Argument,
    packed: Argument,
    scales: Argument,
    zeros: Argument | None,
    columns: Argument | None,
    bias: Argument | None,
    in_features: int,
    out_features: int,
    out: Argument | None = None,
) -> None:
    """Raises :class:`w4a16.ArgumentError` unless ``x @ W + bias`` makes sense."""
    if x.dtype != "float16":
        raise ArgumentError(
            f"{x}: the kernels multiply float16 activations; convert x to float16"
            " (a model: model.to(torch.float16))"
        )
    if not x.shape or x.shape[-1] != in_features:
        raise ArgumentError(f"{x}: expected [..., {in_features}], one column for each input")
    check_weight(packed, scales, zeros, columns, in_features, out_features)
    if packed.device != x.device:
        raise ArgumentError(f"{x}, but {packed}: expected all arrays on one device")
    if bias is not None:
        n = packed.shape[0]
        if bias.dtype != "float16" or tuple(bias.shape) not in ((n,), (out_features,)):
            raise ArgumentError(f"{bias}: expected float16 [{out_features}]")
        _check_place(bias, packed)
    if out is not None:
        shape = (*x.shape[:-1], out_features)
        if out.dtype != "float16" or tuple(out.shape) != shape:
            raise ArgumentError(f"{out}: expected float16 {list(shape)}")
        _check_place(out, packed)


def _check_place(array: Argument, packed: Argument) -> None:
    if array.device != packed.device:
        raise ArgumentError(f"{array}, but {packed}: expected all arrays on one device")
    if not array.contiguous:
        raise ArgumentError(f"{array}: expected a contiguous array")
