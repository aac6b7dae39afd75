"""Weights of a fused projection: packed (:class:`FusedQKV`), or as a GPTQ checkpoint holds them
(:class:`GPTQTensors`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16 import arrays
from w4a16.arguments import N_MULTIPLE
from w4a16.errors import ArgumentError, UnsupportedError
from w4a16.formats import gptq
from w4a16.formats.config import LayerConfig, QuantizationConfig, ZeroPoints
from w4a16.formats.layer import check_one_device
from w4a16.library import QuantOp
from w4a16.packed import PackedWeight
from w4a16.packing import pack

MOST_SEGMENTS = 3

#: What the kernel for GPTQ's own layout wants of K and of the group size.
GPTQ_UNIT = 32

_SEGMENT_NAMES = ("q", "k", "v")


@dataclass(frozen=True, eq=False, kw_only=True)
class FusedQKV:
    """Up to three projections of one input, packed: :func:`w4a16.fused.fuse_qkv` makes it.

    The packed values of all are one array. Scales, zeros and bias are there for each segment by
    itself, so that each is a whole :class:`w4a16.PackedWeight` (:attr:`segments`), and once more
    for all of them side by side (:attr:`joined`).
    """

    packed: Any
    """uint8 ``[n_q + n_k + n_v, k/2]``."""
    scales: tuple[Any, ...]
    """float16 ``[groups, n_i]`` each."""
    zeros: tuple[Any, ...]
    """float16 ``[groups, n_i]`` each; empty: symmetric."""
    bias: tuple[Any, ...]
    """float16 ``[n_i]`` each; empty: none."""
    columns: Any | None
    """int32 ``[k]``, as in :class:`w4a16.PackedWeight`, of all segments."""
    joined: tuple[Any | None, ...]
    """Scales, zeros and bias (or None) of all segments side by side; empty for one segment."""
    in_features: int
    widths: tuple[int, ...]
    """Outputs of each segment."""

    @property
    def k(self) -> int:
        """Inputs, padded."""
        return int(self.packed.shape[1]) * 2

    @property
    def out_features(self) -> int:
        """Outputs of all segments."""
        return sum(self.widths)

    @property
    def quant_op(self) -> QuantOp:
        return self.segments[0].quant_op

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0: all (per column, without zeros)."""
        return self.segments[0].group_size

    @property
    def segments(self) -> tuple[PackedWeight, ...]:
        """Each projection as a weight of its own; nothing is copied."""
        return tuple(
            PackedWeight(
                packed=self.packed[begin:end],
                scales=self.scales[i],
                zeros=self.zeros[i] if self.zeros else None,
                columns=self.columns,
                bias=self.bias[i] if self.bias else None,
                in_features=self.in_features,
                out_features=end - begin,
            )
            for i, (begin, end) in enumerate(ranges(self.widths))
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class GPTQTensors:
    """A GPTQ checkpoint's tensors of one fused projection, run as they are: tactic ``gptq:plain``.

    The shapes are those of :mod:`w4a16.formats.gptq`. Making one checks them, once, and drops a
    ``g_idx`` that only says that inputs are in order.

    Raises :class:`w4a16.FormatError` for tensors that do not fit together, and
    :class:`w4a16.UnsupportedError` for sizes that the kernel does not take.
    """

    qweight: Any
    """int32 ``[K/8, N]``."""
    scales: Any
    """float16 ``[groups, N]``."""
    qzeros: Any | None = None
    """int32 ``[groups, N/8]``; None: all zero points are 8."""
    g_idx: Any | None = None
    """int32 ``[K]``, the group of each input; None: input i is in group i / group_size."""
    bias: Any | None = None
    """float16 ``[N]``."""
    group_size: int | None = None
    """Inputs that share a scale (-1: all); None: read off the shapes."""
    zero_points: ZeroPoints = "v1"
    """``v1``: zero points are stored minus 1 (checkpoint_format gptq); ``v2``: as they are."""
    widths: tuple[int, ...] = ()
    """Outputs of each segment; empty: three of N/3."""

    def __post_init__(self) -> None:
        if self.zero_points not in ("v1", "v2"):
            raise ArgumentError(f"zero_points is {self.zero_points!r}: expected 'v1' or 'v2'")
        tensors = {name: getattr(self, name) for name in gptq.TENSORS}
        views = {
            name: arrays.view(value, name) for name, value in tensors.items() if value is not None
        }
        config = LayerConfig(
            method="gptq", group_size=self.group_size, symmetric=self.qzeros is None
        )
        layer = gptq.read(views, config)
        check_one_device(layer)
        for name, view in views.items():
            if name in ("scales", "bias") and view.dtype != "float16":
                raise ArgumentError(
                    f"{name} is {view.describe()}: the kernel reads float16; convert it, or pack"
                    " the weight with w4a16.fused.fuse_qkv, which does"
                )
            if not view.contiguous:
                raise ArgumentError(f"{name} is {view.describe()}: expected a contiguous array")
        k, n, group = layer.in_features, layer.out_features, layer.group_size
        if k % GPTQ_UNIT or group % GPTQ_UNIT or n % N_MULTIPLE:
            raise UnsupportedError(
                f"qweight is {views['qweight'].describe()}, so K is {k} and N is {n}, with group"
                f" size {group}: the kernel for GPTQ's own layout takes K and group sizes that are"
                f" multiples of {GPTQ_UNIT}, and N of {N_MULTIPLE}"
            )
        object.__setattr__(self, "group_size", group)
        object.__setattr__(self, "widths", widths_of(n, self.widths or None, "qweight"))
        if self.g_idx is not None:
            object.__setattr__(self, "g_idx", _order(self.g_idx, group, layer.groups))

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any] | QuantizationConfig | LayerConfig | None = None,
        *,
        widths: Sequence[int] | None = None,
        group_size: int | None = None,
        zero_points: ZeroPoints | None = None,
    ) -> GPTQTensors:
        """From a layer's tensors by their last names, and the model's ``quantization_config``."""
        unknown = sorted(set(tensors) - set(gptq.TENSORS))
        if unknown:
            raise ArgumentError(
                f"{unknown[0]!r} is no tensor of a GPTQ weight: expected {', '.join(gptq.TENSORS)}"
            )
        found = config
        if found is not None and not isinstance(found, LayerConfig):
            found = QuantizationConfig.parse(found).layer
        if found is not None and found.method != "gptq":
            raise ArgumentError(f"config is one of {found.method}: expected one of gptq")
        if group_size is None and found is not None:
            group_size = found.group_size
        if zero_points is None:
            zero_points = "v1" if found is None else found.zero_points
        given = dict(tensors)
        if 0 in getattr(given.get("g_idx"), "shape", (1,)):
            given["g_idx"] = None  # modules without act-order have an empty one
        return cls(
            **given,
            group_size=group_size,
            zero_points=zero_points or "v1",
            widths=tuple(widths or ()),
        )

    @property
    def in_features(self) -> int:
        return int(self.qweight.shape[0]) * 8

    @property
    def out_features(self) -> int:
        return int(self.qweight.shape[1])


def fuse_qkv(
    *weights: Mapping[str, Any] | GPTQTensors | PackedWeight,
    widths: Sequence[int] | None = None,
    config: Mapping[str, Any] | QuantizationConfig | LayerConfig | None = None,
    format: str | None = None,
    group_size: int | None = None,
    zero_points: ZeroPoints | None = None,
    device: int | str | None = None,
) -> FusedQKV:
    """Packs the projections of one input into one weight.

    ``weights`` is one weight for all projections (``widths`` says how many outputs each has;
    default: three of equal width), or two or three, one for each. Each is a layer's tensors as
    :func:`w4a16.pack` takes them (with ``config``, ``format``, ``group_size``, ``zero_points`` and
    ``device`` as there), a :class:`GPTQTensors`, or a :class:`w4a16.PackedWeight`. Where some
    projections have zeros or a bias and others have none, those get zeros.

    Raises :class:`w4a16.ArgumentError` for weights that do not fit together, and what
    :func:`w4a16.pack` raises.
    """
    if not 1 <= len(weights) <= MOST_SEGMENTS:
        raise ArgumentError(
            f"{len(weights)} weights were given: expected 1 for all projections, or 2 or 3, one"
            " for each"
        )
    options = {
        "config": config,
        "format": format,
        "group_size": group_size,
        "zero_points": zero_points,
        "device": device,
    }
    packed = [_packed(weight, options) for weight in weights]
    if len(packed) == 1:
        whole = packed[0]
        parts = widths_of(whole.out_features, widths, "the weight")
        return _fused(whole, parts)
    if widths is not None and tuple(widths) != tuple(p.out_features for p in packed):
        raise ArgumentError(
            f"widths is {list(widths)}, but the weights have"
            f" {[p.out_features for p in packed]} outputs: expected these, or no widths"
        )
    _check_alike(packed)
    for name, part in zip(_SEGMENT_NAMES, packed, strict=False):
        _check_width(part.out_features, name)
    return _fused(_side_by_side(packed), tuple(p.out_features for p in packed))


def widths_of(n: int, widths: Sequence[int] | None, what: str) -> tuple[int, ...]:
    """Outputs of each segment of ``n``; None: three of equal width."""
    if widths is None:
        if n % (MOST_SEGMENTS * N_MULTIPLE):
            raise ArgumentError(
                f"{what} has {n} outputs, which are not three times a multiple of {N_MULTIPLE}:"
                " expected widths=(n_q, n_k, n_v)"
            )
        return (n // MOST_SEGMENTS,) * MOST_SEGMENTS
    found = tuple(widths)
    whole = all(isinstance(w, int) and not isinstance(w, bool) for w in found)
    if not whole or not 1 <= len(found) <= MOST_SEGMENTS or sum(found) != n:
        total = f" (sum {sum(found)})" if whole else ""
        raise ArgumentError(
            f"widths is {list(found)}{total}, but {what} has {n} outputs: expected 1 to"
            f" {MOST_SEGMENTS} numbers that sum to {n}"
        )
    for name, width in zip(_SEGMENT_NAMES, found, strict=False):
        _check_width(width, name)
    return found


def ranges(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First column of each segment, and the one after its last."""
    begin = 0
    for width in widths:
        yield begin, begin + width
        begin += width


def _check_width(width: int, name: str) -> None:
    if width < N_MULTIPLE or width % N_MULTIPLE:
        raise ArgumentError(
            f"the {name} projection has {width} outputs: the kernels write multiples of"
            f" {N_MULTIPLE}; expected such a width"
        )


def _packed(weight: Any, options: dict[str, Any]) -> PackedWeight:
    if isinstance(weight, PackedWeight):
        return weight
    if isinstance(weight, GPTQTensors):
        tensors = {name: getattr(weight, name) for name in gptq.TENSORS}
        group = weight.group_size
        return pack(
            tensors,
            format="gptq",
            group_size=-1 if group == weight.in_features else group,
            zero_points=weight.zero_points,
            device=options["device"],
        )
    return pack(weight, **options)


def _check_alike(packed: list[PackedWeight]) -> None:
    first = packed[0]
    for name, other in zip(_SEGMENT_NAMES[1:], packed[1:], strict=False):
        for what, a, b in (
            ("inputs", first.in_features, other.in_features),
            ("groups of inputs with a scale", first.groups, other.groups),
            ("inputs after padding", first.k, other.k),
        ):
            if a != b:
                raise ArgumentError(
                    f"the q projection has {a} {what}, the {name} projection {b}: expected"
                    " projections of one input, quantised alike"
                )
        if type(first.packed) is not type(other.packed) or _device(first) != _device(other):
            raise ArgumentError(
                f"the q projection is a {type(first.packed).__name__} on {_device(first)}, the"
                f" {name} projection a {type(other.packed).__name__} on {_device(other)}: expected"
                " arrays of one framework on one device"
            )
        if not _same_order(first.columns, other.columns):
            raise ArgumentError(
                f"the q and {name} projections have their rows in different orders (act-order,"
                " g_idx): one normalised input serves all of them, in one order; run them with"
                " w4a16.linear, or quantise them together"
            )


def _side_by_side(packed: list[PackedWeight]) -> PackedWeight:
    first = packed[0]
    library = _library(first.packed)
    zeros = bias = None
    if any(p.zeros is not None for p in packed):
        zeros = [library.zeros_like(p.scales) if p.zeros is None else p.zeros for p in packed]
    if any(p.bias is not None for p in packed):
        bias = [library.zeros_like(p.scales[0]) if p.bias is None else p.bias for p in packed]
    return PackedWeight(
        packed=library.concatenate([p.packed for p in packed]),
        scales=library.concatenate([p.scales for p in packed], 1),
        zeros=None if zeros is None else library.concatenate(zeros, 1),
        columns=first.columns,
        bias=None if bias is None else library.concatenate(bias),
        in_features=first.in_features,
        out_features=sum(p.out_features for p in packed),
    )


def _fused(whole: PackedWeight, widths: tuple[int, ...]) -> FusedQKV:
    _library(whole.packed)

    def columns(array: Any) -> tuple[Any, ...]:
        if array is None:
            return ()
        return tuple(_dense(array[..., begin:end]) for begin, end in ranges(widths))

    one = len(widths) == 1
    return FusedQKV(
        packed=whole.packed,
        scales=columns(whole.scales),
        zeros=columns(whole.zeros),
        bias=columns(whole.bias),
        columns=whole.columns,
        joined=() if one else (whole.scales, whole.zeros, whole.bias),
        in_features=whole.in_features,
        widths=widths,
    )


def _order(g_idx: Any, group_size: int, groups: int) -> Any:
    """int32, or None for inputs that are in the order of their groups."""
    library = _library(g_idx)
    on_host = np.asarray(g_idx.cpu() if hasattr(g_idx, "cpu") else g_idx)
    if np.array_equal(on_host, np.arange(len(on_host)) // group_size):
        return None
    lowest, highest = int(on_host.min()), int(on_host.max())
    if lowest < 0 or highest >= groups:
        raise ArgumentError(
            f"g_idx holds {lowest if lowest < 0 else highest}: expected groups 0 to {groups - 1}"
        )
    return g_idx.astype(np.int32) if library is np else g_idx.int()


def _library(array: Any) -> Any:
    """torch or numpy."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    if isinstance(array, np.ndarray):
        return np
    raise ArgumentError(
        f"the weight is a {type(array).__name__}: expected torch tensors or numpy arrays"
    )


def _dense(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    return array.contiguous()


def _device(packed: PackedWeight) -> str:
    return str(getattr(packed.packed, "device", "cpu"))


def _same_order(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool((one == other).all())
