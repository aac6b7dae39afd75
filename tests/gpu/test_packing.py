"""Weight packing on the CPU against upstream's four steps, each done separately. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest

from .layouts import (
    HOPPER,
    OTHERS,
    ROW_ORDER,
    arguments,
    filled,
    multiples_of,
    nibbles,
    np,
    packed_for,
    random_case,
    stored,
)
from .library import Library, Source

hypothesis: Any = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")


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


def pack_weight(
    library: Library,
    source: Source,
    arch: str | None,
    k: int,
    n: int,
    q: Any,
    rows: Any,
    **how: int,
) -> Any:
    """``w4a16_pack_weight`` of numbers 0..15, from and to unaligned memory between guard bytes."""
    shift = how.get("shift", 0)
    data = stored(q, source)
    held = np.empty(data.size + shift, np.uint8)
    held[shift:] = data
    size = library.packed_size(arch, k, n)
    out = np.full(size + 128 + shift, 0xA5, np.uint8)
    here = held.ctypes.data + shift
    picked = None if rows is None else rows.ctypes.data
    args = arguments(source, arch, (k, n), q, (here, picked, out.ctypes.data + 64 + shift))
    library.pack_weight(args, how.get("threads", 0))
    assert (out[: 64 + shift] == 0xA5).all()
    assert (out[64 + shift + size :] == 0xA5).all()
    assert (held[shift:] == data).all(), "the input was written to"
    return out[64 + shift : 64 + shift + size]


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
        assert (packed == packed_for(library, arch, nibbles(plain))).all()
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


def test_every_source_gives_the_bytes_of_its_numbers_whatever_is_missing_or_picked(
    library: Library,
) -> None:
    def check(source: Source, arch: str | None, k: int, n: int, seed: int, **how: int) -> None:
        random = np.random.default_rng(seed)
        q, rows = random_case(random, source, k, n)
        found = pack_weight(library, source, arch, k, n, q, rows, **how)
        assert (found == packed_for(library, arch, filled(q, k, n, rows))).all(), q.shape

    search: Any = hypothesis.given(
        source=st.sampled_from(Source),
        arch=st.sampled_from((None, *HOPPER, *OTHERS)),
        k=st.integers(1, 9).map(lambda units: 64 * units),
        n=st.integers(1, 50).map(lambda units: 8 * units),
        threads=st.integers(0, 5),
        shift=st.integers(0, 17),
        seed=st.integers(0, 2**32 - 1),
    )(check)
    hypothesis.settings(max_examples=300, deadline=None, database=None)(search)()


@pytest.mark.parametrize("source", Source, ids=lambda source: source.label)
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_a_source_of_any_size_up_to_the_packed_weights_is_filled(
    library: Library, source: Source, arch: str
) -> None:
    random = np.random.default_rng(11)
    k, n = 192, 136
    by_k, by_n = multiples_of(source)
    for source_k in (by_k, 56, 64, 120, 128, 136, k - by_k, k):
        for source_n in (by_n, 8, 120, 128, n - by_n, n):
            q = random.integers(0, 16, (source_k, source_n), dtype=np.uint8)
            for rows in (None, np.full(k, source_k - 1, np.int32), np.full(k, -1, np.int32)):
                found = pack_weight(library, source, arch, k, n, q, rows)
                wanted = packed_for(library, arch, filled(q, k, n, rows))
                assert (found == wanted).all(), (source_k, source_n)


@pytest.mark.parametrize("source", Source, ids=lambda source: source.label)
def test_large_sources_are_packed_the_same_by_any_number_of_threads(
    library: Library, source: Source
) -> None:
    random = np.random.default_rng(12)
    k, n = 3 * 2048 + 64, 520
    q = random.integers(0, 16, (k, n), dtype=np.uint8)
    for rows in (None, random.permutation(k).astype(np.int32)):
        wanted = packed_for(library, None, filled(q, k, n, rows))
        for threads in (0, 1, 2, 7, 1000):
            found = pack_weight(library, source, None, k, n, q, rows, threads=threads)
            assert (found == wanted).all(), threads


def test_packing_plain_numbers_is_packing_a_plain_source(library: Library) -> None:
    plain = np.random.default_rng(13).integers(0, 256, (128, 36), dtype=np.uint8)
    found = pack_weight(library, Source.PLAIN, None, 128, 72, nibbles(plain), None)
    assert (found == pack(library, None, plain)).all()


@pytest.mark.parametrize("arch", [None, *HOPPER, *OTHERS])
def test_packed_size_is_half_a_byte_a_weight(library: Library, arch: str | None) -> None:
    for k, n in ((64, 8), (192, 296), (28672, 8192)):
        assert library.packed_size(arch, k, n) == k * n // 2


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_any_number_of_threads_packs_the_same_bytes(library: Library, arch: str) -> None:
    plain = np.random.default_rng(7).integers(0, 256, (1088, 516), dtype=np.uint8)
    one = pack(library, arch, plain, 1)
    assert (one == packed_for(library, arch, nibbles(plain))).all()
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
