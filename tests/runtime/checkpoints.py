"""Small weights in every checkpoint format, packed nibble by nibble, and what must become of them.

Everything here is written from the formats' definitions, one number at a time, and shares nothing
with the package but names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = Any

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "plain")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight as numbers."""

    format: str
    q: Array
    """int64 [K, N], 0..15."""
    points: Array
    """int64 [groups, N], 0..15; None: the weight is symmetric, and says so."""
    scales: Array
    """float16 [groups, N]."""
    group_size: int
    """-1: one group."""
    g_idx: Array
    """int64 [K], or None."""
    bias: Array
    """float16 [N], or None."""

    @property
    def k(self) -> int:
        return int(self.q.shape[0])

    @property
    def n(self) -> int:
        return int(self.q.shape[1])

    @property
    def groups(self) -> int:
        return int(self.scales.shape[0])

    @property
    def size(self) -> int:
        return self.k if self.group_size == -1 else self.group_size

    @property
    def group_of_input(self) -> Array:
        return np.arange(self.k) // self.size if self.g_idx is None else self.g_idx

    def tensors(self) -> dict[str, Array]:
        """By the format's names; for plain, the keyword arguments."""
        points = np.full((self.groups, self.n), 8) if self.points is None else self.points
        optional = {"bias": self.bias} if self.bias is not None else {}
        if self.format == "plain":
            made = {"q": self.q.astype(np.uint8), "scales": self.scales}
            if self.points is not None:
                made["zeros"] = self.points
            if self.g_idx is not None:
                made["g_idx"] = self.g_idx.astype(np.int32)
            return {**made, **optional}
        if self.format == "compressed-tensors":
            made = {
                "weight_packed": words(self.q.T),
                "weight_scale": np.ascontiguousarray(self.scales.T),
                "weight_shape": np.array([self.n, self.k]),
            }
            if self.points is not None:
                made["weight_zero_point"] = np.ascontiguousarray(words(points).T)
            if self.g_idx is not None:
                made["weight_g_idx"] = self.g_idx.astype(np.int32)
            return {**made, **optional}
        if self.format == "awq":
            made = {"qweight": words(self.q, AWQ_ORDER), "qzeros": words(points, AWQ_ORDER)}
            return {**made, "scales": self.scales, **optional}
        qzeros = words(points)
        if self.format == "gptq":  # v1
            qzeros = (qzeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
        made = {"qweight": np.ascontiguousarray(words(self.q.T).T), "qzeros": qzeros}
        if self.g_idx is not None:
            made["g_idx"] = self.g_idx.astype(np.int32)
        return {**made, "scales": self.scales, **optional}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of ``w4a16.pack``."""
        if self.format == "plain":
            return (), {**self.tensors(), "group_size": self.group_size}
        return (self.tensors(),), {"format": self.format, "group_size": self.group_size}

    def __repr__(self) -> str:
        return (
            f"Case({self.format}, K={self.k}, N={self.n}, group {self.group_size},"
            f" {'symmetric' if self.points is None else 'asymmetric'},"
            f" act-order {self.g_idx is not None}, bias {self.bias is not None})"
        )


def words(values: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """int32 [rows, ceil(columns / 8)]: nibble i of each word is column ``order[i]`` of its 8."""
    rows, columns = values.shape
    made = np.zeros((rows, -(-columns // 8)), np.uint32)
    for word in range(made.shape[1]):
        for nibble, column in enumerate(order):
            if 8 * word + column < columns:
                made[:, word] |= values[:, 8 * word + column].astype(np.uint32) << 4 * nibble
    return made.view(np.int32)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What packing makes of a case, in the order of packed rows."""

    q: Array
    """[k, n]; what follows is of the dtypes and shapes of PackedWeight, or None."""
    scales: Array
    zeros: Array
    columns: Array
    bias: Array


def expected(case: Case) -> Expected:
    """Rows by their group, groups of the same size, padding; zeros as the kernels add them."""
    n = -(-case.n // 8) * 8
    size = case.size
    order: list[int] = []
    for group in range(case.groups):
        members = [i for i in range(case.k) if case.group_of_input[i] == group]
        order += members + [-1] * (size - len(members) if case.groups > 1 else 0)
    unit = 64 if case.groups == 1 else math.lcm(64, size)
    k = -(-len(order) // unit) * unit
    order += [-1] * (k - len(order))
    groups = 1 if case.groups == 1 else k // size
    q = np.full((k, n), 8)
    for place, row in enumerate(order):
        if row >= 0:
            q[place, : case.n] = case.q[row]
    scales = np.zeros((groups, n), np.float16)
    scales[: case.groups, : case.n] = case.scales
    zeros = None
    if case.points is not None and (case.points != 8).any():
        zeros = np.zeros((groups, n), np.float16)
        # float64 holds the product exactly, and numpy rounds it to float16 once.
        product = (8.0 - case.points) * case.scales.astype(np.float64)
        zeros[: case.groups, : case.n] = product.astype(np.float16)
    bias = None
    if case.bias is not None:
        bias = np.zeros(n, np.float16)
        bias[: case.n] = case.bias
    columns = np.array(order, np.int32)
    moved = k != case.k or (columns != np.arange(k)).any()
    return Expected(q=q, scales=scales, zeros=zeros, columns=columns if moved else None, bias=bias)


def weight(case: Case) -> Array:
    """float16 [K, N]: fma(q - 8, s, z), rounded once from the exact number."""
    return exact_weight(case).astype(np.float16)


def exact_weight(case: Case) -> Array:
    """float64 [K, N]: (q - 8) * s + z, of scales and zeros as they are stored."""
    group = case.group_of_input
    s = case.scales[group].astype(np.float64)
    z = np.zeros_like(s)
    if case.points is not None:
        z = ((8.0 - case.points) * case.scales.astype(np.float64)).astype(np.float16)[group]
    return np.asarray((case.q - 8) * s + z.astype(np.float64))


def case_of(
    rng: np.random.Generator,
    *,
    format: str,
    k: int,
    n: int,
    group_size: int,
    symmetric: bool = False,
    act_order: str = "none",
    bias: bool = False,
) -> Case:
    """Random numbers. ``act_order``: none, shuffled (full groups), or uneven (some too short)."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    size = k if group_size == -1 else group_size
    g_idx = None
    if act_order == "shuffled":
        g_idx = rng.permutation(np.arange(k) // size)
    elif act_order == "uneven":
        g_idx = rng.permutation(np.repeat(np.arange(groups), size))[:k]
    points = None if symmetric else rng.integers(0, 16, (groups, n))
    if points is not None and (points == 9).all():
        points.flat[0] = 3  # stored as 8 throughout, v1 would be taken for v2
    return Case(
        format=format,
        q=rng.integers(0, 16, (k, n)),
        points=points,
        scales=np.exp2(rng.uniform(-14, 2, (groups, n))).astype(np.float16),
        group_size=group_size,
        g_idx=g_idx,
        bias=rng.standard_normal(n).astype(np.float16) if bias else None,
    )


@st.composite
def cases(draw: st.DrawFn, formats: tuple[str, ...] = FORMATS) -> Case:
    """Any format, shape, grouping and order that packing takes."""
    format = draw(st.sampled_from(formats))
    eights = format in ("gptq", "gptq_v2")
    k = draw(st.integers(1, 50)) * 8 if eights else draw(st.integers(1, 400))
    n = draw(st.integers(1, 12)) * 8 if format == "awq" else draw(st.integers(1, 80))
    group_size = draw(st.sampled_from((64, 128, 192, 256, -1)))
    orders = ("none",) if format == "awq" else ("none", "shuffled", "uneven")
    return case_of(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        format=format,
        k=k,
        n=n,
        group_size=group_size,
        symmetric=draw(st.booleans()),
        act_order=draw(st.sampled_from(orders)),
        bias=draw(st.booleans()),
    )
