"""Packing on a GPU makes the CPU's bytes, and the kernels multiply with exactly what was stored."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import w4a16
from hypothesis import HealthCheck, given, settings
from w4a16.errors import ArgumentError, FormatError, UnsupportedError, W4A16Warning
from w4a16.library import LIBRARY, Problem

from tests.runtime.checkpoints import FORMATS, Case, case_of, cases, weight

torch: Any = pytest.importorskip("torch", reason="these tests pack torch's tensors")

#: Any: arrays that may be None are looked at where they are known not to be.
api: Any = w4a16

many = settings(
    max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def with_arrays(case: Case, convert: Callable[[Any], Any], **options: Any) -> Any:
    """``pack`` of the case's arrays as another framework has them."""

    def converted(named: dict[str, Any]) -> dict[str, Any]:
        return {
            name: convert(value) if isinstance(value, np.ndarray) else value
            for name, value in named.items()
        }

    positional, named = case.arguments()
    return api.pack(*(converted(tensors) for tensors in positional), **converted(named), **options)


def on_gpu(array: Any) -> Any:
    return torch.from_numpy(array).cuda()


def in_numpy(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def check_same(packed: Any, case: Case, to_host: Callable[[Any], Any]) -> None:
    """The bytes that the CPU makes; that those are right is tested without a GPU."""
    wanted = with_arrays(case, lambda array: array)
    assert (packed.in_features, packed.out_features) == (case.k, case.n)
    assert packed.arrays().keys() == wanted.arrays().keys()
    for name, array in wanted.arrays().items():
        found = to_host(getattr(packed, name))
        assert found.dtype == array.dtype, name
        assert found.shape == array.shape, name
        assert found.tobytes() == array.tobytes(), name


def random_case(seed: int = 1, **options: Any) -> Case:
    chosen = {"format": "gptq", "k": 512, "n": 192, "group_size": 128, **options}
    return case_of(np.random.default_rng(seed), **chosen)


@many
@given(case=cases())
def test_torchs_tensors_on_a_gpu_make_the_cpus_bytes(case: Case) -> None:
    packed = with_arrays(case, on_gpu)
    for tensor in packed.arrays().values():
        assert tensor.is_cuda
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
    check_same(packed, case, in_numpy)


@many
@given(case=cases())
def test_cupys_arrays_make_the_cpus_bytes(case: Case) -> None:
    cupy: Any = pytest.importorskip("cupy")
    packed = with_arrays(case, cupy.asarray)
    for array in packed.arrays().values():
        assert isinstance(array, w4a16.DeviceArray)
    check_same(packed, case, lambda array: array.numpy())


@many
@given(case=cases())
def test_unpacking_on_a_gpu_gives_every_number_back(case: Case) -> None:
    packed = with_arrays(case, on_gpu)
    found = api.unpack(packed)
    assert found.q.is_cuda
    assert (in_numpy(found.q) == case.q).all()
    assert in_numpy(found.scales).tobytes() == case.scales.tobytes()
    if found.zeros is not None:
        assert (in_numpy(found.zeros) == case.points).all()
    if found.g_idx is not None:
        assert (in_numpy(found.g_idx) == case.g_idx).all()
    again = api.pack(
        q=found.q,
        scales=found.scales,
        zeros=found.zeros,
        g_idx=found.g_idx,
        bias=found.bias,
        group_size=found.group_size,
    )
    check_same(again, case, in_numpy)
    dequantised = api.dequantize(packed)
    assert dequantised.is_cuda
    assert (in_numpy(dequantised) == weight(case)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_the_package_are_unpacked_to_arrays_of_the_package(format: str) -> None:
    case = random_case(format=format, bias=True)
    packed = with_arrays(case, w4a16.DeviceArray.from_numpy)
    check_same(packed, case, lambda array: array.numpy())
    found = api.unpack(packed)
    assert isinstance(found.q, w4a16.DeviceArray)
    assert (found.q.numpy() == case.q).all()
    assert (api.dequantize(packed).numpy() == weight(case)).all()


@pytest.mark.parametrize("act_order", ["none", "shuffled"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_large_weight_makes_the_cpus_bytes(format: str, act_order: str) -> None:
    if format == "awq" and act_order != "none":
        pytest.skip("AWQ has no act-order")
    case = random_case(format=format, k=4096, n=2056, act_order=act_order)
    check_same(with_arrays(case, on_gpu), case, in_numpy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_zeros_and_bias_are_rounded_as_on_the_cpu(dtype: Any) -> None:
    generator = torch.Generator().manual_seed(8)

    def numbers(*shape: int) -> Any:
        exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 36 - 26
        return exponents.exp2().to(dtype)

    given = {
        "q": torch.randint(0, 16, (256, 512), generator=generator, dtype=torch.uint8),
        "scales": numbers(4, 512),
        "zeros": numbers(4, 512) % 16,
        "bias": numbers(512),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_host = api.pack(**given)
        packed = api.pack(**{name: tensor.cuda() for name, tensor in given.items()})
    for name, tensor in on_host.arrays().items():
        assert in_numpy(getattr(packed, name)).tobytes() == in_numpy(tensor).tobytes(), name
    assert torch.equal(api.dequantize(packed).cpu(), api.dequantize(on_host))


# ---- Devices and streams ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_weights_on_the_cpu_are_packed_for_a_gpu(format: str, device: int | str) -> None:
    case = random_case(format=format, bias=True)
    from_numpy = with_arrays(case, lambda array: array, device=device)
    assert isinstance(from_numpy.packed, w4a16.DeviceArray)
    check_same(from_numpy, case, lambda array: array.numpy())
    from_torch = with_arrays(case, torch.from_numpy, device=device)
    assert from_torch.packed.is_cuda
    check_same(from_torch, case, in_numpy)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_on_a_gpu_are_packed_for_the_cpu(format: str) -> None:
    case = random_case(format=format, bias=True)
    packed = with_arrays(case, on_gpu, device="cpu")
    assert not packed.packed.is_cuda
    check_same(packed, case, in_numpy)
    packed = with_arrays(case, w4a16.DeviceArray.from_numpy, device="cpu")
    assert isinstance(packed.packed, np.ndarray)
    check_same(packed, case, in_numpy)


def test_another_gpu_than_the_current_one_packs_its_own_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = random_case(act_order="shuffled")
    packed = with_arrays(case, lambda array: torch.from_numpy(array).to("cuda:1"))
    assert packed.packed.device.index == 1
    check_same(packed, case, in_numpy)
    assert torch.cuda.current_device() == 0
    packed = with_arrays(case, on_gpu, device="cuda:1")
    assert packed.packed.device.index == 1
    check_same(packed, case, in_numpy)


def test_devices_are_not_mixed() -> None:
    tensors = {name: on_gpu(array) for name, array in random_case().tensors().items()}
    tensors["scales"] = tensors["scales"].cpu()
    with pytest.raises(FormatError, match=r"scales is .* on cpu, but qweight is .* on cuda:0"):
        api.pack(tensors, format="gptq")


def late(array: Any) -> Any:
    """On the GPU, but only after the current stream has done something long."""
    there = torch.from_numpy(array)
    gone = torch.empty_like(there, device="cuda").fill_(0)
    source = there.pin_memory()
    torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
    gone.copy_(source, non_blocking=True)
    return gone


@pytest.mark.parametrize("format", FORMATS)
def test_packing_follows_the_current_stream(format: str) -> None:
    case = random_case(format=format, k=1024, n=1024, bias=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        packed = with_arrays(case, late)
        copies = {name: tensor.clone() for name, tensor in packed.arrays().items()}
    stream.synchronize()
    wanted = with_arrays(case, lambda array: array)
    for name, tensor in copies.items():
        assert in_numpy(tensor).tobytes() == getattr(wanted, name).tobytes(), name


@pytest.mark.parametrize("format", FORMATS)
def test_packing_on_a_given_stream_waits_for_the_tensors(format: str) -> None:
    case = random_case(format=format, k=1024, n=1024, bias=True)
    stream = torch.cuda.Stream()
    packed = with_arrays(case, late, stream=stream.cuda_stream)
    with torch.cuda.stream(stream):
        copies = {name: tensor.clone() for name, tensor in packed.arrays().items()}
    stream.synchronize()
    wanted = with_arrays(case, lambda array: array)
    for name, tensor in copies.items():
        assert in_numpy(tensor).tobytes() == getattr(wanted, name).tobytes(), name


@pytest.mark.parametrize("format", FORMATS)
def test_cupys_arrays_are_packed_on_the_stream_that_is_given(format: str) -> None:
    cupy: Any = pytest.importorskip("cupy")
    case = random_case(format=format, k=1024, n=1024)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        packed = with_arrays(case, cupy.asarray, stream=stream.ptr)
    del stream
    gc.collect()
    check_same(packed, case, lambda array: array.numpy())


# ---- Warnings and errors are the CPU's ----


def test_zero_points_of_the_other_version_are_noticed_on_a_gpu() -> None:
    case = random_case(format="gptq_v2", symmetric=True)
    with pytest.warns(W4A16Warning, match="read as v2"):
        packed = api.pack(
            {name: on_gpu(array) for name, array in case.tensors().items()}, format="gptq"
        )
    assert packed.zeros is None


def test_bad_numbers_are_noticed_on_a_gpu() -> None:
    q = torch.zeros(128, 16, dtype=torch.uint8, device="cuda")
    scales = torch.ones(2, 16, device="cuda")
    scales[1, 3] = 1e6
    with pytest.raises(FormatError, match=r"1 of 32 scales .* first in group 1 of output 3"):
        api.pack(q=q, scales=scales)
    scales[1, 3] = float("nan")
    with pytest.warns(W4A16Warning, match="are NaN or infinite, first in group 1 of output 3"):
        api.pack(q=q, scales=scales)
    scales[1, 3] = 0
    with pytest.warns(W4A16Warning, match="are 0, first in group 1 of output 3"):
        api.pack(q=q, scales=scales)
    q[77, 6] = 16
    with pytest.raises(ArgumentError, match=r"q holds 16 at \[77, 6\]: expected 0 to 15"):
        api.pack(q=q, scales=torch.ones(2, 16, device="cuda"))


def test_a_group_that_no_kernel_takes_is_refused_on_a_gpu_before_anything_is_launched() -> None:
    with pytest.raises(UnsupportedError, match=r"group size 16 .*: quantise the model again"):
        with_arrays(random_case(group_size=16), on_gpu)


# ---- Through the kernels ----


def product(tactic: int, packed: Any, a: Any) -> Any:
    """One launch into poisoned memory."""
    m = a.shape[0]
    problem = Problem(
        quant_op=packed.quant_op, m=m, n=packed.n, k=packed.k, group_size=packed.group_size
    )
    c = torch.full((m, packed.n), float("nan"), dtype=torch.float16, device="cuda")
    size = LIBRARY.workspace_size(tactic, problem)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    LIBRARY.run(
        tactic,
        packed.quant_op,
        m,
        packed.n,
        packed.k,
        packed.group_size,
        a.data_ptr(),
        packed.packed.data_ptr(),
        packed.scales.data_ptr(),
        None if packed.zeros is None else packed.zeros.data_ptr(),
        None,
        c.data_ptr(),
        workspace.data_ptr() if size else None,
        size,
        torch.cuda.current_stream().cuda_stream,
    )
    torch.cuda.synchronize()
    return c


def gathered_identity(packed: Any) -> Any:
    """Row i is 1 where packed rows multiply input i."""
    if packed.columns is None:
        return torch.eye(packed.k, dtype=torch.float16, device="cuda")
    a = torch.zeros(packed.in_features, packed.k, dtype=torch.float16, device="cuda")
    rows = (packed.columns >= 0).nonzero()[:, 0]
    a[packed.columns[rows].long(), rows] = 1
    return a


KINDS = [
    (format, symmetric, act_order)
    for format in FORMATS
    for symmetric in (True, False)
    for act_order in (("none",) if format == "awq" else ("none", "shuffled", "uneven"))
]


@pytest.mark.parametrize("group_size", [64, 128, 256, -1])
@pytest.mark.parametrize(("format", "symmetric", "act_order"), KINDS)
def test_identity_activations_return_the_dequantised_weight_exactly(
    format: str, symmetric: bool, act_order: str, group_size: int
) -> None:
    case = random_case(
        seed=group_size + 2,
        format=format,
        k=488,
        n=104,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
    )
    packed = with_arrays(case, on_gpu)
    a = gathered_identity(packed)
    wanted = api.dequantize(packed)
    assert (in_numpy(wanted) == weight(case)).all()
    gemms = [tactic for tactic in LIBRARY.tactics if tactic.kind == "gemm"]
    gemms = [tactic for tactic in gemms if packed.quant_op in tactic.quant_ops]
    assert gemms
    # A few of them: all are tested on packed weights elsewhere.
    for tactic in gemms[:: max(1, len(gemms) // 3)]:
        found = product(tactic.index, packed, a)[:, : packed.out_features]
        assert torch.equal(found, wanted), tactic.name
