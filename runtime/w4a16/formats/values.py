"""Scales, zero points and bias, as checkpoints store them, to what the kernels read.

Kernels compute ``fma(q - 8, s, z)`` in FP16, so a zero point p becomes ``z = (8 - p) * s``: the
product in FP32 (exact for an integer p, since s is FP16), then rounded once to FP16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16.errors import FormatError
from w4a16.formats.backends import Backend, Extremes, first
from w4a16.formats.config import ZeroPoints
from w4a16.formats.layer import Layer, PointsKind
from w4a16.formats.order import Extent

#: Where nibble shifts are those of outputs 0 to 7.
_SHIFTS = [0, 4, 8, 12, 16, 20, 24, 28]
_AWQ_SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]
_ONES = 0x11111111

#: FP16 without its sign, as integers.
_MAGNITUDE = 0x7FFF
_INFINITY = 0x7C00
_SMALLEST_NORMAL = 0x0400
_EIGHTH_OF_LARGEST = 0x6FFF  # 8188, the largest s with a finite 8 * s
_LARGEST = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A layer's small arrays in the backend's form, as they are stored."""

    scales: Any
    points: Any | None
    bias: Any | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Padded, dense, FP16; names and shapes of :class:`w4a16.PackedWeight`."""

    scales: Any
    zeros: Any | None
    bias: Any | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Conversions on their way, before anything is known of the numbers."""

    given: Any
    """Scales as they are stored, ``[groups, N]``."""
    scales: Any
    """Padded, as zeros and bias are."""
    points: Any | None
    """``[groups, N]``, as the configuration says that they are stored."""
    zeros: Any | None
    """Only where to compute them costs less than to know first whether they are wanted."""
    bias: Any | None


def begin(
    layer: Layer,
    raw: Raw,
    extent: Extent,
    zero_points: ZeroPoints | None,
    backend: Backend,
    seen: Extremes,
) -> Begun:
    """What :func:`finish` looks at goes to ``seen``. ``zero_points`` overrules the configuration.
    On a GPU nothing here waits."""
    with backend.ignoring_overflow():
        given = _by_group(raw.scales, layer.scales_by_output)
        scales = _padded(layer, extent, backend)
        inner = _inside(layer, scales)
        inner[...] = backend.cast(given, "float32") if layer.scales.dtype == "float64" else given
        seen.add("scales", backend.bits(inner) & _MAGNITUDE)
        points = zeros = None
        if layer.points is not None and raw.points is not None:
            version = zero_points or layer.config.zero_points
            points = _points(layer, raw.points, version, backend)
            seen.add("points", points)
            if backend.speculates:
                zeros = _zeros(layer, extent, points, inner, backend)
        bias = None
        if raw.bias is not None:
            whole = extent.n == layer.out_features
            bias = (
                backend.empty((extent.n,), "float16")
                if whole
                else backend.filled((extent.n,), 0, "float16")
            )
            bias[: layer.out_features] = raw.bias
            if layer.bias is not None and layer.bias.dtype != "float16":
                seen.add("bias", backend.bits(bias) & _MAGNITUDE)
    return Begun(given=given, scales=scales, points=points, zeros=zeros, bias=bias)


def finish(
    layer: Layer,
    raw: Raw,
    extent: Extent,
    begun: Begun,
    zero_points: ZeroPoints | None,
    backend: Backend,
    seen: Extremes,
    notes: list[str],
) -> Values:
    """What is worth a warning goes to ``notes``.

    Raises :class:`w4a16.FormatError` for numbers that FP16 cannot hold. On a GPU this waits for the
    stream once, and again only where something is wrong, or close to it.
    """
    with backend.ignoring_overflow():
        points, zeros = begun.points, None
        inner = _inside(layer, begun.scales)
        if points is not None:
            _check_points(layer, seen["points"])
            if zero_points is None and _misnamed(layer, seen["points"], notes):
                points = None  # all 8
        _check_scales(layer, begun.given, inner, points, backend, seen, notes)
        if points is not None and seen["points"] != (8, 8):
            zeros = begun.zeros
            if zeros is None:
                zeros = _zeros(layer, extent, points, inner, backend)
            if _may_overflow(layer, seen):
                _check_zeros(layer, _inside(layer, zeros), inner, backend)
        if begun.bias is not None and raw.bias is not None:
            _check_bias(layer, raw.bias, begun.bias[: layer.out_features], backend, seen)
    return Values(scales=begun.scales, zeros=zeros, bias=begun.bias)


def _padded(layer: Layer, extent: Extent, backend: Backend) -> Any:
    """float16 ``[groups, n]``, to be written to by :func:`_inside`."""
    shape = (extent.groups, extent.n)
    if shape == (layer.groups, layer.out_features):
        return backend.empty(shape, "float16")
    return backend.filled(shape, 0, "float16")


def _inside(layer: Layer, padded: Any) -> Any:
    return padded[: layer.groups, : layer.out_features]


def _zeros(layer: Layer, extent: Extent, points: Any, scales: Any, backend: Backend) -> Any:
    zeros = _padded(layer, extent, backend)
    backend.product(points, scales, _inside(layer, zeros))
    return zeros


def _by_group(array: Any, by_output: bool) -> Any:
    """``[groups, N]``."""
    if array.ndim == 1:
        return array[None, :]
    return array.T if by_output else array


# ---- Zero points ----


def nibbles(kind: PointsKind, words: Any, outputs: int, backend: Backend) -> Any:
    """int32 ``[groups, outputs]`` from 32-bit words."""
    shifts = backend.constant(_AWQ_SHIFTS if kind == "awq" else _SHIFTS)
    if kind == "outputs":
        found = (words[:, None, :] >> shifts[None, :, None]) & 15
        return found.reshape(-1, words.shape[1])[:outputs].T
    found = (words[:, :, None] >> shifts) & 15
    return found.reshape(words.shape[0], -1)[:, :outputs]


def _points(layer: Layer, stored: Any, version: ZeroPoints, backend: Backend) -> Any:
    """Zero points ``[groups, N]``, integers, or float32 where any number is allowed."""
    assert layer.points is not None
    kind = layer.points.kind
    if kind == "values":
        return backend.cast(_by_group(stored, False), "float32")
    if kind == "signed":
        return backend.cast(stored.T, "int32") + 8
    if kind == "gptq" and version == "v1":
        stored = stored + _ONES  # modulo 2**32, borrows and all: see gptq.py
    return nibbles(kind, stored, layer.out_features, backend)


def _check_points(layer: Layer, seen: tuple[float, float]) -> None:
    assert layer.points is not None
    lowest, highest = seen
    if layer.points.kind == "values" and not math.isfinite(highest - lowest):
        raise FormatError(f"{layer.points_name} holds NaN or infinity: expected finite zero points")
    if layer.points.kind == "signed" and (lowest < 0 or highest > 15):
        raise FormatError(
            f"{layer.points_name} is {layer.points.stored.describe()} with numbers outside"
            " -8..7: expected zero points of 4 bits"
        )


def _misnamed(layer: Layer, seen: tuple[float, float], notes: list[str]) -> bool:
    """Whether zero points of GPTQ make a symmetric weight lopsided by what the configuration says
    of them, and are all 8 otherwise."""
    if layer.points is None or layer.points.kind != "gptq":
        return False
    config = layer.config
    by = f" (written by {config.producer})" if config.producer else ""
    if config.zero_points == "v1" and seen == (9, 9):
        notes.append(
            f"checkpoint_format says gptq (v1){by}, but every stored zero point of {layer.q_name}"
            " is 8, as gptq_v2 stores symmetric weights: read as v2; pass zero_points='v1' if"
            " they mean 9"
        )
        return True
    if config.zero_points == "v2" and seen == (7, 7) and config.symmetric:
        notes.append(
            f"checkpoint_format says gptq_v2{by}, but every stored zero point of {layer.q_name}"
            " is 7, as gptq (v1) stores symmetric weights: read as v1; pass zero_points='v2' if"
            " they mean 7"
        )
        return True
    return False


# ---- Checks ----


def _check_scales(
    layer: Layer,
    given: Any,
    scales: Any,
    points: Any,
    backend: Backend,
    seen: Extremes,
    notes: list[str],
) -> None:
    converted = layer.scales.dtype != "float16"
    lopsided = layer.config.symmetric and points is not None and seen["points"] != (8, 8)
    lowest, highest = seen["scales"]
    least = _SMALLEST_NORMAL if converted else 1
    if least <= lowest and highest < _INFINITY and not lopsided:
        return
    magnitude = backend.bits(scales) & _MAGNITUDE
    nonfinite = magnitude >= _INFINITY
    zero = magnitude == 0
    masks = [nonfinite, zero]
    if lopsided:
        masks.append(points != 8)
    if converted:
        masks += [
            nonfinite & ((given - given) == 0),
            zero & (given != 0),
            (magnitude < _SMALLEST_NORMAL) & ~zero,
        ]
    found = backend.counts(masks)
    total, name = layer.groups * layer.out_features, layer.scales_name

    def place(mask: Any) -> str:
        group, output = first(mask)
        return f"first in group {group} of output {output}"

    if converted:
        overflowed, lost, subnormal = found[-3:]
        if overflowed:
            raise FormatError(
                f"{overflowed} of {total} {name} are too large for float16, {place(masks[-3])}"
                f" ({name} is {layer.scales.describe()}): expected at most 65504 in magnitude"
            )
        if lost:
            notes.append(
                f"{lost} of {total} {name} are too small for float16 and become 0,"
                f" {place(masks[-2])}"
            )
        if subnormal:
            notes.append(
                f"{subnormal} of {total} {name} are less than 6.1e-5, the smallest normal float16,"
                f" and lose precision, {place(masks[-1])}"
            )
        found[1] -= lost
        zero = zero & (given == 0)
    if found[0]:
        notes.append(f"{found[0]} of {total} {name} are NaN or infinite, {place(nonfinite)}")
    if found[1]:
        notes.append(f"{found[1]} of {total} {name} are 0, {place(zero)}: so are their weights")
    if lopsided:
        notes.append(
            f"the configuration says that weights are symmetric, but {found[2]} of {total} zero"
            f" points are not 8, {place(points != 8)}: used as they are"
        )


def _may_overflow(layer: Layer, seen: Extremes) -> bool:
    """Whether a zero may be too large for float16."""
    _, highest = seen["scales"]
    if layer.points is not None and layer.points.kind != "values":
        return highest > _EIGHTH_OF_LARGEST
    lowest_point, highest_point = seen["points"]
    factor = max(abs(8 - lowest_point), abs(8 - highest_point))
    scale = float(np.array(int(highest), np.uint16).view(np.float16))
    return not factor * scale < _LARGEST


def _check_zeros(layer: Layer, zeros: Any, scales: Any, backend: Backend) -> None:
    infinite = (backend.bits(zeros) & _MAGNITUDE) >= _INFINITY
    mask = infinite & ((backend.bits(scales) & _MAGNITUDE) < _INFINITY)
    count = backend.counts([mask])[0]
    if count:
        group, output = first(mask)
        raise FormatError(
            f"{count} zeros (8 - zero point) * scale are too large for float16, first in group"
            f" {group} of output {output} ({layer.points_name} and {layer.scales_name}): expected"
            " at most 65504 in magnitude"
        )


def _check_bias(layer: Layer, given: Any, bias: Any, backend: Backend, seen: Extremes) -> None:
    if layer.bias is None or layer.bias.dtype == "float16" or seen["bias"][1] < _INFINITY:
        return
    mask = ((backend.bits(bias) & _MAGNITUDE) >= _INFINITY) & ((given - given) == 0)
    count = backend.counts([mask])[0]
    if count:
        raise FormatError(
            f"{count} of {layer.out_features} numbers of bias are too large for float16, first for"
            f" output {first(mask)[0]} (bias is {layer.bias.describe()}): expected at most 65504"
            " in magnitude"
        )
