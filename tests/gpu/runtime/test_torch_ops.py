"""`torch.ops.w4a16` on a GPU: numbers, streams, threads, graphs, compilation, memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import w4a16
from w4a16 import torch_ops
from w4a16.library import LIBRARY, Problem, QuantOp

from tests.gpu.runtime.products import KINDS, Product, poison, torch

torch_ops.register_torch_ops()
OPS = torch.ops.w4a16
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest) -> Product:
    return Product(request.param)


@pytest.mark.parametrize("m", [1, 2, 7, 16, 33, 128, 300])
def test_the_product_is_right_for_few_and_many_rows(product: Product, m: int) -> None:
    x = product.x(m)
    poison()
    product.check(OPS.linear(x, *product.arguments), x)


@pytest.mark.parametrize("kind", ["symmetric", "per column", "zeros and bias", "act-order"])
def test_every_tactic_can_be_named_by_its_index(kind: str) -> None:
    product = Product(kind)
    packed = product.packed
    ran = 0
    for tactic in LIBRARY.tactics:
        m = min(40, tactic.m_max)
        problem = Problem(
            quant_op=packed.quant_op,
            m=m,
            n=packed.n,
            k=packed.k,
            group_size=packed.group_size,
            has_bias=packed.bias is not None,
        )
        if LIBRARY.why_unsupported(tactic.index, problem):
            continue
        x = product.x(m)
        poison()
        limit = 3e-3 if tactic.kind == "gemv" else 5e-4
        product.check(OPS.linear(x, *product.arguments, tactic.index), x, limit)
        ran += 1
    assert ran > 0


def test_a_tactic_without_a_kernel_for_the_rows_says_so() -> None:
    product = Product()
    for tactic in LIBRARY.tactics:
        if tactic.m_max < 1000:
            with pytest.raises(w4a16.UnsupportedError):
                OPS.linear(product.x(1000), *product.arguments, tactic.index)
            return
    pytest.skip("every tactic of this library takes any number of rows")


def test_identity_activations_give_the_weight_exactly() -> None:
    product = Product("act-order", k=256, n=128)
    weight = (*product.weight[:-1], None)
    found = OPS.linear(torch.eye(256, device="cuda").half(), *weight, 256, 128)
    assert torch.equal(found, product.w)
    assert torch.equal(OPS.dequantize(*product.weight[:-1], 256, 128), product.w)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions_are_kept(product: Product, leading: tuple[int, ...]) -> None:
    x = product.x(*leading)
    found = OPS.linear(x, *product.arguments)
    assert found.shape == (*leading, product.n)
    if found.numel():
        product.check(found, x)
    fake = torch_ops._linear_fake(x, *product.arguments)
    assert fake.stride() == found.stride()


def test_strides_and_alignment_of_x_do_not_matter(product: Product) -> None:
    wide = torch.randn(6, product.k + 24, device="cuda").half()
    storage = torch.randn(6 * product.k + 3, device="cuda").half()
    for x in (
        wide[:, : product.k],
        wide[::2, 5 : product.k + 5],
        wide[:, : product.k].T.contiguous().T,
        storage[3:].view(6, product.k),
        wide[0, : product.k].expand(4, product.k),
    ):
        product.check(OPS.linear(x, *product.arguments), x)


def test_linear_out_writes_what_linear_returns(product: Product) -> None:
    x = product.x(2, 9)
    out = torch.full((2, 9, product.n), torch.nan, device="cuda", dtype=torch.float16)
    OPS.linear_out(x, *product.arguments, out)
    product.check(out, x)
    storage = torch.full((18 * product.n + 1,), torch.nan, device="cuda", dtype=torch.float16)
    odd = storage[1:].view(2, 9, product.n)
    OPS.linear_out(x, *product.arguments, odd)
    assert torch.equal(odd, out)


def test_inputs_are_not_written_to(product: Product) -> None:
    x = product.x(33)
    before = [None if t is None else t.clone() for t in (x, *product.weight)]
    OPS.linear(x, *product.arguments)
    for old, new in zip(before, (x, *product.weight), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


def test_opcheck_finds_nothing(product: Product) -> None:
    torch.library.opcheck(OPS.linear.default, (product.x(3), *product.arguments))
    out = torch.empty(3, product.n, device="cuda", dtype=torch.float16)
    torch.library.opcheck(OPS.linear_out.default, (product.x(3), *product.arguments, out))
    weight = (*product.weight[:-1], product.k, product.n)
    torch.library.opcheck(OPS.dequantize.default, weight)


# ---- Streams, threads, devices ----


def test_work_is_ordered_on_the_current_stream(product: Product) -> None:
    """x is written after a long wait: a launch on any other stream would read what was before."""
    x = product.x(16)
    expected = OPS.linear(x, *product.arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            late = torch.full_like(x, torch.nan)
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            results.append(OPS.linear(late, *product.arguments))
    torch.cuda.synchronize()
    for found in results:
        assert torch.equal(found, expected)


def test_workspaces_of_streams_that_run_at_once_do_not_meet() -> None:
    products = [Product("act-order", seed=seed, k=4096, n=1024) for seed in range(4)]
    xs = [product.x(48) for product in products]
    expected = [OPS.linear(x, *p.arguments) for x, p in zip(xs, products, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in products]
    found: list[list[Any]] = [[] for _ in products]
    for _ in range(50):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                result = OPS.linear(xs[place], *products[place].arguments)
                found[place].append((result != expected[place]).any())
    torch.cuda.synchronize()
    assert not any(bool(wrong) for each in found for wrong in each)


def test_threads_may_launch_at_once() -> None:
    products = [Product(kind, seed=3) for kind in KINDS]
    wrong: list[BaseException] = []

    def work(product: Product, seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for m in (1, 5, 16, 64, 200):
                    x = product.x(m, seed=seed)
                    for _ in range(10):
                        product.check(OPS.linear(x, *product.arguments), x)
        except BaseException as error:
            wrong.append(error)

    threads = [
        threading.Thread(target=work, args=(product, seed))
        for seed in range(2)
        for product in products
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_a_tensors_device_need_not_be_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    product = Product("act-order")
    x = product.x(20)
    weight = [None if tensor is None else tensor.to("cuda:1") for tensor in product.weight]
    assert torch.cuda.current_device() == 0
    found = OPS.linear(x.to("cuda:1"), *weight, product.k, product.n)
    assert found.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    product.check(found.to("cuda:0"), x)
    with pytest.raises(w4a16.ArgumentError, match=r"cuda:0, but packed .*cuda:1"):
        OPS.linear(x, *weight, product.k, product.n)


def test_arrays_on_several_devices_are_refused() -> None:
    product = Product("zeros and bias")
    with pytest.raises(w4a16.ArgumentError, match=r"x is .* on cpu, but packed .* on cuda:0"):
        OPS.linear(product.x(2).cpu(), *product.arguments)
    for place, tensor in enumerate(product.weight):
        if tensor is None:
            continue
        weight = list(product.weight)
        weight[place] = tensor.cpu()
        with pytest.raises(w4a16.ArgumentError, match="one device"):
            OPS.linear(product.x(2), *weight, product.k, product.n)


def test_other_dtypes_are_told_to_convert() -> None:
    product = Product()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(w4a16.ArgumentError, match="convert x to float16"):
            OPS.linear(product.x(2).to(dtype), *product.arguments)


# ---- No waiting, no memory ----


def test_nothing_waits_for_the_gpu(product: Product) -> None:
    x = product.x(16)
    OPS.linear(x, *product.arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.linear(x, *product.arguments)
        OPS.linear(x[:, : product.k], *product.arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # That mode knows of torch's own waits only.
    event = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    OPS.linear(x, *product.arguments)
    event.record()
    assert not event.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("m", [1, 16, 64])
def test_weights_that_torch_changes_between_launches_that_overlap_are_not_read_early(
    m: int,
) -> None:
    one, other = (Product("zeros and bias", seed=seed) for seed in (1, 2))
    x = one.x(m)
    weight = [tensor if tensor is None else tensor.clone() for tensor in one.weight]
    wanted = [OPS.linear(x, *product.arguments) for product in (one, other)]
    found = []
    for turn in range(6):
        for tensor, source in zip(weight, (one, other)[turn % 2].weight, strict=True):
            if tensor is not None:
                tensor.copy_(source)
        found += [OPS.linear(x, *weight, one.k, one.n) for _ in range(3)]
    for place, result in enumerate(found):
        assert torch.equal(result, wanted[place // 3 % 2]), place


@pytest.mark.parametrize("m", [1, 16, 64])
def test_weights_that_another_stream_changes_are_not_read_before_the_event_that_says_so(
    m: int,
) -> None:
    one, other = (Product("zeros and bias", seed=seed) for seed in (1, 2))
    x = one.x(m)
    weight = [tensor if tensor is None else tensor.clone() for tensor in one.weight]
    wanted = [OPS.linear(x, *product.arguments) for product in (one, other)]
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    for turn in range(6):
        source = (other, one)[turn % 2]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            for tensor, new in zip(weight, source.weight, strict=True):
                if tensor is not None:
                    tensor.copy_(new)
            first = OPS.linear(x, *weight, one.k, one.n)  # without overlap
        # A launch that lets the next one begin, long before the weight is there.
        OPS.linear(x, *other.arguments)
        main.wait_stream(side)
        found = OPS.linear(x, *weight, one.k, one.n)
        expected = wanted[1 - turn % 2]
        assert torch.equal(found, expected), turn
        assert torch.equal(first, expected), turn


def test_launches_give_the_same_bits_with_and_without_overlap(product: Product) -> None:
    x = product.x(8)
    OPS.linear(x, *product.arguments)
    overlapping = [OPS.linear(x, *product.arguments) for _ in range(5)]
    w4a16.set_overlap(False)
    try:
        plain = OPS.linear(x, *product.arguments)
    finally:
        w4a16.set_overlap(True)
    assert all(torch.equal(found, plain) for found in overlapping)


@pytest.mark.parametrize("kind", ["zeros and bias", "act-order"])
@pytest.mark.parametrize("m", [1, 64, 300])
def test_only_the_output_and_one_workspace_are_allocated(kind: str, m: int) -> None:
    product = Product(kind)
    packed, x = product.packed, product.x(m)
    OPS.linear(x, *product.arguments)
    problem = Problem(
        quant_op=QuantOp.GROUP_SCALE_ZERO,
        m=m,
        n=packed.n,
        k=packed.k,
        group_size=packed.group_size,
        has_bias=packed.bias is not None,
    )
    for tactic in LIBRARY.tactics:
        if LIBRARY.why_unsupported(tactic.index, problem):
            continue
        size = LIBRARY.workspace_size(tactic.index, problem)
        if packed.columns is not None:
            size += -(-m * packed.k * 2 // 256) * 256
        before = torch.cuda.memory_stats()
        found = OPS.linear(x, *product.arguments, tactic.index)
        after = torch.cuda.memory_stats()

        def added(name: str, before: Any = before, after: Any = after) -> int:
            return int(after[name] - before[name])

        assert added("allocation.all.allocated") == (2 if size else 1), tactic.name
        assert added("requested_bytes.all.allocated") == found.nbytes + size, tactic.name
        assert added("allocation.all.current") == 1
        del found


# ---- CUDA graphs ----


@pytest.mark.parametrize("m", [1, 33])
def test_a_captured_call_is_replayed_on_new_inputs(product: Product, m: int) -> None:
    x = product.x(m)
    OPS.linear(x, *product.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = OPS.linear(x, *product.arguments)
        again = OPS.linear(x.mul(2), *product.arguments)
    for seed in range(3, 6):
        x.copy_(product.x(m, seed=seed))
        graph.replay()
        product.check(found, x)
        product.check(again, x * 2)


FIRST_CALL = """
import sys
import torch
from tests.gpu.runtime.products import Product
import w4a16
w4a16.register_torch_ops()
op = torch.ops.w4a16.linear
kind, m = sys.argv[1], int(sys.argv[2])
product = Product(kind)
x = product.x(m)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    found = op(x, *product.arguments)
for seed in (7, 8):
    x.copy_(product.x(m, seed=seed))
    graph.replay()
    product.check(found, x)
eager = op(x, *product.arguments)
product.check(eager, x)
"""


@pytest.mark.parametrize("kind", ["symmetric", "act-order"])
@pytest.mark.parametrize("m", [1, 64])
def test_the_first_call_of_a_process_may_be_captured(kind: str, m: int) -> None:
    path = [str(ROOT), str(ROOT / "runtime")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {path!r}\n{FIRST_CALL}", kind, str(m)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- torch.compile ----


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compilation_breaks_no_graph(mode: str) -> None:
    torch._dynamo.reset()
    first, second = Product("act-order", k=512, n=256), Product("padded", k=256, n=301)

    def network(x: Any) -> Any:
        hidden = torch.relu(OPS.linear(x * 0.5, *first.arguments))
        return OPS.linear(hidden, *second.arguments) + 1

    compiled = torch.compile(network, mode=mode, fullgraph=True)
    with torch.no_grad():
        for m in (1, 64, 64, 64):
            x = first.x(m, seed=m)
            found = compiled(x).clone()
            expected = network(x)
            norm = torch.linalg.vector_norm
            assert norm((found - expected).double()) <= 2e-3 * norm(expected.double())


def test_compilation_takes_any_number_of_rows_at_once() -> None:
    torch._dynamo.reset()
    product = Product("zeros and bias")
    compiled = torch.compile(
        lambda x: OPS.linear(x.neg(), *product.arguments), fullgraph=True, dynamic=True
    )
    with torch.no_grad():
        for m in (3, 17, 256):
            x = product.x(m)
            product.check(compiled(x), -x)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_the_backward_pass_says_that_there_is_none(backend: str | None) -> None:
    torch._dynamo.reset()
    product = Product("zeros and bias")

    def function(x: Any) -> Any:
        return OPS.linear(x * 2, *product.arguments)

    if backend:
        function = torch.compile(function, backend=backend, fullgraph=True)
    x = product.x(4).requires_grad_()
    found = function(x)
    product.check(found.detach(), x.detach() * 2)
    with pytest.raises(w4a16.W4A16Error, match="not differentiable"):
        found.sum().backward()


def test_inference_tensors_and_subclasses_are_taken() -> None:
    product = Product("act-order")
    with torch.inference_mode():
        x = product.x(5)
        product.check(OPS.linear(x, *product.arguments), x)
    parameter = torch.nn.Parameter(product.x(5), requires_grad=False)
    product.check(OPS.linear(parameter, *product.arguments), parameter)
