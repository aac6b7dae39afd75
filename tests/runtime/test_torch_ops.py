"""`torch.ops.w4a16` on a CPU: registration, fakes, compilation, gradients, errors."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from w4a16 import overlap, tactics, torch_ops
from w4a16.library import LIBRARY, _Args

from tests.runtime.checkpoints import case_of, weight
from tests.runtime.host_kernels import HostKernels

torch_ops.register_torch_ops()
OPS = torch.ops.w4a16


class Product:
    """A random weight as the arguments of the operators, and as numbers."""

    def __init__(self, seed: int, **kind: Any) -> None:
        rng = np.random.default_rng(seed)
        self.case = case_of(rng, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **kind})
        positional, named = self.case.arguments()
        self.packed = w4a16.pack(*positional, **named)
        tensors = {name: torch.from_numpy(array) for name, array in self.packed.arrays().items()}
        self.weight: Any = tuple(
            tensors.get(name) for name in ("packed", "scales", "zeros", "columns", "bias")
        )
        self.sizes: Any = (self.case.k, self.case.n)
        self.x = torch.from_numpy(rng.standard_normal((3, self.case.k)).astype(np.float16))

    @property
    def arguments(self) -> Any:
        return (self.x, *self.weight, *self.sizes)

    def exact(self, x: Any) -> Any:
        product = x.double() @ torch.from_numpy(weight(self.case)).double()
        bias = self.case.bias
        return product if bias is None else product + torch.from_numpy(bias).double()


KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "per column": {"symmetric": True, "group_size": -1},
    "zeros and bias": {"bias": True},
    "act-order": {"act_order": "shuffled"},
    "padded": {"k": 100, "n": 21, "bias": True},
}


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest) -> Product:
    return Product(3, **KINDS[request.param])


def close(found: Any, exact: Any) -> None:
    norm = torch.linalg.vector_norm
    assert norm(found.double() - exact) <= 1e-3 * norm(exact)


def test_linear_is_the_product_with_the_checkpoints_weight(product: Product) -> None:
    found = OPS.linear(*product.arguments)
    assert found.shape == (3, product.case.n)
    assert found.dtype == torch.float16
    close(found, product.exact(product.x))


def test_dequantize_gives_the_weight_bit_for_bit(product: Product) -> None:
    packed, scales, zeros, columns, _ = product.weight
    found = OPS.dequantize(packed, scales, zeros, columns, *product.sizes)
    assert torch.equal(found, torch.from_numpy(weight(product.case)))


def test_linear_out_writes_what_linear_returns(product: Product) -> None:
    out = torch.full((3, product.case.n), torch.nan, dtype=torch.float16)
    version = out._version
    assert OPS.linear_out(*product.arguments, out) is None
    assert torch.equal(out, OPS.linear(*product.arguments))
    assert out._version > version


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_out_takes_the_sizes_of_the_packed_weight_for_0(device: str) -> None:
    product = Product(3, **KINDS["symmetric"])
    x, packed, scales = (tensor.to(device) for tensor in (product.x, *product.weight[:2]))
    out = torch.empty((3, product.case.n), dtype=torch.float16, device=device)
    OPS.linear_out(x, packed, scales, None, None, None, 0, 0, out)
    if device == "cpu":
        assert torch.equal(out, OPS.linear(x, packed, scales))


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions_are_kept(product: Product, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, product.case.k).half()
    found = OPS.linear(x, *product.weight, *product.sizes)
    assert found.shape == (*leading, product.case.n)
    assert found.stride(-1) == 1 or found.shape[-1] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck_finds_nothing(product: Product, dynamic: bool) -> None:
    x = torch.randn(2, 5, product.case.k).half() if dynamic else product.x
    packed, scales, zeros, columns, _ = product.weight
    torch.library.opcheck(OPS.linear.default, (x, *product.weight, *product.sizes))
    torch.library.opcheck(
        OPS.linear_out.default,
        (x, *product.weight, *product.sizes, x.new_empty((*x.shape[:-1], product.case.n))),
    )
    torch.library.opcheck(OPS.dequantize.default, (packed, scales, zeros, columns, *product.sizes))


def test_the_operators_are_marked_as_safe_to_compile() -> None:
    for name in ("linear", "linear_out", "dequantize"):
        assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compilation_breaks_no_graph(product: Product, backend: str) -> None:
    torch._dynamo.reset()

    def two(x: Any) -> Any:
        y = OPS.linear(x.neg(), *product.weight, *product.sizes)
        OPS.linear_out(x, *product.weight, *product.sizes, out := torch.empty_like(y))
        return y.relu() + out

    compiled = torch.compile(two, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((3,), (2, 4), (2, 7)):
        x = torch.randn(*shape, product.case.k).half()
        assert torch.equal(compiled(x), two(x))


def test_the_function_compiles_too() -> None:
    product = Product(4, act_order="shuffled", bias=True)
    packed = w4a16.PackedWeight(
        **dict(zip(("packed", "scales", "zeros", "columns", "bias"), product.weight, strict=True)),
        in_features=product.case.k,
        out_features=product.case.n,
    )
    linear = w4a16.linear
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear(x, packed) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(product.x), linear(product.x, packed) * 2)


def test_meta_tensors_give_shapes() -> None:
    product = Product(5, k=100, n=21)
    there = [None if tensor is None else tensor.to("meta") for tensor in product.weight]
    found = OPS.linear(torch.empty(2, 3, 100, dtype=torch.float16, device="meta"), *there, 100, 21)
    real = OPS.linear(torch.zeros(2, 3, 100).half(), *product.weight, 100, 21)
    assert found.is_meta
    assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


# ---- Gradients ----


def test_the_forward_pass_works_where_gradients_are_recorded(product: Product) -> None:
    x = product.x.clone().requires_grad_()
    assert torch.equal(
        OPS.linear(x, *product.weight, *product.sizes), OPS.linear(*product.arguments)
    )
    with torch.no_grad():
        assert not OPS.linear(x, *product.weight, *product.sizes).requires_grad


def backward(function: Any, x: Any) -> None:
    function(x).sum().backward()


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_the_backward_pass_says_that_there_is_none(backend: str | None) -> None:
    product = Product(6, bias=True)
    torch._dynamo.reset()

    def function(x: Any) -> Any:
        return OPS.linear(x * 2, *product.weight, *product.sizes)

    if backend:
        function = torch.compile(function, backend=backend, fullgraph=True)
    x = product.x.clone().requires_grad_()
    with pytest.raises(w4a16.W4A16Error, match=r"not differentiable.*no_grad"):
        backward(function, x)
    assert x.grad is None


def test_a_bias_that_wants_a_gradient_is_told_the_same() -> None:
    product = Product(6, bias=True)
    bias = product.weight[-1].clone().requires_grad_()
    found = OPS.linear(product.x, *product.weight[:-1], bias, *product.sizes)
    with pytest.raises(w4a16.W4A16Error, match="not differentiable"):
        found.sum().backward()


def test_out_cannot_be_differentiated() -> None:
    product = Product(6)
    x = product.x.clone().requires_grad_()
    out = torch.empty(3, 24, dtype=torch.float16)
    with pytest.raises(w4a16.ArgumentError, match=r"x requires a gradient.*no_grad"):
        OPS.linear_out(x, *product.weight, *product.sizes, out)
    with torch.no_grad():
        OPS.linear_out(x, *product.weight, *product.sizes, out)


def test_inference_tensors_are_taken() -> None:
    product = Product(6)
    with torch.inference_mode():
        x = product.x.clone()
        found = OPS.linear(x, *product.weight, *product.sizes)
        out = torch.empty_like(found)
        OPS.linear_out(x, *product.weight, *product.sizes, out)
    assert torch.equal(found, OPS.linear(*product.arguments))
    assert torch.equal(out, found)


# ---- Errors ----


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.zeros(3, 128), ("x is float32 [3, 128] on cpu", "convert x to float16")),
        (0, torch.zeros(3, 128).bfloat16(), ("x is bfloat16", "convert x to float16")),
        (0, torch.zeros(3, 64).half(), ("x is float16 [3, 64]", "[..., 128]")),
        (0, torch.tensor(1.0).half(), ("x is float16 []",)),
        (0, torch.zeros(3, 128, device="meta").half(), ("x is float16 [3, 128] on meta", "device")),
        (1, torch.zeros(24, 64), ("packed is float32", "uint8")),
        (1, torch.zeros(24, 64, 1).byte(), ("packed is uint8 [24, 64, 1]",)),
        (1, torch.zeros(24, 128).byte()[:, ::2], ("packed is", "not contiguous")),
        (2, torch.zeros(3, 24).half(), ("scales is float16 [3, 24]", "divides k")),
        (2, torch.zeros(0, 24).half(), ("scales is float16 [0, 24]",)),
        (2, torch.zeros(24).half(), ("scales is float16 [24]", "[groups, 24]")),
        (3, torch.zeros(1, 24).half(), ("zeros is float16 [1, 24]", "[2, 24]")),
        (4, torch.zeros(128), ("columns is float32 [128]", "int32 [128]")),
        (5, torch.zeros(23).half(), ("bias is float16 [23]", "[24]")),
        (6, 64, ("x is float16 [3, 128]", "[..., 64]")),
        (7, 25, ("out_features is 25", "1 to 24")),
    ],
)
def test_a_wrong_argument_is_named(place: int, value: Any, words: tuple[str, ...]) -> None:
    arguments = list(Product(7).arguments)
    arguments[place] = value
    with pytest.raises(w4a16.ArgumentError) as error:
        OPS.linear(*arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("in_features", [64, 256])
def test_inputs_that_the_weight_does_not_have_are_refused(in_features: int) -> None:
    _, *weight, _, out_features = Product(7).arguments
    x = torch.zeros(3, in_features).half()
    with pytest.raises(w4a16.ArgumentError, match=f"in_features is {in_features}"):
        OPS.linear(x, *weight, in_features, out_features)


# ---- Registration ----


def test_registering_again_from_many_threads_changes_nothing() -> None:
    before = torch_ops._library
    threads = [threading.Thread(target=torch_ops.register_torch_ops) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch_ops._library is before


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_operators_are_there_if_torch_was_imported_first() -> None:
    run("import torch, w4a16; torch.ops.w4a16.linear.default")


def test_torch_is_not_imported_before_it_is_needed() -> None:
    run("import sys, w4a16; assert 'torch' not in sys.modules")
    run("import w4a16, torch; w4a16.register_torch_ops(); torch.ops.w4a16.linear.default")


def test_the_first_registration_may_come_from_many_threads() -> None:
    run(
        "import threading, w4a16, torch\n"
        "from w4a16 import torch_ops\n"
        "assert torch_ops._library is None\n"
        "go, wrong = threading.Barrier(8), []\n"
        "def register():\n"
        "    go.wait()\n"
        "    try: torch_ops.register_torch_ops()\n"
        "    except BaseException as error: wrong.append(error)\n"
        "threads = [threading.Thread(target=register) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not wrong, wrong\n"
        "torch.ops.w4a16.linear.default\n"
    )


def test_reloading_the_module_registers_anew() -> None:
    run(
        "import importlib, torch, w4a16\n"
        "from w4a16 import torch_ops\n"
        "importlib.reload(torch_ops).register_torch_ops()\n"
        "torch.ops.w4a16.linear.default\n"
    )


# ---- Launches, on host memory ----

LAUNCH: Any = torch_ops._linear_cuda
LAUNCH_OUT: Any = torch_ops._linear_out_cuda


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    """The CUDA implementation, which knows no better than that the CPU is GPU number -1."""
    monkeypatch.setattr(torch_ops, "_current_device", lambda: -1)
    monkeypatch.setattr(torch_ops, "_raw_stream", lambda device: 4711)
    monkeypatch.setattr(torch_ops, "_capturing", lambda: False)
    monkeypatch.setattr(
        torch_ops,
        "_empty_cuda",
        lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
    )
    return HostKernels().install(monkeypatch, torch_ops)


def shifted(tensor: Any, elements: int) -> Any:
    """A copy that begins so many elements after an aligned address."""
    storage = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    storage[elements:] = tensor.reshape(-1)
    return storage[elements:].view(tensor.shape)


@pytest.mark.parametrize("form", ["plain", "row-strided", "transposed", "misaligned", "3-D"])
def test_a_launch_computes_the_product_however_x_lies(
    product: Product, kernels: HostKernels, form: str
) -> None:
    k = product.case.k
    x = {
        "plain": product.x,
        "row-strided": torch.randn(3, k + 8).half()[:, :k],
        "transposed": torch.randn(k, 3).half().T,
        "misaligned": shifted(product.x, 3),
        "3-D": torch.randn(2, 1, k).half(),
    }[form]
    found = LAUNCH(x, *product.weight, *product.sizes)
    close(found, product.exact(x))
    fake = torch_ops._linear_fake(x, *product.weight, *product.sizes)
    assert (found.shape, found.stride()) == (fake.shape, fake.stride())
    (launch,) = kernels.launches
    assert launch["stream"] == 4711
    assert launch["tactic"] == 3
    assert len(kernels.gathers) == (product.weight[3] is not None)
    assert kernels.plans[0][0] == -1


def test_a_launch_into_out_needs_no_copy_unless_it_is_padded(
    product: Product, kernels: HostKernels
) -> None:
    out = torch.empty(3, product.case.n, dtype=torch.float16)
    LAUNCH_OUT(*product.arguments, out)
    close(out, product.exact(product.x))
    assert (kernels.launches[0]["c"] == out.data_ptr()) == (product.case.n % 8 == 0)
    odd = shifted(torch.empty(3, product.case.n).half(), 1)
    LAUNCH_OUT(*product.arguments, odd)
    assert torch.equal(odd, out)


def test_a_bias_without_padding_is_padded(kernels: HostKernels) -> None:
    product = Product(8, n=21, bias=True)
    bias = torch.from_numpy(product.case.bias)
    found = LAUNCH(product.x, *product.weight[:-1], bias, *product.sizes)
    close(found, product.exact(product.x))


def test_without_rows_nothing_is_launched(product: Product, kernels: HostKernels) -> None:
    x = torch.empty(2, 0, product.case.k, dtype=torch.float16)
    found = LAUNCH(x, *product.weight, *product.sizes)
    assert found.shape == (2, 0, product.case.n)
    assert not kernels.launches
    assert not kernels.plans


def test_a_tactic_that_was_named_is_not_chosen(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product(8)
    asked = []

    def workspace_size(*arguments: Any) -> int:
        asked.append(arguments)
        return 100

    monkeypatch.setattr(torch_ops, "_workspace_size", workspace_size)
    LAUNCH(*product.arguments, 5)
    assert kernels.launches[0]["tactic"] == 5
    assert not kernels.plans
    assert asked == [(-1, 5, 2, 3, 24, 128, 64, False)]


def test_a_tactic_is_chosen_once_for_a_shape_and_anew_when_tables_changed(
    kernels: HostKernels,
) -> None:
    product = Product(8, bias=True)
    for _ in range(3):
        LAUNCH(*product.arguments)
    assert len(kernels.plans) == 1
    more = torch.randn(5, product.case.k).half()
    close(LAUNCH(more, *product.weight, *product.sizes), product.exact(more))
    assert [plan[2] for plan in kernels.plans] == [3, 5]
    tactics.forget()
    close(LAUNCH(*product.arguments), product.exact(product.x))
    assert [plan[2] for plan in kernels.plans] == [3, 5, 3]
    LAUNCH(*product.arguments)
    assert len(kernels.plans) == 3


def test_what_is_prepared_for_shapes_does_not_grow_without_end(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "_MOST_LAUNCHES", 4)
    product = Product(8)
    for m in range(1, 12):
        x = torch.randn(m, product.case.k).half()
        close(LAUNCH(x, *product.weight, *product.sizes), product.exact(x))
        assert len(product.weight[0]._w4a16.launches) <= 4


def test_threads_may_launch_one_weight_at_once_with_any_shapes(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "_MOST_LAUNCHES", 3)
    product = Product(8, bias=True)
    given = [torch.randn(m, product.case.k).half() for m in range(1, 6)]
    wanted = [LAUNCH(x, *product.weight, *product.sizes) for x in given]
    go = threading.Barrier(6)

    def launch(thread: int) -> None:
        go.wait()
        for turn in range(20):
            m = (thread + turn) % 5
            assert torch.equal(LAUNCH(given[m], *product.weight, *product.sizes), wanted[m])

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(launch, thread) for thread in range(6)]:
            done.result()
    assert len(kernels.launches) == 5 + 6 * 20


def test_activations_that_are_wrong_are_refused_for_a_shape_that_was_right(
    kernels: HostKernels,
) -> None:
    product = Product(8)
    LAUNCH(*product.arguments)
    for x in (product.x.float(), product.x.to(torch.bfloat16)):
        with pytest.raises(w4a16.ArgumentError, match="x is"):
            LAUNCH(x, *product.weight, *product.sizes)


@pytest.mark.parametrize("zeros", [0, 4096])
@pytest.mark.parametrize("bias", [0, 8192])
def test_a_prepared_launch_passes_what_a_launch_does(
    zeros: int, bias: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def contents(struct: Any) -> Any:
        return {name: getattr(struct, name) for name, _ in struct._fields_ if name != "problem"}

    def see(tactic: int, args: Any, stream: Any) -> int:
        block = args if isinstance(args, bytes) else ctypes.string_at(args, ctypes.sizeof(_Args))
        read = _Args.from_buffer_copy(block)
        stream = stream.value if isinstance(stream, ctypes.c_void_p) else stream
        seen.append((tactic, contents(read), contents(read.problem.contents), stream or 0))
        return 0

    monkeypatch.setattr(LIBRARY, "_run", see)
    monkeypatch.setattr(LIBRARY, "_quick_run", see)
    shape = (7, 2, 2**33, 24, 128, 64)
    for workspace, size in ((0, 0), (2**47 + 16, 2**35)):
        prepared = LIBRARY.prepared(*shape, 16, 32, zeros, bias, size)
        for stream in (0, 2**46, 0):
            weight = (16, 32, zeros or None, bias or None)
            overlaps = stream != 0
            LIBRARY.run(*shape, 64, *weight, 2**45, workspace or None, size, stream, overlaps)
            prepared(64, 2**45, workspace, stream, overlaps)
            assert seen[-1] == seen[-2]
            assert seen[-1][3] == stream


def test_a_prepared_launch_that_is_refused_says_why() -> None:
    with pytest.raises(w4a16.W4A16Error):
        LIBRARY.prepared(10**6, 2, 1, 8, 64, 64, 16, 16, 16, 0, 0)(16, 16, 0, 0, False)


def test_wrong_arguments_of_a_launch_are_explained_before_it(kernels: HostKernels) -> None:
    x, *rest = Product(8).arguments
    with pytest.raises(w4a16.ArgumentError, match=r"x is float32 \[3, 128\]"):
        LAUNCH(x.float(), *rest)
    assert not kernels.launches


def refusal_of(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except w4a16.ArgumentError as error:
        return str(error)
    return ""


def test_a_weight_that_was_checked_is_checked_again_when_anything_of_it_changed(
    kernels: HostKernels,
) -> None:
    x, packed, scales, zeros, columns, bias, k, n = Product(
        8, act_order="shuffled", bias=True
    ).arguments
    good = (scales, zeros, columns, bias, k, n)
    LAUNCH(x, packed, *good)
    changes = {
        0: [scales[:, :-8].contiguous(), scales.float(), scales.T],
        1: [zeros[:1], zeros.double()],
        2: [columns[:-1], columns.long()],
        3: [bias[:-1], bias.float()],
        4: [k - 1],
        5: [n - 1, n + 1],
    }
    for place, values in changes.items():
        for value in values:
            changed = list(good)
            changed[place] = value
            refusal = refusal_of(torch_ops._check, x, packed, *changed)
            assert refusal_of(LAUNCH, x, packed, *changed) == refusal
    before = len(kernels.launches)
    scales.data = scales.data[:, :-8].contiguous()
    with pytest.raises(w4a16.ArgumentError, match="scales is"):
        LAUNCH(x, packed, *good)
    assert len(kernels.launches) == before


def overlaps(kernels: HostKernels, *arguments: Any) -> bool:
    """Whether a launch with these arguments may overlap with the kernel before it."""
    LAUNCH(*arguments)
    return bool(kernels.launches[-1]["overlap"])


def test_launches_overlap_once_a_weight_was_launched_without_and_until_it_changes(
    kernels: HostKernels,
) -> None:
    product = Product(8)
    arguments = product.arguments
    packed, scales, zeros, *_ = product.weight
    assert [overlaps(kernels, *arguments) for _ in range(3)] == [False, True, True]
    for tensor in (packed, scales, zeros):
        tensor.add_(0)
        assert [overlaps(kernels, *arguments) for _ in range(2)] == [False, True]
    product.x.mul_(2)
    assert overlaps(kernels, *arguments), "activations are read after the wait"
    again = product.x, packed, scales.clone(), *arguments[3:]
    assert [overlaps(kernels, *again) for _ in range(2)] == [False, True]


def test_a_launch_that_is_captured_or_fails_or_has_no_rows_does_not_count_as_one_before(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product(8)

    def fails(*_: Any) -> None:
        raise w4a16.InternalError("no")

    with monkeypatch.context() as patch:
        patch.setattr(torch_ops, "_capturing", lambda: True)
        assert [overlaps(kernels, *product.arguments) for _ in range(2)] == [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "run", fails)
        with pytest.raises(w4a16.InternalError):
            LAUNCH(*product.arguments)
    LAUNCH(product.x[:0], *product.arguments[1:])
    assert [overlaps(kernels, *product.arguments) for _ in range(2)] == [False, True]
    with monkeypatch.context() as patch:
        patch.setattr(torch_ops, "_capturing", lambda: True)
        assert overlaps(kernels, *product.arguments), "it was launched before the capture"


def test_nothing_overlaps_where_that_is_off_or_torch_counts_no_changes(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "enabled", True)
    product = Product(8)
    w4a16.set_overlap(False)
    assert [overlaps(kernels, *product.arguments) for _ in range(2)] == [False, False]
    w4a16.set_overlap(True)
    assert [overlaps(kernels, *product.arguments) for _ in range(2)] == [False, True]
    with torch.inference_mode():
        weight = [None if tensor is None else tensor.clone() for tensor in product.weight]
        for _ in range(3):
            assert not overlaps(kernels, product.x, *weight, *product.sizes)


@pytest.mark.parametrize(
    ("given", "on"),
    [(None, True), ("", True), ("1", True), ("0", False), ("off", False), ("False", False)],
)
def test_the_environment_says_whether_launches_overlap(given: str | None, on: bool) -> None:
    code = "import w4a16.overlap; print(w4a16.overlap.enabled)"
    env = {name: value for name, value in os.environ.items() if name != overlap.ENVIRONMENT}
    more = {} if given is None else {overlap.ENVIRONMENT: given}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **more},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(on)


def test_overlap_is_switched_by_nothing_but_true_and_false() -> None:
    with pytest.raises(w4a16.ArgumentError, match="on is 'off'"):
        w4a16.set_overlap("off")  # type: ignore[arg-type]


def test_what_is_left_out_is_as_the_packed_weight_says() -> None:
    product = Product(8)
    x, packed, scales, zeros, *_ = product.arguments
    close(OPS.linear(x, packed, scales, zeros), product.exact(x))
    assert OPS.dequantize(packed, scales, zeros).shape == (product.case.k, product.case.n)


def test_a_launch_leaves_tensors_that_can_be_copied_and_saved(
    product: Product, kernels: HostKernels
) -> None:
    expected = LAUNCH(*product.arguments)
    file = io.BytesIO()
    torch.save(product.weight, file)
    file.seek(0)
    for arrays in (copy.deepcopy(product.weight), torch.load(file, weights_only=True)):
        assert not arrays[0].__dict__.get("_w4a16")
        assert torch.equal(LAUNCH(product.x, *arrays, *product.sizes), expected)


def test_a_weight_that_changed_since_its_last_launch_is_looked_at_again(
    kernels: HostKernels,
) -> None:
    product = Product(8, bias=True)
    names = ("packed", "scales", "zeros", "columns", "bias")
    for name, tensor in zip(names, product.weight, strict=True):
        if tensor is None:
            continue
        LAUNCH(*product.arguments)
        kept = tensor.data
        tensor.data = tensor.data.reshape(-1)[:-8].clone()
        with pytest.raises(w4a16.ArgumentError, match=name):
            LAUNCH(*product.arguments)
        tensor.data = kept
        LAUNCH(*product.arguments)
        # Another tensor in its place.
        place = names.index(name)
        weight = [*product.weight[:place], tensor.reshape(-1)[:8], *product.weight[place + 1 :]]
        with pytest.raises(w4a16.ArgumentError, match=name):
            LAUNCH(product.x, *weight, *product.sizes)


@pytest.mark.parametrize("tactic", [-2, len(w4a16.tactic_names()), 999])
def test_a_tactic_that_is_not_there_is_refused_on_a_cpu_too(tactic: int) -> None:
    with pytest.raises(w4a16.ArgumentError, match=f"tactic is {tactic}"):
        OPS.linear(*Product(8).arguments, tactic)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3), (1, 1, 4, 1)])
def test_outputs_of_launches_are_contiguous_in_any_number_of_dimensions(
    kernels: HostKernels, leading: tuple[int, ...]
) -> None:
    product = Product(8)
    x = torch.randn(*leading, product.case.k).half()
    found = LAUNCH(x, *product.weight, *product.sizes)
    expected = x.new_empty((*leading, product.case.n))
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
