"""`w4a16.linear` with arrays of other frameworks on a GPU: numbers, streams, graphs, memory."""

from __future__ import annotations

import gc
import os

# JAX would take most of the GPU's memory when it is first used.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import w4a16
from w4a16 import driver
from w4a16.arrays import DeviceArray
from w4a16.library import LIBRARY

from tests.gpu.runtime.products import KINDS, Product, torch

linear: Any = w4a16.linear


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest) -> Product:
    return Product(request.param)


def with_device_arrays(product: Product) -> Any:
    arrays: dict[str, Any] = {
        name: DeviceArray.from_numpy(array) for name, array in product.host.arrays().items()
    }
    return replace(product.host, **arrays)


def to_torch(array: Any) -> Any:
    return torch.from_dlpack(array)


def from_cupy(array: Any) -> Any:
    return pytest.importorskip("cupy").asarray(array)


def from_numba(array: Any) -> Any:
    return pytest.importorskip("numba.cuda").to_device(array)


def from_jax(array: Any) -> Any:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU backend")
    return jax.numpy.asarray(array)


FRAMEWORKS: dict[str, Callable[[Any], Any]] = {
    "DeviceArray": DeviceArray.from_numpy,
    "CuPy": from_cupy,
    "numba": from_numba,
    "JAX": from_jax,
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("m", [1, 40])
def test_arrays_of_any_framework_are_multiplied(product: Product, framework: str, m: int) -> None:
    x = product.x(2, m)
    found = linear(FRAMEWORKS[framework](x.cpu().numpy()), with_device_arrays(product))
    assert isinstance(found, DeviceArray)
    product.check(to_torch(found), x)


@pytest.mark.parametrize("framework", ["CuPy", "JAX"])
def test_the_weight_may_be_of_that_framework_too(product: Product, framework: str) -> None:
    convert = FRAMEWORKS[framework]
    arrays: dict[str, Any] = {name: convert(array) for name, array in product.host.arrays().items()}
    x = product.x(7)
    found = linear(convert(x.cpu().numpy()), replace(product.host, **arrays))
    product.check(to_torch(found), x)


def test_results_go_back_to_their_frameworks() -> None:
    product = Product("zeros and bias")
    packed, x = with_device_arrays(product), product.x(3)
    expected = linear(x, product.packed).cpu().numpy()
    cupy = pytest.importorskip("cupy")
    found = cupy.asarray(linear(cupy.asarray(x.cpu().numpy()), packed))
    np.testing.assert_array_equal(cupy.asnumpy(found), expected)
    array = linear(DeviceArray.from_numpy(x.cpu().numpy()), packed)
    np.testing.assert_array_equal(array.numpy(), expected)


def test_jax_takes_the_result() -> None:
    product = Product("zeros and bias")
    x = from_jax(product.x(3).cpu().numpy())
    jax = pytest.importorskip("jax")
    found = jax.dlpack.from_dlpack(linear(x, with_device_arrays(product)))
    product.check(torch.from_numpy(np.array(found)).cuda(), product.x(3))


def test_torchs_tensors_and_other_arrays_mix(product: Product) -> None:
    x = product.x(9)
    found = linear(x, with_device_arrays(product))
    assert isinstance(found, torch.Tensor)
    product.check(found, x)
    product.check(to_torch(linear(DeviceArray.from_numpy(x.cpu().numpy()), product.packed)), x)


def test_torchs_tensors_take_the_operator(product: Product) -> None:
    x = product.x(4, 5)
    found = linear(x, product.packed)
    assert torch.equal(found, torch.ops.w4a16.linear(x, *product.arguments))
    out = torch.full((4, 5, product.n), torch.nan, device="cuda", dtype=torch.float16)
    assert linear(x, product.packed, out=out) is out
    assert torch.equal(out, found)


def test_tactics_are_taken_by_name_and_index() -> None:
    product = Product()
    x = product.x(20)
    tactic = next(tactic for tactic in LIBRARY.tactics if tactic.kind == "gemm")
    for given in (tactic.name, tactic.index):
        product.check(linear(x, product.packed, tactic=given), x)
        product.check(to_torch(linear(to_cupy(x), product.packed, tactic=given)), x)


def to_cupy(x: Any) -> Any:
    return pytest.importorskip("cupy").from_dlpack(x.contiguous())


def test_rows_that_lie_apart_are_taken(product: Product) -> None:
    cupy = pytest.importorskip("cupy")
    wide = np.random.default_rng(1).standard_normal((2, 6, product.k + 24)).astype(np.float16)
    there, packed = cupy.asarray(wide), with_device_arrays(product)
    for start in (0, 5):
        part = slice(start, start + product.k)
        found = linear(there[..., part], packed)
        product.check(to_torch(found), torch.from_numpy(wide[..., part].copy()).cuda())
    with pytest.raises(w4a16.ArgumentError, match=r"x is .*strides.*contiguous"):
        linear(there[..., product.k - 1 :: -1], packed)


def test_no_rows_give_no_rows(product: Product) -> None:
    found = linear(DeviceArray((3, 0, product.k)), with_device_arrays(product))
    assert found.shape == (3, 0, product.n)


def test_the_stream_of_x_is_respected() -> None:
    """x is written after a long wait on a stream that nothing else waits for."""
    cupy = pytest.importorskip("cupy")
    product = Product("act-order")
    packed = with_device_arrays(product)
    values = product.x(16)
    source = cupy.asarray(values.cpu().numpy())
    x = cupy.asarray(np.full(source.shape, np.nan, np.float16))
    cupy.cuda.Device().synchronize()
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(50_000_000)
    with stream:
        x.data.copy_from_device_async(source.data, source.nbytes, stream)
        found = linear(x, packed)
    del stream
    gc.collect()
    product.check(torch.from_numpy(found.numpy()).cuda(), values)


def test_arrays_that_die_after_the_call_are_read_before_their_memory_is_reused() -> None:
    product = Product("act-order")
    values = product.x(64)
    host = values.cpu().numpy()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    found = linear(
        DeviceArray.from_numpy(host), with_device_arrays(product), stream=side.cuda_stream
    )
    others = [DeviceArray.from_numpy(np.full_like(host, np.nan)) for _ in range(20)]
    product.check(torch.from_numpy(found.numpy()).cuda(), values)
    del others


def test_in_a_capture_out_must_be_given(product: Product) -> None:
    packed = with_device_arrays(product)
    x = DeviceArray.from_numpy(product.x(20).cpu().numpy())
    with driver.use_device(0), driver.Stream.create() as stream:
        with (
            driver.capture(stream) as captured,
            pytest.raises(w4a16.DeviceError, match="captured: make the array before"),
        ):
            linear(x, packed, stream=stream.handle)
        captured.graph.close()


def test_a_stream_can_be_given(product: Product) -> None:
    values = product.x(16)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x = torch.full_like(values, torch.nan)
        torch.cuda._sleep(50_000_000)
        x.copy_(values)
    found = linear(x, product.packed, stream=side.cuda_stream)
    out = torch.empty(16, product.n, device="cuda", dtype=torch.float16)
    assert linear(x, product.packed, out=out, stream=side.cuda_stream) is out
    side.synchronize()
    product.check(found, values)
    product.check(out, values)


def test_calls_with_device_arrays_are_captured_and_replayed(product: Product) -> None:
    packed = with_device_arrays(product)
    with driver.use_device(0), driver.Stream.create() as stream:
        x = DeviceArray.from_numpy(product.x(20).cpu().numpy(), stream=stream.handle)
        out = DeviceArray((20, product.n), stream=stream.handle)
        with driver.capture(stream) as capture:
            linear(x, packed, out=out, stream=stream.handle)
        with capture.graph as graph:
            for seed in (5, 6):
                values = product.x(20, seed=seed)
                driver.copy_to_device(x.address, values.cpu().numpy(), stream)
                graph.launch(stream)
                stream.synchronize()
                product.check(torch.from_numpy(out.numpy()).cuda(), values)


def test_memory_of_temporaries_is_given_back() -> None:
    product = Product("padded", k=4000, n=4001)
    packed = with_device_arrays(product)
    x = DeviceArray.from_numpy(product.x(512).cpu().numpy())
    out = DeviceArray((512, 4001))

    def free() -> int:
        torch.cuda.synchronize()
        with driver.use_device(0):
            return driver.memory_info().free

    for _ in range(3):
        linear(x, packed, out=out)
    before = free()
    for _ in range(200):
        linear(x, packed, out=out)
    assert before - free() < 64 << 20


def test_arrays_on_another_device_are_refused() -> None:
    product = Product()
    with pytest.raises(w4a16.ArgumentError, match=r"on cpu, but packed .*cuda:0"):
        linear(product.x(2).cpu().numpy(), with_device_arrays(product))
    with pytest.raises(w4a16.ArgumentError, match=r"cuda:0, but packed .*cpu"):
        linear(DeviceArray.from_numpy(product.x(2).cpu().numpy()), product.host)
