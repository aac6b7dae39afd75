"""A weight as the kernels read it, with its scales, zeros, act-order and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from w4a16.errors import ArgumentError
from w4a16.library import QuantOp


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedWeight:
    """A quantised weight ``W [K, N]``, packed for SM90, on one device.

    The arrays belong to one framework (numpy, torch, or :class:`w4a16.DeviceArray`); ``n`` and
    ``k`` are padded to what the kernels take, ``out_features`` and ``in_features`` are the
    checkpoint's. With ``q`` in 0..15 the stored value, ``s`` its scale and ``z`` its zero,
    ``w = fma(q - 8, s, z)`` in FP16: zeros are *added*, a zero point ``p`` is ``z = (8 - p) * s``.
    """

    packed: Any
    """uint8 ``[n, k/2]``: each column of W contiguous, rows permuted within each 32."""
    scales: Any
    """float16 ``[groups, n]``; one group: per column."""
    zeros: Any | None
    """float16 ``[groups, n]``, or None: symmetric (zero point 8)."""
    columns: Any | None
    """int32 ``[k]``: the input that packed row i multiplies, -1 for none; None: input i."""
    bias: Any | None
    """float16 ``[n]``, or None."""
    in_features: int
    out_features: int

    @property
    def n(self) -> int:
        """Outputs, padded."""
        return int(self.packed.shape[0])

    @property
    def k(self) -> int:
        """Inputs, padded."""
        return int(self.packed.shape[1]) * 2

    @property
    def groups(self) -> int:
        """Groups of inputs with a scale each."""
        return int(self.scales.shape[0])

    @property
    def quant_op(self) -> QuantOp:
        if self.zeros is not None:
            return QuantOp.GROUP_SCALE_ZERO
        return QuantOp.PER_COLUMN if self.groups == 1 else QuantOp.GROUP_SCALE

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0: all (per column, without zeros)."""
        return 0 if self.quant_op is QuantOp.PER_COLUMN else self.k // self.groups

    def arrays(self) -> dict[str, Any]:
        """The arrays that are not None, by the names of their fields."""
        names = ("packed", "scales", "zeros", "columns", "bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def require_packed(value: object) -> None:
    """Raises :class:`w4a16.ArgumentError` for what is no :class:`w4a16.PackedWeight`."""
    if not isinstance(value, PackedWeight):
        raise ArgumentError(
            f"packed is a {type(value).__name__}: expected a w4a16.PackedWeight, as w4a16.pack"
            " makes it"
        )
