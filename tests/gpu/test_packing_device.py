"""Weight packing on the GPU: the bytes of the CPU's, from every source, for every architecture."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from . import reference
from .harness import Guarded, current_stream
from .layouts import (
    HOPPER,
    OTHERS,
    arguments,
    filled,
    multiples_of,
    np,
    packed_for,
    random_case,
    random_rows,
    stored,
)
from .library import Library, Source
from .reference import Tensor, torch

pytestmark = pytest.mark.usefixtures("gpu")

ARCHES = (None, "sm_90", "sm_80", "sm_89", "sm_100a", "sm_120")


def numbers(name: str) -> Any:
    """numpy's random numbers for one test, from the session's seed and the test's name."""
    return np.random.default_rng([reference.SEED, zlib.crc32(name.encode())])


def on_device(values: Any, alignment: int, shift: int = 0) -> Tensor:
    """A copy at an address ``alignment`` + ``shift`` bytes beyond a multiple of 256."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    storage = torch.empty(data.size + alignment + shift, dtype=torch.uint8, device=reference.DEVICE)
    storage[alignment + shift :].copy_(torch.from_numpy(data))
    return storage[alignment + shift :]


@dataclass
class Case:
    """One packed weight: its source on the device, and its bytes by the CPU."""

    library: Library
    source: Source
    arch: str | None
    k: int
    n: int
    q: Any
    rows: Any
    wanted: Tensor
    stored: Tensor
    rows_there: Tensor | None

    @classmethod
    def make(
        cls,
        library: Library,
        source: Source,
        arch: str | None,
        shape: tuple[int, int],
        given: tuple[Any, Any],
        *,
        shift: int = 0,
        spoil: Any = None,
    ) -> Case:
        """``shift``: units that the source's address is off; ``spoil``: indices on the device that
        are out of range where the CPU's are -1."""
        (k, n), (q, rows) = shape, given
        data = stored(q, source)
        packed = np.full(k * n // 2, 0xA5, np.uint8)
        here = None if rows is None else rows.ctypes.data
        args = arguments(source, arch, shape, q, (data.ctypes.data, here, packed.ctypes.data))
        library.pack_weight(args)
        there = rows if spoil is None or rows is None else np.where(rows < 0, spoil, rows)
        unit = 1 if source in (Source.PLAIN, Source.BYTES) else 4
        return cls(
            library=library,
            source=source,
            arch=arch,
            k=k,
            n=n,
            q=q,
            rows=rows,
            wanted=torch.from_numpy(packed).to(reference.DEVICE),
            stored=on_device(data, 16, shift * unit),
            rows_there=None if there is None else on_device(there.astype(np.int32), 4),
        )

    def __str__(self) -> str:
        rows = "" if self.rows is None else " rows"
        return (
            f"{self.source.label} {self.arch} {self.k}x{self.n} of {self.q.shape}{rows}"
            f" q at {self.stored.data_ptr() % 256}"
        )

    def start(self, out: Guarded, stream: int | None = None) -> None:
        picked = None if self.rows_there is None else self.rows_there.data_ptr()
        args = arguments(
            self.source,
            self.arch,
            (self.k, self.n),
            self.q,
            (self.stored.data_ptr(), picked, out.address),
        )
        self.library.pack_weight_device(args, current_stream() if stream is None else stream)

    def armed(self) -> Guarded:
        out = Guarded(self.k * self.n // 2)
        out.arm(self.k * self.n // 2)
        return out

    def right(self, out: Guarded) -> Tensor:
        """Whether it wrote all bytes and no others, as a tensor: reading it waits."""
        return (out.inside.view(torch.uint8) == self.wanted).all() & (out.intact() == 1)


def check(cases: list[Case], outs: list[Guarded] | None = None) -> None:
    """Launches each case, unless that was done, and compares all at once."""
    if outs is None:
        outs = [case.armed() for case in cases]
        for case, out in zip(cases, outs, strict=True):
            case.start(out)
    right = torch.stack([c.right(o) for c, o in zip(cases, outs, strict=True)]).tolist()
    wrong = [str(case) for case, good in zip(cases, right, strict=True) if not good]
    assert not wrong, f"W4A16_SEED={reference.SEED}: {len(wrong)} wrong: {wrong[:10]}"


def random_cases(library: Library, name: str, count: int, most: tuple[int, int]) -> Iterator[Case]:
    random = numbers(name)
    for turn in range(count):
        source = Source(turn % len(Source))
        k = 64 * int(random.integers(1, most[0] // 64 + 1))
        n = 8 * int(random.integers(1, most[1] // 8 + 1))
        given = random_case(random, source, k, n)
        shift = int(random.integers(0, 5)) if random.integers(2) else 0
        arch = (None, *HOPPER, *OTHERS)[int(random.integers(1 + len(HOPPER) + len(OTHERS)))]
        spoil = random.choice(
            np.array([-1, -2, given[0].shape[0], 2**31 - 1, -(2**31)], np.int32), k
        )
        yield Case.make(library, source, arch, (k, n), given, shift=shift, spoil=spoil)


def test_any_small_weight_is_packed_as_on_the_cpu_whatever_is_missing_or_picked(
    library: Library,
) -> None:
    check(list(random_cases(library, "small", 600, (640, 400))))


def test_larger_weights_are_packed_as_on_the_cpu(library: Library) -> None:
    check(list(random_cases(library, "larger", 32, (6144, 4104))))


def test_the_cpu_that_it_is_compared_with_is_right(library: Library) -> None:
    for case in random_cases(library, "cpu", 16, (640, 400)):
        wanted = packed_for(library, case.arch, filled(case.q, case.k, case.n, case.rows))
        assert (case.wanted.cpu().numpy() == wanted).all(), str(case)


@pytest.mark.parametrize("source", Source, ids=lambda source: source.label)
def test_the_smallest_weights_and_every_edge_of_a_tile_are_right(
    library: Library, source: Source
) -> None:
    random = numbers(f"edges-{source.label}")
    by_k, by_n = multiples_of(source)
    cases = []
    for arch in ("sm_90", "sm_80"):
        for k in (64, 192, 256, 320, 512):
            for n in (8, 120, 128, 136, 256):
                for source_k, source_n in ((k, n), (k - by_k, n), (k, n - by_n), (by_k, by_n)):
                    if not source_n:
                        continue
                    q = random.integers(0, 16, (source_k, source_n), dtype=np.uint8)
                    for rows in (None, random_rows(random, k, q.shape[0])):
                        cases.append(Case.make(library, source, arch, (k, n), (q, rows)))
    check(cases)


@pytest.mark.parametrize("source", Source, ids=lambda source: source.label)
def test_a_source_may_stand_anywhere_that_its_elements_may(
    library: Library, source: Source
) -> None:
    random = numbers(f"anywhere-{source.label}")
    cases = []
    for shift in range(16):
        q = random.integers(0, 16, (320, 136), dtype=np.uint8)
        for rows in (None, random_rows(random, 320, 320)):
            given = (q, rows)
            cases.append(Case.make(library, source, "sm_90", (320, 136), given, shift=shift))
    check(cases)


def test_unpacking_gives_back_the_plain_numbers(library: Library) -> None:
    random = numbers("unpack")
    wrong = []
    shapes = [(64, 8), (256, 128), (320, 136), (4096, 1032), (1088, 4096)]
    shapes += [
        (64 * int(random.integers(1, 12)), 8 * int(random.integers(1, 50))) for _ in "x" * 60
    ]
    for k, n in shapes:
        arch = ARCHES[int(random.integers(len(ARCHES)))]
        q = random.integers(0, 16, (k, n), dtype=np.uint8)
        case = Case.make(library, Source.PLAIN, arch, (k, n), (q, None))
        plain = Guarded(k * n // 2)
        plain.arm(k * n // 2)
        packed = reference.place(case.wanted)
        library.unpack_device(arch, packed.data_ptr(), k, n, plain.address, current_stream())
        same = (plain.inside.view(torch.uint8) == case.stored).all() & (plain.intact() == 1)
        if not same.item() or not torch.equal(packed, case.wanted):
            wrong.append(str(case))
    assert not wrong, f"W4A16_SEED={reference.SEED}: {wrong[:10]}"


def some_cases(library: Library, name: str) -> list[Case]:
    """Each source with and without rows."""
    random = numbers(name)
    cases = []
    for source in Source:
        q = random.integers(0, 16, (1088, 1032), dtype=np.uint8)
        for rows in (None, random_rows(random, 1088, 1088)):
            cases.append(Case.make(library, source, None, (1088, 1032), (q, rows)))
    return cases


def test_a_captured_graph_packs_what_its_source_then_holds(library: Library) -> None:
    cases = some_cases(library, "graph")
    outs = [case.armed() for case in cases]
    held = [case.stored.clone() for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case, out in zip(cases, outs, strict=True):
            case.start(out)
    assert all((out.inside == reference.SENTINEL).all().item() for out in outs)
    for case in cases:
        case.stored.zero_()
    graph.replay()
    assert not any(case.right(out).item() for case, out in zip(cases, outs, strict=True))
    for case, data in zip(cases, held, strict=True):
        case.stored.copy_(data)
    graph.replay()
    check(cases, outs)


def test_packing_waits_for_its_stream_and_for_nothing_else(library: Library) -> None:
    cases = some_cases(library, "stream")
    outs = [case.armed() for case in cases]
    held = [case.stored.clone() for case in cases]
    for case, out in zip(cases, outs, strict=True):
        case.start(out)  # loads what it needs
        case.stored.zero_()
        out.arm(case.k * case.n // 2)
    torch.cuda._sleep(1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for case, out, data in zip(cases, outs, held, strict=True):
            case.stored.copy_(data, non_blocking=True)
            case.start(out)
            case.stored.zero_()
        still_blocked = not stream.query()
    during, _ = torch.cuda.mem_get_info()
    stream.synchronize()
    assert still_blocked, "the stream ran dry while work was launched on it"
    assert during == before, "packing allocated device memory"
    check(cases, outs)


def test_packing_leaves_its_source_and_its_rows_alone(library: Library) -> None:
    for case in some_cases(library, "untouched"):
        stored_before = case.stored.clone()
        rows_before = None if case.rows_there is None else case.rows_there.clone()
        check([case])
        assert torch.equal(case.stored, stored_before), str(case)
        if rows_before is not None:
            assert torch.equal(case.rows_there, rows_before), str(case)


def test_packing_and_unpacking_on_the_gpu_is_a_round_trip_from_every_source(
    library: Library,
) -> None:
    random = numbers("round trip")
    k, n = 1024, 520
    q = random.integers(0, 16, (k, n), dtype=np.uint8)
    plain = torch.empty(k * n // 2, dtype=torch.uint8, device=reference.DEVICE)
    for source in Source:
        for arch in ARCHES:
            case = Case.make(library, source, arch, (k, n), (q, None))
            out = case.armed()
            case.start(out)
            library.unpack_device(arch, out.address, k, n, plain.data_ptr(), current_stream())
            assert (plain.cpu().numpy() == stored(q, Source.PLAIN)).all(), str(case)


def test_threads_that_pack_weights_of_other_depths_do_not_lower_each_others_limits(
    library: Library,
) -> None:
    """A strip of so many rows asks for more shared memory than a block has without asking."""
    failed: list[Exception] = []

    def pack(k: int) -> None:
        n = 8
        q = torch.zeros(k * n // 2, dtype=torch.uint8, device=reference.DEVICE)
        out = torch.empty_like(q)
        order = torch.arange(k, device=reference.DEVICE).int()
        shape = np.broadcast_to(np.uint8(0), (k, n))
        where = (q.data_ptr(), order.data_ptr(), out.data_ptr())
        args = arguments(Source.GPTQ, None, (k, n), shape, where)
        try:
            for _ in range(300):
                library.pack_weight_device(args, current_stream())
            torch.cuda.synchronize()
        except Exception as error:  # told below, in the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=pack, args=(k,)) for k in (57344, 16384, 57344, 20480)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_how_fast_packing_is(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported, not asserted."""
    lines = []
    for k, n in ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)):
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in rates_of(library, k, n))
        lines.append(f"{k}x{n}, GB/s of packed bytes: {rates}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def rates_of(library: Library, k: int, n: int) -> Iterator[tuple[str, float]]:
    size = k * n // 2
    q = torch.randint(0, 16, (k * n,), dtype=torch.uint8, device=reference.DEVICE)
    out = torch.empty_like(q[:size])
    order = torch.randperm(k, device=reference.DEVICE).int()
    shape = np.broadcast_to(np.uint8(0), (k, n))
    for source in Source:
        for rows in (None, order.data_ptr()):
            args = arguments(source, None, (k, n), shape, (q.data_ptr(), rows, out.data_ptr()))
            start = partial(library.pack_weight_device, args, current_stream())
            yield f"{source.label}{' rows' if rows else ''}", size / timed(start) / 1e9
    where = (None, out.data_ptr(), k, n, q.data_ptr(), current_stream())
    yield "unpack", size / timed(partial(library.unpack_device, *where)) / 1e9


def timed(work: Callable[[], None]) -> float:
    """Seconds on the device of one call among many, queued behind a pause."""
    work()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    start.record()
    for _ in range(20):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / 20
