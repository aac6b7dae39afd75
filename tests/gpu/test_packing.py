"""Weight packing on the CPU against upstream's four steps, each done separately. Needs no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .library import Library

np: Any = pytest.importorskip("numpy")
hypothesis: Any = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")

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


def pack(library: Library, arch: str | None, plain: Any, threads: int = 0, shift: int = 0) -> Any:
    """Through the C API, into exactly as many bytes as asked for, between guard bytes."""
    k, n = plain.shape[0], plain.shape[1] * 2
    size = library.packed_size(arch, k, n)
    out = np.full(size + 128 + shift, 0xA5, np.uint8)
    library.pack(arch, plain.ctypes.data, k, n, out.ctypes.data + 64 + shift, threads)
    assert (out[: 64 + shift] == 0xA5).all()
    assert (out[64 + shift + size :] == 0xA5).all()
    return out[64 + shift : 64 + shift + size]


def unpack(library: Library, arch: str | None, packed: Any, k: int, n: int, threads: int) -> Any:
    out = np.full(k * n // 2 + 128, 0xA5, np.uint8)
    library.unpack(arch, packed.ctypes.data, k, n, out.ctypes.data + 64, threads)
    assert (out[:64] == 0xA5).all()
    assert (out[-64:] == 0xA5).all()
    return out[64:-64].reshape(k, n // 2)


def expected_of(library: Library, arch: str | None, plain: Any) -> Any:
    name = arch or str(library.build()["architecture"])
    hopper = name in HOPPER
    release = re.match(r"v?0\.(\d+)", str(library.build()["release"]))
    signed_columns = hopper and release is not None and int(release[1]) < 16
    return packed_by_steps(nibbles(plain), not hopper, signed_columns)


def test_row_order_is_upstreams() -> None:
    known = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13]
    assert known == ROW_ORDER[: len(known)]
    assert sorted(ROW_ORDER) == list(range(32))


def test_packing_is_upstreams_and_unpacking_undoes_it_for_any_shape_and_architecture(
    library: Library,
) -> None:
    def check(arch: str | None, k: int, n: int, threads: int, shift: int, seed: int) -> None:
        plain = np.random.default_rng(seed).integers(0, 256, (k, n // 2), dtype=np.uint8)
        before = plain.copy()
        packed = pack(library, arch, plain, threads, shift)
        assert (packed == expected_of(library, arch, plain)).all()
        assert (unpack(library, arch, packed, k, n, threads) == plain).all()
        assert (plain == before).all(), "the input was written to"

    search: Any = hypothesis.given(
        arch=st.sampled_from((None, *HOPPER, *OTHERS)),
        k=st.integers(1, 9).map(lambda units: 64 * units),
        n=st.integers(1, 70).map(lambda units: 8 * units),
        threads=st.integers(0, 5),
        shift=st.integers(0, 17),
        seed=st.integers(0, 2**32 - 1),
    )(check)
    hypothesis.settings(max_examples=150, deadline=None, database=None)(search)()


@pytest.mark.parametrize("arch", [None, *HOPPER, *OTHERS])
def test_packed_size_is_half_a_byte_a_weight(library: Library, arch: str | None) -> None:
    for k, n in ((64, 8), (192, 296), (28672, 8192)):
        assert library.packed_size(arch, k, n) == k * n // 2


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_any_number_of_threads_packs_the_same_bytes(library: Library, arch: str) -> None:
    plain = np.random.default_rng(7).integers(0, 256, (1088, 516), dtype=np.uint8)
    one = pack(library, arch, plain, 1)
    assert (one == expected_of(library, arch, plain)).all()
    for threads in (0, 2, 3, 7, 64, 1000):
        assert (pack(library, arch, plain, threads) == one).all(), threads
        assert (unpack(library, arch, one, 1088, 1032, threads) == plain).all(), threads


def test_all_layouts_but_hoppers_are_the_same(library: Library) -> None:
    plain = np.random.default_rng(8).integers(0, 256, (192, 148), dtype=np.uint8)
    packed = {arch: pack(library, arch, plain).tobytes() for arch in (*HOPPER, *OTHERS)}
    assert len({packed[arch] for arch in OTHERS}) == 1
    assert len({packed[arch] for arch in HOPPER}) == 1
    assert packed["sm_80"] != packed["sm_90"]


def test_each_nibble_lands_in_exactly_one_place(library: Library) -> None:
    """One weight of 15 among zeros is one nibble of 15, and 64 of them land in 64 places."""
    for arch in ("sm_90", "sm_80"):
        background = pack(library, arch, np.zeros((64, 8), np.uint8))
        places = set()
        for row in range(64):
            plain = np.zeros((64, 8), np.uint8)
            plain[row, 2] = 0xF0  # column 5
            changed = nibbles(pack(library, arch, plain) ^ background)
            assert changed.sum() == 15
            places.add(int(changed.argmax()))
        assert len(places) == 64
