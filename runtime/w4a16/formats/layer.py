"""A quantised weight as its checkpoint holds it: named, checked, not yet converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from w4a16.arrays import View
from w4a16.errors import FormatError
from w4a16.formats.config import LayerConfig
from w4a16.library import Source

FLOATS = ("float16", "bfloat16", "float32", "float64")
INDICES = ("int32", "int64")

PointsKind = Literal["gptq", "awq", "outputs", "signed", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Zero points as they are stored.

    gptq: int32 ``[groups, N/8]``, nibble i of word c is output 8c + i; awq: the same with the
    nibbles in the order 0 2 4 6 1 3 5 7; outputs: int32 ``[N/8, groups]``, nibble i of word r is
    output 8r + i; signed: int8 ``[N, groups]``, the zero point minus 8; values: any real numbers
    ``[groups, N]``.
    """

    kind: PointsKind
    stored: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One weight ``W [K, N]``; all arrays are on one device."""

    source: Source
    q: View
    q_name: str
    in_features: int
    out_features: int
    source_k: int
    """Rows that ``q`` holds: K, or a little more where K is not a multiple of 8."""
    groups: int
    group_size: int
    """Inputs that share a scale; the last group may have fewer. One group: K."""
    scales: View
    """``[groups, N]``, or if ``scales_by_output`` ``[N, groups]``; one group: also ``[N]``."""
    scales_name: str
    scales_by_output: bool
    points: Points | None
    """None: all 8."""
    points_name: str
    g_idx: View | None
    """The group of each input; None: input i is in group i / group_size."""
    g_idx_name: str
    bias: View | None
    config: LayerConfig

    def views(self) -> list[View]:
        """All arrays."""
        points = None if self.points is None else self.points.stored
        optional = (points, self.g_idx, self.bias)
        return [self.q, self.scales, *(view for view in optional if view is not None)]


def take(
    tensors: Mapping[str, View], known: tuple[str, ...], required: tuple[str, ...], method: str
) -> None:
    """Raises :class:`w4a16.FormatError` unless ``tensors`` are those of the format."""
    names = ", ".join(known)
    for name in required:
        if name not in tensors:
            raise FormatError(
                f"a {method} weight has {names}: {name} is missing, only"
                f" {', '.join(tensors) or 'nothing'} is there"
            )
    for name in tensors:
        if name not in known:
            raise FormatError(f"a {method} weight has {names}: {name!r} is none of them")


def check(
    view: View, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], why: str
) -> None:
    """Raises :class:`w4a16.FormatError` unless dtype and shape (None: any extent) are these."""
    fits = len(view.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(view.shape, shape, strict=True)
    )
    if fits and view.dtype in dtypes and 0 not in view.shape:
        return
    empty = " of sizes above 0" if 0 in view.shape else ""
    wanted = "[" + ", ".join("…" if want is None else str(want) for want in shape) + "]"
    raise FormatError(
        f"{name} is {view.describe()}: expected {' or '.join(dtypes)} {wanted}{empty}"
        f"{', ' + why if why else ''}"
    )


def check_one_device(layer: Layer) -> None:
    named = [(layer.scales_name, layer.scales), ("bias", layer.bias)]
    named += [(layer.g_idx_name, layer.g_idx)]
    if layer.points is not None:
        named.append((layer.points_name, layer.points.stored))
    for name, view in named:
        if view is not None and view.device != layer.q.device:
            raise FormatError(
                f"{name} is {view.describe()}, but {layer.q_name} is {layer.q.describe()}:"
                " expected all arrays on one device"
            )


@dataclass(frozen=True, slots=True)
class Grouping:
    """How many groups a weight has, and of how many inputs."""

    groups: int
    group_size: int


def grouping(
    in_features: int, scales: View, axis: int, name: str, group_size: int | None, why: str
) -> Grouping:
    """Groups along ``axis`` of the scales; ``group_size`` -1: one, None: read off the shapes."""
    groups = 1 if len(scales.shape) == 1 else scales.shape[axis]
    where = f"{name} is {scales.describe()}, so there are {groups} groups"
    if group_size is None:
        if in_features % groups:
            raise FormatError(
                f"{where} of {in_features} inputs, which they do not divide ({why}): pass"
                " group_size, if the last group is smaller"
            )
        return Grouping(groups, in_features // groups)
    if group_size == -1:
        if groups != 1:
            raise FormatError(
                f"{where}, but the group size is -1, one group of all {in_features} inputs"
                f" ({why}): expected 1 group, or group size {-(-in_features // groups)}"
            )
        return Grouping(1, in_features)
    expected = -(-in_features // group_size)
    if groups != expected:
        advice = f" or group size {in_features // groups}" if in_features % groups == 0 else ""
        raise FormatError(
            f"{where}, but {in_features} inputs with group size {group_size} make {expected}"
            f" ({why}): expected {expected} groups{advice}"
        )
    return Grouping(groups, in_features if groups == 1 else group_size)


def check_scales(view: View, name: str, n: int, by_output: bool, why: str) -> None:
    """``[groups, N]``, by output ``[N, groups]``; ``[N]`` will do for one group."""
    if len(view.shape) == 1:
        check(view, name, FLOATS, (n,), why)
    else:
        check(view, name, FLOATS, (n, None) if by_output else (None, n), why)


def check_rest(
    g_idx: View | None, g_idx_name: str, bias: View | None, in_features: int, n: int, why: str
) -> None:
    if g_idx is not None:
        check(g_idx, g_idx_name, INDICES, (in_features,), f"one for each input ({why})")
    if bias is not None:
        check(bias, "bias", FLOATS, (n,), f"one for each output ({why})")
