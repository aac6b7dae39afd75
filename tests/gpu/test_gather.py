"""Columns of activations in another order, and padded: the bits of x at the right places."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from . import reference
from .harness import Guarded, current_stream
from .library import Library
from .reference import Tensor, torch

pytestmark = pytest.mark.usefixtures("gpu")


@dataclass
class Gather:
    """One call: activations with rows apart, columns or None, and what must come out, as bits."""

    library: Library
    x: Tensor
    columns: Tensor | None
    k_out: int

    @classmethod
    def make(
        cls,
        library: Library,
        source: Any,
        m: int,
        k_in: int,
        k_out: int,
        *,
        extra: int = 0,
        shift: int = 0,
        columns: str = "any",
        column_shift: int = 0,
    ) -> Gather:
        """Bits of every kind, NaNs and infinities among them; ``extra`` elements between rows,
        ``shift`` elements off an aligned address."""

        def integers(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=source, device=reference.DEVICE)

        stride = k_in + extra
        bits = integers(-(2**15), 2**15, shift + m * stride).to(torch.int16)
        x = torch.as_strided(bits, (m, k_in), (stride, 1), shift)
        if columns == "none":
            return cls(library, x, None, k_out)
        if columns == "permutation":
            at = torch.randperm(k_in, generator=source, device=reference.DEVICE)[:k_out]
            at = torch.cat([at, at.new_full((k_out - len(at),), -1)])
        else:
            at = integers(-1, k_in + 1, k_out)
            wild = integers(0, 20, k_out)
            at[wild == 0] = 2**31 - 1
            at[wild == 1] = -(2**31)
        held = torch.empty(column_shift + k_out, dtype=torch.int32, device=reference.DEVICE)
        held[column_shift:] = at
        return cls(library, x, held[column_shift:], k_out)

    def __str__(self) -> str:
        m, k_in = self.x.shape
        columns = "none" if self.columns is None else f"at {self.columns.data_ptr() % 16}"
        return (
            f"[{m}, {k_in}] to {self.k_out}, stride {self.x.stride(0)}, x at"
            f" {self.x.data_ptr() % 16}, columns {columns}"
        )

    @property
    def byte_count(self) -> int:
        return int(self.x.shape[0]) * self.k_out * 2

    def wanted(self) -> Tensor:
        k_in = self.x.shape[1]
        at = self.columns
        if at is None:
            at = torch.arange(self.k_out, device=reference.DEVICE)
        inside = (at >= 0) & (at < k_in)
        picked = self.x[:, at.clamp(0, k_in - 1).long()]
        return torch.where(inside, picked, torch.zeros_like(picked))

    def armed(self) -> Guarded:
        out = Guarded(self.byte_count)
        out.arm(self.byte_count)
        return out

    def start(self, out: Guarded, x: Tensor | None = None, stream: int | None = None) -> None:
        given = self.x if x is None else x
        self.library.gather_columns(
            given.data_ptr(),
            given.shape[0],
            self.x.stride(0),
            given.shape[1],
            None if self.columns is None else self.columns.data_ptr(),
            self.k_out,
            out.address,
            current_stream() if stream is None else stream,
        )

    def right(self, out: Guarded) -> Tensor:
        return (out.inside.view(-1, self.k_out) == self.wanted()).all() & (out.intact() == 1)


def check(calls: list[Gather], outs: list[Guarded] | None = None) -> None:
    if outs is None:
        outs = [call.armed() for call in calls]
        for call, out in zip(calls, outs, strict=True):
            call.start(out)
    right = torch.stack([c.right(o) for c, o in zip(calls, outs, strict=True)]).tolist()
    wrong = [str(call) for call, good in zip(calls, right, strict=True) if not good]
    assert not wrong, f"W4A16_SEED={reference.SEED}: {len(wrong)} wrong: {wrong[:10]}"


def test_any_columns_of_any_activations_are_picked(library: Library) -> None:
    source = reference.generator("gather")
    draw = random.Random(reference.SEED * 2**31 + zlib.crc32(b"gather"))
    calls = []
    for _ in range(400):
        many = draw.random() < 0.3
        calls.append(
            Gather.make(
                library,
                source,
                draw.choice((draw.randint(1, 9), draw.randint(28, 40), draw.randint(41, 900))),
                draw.randint(1, 20000) if many else draw.randint(1, 600),
                8 * draw.randint(1, 2500 if many else 80),
                extra=draw.choice((0, 8, draw.randint(1, 9))),
                shift=draw.choice((0, 0, draw.randint(1, 9))),
                columns=draw.choice(("any", "any", "permutation", "none")),
                column_shift=draw.choice((0, 0, draw.randint(1, 5))),
            )
        )
        if len(calls) == 50:
            check(calls)
            calls.clear()


@pytest.mark.parametrize("k_in", [1, 7, 8, 9, 4096, 14336, 28672, 57344, 116_000, 116_300, 300_000])
def test_rows_of_every_length_are_picked_whether_they_fit_into_shared_memory_or_not(
    library: Library, k_in: int
) -> None:
    source = reference.generator(f"rows-{k_in}")
    k_out = (k_in + 63) // 64 * 64
    calls = [
        Gather.make(library, source, m, k_in, k_out, columns=columns, extra=extra, shift=shift)
        for m in (1, 2, 33, 40, 300)
        for columns in ("permutation", "none")
        for extra, shift in ((0, 0), (5, 3))
    ]
    check(calls)


def test_many_rows_are_picked(library: Library) -> None:
    source = reference.generator("many")
    check(
        [
            Gather.make(library, source, m, 64, 128, columns=columns)
            for m in (65_535, 65_537, 600_001)
            for columns in ("any", "none")
        ]
    )


def test_no_rows_succeed_and_write_nothing(library: Library) -> None:
    call = Gather.make(library, reference.generator("empty"), 1, 64, 64)
    out = call.armed()
    library.gather_columns(0, 0, 64, 64, None, 64, out.address, current_stream())
    torch.cuda.synchronize()
    assert (out.inside == reference.SENTINEL).all().item()


def some_calls(library: Library, name: str) -> list[Gather]:
    source = reference.generator(name)
    return [
        Gather.make(library, source, m, k_in, 4096, columns=columns)
        for m in (1, 300)
        for k_in in (4096, 4000)
        for columns in ("permutation", "none")
    ]


def test_a_captured_graph_picks_from_what_x_then_holds(library: Library) -> None:
    calls = some_calls(library, "graph")
    outs = [call.armed() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, out in zip(calls, outs, strict=True):
            call.start(out)
    assert all((out.inside == reference.SENTINEL).all().item() for out in outs)
    graph.replay()
    check(calls, outs)
    for call in calls:
        call.x.copy_(call.x.flip(0).flip(1))
    graph.replay()
    check(calls, outs)


def test_picking_waits_for_its_stream_and_for_nothing_else(library: Library) -> None:
    calls = some_calls(library, "stream")
    outs = [call.armed() for call in calls]
    inputs = [torch.zeros_like(call.x) for call in calls]
    for call, out in zip(calls, outs, strict=True):
        call.start(out)  # loads what it needs
        out.arm(call.byte_count)
    torch.cuda._sleep(1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for call, out, given in zip(calls, outs, inputs, strict=True):
            given.copy_(call.x)
            call.start(out, given)
            given.zero_()
        still_blocked = not stream.query()
    during, _ = torch.cuda.mem_get_info()
    stream.synchronize()
    assert still_blocked, "the stream ran dry while work was launched on it"
    assert during == before, "it allocated device memory"
    check(calls, outs)


def test_how_fast_picking_is(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported, not asserted."""
    source = reference.generator("speed")
    lines = []
    for k in (4096, 14336, 28672):
        texts = []
        for m in (1, 8, 64, 512, 4096):
            for columns in ("permutation", "none"):
                call = Gather.make(library, source, m, k, k, columns=columns)
                out = call.armed()
                seconds = timed(partial(call.start, out))
                rate = 2 * call.byte_count / seconds / 1e9
                texts.append(f"m={m} {columns} {seconds * 1e6:.1f} us ({rate:.0f} GB/s)")
        lines.append(f"k={k}: " + ", ".join(texts))
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def timed(work: Callable[[], None]) -> float:
    """Seconds on the device of one call among many, queued behind a pause."""
    work()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    start.record()
    for _ in range(50):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / 50
