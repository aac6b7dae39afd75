"""How a launch behaves: streams, threads, graphs, workspaces, and what it must not do."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import pytest

from . import reference
from .harness import Guarded, Plan, launch, plans, problem_of
from .library import AUTO, ROOT, ApiError, Args, Library, QuantOp, Status, problem
from .reference import Tensor, torch
from .sanitize import EXIT_CANNOT_RUN

N, K, GROUP, M = 1032, 1088, 64, 70
#: About half a second on a Hopper.
LONG_SLEEP_CYCLES = 1_000_000_000

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(scope="module", name="ready")
def _ready(library: Library, gpu: None) -> list[tuple[Plan, Tensor]]:
    """Each tactic and quant op, launched once already, with the bits of that launch."""
    return [(plan, plan.alone()) for plan in plans(library, N, K, GROUP, M, "launch")]


def assert_same(results: list[tuple[str, Tensor, Tensor]]) -> None:
    """Compares bits, all at once."""
    same = torch.stack([(found == wanted).all() for _, found, wanted in results]).tolist()
    different = [name for (name, _, _), equal in zip(results, same, strict=True) if not equal]
    assert not different, f"W4A16_SEED={reference.SEED}: {different}"


def test_results_are_right_before_anything_else_is_asked(ready: list[tuple[Plan, Tensor]]) -> None:
    for plan, bits in ready:
        exact = reference.exact_product(plan.a, plan.weights, plan.bias)
        found = bits.view(torch.float16).view(exact.shape)
        assert reference.relative_error(found, exact).item() < 2e-3, plan.name


def test_every_tactic_gives_the_same_bits_in_20_runs(ready: list[tuple[Plan, Tensor]]) -> None:
    results: list[tuple[str, Tensor, Tensor]] = []
    for plan, bits in ready:
        c, workspace = plan.buffers()
        differ = torch.zeros((), dtype=torch.int64, device=reference.DEVICE)
        for _ in range(20):
            c.arm(plan.c_bytes)
            plan.start(c, workspace)
            differ += (c.inside != bits).sum()
        results.append((plan.name, differ, torch.zeros_like(differ)))
    assert_same(results)


def test_a_captured_graph_replays_every_tactic_on_new_data(
    ready: list[tuple[Plan, Tensor]],
) -> None:
    most = max((plan.a for plan, _ in ready), key=len)
    inputs = [plan.a.clone() for plan, _ in ready]
    buffers = [plan.buffers() for plan, _ in ready]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for (plan, _), given, (c, workspace) in zip(ready, inputs, buffers, strict=True):
            plan.start(c, workspace, a=given)
    untouched = [(c.inside == reference.SENTINEL).all() for c, _ in buffers]
    assert all(torch.stack(untouched).tolist()), "capturing wrote to an output"

    graph.replay()
    assert_same(
        [(p.name, c.inside, bits) for (p, bits), (c, _) in zip(ready, buffers, strict=True)]
    )

    results: list[tuple[str, Tensor, Tensor]] = []
    for (plan, _), given, (c, workspace) in zip(ready, inputs, buffers, strict=True):
        given.copy_(most.flip(0)[: plan.m])
        eager, _ = plan.buffers()
        plan.start(eager, workspace, a=given)
        c.arm(plan.c_bytes)
        results.append((plan.name, c.inside, eager.inside))
    graph.replay()
    assert_same(results)
    assert all(torch.stack([c.intact() for c, _ in buffers]).tolist())


def test_the_first_launch_of_each_kernel_in_a_process_may_be_captured(library: Library) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.cold_capture"],
        cwd=ROOT,
        env={**os.environ, "W4A16_LIBRARY": str(library.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode == EXIT_CANNOT_RUN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_streams_at_once_give_the_bits_of_each_alone(ready: list[tuple[Plan, Tensor]]) -> None:
    streams = [torch.cuda.Stream() for _ in range(6)]
    buffers = [[plan.buffers() for plan, _ in ready] for _ in streams]
    torch.cuda.synchronize()
    for place in range(len(ready)):  # neighbours on the device run different tactics
        for turn, stream in enumerate(streams):
            index = (place + turn * 11) % len(ready)
            with torch.cuda.stream(stream):
                ready[index][0].start(*buffers[turn][index])
    torch.cuda.synchronize()
    assert_same(
        [
            (f"{plan.name} on stream {turn}", buffers[turn][index][0].inside, bits)
            for turn in range(len(streams))
            for index, (plan, bits) in enumerate(ready)
        ]
    )


def test_threads_at_once_give_the_bits_of_each_alone(
    ready: list[tuple[Plan, Tensor]], library: Library
) -> None:
    count = 6
    buffers = [[plan.buffers() for plan, _ in ready] for _ in range(count)]
    torch.cuda.synchronize()
    barrier = threading.Barrier(count)
    failures: list[str] = []

    def work(turn: int) -> None:
        try:
            stream = torch.cuda.Stream()
            barrier.wait(timeout=60)
            for place in range(len(ready)):
                index = (place + turn * 7) % len(ready)
                plan = ready[index][0]
                plan.start(*buffers[turn][index], stream=int(stream.cuda_stream))
                # An error of this thread, with this thread's number in it.
                bad = problem(QuantOp.PER_COLUMN, 1, 8, 64 + turn + 1)
                if library.status_of_supports(AUTO, bad) is Status.OK:
                    failures.append(f"thread {turn}: K = {bad.k} was accepted")
                if str(bad.k) not in library.last_error():
                    failures.append(f"thread {turn}: {library.last_error()!r}")
            stream.synchronize()
        except Exception as error:  # shown by the test's own thread
            failures.append(f"thread {turn}: {error}")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures, failures[:10]
    torch.cuda.synchronize()
    assert_same(
        [
            (f"{plan.name} in thread {turn}", buffers[turn][index][0].inside, bits)
            for turn in range(count)
            for index, (plan, bits) in enumerate(ready)
        ]
    )


def test_a_launch_waits_for_what_its_stream_did_before(ready: list[tuple[Plan, Tensor]]) -> None:
    stream = torch.cuda.Stream()
    inputs = [torch.full_like(plan.a, float("nan")) for plan, _ in ready]
    buffers = [plan.buffers() for plan, _ in ready]
    copies = [torch.empty_like(bits) for _, bits in ready]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP_CYCLES // 10)
        for index, (plan, _) in enumerate(ready):
            inputs[index].copy_(plan.a)
            plan.start(*buffers[index], a=inputs[index])
            copies[index].copy_(buffers[index][0].inside)
            inputs[index].fill_(float("nan"))
    stream.synchronize()
    assert_same([(p.name, copy, bits) for (p, bits), copy in zip(ready, copies, strict=True)])


def test_the_default_stream_may_be_given_as_null(ready: list[tuple[Plan, Tensor]]) -> None:
    results: list[tuple[str, Tensor, Tensor]] = []
    for plan, bits in ready:
        c, workspace = plan.buffers()
        torch.cuda.synchronize()
        plan.start(c, workspace, stream=0)
        results.append((plan.name, c.inside, bits))
    torch.cuda.synchronize()
    assert_same(results)


def test_a_launch_waits_for_nothing(ready: list[tuple[Plan, Tensor]]) -> None:
    buffers = [plan.buffers() for plan, _ in ready]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_SLEEP_CYCLES)
        start = time.perf_counter()
        for (plan, _), (c, workspace) in zip(ready, buffers, strict=True):
            plan.start(c, workspace)
        seconds = time.perf_counter() - start
        still_blocked = not stream.query()
    stream.synchronize()
    assert still_blocked, f"the stream ran dry during {len(ready)} launches of {seconds:.3f} s"
    assert_same(
        [(p.name, c.inside, bits) for (p, bits), (c, _) in zip(ready, buffers, strict=True)]
    )


def test_a_launch_allocates_no_device_memory(ready: list[tuple[Plan, Tensor]]) -> None:
    buffers = [plan.buffers() for plan, _ in ready]
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(5):
        for (plan, _), (c, workspace) in zip(ready, buffers, strict=True):
            plan.start(c, workspace)
    during, _ = torch.cuda.mem_get_info()
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert (during, after) == (before, before)


def test_no_rows_succeed_and_write_nothing(ready: list[tuple[Plan, Tensor]]) -> None:
    for plan, _ in ready:
        c, workspace = plan.buffers()
        assert plan.library.workspace_size(plan.tactic.index, _with_rows(plan, 0)) == 0
        for tactic in (plan.tactic.index, AUTO):
            launch(plan.library, tactic, plan.weights, plan.a[:0], c.address, bias=plan.bias)
        torch.cuda.synchronize()
        assert (c.inside == reference.SENTINEL).all().item(), plan.name
        assert c.intact().item() * workspace.intact().item() == 1, plan.name


def _with_rows(plan: Plan, m: int) -> Any:
    return problem_of(plan.weights, m, plan.bias is not None)


def needing_workspace(library: Library) -> list[Plan]:
    """For each tactic that may need a workspace, a plan for a shape on which it does."""
    shapes = [(1032, 1088, 70), (1032, 4096, 17), (4104, 4096, 100), (2056, 8192, 300)]
    made: list[Plan] = []
    left = {(t.index, op) for t in library.tactics if t.uses_workspace for op in t.quant_ops}
    for n, k, m in shapes:
        if not left:
            break
        for plan in plans(library, n, k, GROUP, m, f"workspace-{n}-{k}-{m}"):
            key = plan.tactic.index, plan.weights.quant_op
            if key in left and plan.workspace_bytes:
                left.discard(key)
                made.append(plan)
    if left:
        warnings.warn(f"no shape tried makes these need a workspace: {sorted(left)}", stacklevel=1)
    return made


def test_only_tactics_that_say_so_need_a_workspace(ready: list[tuple[Plan, Tensor]]) -> None:
    for plan, _ in ready:
        if not plan.tactic.uses_workspace:
            for m in (1, 5, 15) if plan.tactic.is_gemv else (1, 17, 300, 5000):
                given = _with_rows(plan, m)
                assert plan.library.workspace_size(plan.tactic.index, given) == 0, plan.name


def test_exactly_the_workspace_asked_for_is_enough_and_its_contents_do_not_matter(
    library: Library,
) -> None:
    chosen = needing_workspace(library)
    if not chosen:
        pytest.skip("no tactic of this library needs a workspace on any shape tried")
    results: list[tuple[str, Tensor, Tensor]] = []
    for plan in chosen:
        outcomes: list[Tensor] = []
        c, workspace = plan.buffers()
        for byte in (0x00, 0xFF, 0x01):
            c.arm(plan.c_bytes)
            workspace.arm(plan.workspace_bytes)
            workspace.inside.view(torch.uint8).fill_(byte)
            plan.start(c, workspace)
            outcomes.append(c.inside.clone())
            clean = c.intact() * workspace.intact()
            results.append((f"{plan.name}: guard bands", clean, torch.ones_like(clean)))
        exact = reference.exact_product(plan.a, plan.weights, plan.bias)
        found = outcomes[0].view(torch.float16).view(exact.shape)
        assert reference.relative_error(found, exact).item() < 5e-4, plan.name
        results += [(f"{plan.name}: contents", other, outcomes[0]) for other in outcomes[1:]]
    assert_same(results)


def test_a_workspace_one_byte_short_or_missing_is_refused_and_nothing_is_launched(
    library: Library,
) -> None:
    chosen = needing_workspace(library)
    if not chosen:
        pytest.skip("no tactic of this library needs a workspace on any shape tried")
    for plan in chosen:
        c, workspace = plan.buffers()
        size = plan.workspace_bytes
        for address, given in ((workspace.address, size - 1), (workspace.address, 0), (0, size)):
            with pytest.raises(ApiError, match="workspace") as raised:
                launch(
                    library,
                    plan.tactic.index,
                    plan.weights,
                    plan.a,
                    c.address,
                    bias=plan.bias,
                    workspace=address,
                    workspace_bytes=given,
                )
            assert raised.value.status is Status.ERROR_WORKSPACE
        torch.cuda.synchronize()
        assert (c.inside == reference.SENTINEL).all().item(), plan.name


def test_workspace_needed_by_auto_is_that_of_the_tactic_it_takes(library: Library) -> None:
    for n, k in ((1032, 1088), (4104, 4096), (8192, 28672)):
        for m in (1, 4, 16, 64, 100, 300, 1024):
            for op in QuantOp:
                given = problem(op, m, n, k, 0 if op is QuantOp.PER_COLUMN else 64)
                if library.status_of_supports(AUTO, given) is not Status.OK:
                    continue
                taken = library.auto_tactic(given)
                wanted = library.workspace_size(taken.index, given)
                assert library.workspace_size(AUTO, given) == wanted


def test_every_device_of_this_architecture_gives_the_same_bits(
    ready: list[tuple[Plan, Tensor]], library: Library
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    library.check_device(1)
    for plan, bits in ready:
        size = plan.workspace_bytes
        with torch.cuda.device(1):
            there: dict[str, Any] = {
                name: value.to("cuda:1") if value is not None else None
                for name, value in {
                    "a": plan.a,
                    "b": plan.weights.packed,
                    "scales": plan.weights.scales,
                    "zeros": plan.weights.zeros,
                    "bias": plan.bias,
                    "c": torch.full_like(bits, reference.SENTINEL),
                    "workspace": torch.empty(size, dtype=torch.uint8) if size else None,
                }.items()
            }
            addresses = {n: v.data_ptr() if v is not None else None for n, v in there.items()}
            args = Args(problem=ctypes.pointer(plan.problem), workspace_bytes=size, **addresses)
            library.run(plan.tactic.index, args, int(torch.cuda.current_stream().cuda_stream))
            torch.cuda.synchronize()
        assert torch.equal(there["c"].cpu(), bits.cpu()), plan.name


def test_an_output_may_stand_anywhere_that_is_aligned_to_16_bytes(
    ready: list[tuple[Plan, Tensor]],
) -> None:
    results: list[tuple[str, Tensor, Tensor]] = []
    for plan, bits in ready:
        c, workspace = Guarded(plan.c_bytes + 128), plan.buffers()[1]
        for shift in range(0, 128, 16):
            c.arm(plan.c_bytes + 128)
            launch(
                plan.library,
                plan.tactic.index,
                plan.weights,
                plan.a,
                c.address + shift,
                bias=plan.bias,
                workspace=workspace.address if plan.workspace_bytes else 0,
                workspace_bytes=plan.workspace_bytes,
            )
            inside = c.inside[shift // 2 : (shift + plan.c_bytes) // 2].clone()
            results.append((f"{plan.name} at {shift}", inside, bits))
    assert_same(results)
