"""Weights of checkpoints to what the kernels read, and back: :func:`pack`, :func:`unpack`,
:func:`dequantize`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from w4a16 import arrays
from w4a16.arguments import Argument, check_weight, is_group_size
from w4a16.arrays import View
from w4a16.errors import ArgumentError, W4A16Warning
from w4a16.formats import values
from w4a16.formats.backends import Backend, Extremes
from w4a16.formats.config import LayerConfig, QuantizationConfig, ZeroPoints
from w4a16.formats.layer import Layer
from w4a16.formats.order import Extent, extent
from w4a16.formats.reading import check_supported, read_layer
from w4a16.library import Source
from w4a16.packed import PackedWeight, require_packed
from w4a16.places import Place, moved, on_host, place_of

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "plain")


@dataclass(frozen=True, eq=False, kw_only=True)
class Unpacked:
    """A packed weight as numbers, in the order and shape of its checkpoint.

    ``w[i, j] = fma(q[i, j] - 8, scales[g, j], z[g, j])``, with g the group of input i.
    """

    q: Any
    """uint8 ``[in_features, out_features]``, 0..15."""
    scales: Any
    """float16 ``[groups, out_features]``."""
    zeros: Any | None
    """float32 ``[groups, out_features]``, zero points: exactly those of the checkpoint if they
    were integers and the scale is finite and not 0 (where it is 0, 8), otherwise ``8 - z/s``;
    None: all 8."""
    z: Any | None
    """float16 ``[groups, out_features]``, the zeros that the kernels add; None: all 0."""
    g_idx: Any | None
    """int32 ``[in_features]``, the group of each input; None: input i is in group
    i / group_size."""
    bias: Any | None
    """float16 ``[out_features]``, or None."""
    group_size: int
    """Inputs that share a scale; -1: all of them."""


def pack(
    weight: Mapping[str, Any] | None = None,
    /,
    *,
    format: str | None = None,
    config: Mapping[str, Any] | QuantizationConfig | LayerConfig | None = None,
    q: Any = None,
    scales: Any = None,
    zeros: Any = None,
    group_size: int | None = None,
    g_idx: Any = None,
    bias: Any = None,
    zero_points: ZeroPoints | None = None,
    device: int | str | None = None,
    threads: int = 0,
    stream: int | None = None,
) -> PackedWeight:
    """Packs one weight for the kernels of this library.

    From a checkpoint: ``pack(tensors, config=quantization_config)``, with the tensors of one layer
    by their last names (GPTQ: ``qweight qzeros scales g_idx bias``; AWQ: ``qweight qzeros scales
    bias``; compressed-tensors: ``weight_packed weight_scale weight_zero_point weight_shape
    weight_g_idx bias``; shapes in :mod:`w4a16.formats.gptq`, :mod:`~w4a16.formats.awq`,
    :mod:`~w4a16.formats.compressed_tensors`). ``config`` is the model's ``quantization_config``,
    or for models whose modules differ ``QuantizationConfig.for_module(name)``; in its place
    ``format`` names one of ``gptq``, ``gptq_v2``, ``awq``, ``compressed-tensors``.

    From numbers: ``pack(q=…, scales=…)`` with ``q`` uint8 ``[K, N]`` of 0..15, ``scales``
    ``[K/group_size, N]`` and ``zeros`` (zero points, any real numbers; None: all 8) like scales,
    for ``w = (q - zeros) * scales``.

    Args:
        group_size: Inputs that share a scale (-1: all), where the configuration does not say it
            and the shapes leave it open.
        g_idx: Act-order: the group of each input, int32 or int64 ``[K]``.
        bias: Added to the product, ``[N]``.
        zero_points: How GPTQ's are stored, whatever the configuration says: ``v1`` minus 1,
            ``v2`` as they are.
        device: Where the result goes: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an ordinal. Default:
            where the tensors are. Weights bound for a GPU are packed there.
        threads: For packing on the CPU; 0: all cores.
        stream: A ``cudaStream_t`` for packing on a GPU; refused for packing on the CPU. Default:
            the tensors' own (torch: the current one).

    Returns:
        Arrays of the framework and on the device of the tensors: torch for torch, numpy for numpy,
        :class:`w4a16.DeviceArray` for GPU arrays of other frameworks. N is padded to a multiple of
        8 (with weights 0) and K to one of 64 and of the group size (with rows that multiply no
        input), which changes no result. Scales, zeros and bias are float16; other dtypes are
        rounded to it. Zeros are left out if all zero points are 8.

    On a GPU the big array is neither copied nor moved, and everything is ordered on the stream.
    For torch's tensors all checks of numbers wait for it once, together, and a second time only
    where they find something. Arrays of frameworks other than torch have scales, zero points and
    ``g_idx`` (and a copy of ``q``, to check it) read on the host.

    Raises:
        ArgumentError: Arrays that cannot be used, or arguments that contradict each other.
        FormatError: Tensors that are not what the format says, an unknown configuration, numbers
            too large for float16.
        UnsupportedError: No kernel takes the group size.
        DeviceError: No GPU, or one that this library was not built for.

    Warns :class:`w4a16.W4A16Warning` for zero points stored in the other version, scales that are
    NaN, infinite or 0 or lose precision, and a ``g_idx`` or zero points that contradict the
    configuration or are missing.
    """
    plainly = {"q": q, "scales": scales, "zeros": zeros, "g_idx": g_idx, "bias": bias}
    layer_config, tensors = _request(weight, plainly, format, config, group_size, zero_points)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ArgumentError(f"threads is {threads!r}: expected 0 (all cores) or more")
    notes: list[str] = []
    layer = read_layer(tensors, layer_config, stream)
    if layer_config.act_order and layer.g_idx is None and layer.groups > 1:
        notes.append(
            f"the configuration says act-order, but no {layer.g_idx_name} says which group an input"
            " belongs to: read as a weight without act-order"
        )
    target = _ordinal(device, layer.q)
    where = layer.q.device if layer.q.device >= 0 else target
    if stream is not None and where < 0:
        raise ArgumentError(
            f"stream is {stream!r}, but the weight is packed on the CPU, which has no streams:"
            " leave it out, or pass device='cuda'"
        )
    place = place_of(layer.q, where, stream, threads)
    sorts = layer.g_idx is not None and layer.groups > 1 and place.backend.speculates
    extents = _extent(layer, None if sorts else layer.g_idx, notes)
    check_supported(layer, extents)
    with place.active():
        packed = _packed(layer, extents, zero_points, place, sorts, notes)
        if where != target:
            parts = {name: moved(array, target) for name, array in packed.arrays().items()}
            packed = replace(packed, **parts)
    for note in notes:
        warnings.warn(note, W4A16Warning, stacklevel=2)
    return packed


def unpack(packed: PackedWeight) -> Unpacked:
    """The exact inverse of :func:`pack`: original order of rows, no padding.

    ``pack(q=u.q, scales=u.scales, zeros=u.zeros, g_idx=u.g_idx, bias=u.bias,
    group_size=u.group_size)`` makes the same bytes again if the zero points were integers and no
    scale is 0. Arrays are of the framework and on the device of ``packed``; there the work is done,
    for :class:`w4a16.DeviceArray` on the host. Raises :class:`w4a16.ArgumentError` for a weight
    whose arrays do not fit together.
    """
    place, views = _opened(packed)
    with place.active(), place.backend.ignoring_overflow():
        numbers = _unpacked(packed, views, place)
        given = {
            field.name: place.give(value)
            for field in fields(numbers)
            if not isinstance(value := getattr(numbers, field.name), int | None)
        }
    return replace(numbers, **given)


def dequantize(packed: PackedWeight) -> Any:
    """The weight that the kernels multiply with, float16 ``[in_features, out_features]``.

    Bit for bit ``fma(q - 8, s, z)`` rounded once to FP16 (half to even): in float64 the value
    before rounding is exact, since every FP16 number is a multiple of 2**-24 below 2**16. The GEMV
    kernels do not round weights without zeros by themselves (see ``w4a16.h``). Framework, device
    and errors as for :func:`unpack`.
    """
    place, views = _opened(packed)
    with place.active(), place.backend.ignoring_overflow():
        numbers = _unpacked(packed, views, place)
        return place.give(_dequantized(numbers, place.backend))


# ---- What is asked for ----


def _request(
    weight: Mapping[str, Any] | None,
    plainly: dict[str, Any],
    format: str | None,
    config: Mapping[str, Any] | QuantizationConfig | LayerConfig | None,
    group_size: int | None,
    zero_points: str | None,
) -> tuple[LayerConfig, dict[str, Any]]:
    """How the weight is stored, and its tensors by name."""
    if format is not None and format not in FORMATS:
        raise ArgumentError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    if zero_points not in (None, "v1", "v2"):
        raise ArgumentError(f"zero_points is {zero_points!r}: expected 'v1', 'v2' or None")
    if group_size is not None and not is_group_size(group_size):
        raise ArgumentError(
            f"group_size is {group_size!r}: expected a positive number, or -1 for one scale a"
            " column"
        )
    given = [name for name, value in plainly.items() if value is not None]
    if weight is None:
        if "q" not in given:
            raise ArgumentError(
                "no weight was given: expected the tensors of a checkpoint's layer as the first"
                f" argument, or q=… and scales=… (given: {', '.join(given) or 'nothing'})"
            )
        if format not in (None, "plain") or config is not None:
            raise ArgumentError(
                "q was given with a format or config of a checkpoint: q is plain, uint8 [K, N] of"
                " 0..15; a checkpoint's tensors are the first argument"
            )
        layer = LayerConfig(method="plain", group_size=group_size)
        tensors = {name: plainly[name] for name in given}
    else:
        if not isinstance(weight, Mapping):
            raise ArgumentError(
                f"the weight is {type(weight).__name__}: expected a mapping from names such as"
                " qweight, scales to tensors"
            )
        if given:
            raise ArgumentError(
                f"{', '.join(given)} given beside a checkpoint's tensors: expected them in the"
                " mapping, by the checkpoint's names"
            )
        layer = _layer_config(weight, format, config)
        if group_size is not None:
            if layer.group_size not in (None, group_size):
                raise ArgumentError(
                    f"group_size is {group_size}, but the configuration says {layer.group_size}"
                )
            layer = replace(layer, group_size=group_size)
        tensors = {name: value for name, value in weight.items() if value is not None}
    if zero_points is not None and layer.method != "gptq":
        raise ArgumentError(
            f"zero_points is {zero_points!r}, but the weight's format is {layer.method}: only GPTQ"
            " has two ways to store zero points"
        )
    return layer, tensors


def _layer_config(
    weight: Mapping[str, Any],
    format: str | None,
    config: Mapping[str, Any] | QuantizationConfig | LayerConfig | None,
) -> LayerConfig:
    method = "gptq" if format == "gptq_v2" else format
    if config is not None:
        found = (
            config if isinstance(config, LayerConfig) else QuantizationConfig.parse(config).layer
        )
        if method not in (None, found.method):
            raise ArgumentError(
                f"format is {format!r}, but config is one of {found.method}: expected one of them,"
                " or that they agree"
            )
        return replace(found, zero_points="v2") if format == "gptq_v2" else found
    if method is None and "weight_packed" in weight:
        method = "compressed-tensors"
    if method == "gptq":
        version: ZeroPoints = "v2" if format == "gptq_v2" else "v1"
        return LayerConfig(method="gptq", group_size=None, zero_points=version)
    if method == "awq":
        return LayerConfig(method="awq", group_size=None)
    if method == "compressed-tensors":
        symmetric = weight.get("weight_zero_point") is None
        return LayerConfig(method="compressed-tensors", group_size=None, symmetric=symmetric)
    if method == "plain":
        return LayerConfig(method="plain", group_size=None)
    raise ArgumentError(
        f"neither format nor config was given for the tensors {', '.join(map(str, weight))}:"
        f" expected config=quantization_config of the model, or format= one of {', '.join(FORMATS)}"
    )


# ---- Packing ----


def _extent(layer: Layer, g_idx: View | None, notes: list[str]) -> Extent:
    return extent(
        layer.in_features,
        layer.out_features,
        layer.groups,
        layer.group_size,
        None if g_idx is None else on_host(g_idx).astype(np.int64),
        layer.g_idx_name,
        notes,
        minus_one_is_none=layer.source is Source.COMPRESSED_TENSORS,
    )


def _packed(
    layer: Layer,
    extents: Extent,
    zero_points: ZeroPoints | None,
    place: Place,
    sorts: bool,
    notes: list[str],
) -> PackedWeight:
    """``sorts``: by ``layer.g_idx``, which ``extents`` leave out."""
    backend = place.backend
    seen = Extremes(backend)
    columns = rows = packed = None
    if sorts:
        columns = rows = _sorted_rows(layer, extents, place, seen)
    elif extents.columns is not None:
        columns = place.give(extents.columns)
        rows = _rows(layer, extents, columns)
    if backend.speculates:  # the GPU packs while the rest is put on its stream
        packed = place.pack(layer, extents, rows, seen)
    raw = values.Raw(
        scales=place.take(layer.scales),
        points=None if layer.points is None else place.take(layer.points.stored),
        bias=None if layer.bias is None else place.take(layer.bias),
    )
    begun = values.begin(layer, raw, extents, zero_points, backend, seen)
    if sorts and not _is_order(layer, seen):
        # Wrong, or not meant: what to say of it, and what to do, is found on the host.
        extents = _extent(layer, layer.g_idx, notes)
        columns = None if extents.columns is None else place.give(extents.columns)
        packed = place.pack(layer, extents, _rows(layer, extents, columns), seen)
    elif sorts and extents.columns is None and seen["g_idx moved"] == (0, 0):
        columns = None
    found = values.finish(layer, raw, extents, begun, zero_points, backend, seen, notes)
    if packed is None:
        packed = place.pack(layer, extents, rows, seen)
    place.check_packed(layer, seen)

    def given(array: Any) -> Any:
        return None if array is None else place.give(array)

    return PackedWeight(
        packed=packed,
        scales=given(found.scales),
        zeros=given(found.zeros),
        columns=columns,
        bias=given(found.bias),
        in_features=layer.in_features,
        out_features=layer.out_features,
    )


def _sorted_rows(layer: Layer, extents: Extent, place: Place, seen: Extremes) -> Any:
    """Columns of the weight, by the backend; what tells whether they are right goes to ``seen``."""
    assert layer.g_idx is not None
    g_idx = place.take(layer.g_idx)
    found = place.backend.sorted_rows(g_idx, layer.groups, layer.group_size, extents.k)
    seen.add("g_idx", g_idx)
    seen.add("g_idx within", found.within)
    seen.add("g_idx moved", found.moved)
    return found.columns


def _is_order(layer: Layer, seen: Extremes) -> bool:
    """Whether ``g_idx`` names groups that are there, and none of them too often."""
    lowest, highest = seen["g_idx"]
    most = seen["g_idx within"][1] + 1
    return lowest >= 0 and highest < layer.groups and most <= layer.group_size


def _rows(layer: Layer, extents: Extent, columns: Any) -> Any:
    """The row of ``q`` for each packed row; None: in their order, and the library fills up, which
    is faster."""
    if columns is None or layer.source_k != layer.in_features:
        return columns
    return None if _in_order(extents.columns, layer.in_features) else columns


def _in_order(columns: Any, in_features: int) -> bool:
    return np.array_equal(columns[:in_features], np.arange(in_features, dtype=np.int32))


def _ordinal(device: Any, q: View) -> int:
    """A CUDA ordinal; -1: the CPU."""
    if device is None:
        return q.device
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return device
    name = str(device)  # torch.device("cuda", 1) is "cuda:1"
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return -1
    if kind == "cuda" and (index.isdecimal() or index == ""):
        if index:
            return int(index)
        return q.device if q.device >= 0 else _current_device()
    raise ArgumentError(
        f"device is {device!r}: expected 'cpu', 'cuda', 'cuda:0' or the number of a GPU"
    )


def _current_device() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.current_device())
    from w4a16 import driver

    return driver.current_device()


# ---- Unpacking ----


def _opened(packed: PackedWeight) -> tuple[Place, dict[str, View]]:
    """Raises :class:`w4a16.ArgumentError` for arrays that are no packed weight."""
    require_packed(packed)
    views = {name: arrays.view(array, name) for name, array in packed.arrays().items()}
    described = {name: Argument.of(name, view) for name, view in views.items()}
    check_weight(
        described["packed"],
        described["scales"],
        described.get("zeros"),
        described.get("columns"),
        packed.in_features,
        packed.out_features,
    )
    bias, n = described.get("bias"), packed.n
    if bias is not None and (
        bias.dtype != "float16"
        or tuple(bias.shape) != (n,)
        or bias.device != described["packed"].device
    ):
        raise ArgumentError(
            f"{bias}: expected float16 [{n}] on {described['packed'].device}, like packed"
        )
    view = views["packed"]
    return place_of(view, view.device, None), views


def _unpacked(packed: PackedWeight, views: Mapping[str, View], place: Place) -> Unpacked:
    """In the backend's form."""
    backend = place.backend
    inputs, outputs = packed.in_features, packed.out_features
    group = packed.k // packed.groups
    pairs = place.unpack(views["packed"])
    order = None
    if "columns" in views:
        columns = on_host(views["columns"])
        order = _places_of_inputs(columns, inputs)
        pairs = pairs[backend.index(order)]
        if _in_order(columns, inputs):
            order = None
    pairs = pairs[:inputs]
    q = backend.empty((inputs, outputs), "uint8")
    q[:, 0::2] = (pairs & 15)[:, : -(-outputs // 2)]
    q[:, 1::2] = (pairs >> 4)[:, : outputs // 2]
    g_idx = None if order is None else (order // group).astype(np.int32)
    # Groups that were added to fill K up; those of a checkpoint are whole multiples of 64 rows.
    groups = packed.groups
    if g_idx is None:
        groups = min(groups, -(-inputs // group))
    elif group % 64:
        groups = int(g_idx.max()) + 1

    def without_padding(name: str) -> Any:
        return place.take(views[name])[:groups, :outputs]

    scales = without_padding("scales")
    z = without_padding("zeros") if "zeros" in views else None
    return Unpacked(
        q=q,
        scales=scales,
        zeros=None if z is None else _zero_points(scales, z, backend),
        z=z,
        g_idx=g_idx,
        bias=place.take(views["bias"])[:outputs] if "bias" in views else None,
        group_size=-1 if groups == 1 else group,
    )


def _places_of_inputs(columns: Any, inputs: int) -> Any:
    """int64 ``[inputs]``: which packed row multiplies each input."""
    rows = np.flatnonzero(columns >= 0)
    named = columns[rows]
    if len(rows) != inputs or not np.array_equal(np.sort(named), np.arange(inputs)):
        raise ArgumentError(
            f"columns is int32 [{len(columns)}] with {len(rows)} inputs: expected each of 0 to"
            f" {inputs - 1} once, and -1 elsewhere, as w4a16.pack makes it"
        )
    found = np.empty(inputs, np.int64)
    found[named] = rows
    return found


def _zero_points(scales: Any, z: Any, backend: Backend) -> Any:
    """``8 - z/s``; the integer beside it if that has the same z, to which every other is at least
    half of s away."""
    s = backend.cast(scales, "float32")
    exact = 8 - backend.cast(z, "float32") / s
    nearest = backend.rounded(exact)
    same = backend.cast((8 - nearest) * s, "float16") == z
    points = backend.where(same, nearest, exact)
    return backend.where(s == 0, 0 * s + 8, points)


def _dequantized(numbers: Unpacked, backend: Backend) -> Any:
    inputs, outputs = numbers.q.shape
    if numbers.g_idx is not None:
        groups = numbers.g_idx.astype(np.int64)
    else:
        size = inputs if numbers.group_size == -1 else numbers.group_size
        groups = np.arange(inputs) // size
    weight = backend.empty((inputs, outputs), "float16")
    # The product has 4 + 11 bits, the sum up to 44.
    exactly = "float32" if numbers.z is None else "float64"
    scales = backend.cast(numbers.scales, exactly)
    z = None if numbers.z is None else backend.cast(numbers.z, exactly)
    step = max(1, backend.chunk // outputs)
    for start in range(0, inputs, step):
        rows = slice(start, start + step)
        group = backend.index(groups[rows])
        exact = backend.cast(numbers.q[rows], exactly)
        exact -= 8
        exact *= scales[group]
        if z is not None:
            exact += z[group]
        weight[rows] = backend.half(exact)
    return weight
