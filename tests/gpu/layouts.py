"""How 4-bit weights lie, packed and in checkpoints: each definition written down, in numpy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .library import Library, PackArgs, Source, pack_args

np: Any = pytest.importorskip("numpy")

HOPPER = ("sm_90", "sm_90a")
OTHERS = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_88",
    "sm_89",
    "sm_100",
    "sm_101",
    "sm_103",
    "sm_110",
    "sm_120",
    "sm_121",
    "sm_100a",
    "sm_100f",
    "sm_103a",
    "sm_120a",
)

#: Where each of 32 rows comes from: pairs of rows 8 apart, as an MMA's operand registers want.
ROW_ORDER = [8 * (i % 8 // 2) + 2 * (i // 8) + i % 2 for i in range(32)]
#: Which nibble of a 32-bit word comes at each place: the even ones first.
NIBBLE_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
#: What stands where the source has nothing.
FILL = 8


def nibbles(data: Any) -> Any:
    """Bytes as twice as many numbers 0..15, the low nibble first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def as_bytes(values: Any) -> Any:
    return (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)


def packed_by_steps(q: Any, interleaved: bool, signed_columns: bool) -> Any:
    """``preprocess_weights_for_mixed_gemm`` for INT4 as upstream does it, one step at a time."""
    k, n = q.shape
    signed = (q.astype(np.int16) - 8) & 15  # upstream's input: two's complement nibbles
    if signed_columns:  # SM90 of the releases before 0.16: a transposition and nothing else
        return as_bytes(signed.T).reshape(-1)
    permuted = signed.reshape(k // 32, 32, n)[:, ROW_ORDER, :].reshape(k, n)
    columns = permuted.T  # [n, k]: each column of W contiguous
    if interleaved:  # 64 rows of column 0, then of columns 1, 2 and 3, then the next 64 rows
        columns = columns.reshape(n // 4, 4, k // 64, 64).transpose(0, 2, 1, 3)
    words = columns.reshape(-1, 8)
    unsigned = (words + 8) & 15
    return as_bytes(unsigned[:, NIBBLE_ORDER]).reshape(-1)


def packed_for(library: Library, arch: str | None, q: Any) -> Any:
    """What numbers 0..15 become for an architecture, by upstream's steps."""
    name = arch or str(library.build()["architecture"])
    hopper = name in HOPPER
    release = re.match(r"v?0\.(\d+)", str(library.build()["release"]))
    signed_columns = hopper and release is not None and int(release[1]) < 16
    return packed_by_steps(q, not hopper, signed_columns)


def stored(q: Any, source: Source) -> Any:
    """Numbers 0..15 ``[K, N]`` as a checkpoint has them: bytes in their order."""
    k, n = q.shape
    if source is Source.BYTES:
        return q.reshape(-1).astype(np.uint8)
    if source is Source.PLAIN:
        return as_bytes(q).reshape(-1)
    if source is Source.GPTQ:  # [K/8, N], 8 rows to a word
        eights = q.reshape(k // 8, 8, n).transpose(0, 2, 1)
    elif source is Source.AWQ:  # [K, N/8], 8 columns to a word
        eights = q.reshape(k, n // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    else:  # [N, K/8], 8 inputs to a word
        eights = q.T.reshape(n, k // 8, 8)
    words = (eights.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(-1)
    return words.astype("<u4").reshape(-1).view(np.uint8)


def multiples_of(source: Source) -> tuple[int, int]:
    """Of what K and N of a source are multiples."""
    if source is Source.BYTES:
        return 1, 1
    if source is Source.PLAIN:
        return 1, 2
    return (1, 8) if source is Source.AWQ else (8, 1)


def filled(q: Any, k: int, n: int, rows: Any) -> Any:
    """The matrix that is packed: padded, or its rows picked."""
    full = np.full((k, n), FILL, np.uint8)
    if rows is None:
        full[: q.shape[0], : q.shape[1]] = q
    else:
        some = rows >= 0
        full[some, : q.shape[1]] = q[rows[some]]
    return full


def arguments(
    source: Source,
    arch: str | None,
    shape: tuple[int, int],
    q: Any,
    addresses: tuple[int, int | None, int],
) -> PackArgs:
    """For a matrix ``q`` of numbers 0..15, stored and packed at ``addresses``: q, rows, out."""
    return pack_args(source, arch, shape, q.shape, *addresses)


def random_rows(random: Any, k: int, source_k: int) -> Any:
    """Rows in any order: a permutation, or with some missing and others twice."""
    if k == source_k and random.integers(2):
        return random.permutation(k).astype(np.int32)
    return random.integers(-1, source_k, k, dtype=np.int32)


def random_case(random: Any, source: Source, k: int, n: int) -> tuple[Any, Any]:
    """Numbers for a packed weight of this shape, often smaller than it, and rows or None."""
    by_k, by_n = multiples_of(source)
    extents = []
    for extent, multiple in ((k, by_k), (n, by_n)):
        short = int(random.integers(1, extent // multiple + 1)) * multiple
        near = extent - int(random.integers(0, 9)) * multiple
        choices = (extent, short, near if near > 0 else extent)
        extents.append(choices[int(random.integers(3))])
    q = random.integers(0, 16, extents, dtype=np.uint8)
    return q, random_rows(random, k, extents[0]) if random.integers(2) else None
