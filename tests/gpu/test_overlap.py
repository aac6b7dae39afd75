"""Launches that may start while the kernel before them still runs (``W4A16_RUN_OVERLAP``)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from . import reference
from .harness import Guarded, Plan, current_stream, launch, plans
from .library import RUN_OVERLAP, Library, QuantOp, Source, Tactic, pack_args
from .reference import Tensor, Weights, torch

N, K, M = 1032, 1088, 20
#: About 50 ms on a Hopper.
SLEEP_CYCLES = 100_000_000
LAYERS = 6

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(scope="module", name="decode")
def _decode(library: Library) -> list[Tactic]:
    found = [tactic for tactic in library.tactics if tactic.is_decode]
    if not found:
        pytest.skip("this library has no decode tactic")
    return found


@pytest.fixture(scope="module", name="ready")
def _ready(library: Library, gpu: None) -> list[tuple[Plan, Tensor]]:
    """Every tactic and quant op, with the bits of a launch of its own."""
    return [(plan, plan.alone()) for plan in plans(library, N, K, 64, M, "overlap")]


def assert_same(results: list[tuple[str, Tensor, Tensor]]) -> None:
    """Compares bits, all at once."""
    same = torch.stack([(found == wanted).all() for _, found, wanted in results]).tolist()
    different = [name for (name, _, _), equal in zip(results, same, strict=True) if not equal]
    assert not different, f"W4A16_SEED={reference.SEED}: {different}"


def test_every_tactic_takes_the_flag_and_gives_the_same_bits(
    ready: list[tuple[Plan, Tensor]],
) -> None:
    results: list[tuple[str, Tensor, Tensor]] = []
    for plan, bits in ready:
        c, workspace = plan.buffers()
        torch.cuda.synchronize()
        for turn in range(4):
            plan.start(c, workspace, flags=RUN_OVERLAP)
            results.append((f"{plan.name}, launch {turn}", c.inside.clone(), bits))
        clean = c.intact() * workspace.intact()
        results.append((f"{plan.name}: guard bands", clean, torch.ones_like(clean)))
    assert_same(results)


def test_tactics_that_overlap_one_after_another_give_the_bits_of_each_alone(
    ready: list[tuple[Plan, Tensor]],
) -> None:
    buffers = [plan.buffers() for plan, _ in ready]
    torch.cuda.synchronize()
    for _ in range(3):
        for (plan, _), (c, workspace) in zip(ready, buffers, strict=True):
            plan.start(c, workspace, flags=RUN_OVERLAP)
    assert_same(
        [(p.name, c.inside, bits) for (p, bits), (c, _) in zip(ready, buffers, strict=True)]
    )


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_activations_that_another_kernel_writes_are_waited_for(
    ready: list[tuple[Plan, Tensor]], captured: bool
) -> None:
    inputs = [torch.full_like(plan.a, float("nan")) for plan, _ in ready]
    buffers = [plan.buffers() for plan, _ in ready]
    copies = [torch.empty_like(bits) for _, bits in ready]
    torch.cuda.synchronize()

    def work() -> None:
        torch.cuda._sleep(SLEEP_CYCLES)
        for index, (plan, _) in enumerate(ready):
            inputs[index].copy_(plan.a)
            plan.start(*buffers[index], a=inputs[index], flags=RUN_OVERLAP)
            copies[index].copy_(buffers[index][0].inside)
            inputs[index].fill_(float("nan"))

    twice(work, captured)
    assert_same([(p.name, copy, bits) for (p, bits), copy in zip(ready, copies, strict=True)])


def twice(work: Callable[[], None], captured: bool) -> None:
    """On a stream of its own, or as a graph that is replayed."""
    stream = torch.cuda.Stream()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        graph.replay()
        graph.replay()
    else:
        with torch.cuda.stream(stream):
            work()
            work()
    torch.cuda.synchronize()


def chain(
    library: Library, tactic: Tactic, weights: Weights, rows: list[Tensor], flags: int
) -> None:
    """Each layer reads what the one before writes: ``rows[0]`` to ``rows[-1]``."""
    for a, c in pairwise(rows):
        launch(library, tactic.index, weights, a, c.data_ptr(), flags=flags)


# The larger one makes more tiles than there are SMs, of small tiles: another time of release.
@pytest.mark.parametrize("size", [2048, 8576])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_a_chain_of_launches_that_overlap_waits_for_each_others_results(
    library: Library, decode: list[Tactic], size: int, captured: bool
) -> None:
    source = reference.generator(f"chain-{size}")
    op = QuantOp.GROUP_SCALE_ZERO if size % 128 else QuantOp.GROUP_SCALE
    weights = reference.random_weights(library, op, size, size, 64, source)
    results: list[tuple[str, Tensor, Tensor]] = []
    for tactic in decode:
        for m in (1, tactic.tile[1], 3 * tactic.tile[1] + 1):
            first = reference.randn((m, size), source)
            plain = [first, *(torch.empty_like(first) for _ in range(LAYERS))]
            chain(library, tactic, weights, plain, 0)
            rows = [first, *(torch.full_like(first, float("nan")) for _ in range(LAYERS))]
            torch.cuda.synchronize()

            def work(tactic: Tactic = tactic, rows: list[Tensor] = rows) -> None:
                for row in rows[1:]:
                    row.fill_(float("nan"))
                chain(library, tactic, weights, rows, RUN_OVERLAP)

            twice(work, captured)
            for layer, (found, wanted) in enumerate(zip(rows, plain, strict=True)):
                bits = found.view(torch.int16), wanted.view(torch.int16)
                results.append((f"{tactic.name} M={m}, layer {layer}", *bits))
    assert_same(results)


def test_the_second_kernel_waits_for_a_first_one_that_takes_long(
    library: Library, decode: list[Tactic]
) -> None:
    """The first one has 400 blocks of rows; the second reads the last of them."""
    size = 2048
    source = reference.generator("long")
    weights = reference.random_weights(library, QuantOp.GROUP_SCALE, size, size, 128, source)
    results: list[tuple[str, Tensor, Tensor]] = []
    for tactic in decode:
        m = 400 * tactic.tile[1]
        a = reference.randn((m, size), source)
        outcomes = []
        for flags in (0, RUN_OVERLAP):
            middle = torch.full_like(a, float("nan"))
            last = middle[-tactic.tile[1] :]
            c = torch.full_like(last, float("nan"))
            torch.cuda.synchronize()
            launch(library, tactic.index, weights, a, middle.data_ptr(), flags=flags)
            launch(library, tactic.index, weights, last, c.data_ptr(), flags=flags)
            outcomes.append(c.view(torch.int16))
        results.append((tactic.name, outcomes[1], outcomes[0]))
    assert_same(results)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_a_plain_launch_after_weights_were_written_is_right_and_those_after_it_may_overlap(
    library: Library, decode: list[Tactic], captured: bool
) -> None:
    n, k, group, m = 1032, 2304, 128, 8
    source = reference.generator("rewritten")
    both = [
        reference.random_weights(library, QuantOp.GROUP_SCALE_ZERO, n, k, group, source)
        for _ in range(2)
    ]
    a = reference.randn((m, k), source)
    plain = [unpacked(library, weights) for weights in both]
    shared = Weights(
        **{
            **vars(both[0]),
            **{
                name: reference.place(torch.zeros_like(getattr(both[0], name)))
                for name in ("packed", "scales", "zeros")
            },
        }
    )
    results: list[tuple[str, Tensor, Tensor]] = []
    for tactic in decode:
        wanted = []
        for weights in both:
            c = Guarded(m * n * 2)
            c.arm(m * n * 2)
            launch(library, tactic.index, weights, a, c.address)
            wanted.append(c.inside.clone())
        outputs = [
            [torch.zeros(m, n, dtype=torch.float16, device="cuda") for _ in range(3)] for _ in both
        ]
        torch.cuda.synchronize()

        def work(tactic: Tactic = tactic, outputs: list[list[Tensor]] = outputs) -> None:
            for turn, weights in enumerate(both):
                for name in ("scales", "zeros"):
                    getattr(shared, name).copy_(getattr(weights, name))
                pack_on_device(library, plain[turn], k, n, shared.packed)
                for place, output in enumerate(outputs[turn]):
                    flags = RUN_OVERLAP if place else 0
                    launch(library, tactic.index, shared, a, output.data_ptr(), flags=flags)

        twice(work, captured)
        for turn, row in enumerate(outputs):
            for place, output in enumerate(row):
                name = f"{tactic.name}, weights {turn}, launch {place}"
                results.append((name, output.view(torch.int16).reshape(-1), wanted[turn]))
    assert_same(results)


def unpacked(library: Library, weights: Weights) -> Tensor:
    """Plain nibbles on the device."""
    plain = torch.empty(weights.k * weights.n // 2, dtype=torch.uint8, device="cuda")
    library.unpack_device(
        *(None, weights.packed.data_ptr(), weights.k, weights.n, plain.data_ptr()),
        current_stream(),
    )
    return plain


def pack_on_device(library: Library, plain: Tensor, k: int, n: int, out: Tensor) -> None:
    args = pack_args(Source.PLAIN, None, (k, n), (k, n), plain.data_ptr(), None, out.data_ptr())
    library.pack_weight_device(args, current_stream())


def test_the_smallest_problem_may_overlap(library: Library, decode: list[Tactic]) -> None:
    """Most warps of a CTA then have nothing to copy, and still may not write early."""
    source = reference.generator("smallest")
    weights = reference.random_weights(library, QuantOp.PER_COLUMN, 8, 64, 0, source)
    given = reference.randn((1, 64), source)
    results: list[tuple[str, Tensor, Tensor]] = []
    for tactic in decode:
        a = torch.full_like(given, float("nan"))
        outputs = [Guarded(16), Guarded(16)]
        for c in outputs:
            c.arm(16)
        torch.cuda.synchronize()
        launch(library, tactic.index, weights, given, outputs[0].address)
        torch.cuda._sleep(SLEEP_CYCLES // 50)
        a.copy_(given)
        launch(library, tactic.index, weights, a, outputs[1].address, flags=RUN_OVERLAP)
        results.append((tactic.name, outputs[1].inside.clone(), outputs[0].inside.clone()))
        clean = outputs[0].intact() * outputs[1].intact()
        results.append((f"{tactic.name}: guard bands", clean, torch.ones_like(clean)))
    assert_same(results)
