"""The tensors of a layer to a :class:`~w4a16.formats.layer.Layer`, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from w4a16 import arrays
from w4a16.arrays import View
from w4a16.errors import ArgumentError, FormatError
from w4a16.formats import awq, compressed_tensors, gptq, plain
from w4a16.formats.config import LayerConfig
from w4a16.formats.layer import Layer, check_one_device
from w4a16.formats.order import Extent
from w4a16.library import Source
from w4a16.places import on_host
from w4a16.support import require_kernel


def read_layer(tensors: Mapping[str, Any], config: LayerConfig, stream: int | None = None) -> Layer:
    """A layer of anybody's arrays, by the format's names; nothing is copied.

    Raises :class:`w4a16.FormatError` for tensors that do not fit together or are on different
    devices, and :class:`w4a16.ArgumentError` for what is no array.
    """
    views = {
        name: arrays.view(value, name, stream=stream)
        for name, value in tensors.items()
        # Modules without act-order have an empty one.
        if not (name in ("g_idx", "weight_g_idx") and 0 in getattr(value, "shape", (1,)))
    }
    if config.method == "gptq":
        layer = gptq.read(views, config)
    elif config.method == "awq":
        layer = awq.read(views, config)
    elif config.method == "plain":
        layer = plain.read(views, config)
    else:
        layer = compressed_tensors.read(views, config, _shape(views.get("weight_shape")))
    check_one_device(layer)
    if layer.source is not Source.BYTES and not layer.q.contiguous:
        raise ArgumentError(
            f"{layer.q_name} is {layer.q.describe()}: expected a contiguous array"
            " (torch: .contiguous(), numpy: np.ascontiguousarray)"
        )
    return layer


def _shape(view: View | None) -> tuple[int, int] | None:
    if view is None:
        return None
    if view.dtype not in ("int32", "int64") or tuple(view.shape) != (2,):
        raise FormatError(f"weight_shape is {view.describe()}: expected int32 or int64 [2]")
    n, k = (int(number) for number in on_host(view))
    return n, k


def check_supported(layer: Layer, extents: Extent) -> None:
    """Raises :class:`w4a16.UnsupportedError` unless some kernel takes the group size."""
    # Zero points may turn out to be 8 throughout: who takes them takes their absence, too.
    require_kernel(
        extents.n,
        extents.k,
        extents.groups,
        zeros=layer.points is not None,
        bias=layer.bias is not None,
        described=(
            f"K = {layer.in_features}, N = {layer.out_features} and group size {layer.group_size}"
        ),
    )
