"""Scales, zero points and bias, as checkpoints store them, to what the kernels read.

Kernels compute ``fma(q - 8, s, z)`` in FP16, so a zero point p becomes ``z = (8 - p) * s``: the
product in FP32 (exact for an integer p, since s is FP16), then rounded once to FP16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from w4a16.errors import FormatError
from w4a16.formats.backends import Backend, first
from w4a16.formats.config import ZeroPoints
from w4a16.formats.layer import Layer, PointsKind
from w4a16.formats.order import Extent

#: Where nibble shifts are those of outputs 0 to 7.
_SHIFTS = [0, 4, 8, 12, 16, 20, 24, 28]
_AWQ_SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]
_ONES = 0x11111111
_SEVENS = 0x77777777
_EIGHTS = 0x88888888 - (1 << 32)

#: FP16 without its sign, as integers.
_MAGNITUDE = 0x7FFF
_INFINITY = 0x7C00
_SMALLEST_NORMAL = 0x0400
_EIGHTH_OF_LARGEST = 0x6FFF  # 8188, the largest s with a finite 8 * s


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


def convert(
    layer: Layer,
    raw: Raw,
    extent: Extent,
    zero_points: ZeroPoints | None,
    backend: Backend,
    notes: list[str],
) -> Values:
    """What is worth a warning goes to ``notes``. ``zero_points`` overrules the configuration.

    Raises :class:`w4a16.FormatError` for numbers that FP16 cannot hold. On a GPU this waits for
    the stream once, twice if there are zero points of GPTQ.
    """
    with backend.ignoring_overflow():
        shape = (extent.groups, extent.n)
        given = _by_group(raw.scales, layer.scales_by_output)
        scales = backend.filled(shape, 0, "float16")
        inner = scales[: layer.groups, : layer.out_features]
        inner[...] = backend.cast(given, "float32") if layer.scales.dtype == "float64" else given
        points = None
        if layer.points is not None and raw.points is not None:
            points = _points(layer, raw.points, zero_points, backend, notes)
        asymmetric, large = _check_scales(layer, given, inner, points, backend, notes)
        zeros = None
        if points is not None and asymmetric:
            zeros = backend.filled(shape, 0, "float16")
            inside = zeros[: layer.groups, : layer.out_features]
            inside[...] = backend.cast(8 - points, "float32") * backend.cast(inner, "float32")
            if large or layer.points is None or layer.points.kind == "values":
                _check_zeros(layer, inside, inner, backend)
        bias = None
        if raw.bias is not None:
            bias = backend.filled((extent.n,), 0, "float16")
            bias[: layer.out_features] = raw.bias
            _check_bias(layer, raw.bias, bias[: layer.out_features], backend)
    return Values(scales=scales, zeros=zeros, bias=bias)


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


def _points(
    layer: Layer,
    stored: Any,
    zero_points: ZeroPoints | None,
    backend: Backend,
    notes: list[str],
) -> Any:
    """Zero points ``[groups, N]``, integers, or float32 where any number is allowed."""
    assert layer.points is not None
    kind = layer.points.kind
    if kind == "values":
        values = backend.cast(_by_group(stored, False), "float32")
        if backend.counts([(values - values) != 0])[0]:
            raise FormatError(
                f"{layer.points_name} holds NaN or infinity: expected finite zero points"
            )
        return values
    if kind == "signed":
        signed = backend.cast(stored.T, "int32")
        if backend.counts([(signed < -8) | (signed > 7)])[0]:
            raise FormatError(
                f"{layer.points_name} is {layer.points.stored.describe()} with numbers outside"
                " -8..7: expected zero points of 4 bits"
            )
        return signed + 8
    if kind == "gptq" and (zero_points or _version(layer, stored, backend, notes)) == "v1":
        stored = stored + _ONES  # modulo 2**32, borrows and all: see gptq.py
    return nibbles(kind, stored, layer.out_features, backend)


def _version(layer: Layer, words: Any, backend: Backend, notes: list[str]) -> ZeroPoints:
    """v1 or v2: what the configuration says, unless that makes a symmetric weight lopsided."""
    config = layer.config
    whole = layer.out_features // 8
    rest = nibbles("gptq", words[:, whole:], layer.out_features % 8, backend)
    words = words[:, :whole]
    found = backend.counts([words != _SEVENS, words != _EIGHTS, rest != 7, rest != 8])
    not_v1, not_v2 = found[0] + found[2], found[1] + found[3]
    by = f" (written by {config.producer})" if config.producer else ""
    if config.zero_points == "v1" and not_v2 == 0:
        notes.append(
            f"checkpoint_format says gptq (v1){by}, but every stored zero point of {layer.q_name}"
            " is 8, as gptq_v2 stores symmetric weights: read as v2; pass zero_points='v1' if"
            " they mean 9"
        )
        return "v2"
    if config.zero_points == "v2" and not_v1 == 0 and config.symmetric:
        notes.append(
            f"checkpoint_format says gptq_v2{by}, but every stored zero point of {layer.q_name}"
            " is 7, as gptq (v1) stores symmetric weights: read as v1; pass zero_points='v2' if"
            " they mean 7"
        )
        return "v1"
    return config.zero_points


# ---- Checks ----


def _check_scales(
    layer: Layer, given: Any, scales: Any, points: Any, backend: Backend, notes: list[str]
) -> tuple[bool, bool]:
    """Whether any zero point is not 8, and whether a zero may overflow."""
    magnitude = backend.bits(scales) & _MAGNITUDE
    nonfinite = magnitude >= _INFINITY
    zero = magnitude == 0
    masks = [nonfinite, zero, magnitude > _EIGHTH_OF_LARGEST]
    if points is not None:
        masks.append(points != 8)
    converted = layer.scales.dtype != "float16"
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
    if points is None:
        return False, bool(found[2])
    if layer.config.symmetric and found[3]:
        notes.append(
            f"the configuration says that weights are symmetric, but {found[3]} of {total} zero"
            f" points are not 8, {place(points != 8)}: used as they are"
        )
    return found[3] > 0, bool(found[2])


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


def _check_bias(layer: Layer, given: Any, bias: Any, backend: Backend) -> None:
    if layer.bias is None or layer.bias.dtype == "float16":
        return
    mask = ((backend.bits(bias) & _MAGNITUDE) >= _INFINITY) & ((given - given) == 0)
    count = backend.counts([mask])[0]
    if count:
        raise FormatError(
            f"{count} of {layer.out_features} numbers of bias are too large for float16, first for"
            f" output {first(mask)[0]} (bias is {layer.bias.describe()}): expected at most 65504"
            " in magnitude"
        )
