"""Which rows a packed weight has, and in which order: act-order, ragged groups and padding.

Act-order checkpoints let any input belong to any group (``g_idx``). Rows are sorted by their group
once, here, stably; at run time the activations' columns are picked in that order. A group with
fewer rows than the others (the last one, where the group size does not divide K) is filled with
rows that multiply no input (``-1``): activations are 0 there, so the product is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16.arguments import K_MULTIPLE, N_MULTIPLE, round_up
from w4a16.errors import FormatError


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What the kernels are given: padded, in groups of the same size."""

    k: int
    n: int
    groups: int
    columns: Any
    """numpy int32 [k]: the input that packed row i multiplies, -1 for none; None: input i."""

    @property
    def group_size(self) -> int:
        return self.k // self.groups


def extent(
    in_features: int,
    out_features: int,
    groups: int,
    group_size: int,
    g_idx: Any,
    g_idx_name: str,
    notes: list[str],
    minus_one_is_none: bool = False,
) -> Extent:
    """``g_idx``: numpy integers [in_features], or None; what is worth a warning goes to ``notes``.
    ``minus_one_is_none``: if all of them are -1, the weight is not reordered.

    Raises :class:`w4a16.FormatError` for a ``g_idx`` that names groups that are not there, or more
    rows of a group than it has.
    """
    n = round_up(out_features, N_MULTIPLE)
    order = None
    if g_idx is not None:
        unordered = minus_one_is_none and bool((g_idx == -1).all())
        if not unordered:
            order = _sorted_rows(g_idx, g_idx_name, groups, group_size, notes)
    if groups == 1:
        k = round_up(in_features, K_MULTIPLE)
    else:
        k = round_up(groups * group_size, math.lcm(K_MULTIPLE, group_size))
    columns = None
    if order is not None:
        columns = np.full(k, -1, np.int32)
        columns[: len(order)] = order
    elif k != in_features:
        columns = np.full(k, -1, np.int32)
        columns[:in_features] = np.arange(in_features, dtype=np.int32)
    return Extent(k=k, n=n, groups=1 if groups == 1 else k // group_size, columns=columns)


def _sorted_rows(g_idx: Any, name: str, groups: int, group_size: int, notes: list[str]) -> Any:
    """Rows by group, -1 where a group has too few; None if they are in order as they are."""
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= groups:
        wrong = lowest if lowest < 0 else highest
        raise FormatError(
            f"{name} holds {wrong}, first for input {int((g_idx == wrong).argmax())}: expected"
            f" groups 0 to {groups - 1}"
        )
    if groups == 1:
        return None
    rows = np.arange(len(g_idx))
    if np.array_equal(g_idx, rows // group_size):
        return None
    if highest == 0:
        # exllama and text-generation-inference ignore such a g_idx, too; without groups of the
        # wrong size it could not be meant.
        notes.append(
            f"{name} says that all {len(g_idx)} inputs belong to group 0 of {groups}: read as a"
            " weight without act-order"
        )
        return None
    counts = np.bincount(g_idx, minlength=groups)
    if counts.max() > group_size:
        group = int(counts.argmax())
        raise FormatError(
            f"{name} puts {int(counts[group])} inputs into group {group}: expected at most"
            f" {group_size}, the group size"
        )
    order = np.argsort(g_idx, kind="stable")
    place = g_idx[order] * group_size + rows - (np.cumsum(counts) - counts)[g_idx[order]]
    found = np.full(groups * group_size, -1, np.int32)
    found[place] = order
    return found
