"""Arrays of torch, CuPy, JAX and numba on a GPU, to and from the package's own."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
from w4a16 import arrays, driver
from w4a16.arrays import DeviceArray, empty, to_host, view
from w4a16.errors import ArgumentError, DeviceError

from ..reference import torch

DEVICE = 0
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def cupy() -> Any:
    """CuPy on the first device: others, JAX for one, may have left another current."""
    found = pytest.importorskip("cupy", exc_type=ImportError)
    found.cuda.Device(0).use()
    return found


@pytest.fixture
def jax() -> Any:
    """JAX with a GPU; without taking most of its memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = pytest.importorskip("jax", exc_type=ImportError)
    try:
        found.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {error}")
    return found


@pytest.fixture
def numba() -> Any:
    pytest.importorskip("numba", exc_type=ImportError)
    cuda = pytest.importorskip("numba.cuda", exc_type=ImportError)
    try:
        available = cuda.is_available()
    except Exception as error:
        pytest.skip(f"numba.cuda does not work here: {error}")
    if not available:
        pytest.skip("numba sees no GPU")
    return cuda


def check_view(value: Any, expected: Any, framework: str) -> None:
    """That address, shape and strides of a view lead to the right numbers."""
    seen = view(value, "x")
    assert (seen.shape, seen.device, seen.framework) == (expected.shape, DEVICE, framework)
    assert seen.dtype == expected.dtype.name
    if expected.size:  # of nothing, frameworks disagree on the strides
        strides = tuple(stride // expected.itemsize for stride in expected.strides)
        assert seen.strides == strides
    assert seen.contiguous == expected.flags.c_contiguous
    found = to_host(value)
    found = found.numpy() if framework == "torch" else found
    assert np.array_equal(found, expected)


# ---- torch ----


def test_a_torch_tensor_is_seen_with_its_current_stream() -> None:
    tensor = torch.from_numpy(VALUES).cuda()
    check_view(tensor, VALUES, "torch")
    seen = view(tensor, "x")
    assert seen.address == tensor.data_ptr()
    assert seen.stream == torch.cuda.current_stream().cuda_stream == 0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert view(tensor, "x").stream == stream.cuda_stream
    assert view(tensor.T, "x").strides == (1, 6)
    assert view(tensor.bfloat16(), "x").dtype == "bfloat16"


def test_work_on_another_stream_waits_for_torchs() -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    large = torch.ones(1 << 27, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        for _ in range(20):
            large.mul_(2).mul_(0.5)
        large.fill_(5)
        assert view(large, "x", stream=two.cuda_stream).stream == two.cuda_stream
    with torch.cuda.stream(two):
        last = large[-4:].clone()
    two.synchronize()
    assert last.tolist() == [5.0] * 4
    torch.cuda.synchronize()


def test_empty_is_a_tensor_for_tensors_and_a_device_array_for_others() -> None:
    made = empty((2, 3), "float16", view(torch.zeros(1, device="cuda"), "x"))
    assert isinstance(made, torch.Tensor)
    assert (made.dtype, tuple(made.shape), made.device.index) == (torch.float16, (2, 3), DEVICE)
    made = empty((2, 3), "float16", view(DeviceArray(1), "x"))
    assert isinstance(made, DeviceArray)
    assert (made.shape, made.dtype.name, made.device) == ((2, 3), "float16", DEVICE)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int32", "int64", "bool"])
def test_torch_takes_a_device_array_without_a_copy_and_keeps_it(dtype: str) -> None:
    expected = (np.random.default_rng(1).random((5, 7)) * 100).astype(dtype)
    array = DeviceArray.from_numpy(expected)
    tensor = torch.from_dlpack(array)
    address = array.address
    assert (tensor.data_ptr(), tensor.device.index) == (address, DEVICE)
    del array
    gc.collect()
    others = [DeviceArray.from_numpy(np.zeros((5, 7), dtype)) for _ in range(4)]
    assert address not in [other.address for other in others]
    assert np.array_equal(tensor.cpu().numpy(), expected)
    by_interface = torch.as_tensor(DeviceArray.from_numpy(expected), device="cuda")
    assert np.array_equal(by_interface.cpu().numpy(), expected)


def test_memory_comes_back_when_the_consumer_lets_go() -> None:
    with driver.use_device(DEVICE):
        before = driver.memory_info().free
        for _ in range(20):
            tensor = torch.from_dlpack(DeviceArray(256 << 20, "uint8"))
            tensor.fill_(1)
            del tensor
            gc.collect()
        torch.cuda.synchronize()
        kept = driver.POOL_BYTES + (600 << 20)
        assert driver.memory_info().free > before - kept


def test_torch_on_another_stream_waits_for_the_array() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as own:
        size = 1 << 28
        array = DeviceArray(size, "uint8", stream=own.handle)
        for value in range(20):
            driver.memset(array.address, value, size, own)
        array.record_stream(own.handle)
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            tensor = torch.from_dlpack(array)
            last = tensor[-8:].clone()
            torch.cuda.current_stream().synchronize()
        assert last.tolist() == [19] * 8
        assert torch.from_dlpack(array)[-8:].tolist() == [19] * 8
        del tensor
    assert array.numpy()[-8:].tolist() == [19] * 8  # its stream is gone


def test_a_device_array_in_torchs_graph_capture_is_no_obstacle() -> None:
    packed = DeviceArray.from_numpy(VALUES)
    waits = DeviceArray.from_numpy(VALUES)
    tensor = torch.from_dlpack(packed)
    result = torch.zeros_like(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        seen = view(packed, "x", stream=stream.cuda_stream)
        assert seen.stream == stream.cuda_stream
        result.copy_(tensor * 2)
        del waits
        gc.collect()
    graph.replay()
    torch.cuda.synchronize()
    assert np.array_equal(result.cpu().numpy(), VALUES * 2)


# ---- CuPy ----


def test_cupy_arrays_are_seen_and_take_device_arrays(cupy: Any) -> None:
    array = cupy.asarray(VALUES)
    check_view(array, VALUES, "other")
    check_view(array[:, ::2], VALUES[:, ::2], "other")
    check_view(array[::-1].T, VALUES[::-1].T, "other")
    check_view(cupy.zeros((0, 3), cupy.float16), np.zeros((0, 3), np.float16), "other")
    made = DeviceArray.from_numpy(VALUES)
    for taken in (cupy.asarray(made), cupy.from_dlpack(made)):
        assert taken.data.ptr == made.address
        assert np.array_equal(cupy.asnumpy(taken), VALUES)
    assert not view(array, "out", writable=True).readonly
    assert isinstance(empty((3,), "float16", view(array, "x")), DeviceArray)


@pytest.mark.parametrize("non_blocking", [True, False])
@pytest.mark.parametrize("consumer", ["none", "numpy", "view", "torch", "cupy", "jax", "numba"])
def test_a_stream_may_be_destroyed_before_the_arrays_made_on_it(
    cupy: Any, request: pytest.FixtureRequest, consumer: str, non_blocking: bool
) -> None:
    """Each consumer also sees what was put on the stream last."""
    size = 1 << 27
    framework: Any = request.getfixturevalue(consumer) if consumer in ("jax", "numba") else None
    with cupy.cuda.Device(DEVICE):  # JAX may have left another one current
        stream = cupy.cuda.Stream(non_blocking=non_blocking)
    array = DeviceArray(size, "uint8", stream=stream.ptr)
    unused = DeviceArray(3, stream=stream.ptr)
    copied = DeviceArray.from_numpy(VALUES, stream=stream.ptr)
    with driver.use_device(DEVICE):
        for value in range(20):
            driver.memset(array.address, value, size, stream.ptr)
    array.record_stream(stream.ptr)
    del stream
    gc.collect()
    found: Any
    if consumer == "numpy":
        found = array.numpy()[-8:]
    elif consumer == "view":
        assert view(array, "x").stream == 0
        found = to_host(array)[-8:]
    elif consumer == "torch":
        with torch.cuda.stream(torch.cuda.Stream()):
            found = torch.from_dlpack(array)[-8:].cpu().numpy()
    elif consumer == "cupy":
        with cupy.cuda.Stream(non_blocking=True):
            taken = cupy.asarray(array) if non_blocking else cupy.from_dlpack(array)
            found = cupy.asnumpy(taken[-8:])
        del taken
    elif consumer == "jax":
        found = np.asarray(framework.dlpack.from_dlpack(array)[-8:])
    elif consumer == "numba":
        found = framework.as_cuda_array(array)[-8:].copy_to_host()
    else:
        found = np.full(8, 19)
    assert found.tolist() == [19] * 8
    assert np.array_equal(copied.numpy(), VALUES)
    del array, unused, copied
    gc.collect()
    torch.cuda.synchronize()
    assert not arrays._dead


def test_memory_is_not_given_to_others_before_work_on_it_is_done(cupy: Any) -> None:
    size = 1 << 26
    with driver.use_device(DEVICE), driver.Stream.create() as third:
        for non_blocking in (True, False):
            stream = cupy.cuda.Stream(non_blocking=non_blocking)
            array = DeviceArray(size, "uint8", stream=stream.ptr)
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                torch.cuda._sleep(50_000_000)
            driver.memset(array.address, 7, size, stream.ptr)
            if non_blocking:
                array.record_stream(stream.ptr)
            del array
            others = [DeviceArray(size, "uint8", stream=third.handle) for _ in range(3)]
            for other in others:
                driver.memset(other.address, 1, size, third)
                other.record_stream(third.handle)
            stream.synchronize()
            assert all((other.numpy() == 1).all() for other in others)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_arrays_do_not_disturb_captures_of_cupy(cupy: Any, non_blocking: bool) -> None:
    stream = cupy.cuda.Stream(non_blocking=non_blocking)
    side = cupy.cuda.Stream(non_blocking=True)
    array, dies = DeviceArray(8, stream=side.ptr), DeviceArray(8, stream=side.ptr)
    with stream:
        value = cupy.zeros(8, cupy.float32)
        value += 1  # loads the kernel
        stream.synchronize()
        stream.begin_capture()
        view(array, "x")
        view(array, "x", stream=stream.ptr)
        _ = array.__cuda_array_interface__
        array.__dlpack__(stream=stream.ptr)
        array.record_stream(stream.ptr)
        del dies
        gc.collect()
        with pytest.raises(DeviceError, match="make the array before"):
            DeviceArray(8, stream=stream.ptr)
        value += 1
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        assert cupy.asnumpy(value).tolist() == [2.0] * 8
    DeviceArray(1)
    assert not arrays._dead


def test_cupys_current_stream_is_the_arrays(cupy: Any) -> None:
    array = cupy.zeros(8, cupy.float16)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        assert view(array, "x").stream == stream.ptr
        made = DeviceArray(8, stream=stream.ptr)
        assert cupy.asarray(made).data.ptr == made.address
        stream.synchronize()
        del made
    assert view(array, "x").stream == 0


# ---- JAX ----


def test_jax_arrays_are_inputs_and_never_outputs(jax: Any) -> None:
    array = jax.device_put(VALUES, jax.devices("gpu")[0])
    check_view(array, VALUES, "other")
    seen = view(array, "x")
    assert seen.readonly
    assert seen.stream == 0
    with pytest.raises(ArgumentError, match=r"out is a jax.* that may not be written to"):
        view(array, "out", writable=True)
    half = array.astype(jax.numpy.bfloat16)
    assert view(half, "x").dtype == "bfloat16"
    host = jax.device_put(VALUES, jax.devices("cpu")[0])
    assert view(host, "x").device == -1
    assert np.array_equal(to_host(host), VALUES)


def test_jax_takes_a_device_array(jax: Any) -> None:
    made = DeviceArray.from_numpy(VALUES)
    taken = jax.dlpack.from_dlpack(made)
    assert np.array_equal(np.asarray(taken + 1), VALUES + 1)
    del made
    gc.collect()
    assert np.array_equal(np.asarray(taken), VALUES)


def test_a_traced_jax_array_is_refused(jax: Any) -> None:
    def traced(x: Any) -> Any:
        view(x, "x")
        return x

    with pytest.raises(ArgumentError, match="x is a jax"):
        jax.jit(traced)(jax.numpy.zeros(3))


# ---- numba ----


def test_numba_arrays_are_seen_and_take_device_arrays(numba: Any) -> None:
    array = numba.to_device(VALUES)
    check_view(array, VALUES, "other")
    stream = numba.stream()
    bound = numba.to_device(VALUES, stream=stream)
    stream.synchronize()
    assert np.array_equal(to_host(bound), VALUES)
    handle = stream.handle  # a ctypes object or the driver package's, by version
    made = DeviceArray.from_numpy(VALUES, stream=int(getattr(handle, "value", handle)))
    del bound, stream, handle
    gc.collect()
    taken = numba.as_cuda_array(made)
    assert np.array_equal(taken.copy_to_host(), VALUES)


# ---- The package's own ----


def test_arrays_go_to_the_gpu_and_back_with_their_bits() -> None:
    random = np.random.default_rng(3)
    for dtype in ("float16", "uint8", "int32", "int64", "float64"):
        for shape in ((), (1,), (0, 4), (3, 5, 7), (1000, 1001)):
            expected = np.asarray(random.random(shape) * 200).astype(dtype)
            made = DeviceArray.from_numpy(expected, DEVICE)
            assert driver.device_of(made.address) == DEVICE or not made.size
            assert np.array_equal(made.numpy(), expected)
            assert np.array_equal(to_host(made), expected)
    assert to_host(torch.from_numpy(VALUES).to(DEVICE)).device.type == "cpu"


def test_an_address_that_was_freed_or_never_was_is_refused() -> None:
    class Bad:
        def __init__(self) -> None:
            self.__cuda_array_interface__ = {
                "shape": (4,),
                "typestr": "<f2",
                "data": (VALUES.ctypes.data, False),
                "version": 3,
            }

    with pytest.raises(ArgumentError, match="which CUDA does not know"):
        view(Bad(), "x")


def test_pinned_memory_of_torch_is_the_cpus() -> None:
    tensor = torch.zeros(8).pin_memory()
    assert view(tensor, "x").device == -1
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    assert view(capsule, "x").device == -1


def test_capsules_of_torch_are_read_and_given_back() -> None:
    tensor = torch.full((1 << 20,), 3.0, device="cuda")
    before = torch.cuda.memory_allocated()
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    seen = view(capsule, "x")
    assert (seen.device, seen.address, seen.stream) == (DEVICE, tensor.data_ptr(), 0)
    del tensor, capsule
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert set(to_host(seen.owner)[:10].tolist()) == {3.0}
    del seen
    gc.collect()
    assert torch.cuda.memory_allocated() < before


def test_arrays_that_die_while_nothing_else_does_free_all_their_memory() -> None:
    with driver.use_device(DEVICE):
        DeviceArray(1)
        driver.synchronize()
        before = driver.memory_info().free
        for turn in range(50):
            array = DeviceArray(200 << 20, "uint8")
            other = torch.cuda.Stream().cuda_stream
            if turn % 2:
                view(array, "x", stream=other)
            del array
        driver.synchronize()
        assert not arrays._dead
        assert driver.memory_info().free > before - driver.POOL_BYTES - (300 << 20)
