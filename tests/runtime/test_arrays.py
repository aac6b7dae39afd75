"""What arrays of numpy, torch and the array protocols are seen as, and the package's own arrays, on
a stand-in for libcuda."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from w4a16 import arrays, driver
from w4a16.arrays import DeviceArray, View, empty, to_host, view
from w4a16.errors import ArgumentError, DeviceError

from tests.runtime.fake import FakeDriver, install


class Cuda:
    """Says that host memory is a GPU's, as ``__cuda_array_interface__``."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            "strides": None if array.flags.c_contiguous else array.strides,
            **changes,
        }
        for name, value in changes.items():
            if value is Cuda:
                del self.__cuda_array_interface__[name]


class Exporter:
    """Exports numpy's DLPack capsule, changed as a test wants it."""

    def __init__(
        self,
        array: Any,
        device: tuple[int, int] = (1, 0),
        versioned: bool = True,
        **changes: int,
    ) -> None:
        self.array = array
        self.device = device
        self.versioned = versioned
        self.changes = changes
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **arguments: Any) -> object:
        if not self.versioned and "max_version" in arguments:
            raise TypeError("unexpected argument max_version")
        self.asked.append(arguments)
        given = {"max_version": (1, 0)} if self.versioned else {}
        capsule = self.array.__dlpack__(**given)
        tensor, _ = arrays._tensor_of(capsule, "x")
        tensor.device_type, tensor.device_id = self.device
        for name, value in self.changes.items():
            setattr(tensor, name, value)
        return capsule


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address is memory of GPU 2."""
    monkeypatch.setattr(driver, "device_of", lambda address: 2)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = install(tmp_path, monkeypatch)
    yield made
    gc.collect()
    assert made.misuse == []


def elements(seen: View) -> list[float]:
    """Reads float32 elements one by one through address and strides."""
    found = []
    for index in np.ndindex(*seen.shape):
        offset = sum(i * stride for i, stride in zip(index, seen.strides, strict=True))
        found.append(ctypes.c_float.from_address(seen.address + 4 * offset).value)
    return found


# ---- numpy ----


def test_a_numpy_array_is_seen_as_it_lies() -> None:
    array = np.zeros((3, 8), np.float16)
    seen = view(array, "x")
    assert (seen.address, seen.shape, seen.strides) == (array.ctypes.data, (3, 8), (8, 1))
    assert (seen.dtype, seen.device, seen.framework) == ("float16", -1, "numpy")
    assert (seen.owner, seen.stream, seen.readonly) == (array, None, False)
    assert (seen.contiguous, seen.nbytes, seen.device_name) == (True, 48, "cpu")
    assert seen.describe() == "float16 [3, 8] on cpu"


@given(st.data())
def test_address_and_strides_reach_every_element_of_a_sliced_array(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    base = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    steps = data.draw(st.tuples(*(st.sampled_from([-2, -1, 1, 2]) for _ in shape)))
    array = base[tuple(slice(None, None, step) for step in steps)]
    array = array.transpose(data.draw(st.permutations(range(len(shape)))))
    for value in (array, Exporter(array), Exporter(array, versioned=False)):
        seen = view(value, "x")
        assert elements(seen) == array.ravel().tolist()
        assert seen.contiguous == array.flags.c_contiguous


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1, 1), (4, 1), (2, 3, 4)])
def test_contiguity_is_numpys(shape: tuple[int, ...]) -> None:
    for array in (np.zeros(shape, np.uint8), np.zeros(shape, np.uint8).T, np.zeros(shape, "i4")):
        seen = view(array, "x")
        assert seen.contiguous == array.flags.c_contiguous
        assert seen.nbytes == array.nbytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int8", "int32", "int64", "bool"])
def test_dtypes_have_numpys_names_and_sizes(dtype: str) -> None:
    array = np.zeros(3, dtype)
    assert view(array, "x").dtype == dtype
    assert view(array, "x").nbytes == array.nbytes
    assert view(Exporter(array), "x").dtype == dtype


def test_the_size_of_an_element_is_in_its_dtypes_name() -> None:
    sizes = {"bfloat16": 2, "float8_e4m3fn": 1, "complex64": 8, "bool": 1, "float64": 8}
    assert {name: arrays.itemsize(name) for name in sizes} == sizes


def test_a_read_only_array_is_an_input_but_no_output() -> None:
    array = np.zeros(4, np.float16)
    array.flags.writeable = False
    assert view(array, "x").readonly
    with pytest.raises(ArgumentError, match=r"out is a numpy\.ndarray that may not be written to"):
        view(array, "out", writable=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], r"x is a list: expected a numpy array, a torch tensor, or"),
        (1.5, "x is a float"),
        (None, "x is a NoneType"),
        (np.ndarray, "x is a type"),
        (np.zeros(2, ">f2"), "expected native numbers"),
        (np.zeros(2, object), "expected native numbers"),
        (np.zeros(2, [("a", "f4")]), "expected native numbers"),
        (np.ma.masked_array(np.zeros(2), mask=True), "masked array"),
        (np.zeros(4, [("a", "u1"), ("b", "<f2")])["b"], "expected multiples of the 2 bytes"),
    ],
    ids=["list", "float", "None", "class", "endian", "object", "fields", "mask", "odd-stride"],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(value: Any, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        view(value, "x")


def test_an_object_with_an_array_interface_is_read_in_place() -> None:
    class Other:
        def __init__(self) -> None:
            self.array = np.arange(6, dtype=np.float32).reshape(2, 3)
            self.__array_interface__ = self.array.__array_interface__

    other = Other()
    seen = view(other, "x")
    assert (seen.framework, seen.address) == ("other", other.array.ctypes.data)
    assert seen.owner is other


# ---- torch ----


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def test_a_torch_tensor_is_seen_as_it_lies(torch: Any) -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)[1:, ::2].T
    seen = view(tensor, "x")
    assert elements(seen) == tensor.reshape(-1).tolist()
    assert (seen.framework, seen.device, seen.stream) == ("torch", -1, None)
    assert seen.owner is tensor
    assert not seen.contiguous
    assert seen.describe() == "float32 [3, 3] on cpu, strides [2, 6]"


@pytest.mark.parametrize("name", ["float16", "bfloat16", "uint8", "int32", "float8_e4m3fn"])
def test_torchs_dtypes_have_numpys_names(torch: Any, name: str) -> None:
    seen = view(torch.zeros(4, dtype=getattr(torch, name)), "x")
    assert seen.dtype == name
    assert seen.nbytes == 4 * torch.empty(0, dtype=getattr(torch, name)).element_size()


def test_torch_tensors_without_plain_memory_are_refused(torch: Any) -> None:
    sparse = torch.eye(3).to_sparse()
    pending = torch._neg_view(torch.ones(3))
    for tensor, reason in (
        (torch.empty(3, device="meta"), "on meta: expected one on a CPU or a CUDA GPU"),
        (sparse, "expected a dense one"),
        (pending, r"x\.resolve_neg\(\)"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            view(tensor, "x")


def test_a_parameter_that_requires_a_gradient_is_seen(torch: Any) -> None:
    assert view(torch.nn.Parameter(torch.ones(2)), "x").shape == (2,)


def test_torch_is_not_imported_for_arrays_of_others() -> None:
    code = (
        "import sys, numpy as np; from w4a16 import arrays; arrays.view(np.zeros(3), 'x');"
        " assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(arrays.__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


# ---- __cuda_array_interface__ ----


@pytest.mark.usefixtures("on_gpu")
def test_a_cuda_array_interface_is_seen_with_its_stream() -> None:
    array = np.zeros((2, 8), np.float16)
    cuda = Cuda(array)
    seen = view(cuda, "x")
    assert (seen.address, seen.shape, seen.strides) == (array.ctypes.data, (2, 8), (8, 1))
    assert (seen.dtype, seen.device, seen.framework) == ("float16", 2, "other")
    assert seen.device_name == "cuda:2"
    assert (seen.owner, seen.stream) == (cuda, None)
    for stream, normal in ((1, 0), (2, 2), (0x7F00, 0x7F00), (None, None)):
        assert view(Cuda(array, stream=stream), "x").stream == normal


@pytest.mark.usefixtures("on_gpu")
def test_a_cuda_array_interface_of_version_2_needs_no_stream_and_no_strides() -> None:
    array = np.zeros((2, 8), np.float16)
    seen = view(Cuda(array, version=2, strides=Cuda), "x")
    assert (seen.strides, seen.stream) == ((8, 1), None)


@pytest.mark.usefixtures("on_gpu")
def test_strides_of_a_cuda_array_interface_are_bytes() -> None:
    array = np.zeros((4, 8), np.float16)[:, ::2]
    seen = view(Cuda(array), "x")
    assert seen.strides == (8, 2)
    assert not seen.contiguous


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask": np.zeros(2)}, "has a mask"),
        ({"version": 1}, "has version 1: expected 2 or later"),
        ({"stream": 0}, "stream 0, which is ambiguous"),
        ({"stream": "a"}, "cannot be read"),
        ({"typestr": ">f2"}, "has the type '>f2'"),
        ({"typestr": "|V2"}, "expected numbers"),
        ({"typestr": "nonsense"}, "cannot be read"),
        ({"strides": (3, 1)}, "expected multiples of the 2 bytes"),
        ({"strides": (2,)}, r"shape \[2, 8\] and strides"),
        ({"shape": (-1, 8)}, r"shape \[-1, 8\]"),
        ({"shape": None}, "cannot be read"),
        ({"data": Cuda}, "cannot be read"),
        ({"data": 7}, "cannot be read"),
    ],
    ids=str,
)
def test_a_malformed_cuda_array_interface_is_refused(changes: dict[str, Any], reason: str) -> None:
    cuda = Cuda(np.zeros((2, 8), np.float16), **changes)
    with pytest.raises(ArgumentError, match=reason) as caught:
        view(cuda, "weights")
    assert str(caught.value).startswith("weights ")


@pytest.mark.usefixtures("on_gpu")
def test_a_read_only_cuda_array_is_no_output() -> None:
    array = np.zeros(8, np.float16)
    cuda = Cuda(array, data=(array.ctypes.data, True))
    assert view(cuda, "x").readonly
    with pytest.raises(ArgumentError, match="may not be written to"):
        view(cuda, "out", writable=True)


def test_an_address_that_cuda_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device_of", lambda address: None)
    with pytest.raises(ArgumentError, match="which CUDA does not know"):
        view(Cuda(np.zeros(2)), "x")


def test_a_framework_that_raises_for_arrays_on_a_cpu_is_asked_for_dlpack() -> None:
    class Raises(Exporter):
        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("not on a GPU")

    assert view(Raises(np.zeros(3, np.float32)), "x").device == -1


# ---- DLPack ----


@pytest.mark.parametrize("versioned", [True, False])
def test_a_dlpack_array_on_a_gpu_is_asked_to_be_ready_on_the_stream(versioned: bool) -> None:
    array = np.zeros((2, 8), np.float16)
    for stream, asked, ready in ((None, 1, 0), (0, 1, 0), (1, 1, 0), (2, 2, 2), (0x70, 0x70, 0x70)):
        value = Exporter(array, (2, 3), versioned)
        seen = view(value, "x", stream=stream)
        assert value.asked[-1]["stream"] == asked
        assert (seen.stream, seen.device, seen.address) == (ready, 3, array.ctypes.data)


@pytest.mark.parametrize(("kind", "device"), [(1, -1), (3, -1), (2, 1), (13, 1)])
def test_pinned_memory_is_the_cpus_and_managed_memory_the_gpus(kind: int, device: int) -> None:
    seen = view(Exporter(np.zeros(4, np.float16), (kind, 1)), "x")
    assert seen.device == device
    assert (seen.stream is None) == (device < 0)


@pytest.mark.parametrize("kind", [4, 7, 8, 10, 14, 99])
def test_arrays_on_other_devices_are_refused_before_they_are_exported(kind: int) -> None:
    value = Exporter(np.zeros(4, np.float16), (kind, 0))
    with pytest.raises(ArgumentError, match="expected one on a CPU or a CUDA GPU"):
        view(value, "x")
    assert value.asked == []


def test_the_offset_of_a_dlpack_tensor_counts() -> None:
    array = np.arange(8, dtype=np.float32)
    assert elements(view(Exporter(array[:3], byte_offset=8), "x")) == [2, 3, 4]


def test_a_dlpack_tensor_without_strides_is_dense() -> None:
    array = np.zeros((3, 4), np.float32)
    value = Exporter(array)
    capsule = value.__dlpack__()
    tensor, _ = arrays._tensor_of(capsule, "x")
    tensor.strides = type(tensor.strides)()
    assert view(capsule, "x").strides == (4, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lanes": 2}, "2 lanes"),
        ({"bits": 4}, "with 4 bits"),
        ({"code": 3}, "type 3"),
        ({"device_type": 10}, "on ROCm"),
    ],
    ids=str,
)
def test_dlpack_types_that_are_no_plain_numbers_are_refused(
    changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        view(Exporter(np.zeros(4, np.float16), (1, 0), True, **changes), "x")


def test_bfloat16_has_a_name_though_numpy_has_no_such_type() -> None:
    assert view(Exporter(np.zeros(4, np.float16), code=4), "x").dtype == "bfloat16"


def test_an_unknown_major_version_of_dlpack_is_refused() -> None:
    capsule = np.zeros(4, np.float16).__dlpack__(max_version=(1, 0))
    tensor, _ = arrays._tensor_of(capsule, "x")
    offset = arrays._Versioned.tensor.offset
    managed = arrays._Versioned.from_address(ctypes.addressof(tensor) - offset)
    managed.major = 2
    with pytest.raises(ArgumentError, match=r"version 2\.\d+ of DLPack"):
        view(capsule, "x")
    managed.major = 1


def test_a_read_only_dlpack_array_is_no_output() -> None:
    array = np.zeros(4, np.float16)
    array.flags.writeable = False
    value = Exporter(array)
    assert view(value, "x").readonly
    with pytest.raises(ArgumentError, match="may not be written to"):
        view(value, "out", writable=True)


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError])
def test_an_array_that_refuses_export_is_refused_with_its_reason(error: type[Exception]) -> None:
    class Refuses(Exporter):
        def __dlpack__(self, **_: Any) -> object:
            raise error("it was donated")

    with pytest.raises(ArgumentError, match=r"x is a .*Refuses that cannot be exported: it was"):
        view(Refuses(np.zeros(2)), "x")


def test_a_consumed_capsule_is_refused() -> None:
    value = Exporter(np.zeros(4, np.float32))
    capsule = value.__dlpack__()

    class Gives:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **_: Any) -> object:
            return capsule

    np.from_dlpack(Gives())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="without a DLPack tensor, or one that was consumed"):
        view(capsule, "x")


@pytest.mark.parametrize("versioned", [True, False])
def test_a_view_keeps_the_memory_of_a_dlpack_array_and_gives_it_back(versioned: bool) -> None:
    array = np.zeros(1000, np.float32)
    idle = sys.getrefcount(array)
    seen = view(Exporter(array, versioned=versioned), "x")
    assert sys.getrefcount(array) > idle
    del seen
    gc.collect()
    assert sys.getrefcount(array) == idle


def test_a_view_of_a_torch_capsule_keeps_its_memory(torch: Any) -> None:
    capsule = torch.utils.dlpack.to_dlpack(torch.full((1000,), 7.0))
    seen = view(capsule, "x")
    del capsule
    gc.collect()
    torch.empty(1000).fill_(1)
    assert set(elements(seen)) == {7.0}


def test_what_a_view_names_as_its_owner_can_be_viewed_again() -> None:
    array = np.arange(4, dtype=np.float32)
    owner = view(Exporter(array), "x").owner
    assert view(owner, "x").address == array.ctypes.data
    assert np.array_equal(to_host(owner), array)


# ---- empty, to_host ----


def test_empty_is_of_the_same_framework(torch: Any) -> None:
    made = empty((2, 3), "float16", view(np.zeros(1), "x"))
    assert isinstance(made, np.ndarray)
    assert (made.shape, made.dtype) == ((2, 3), np.float16)
    tensor = empty((2, 3), "float16", view(torch.zeros(1), "x"))
    assert isinstance(tensor, torch.Tensor)
    assert (tuple(tensor.shape), tensor.dtype) == ((2, 3), torch.float16)


def test_to_host_leaves_what_is_there(torch: Any) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(to_host(array), array)
    tensor = torch.ones(3)
    assert to_host(tensor) is tensor
    assert np.array_equal(to_host(Exporter(array[:, ::-1])), array[:, ::-1])


# ---- DeviceArray, on the stand-in ----


def test_a_device_array_holds_what_numpy_gave(fake: FakeDriver) -> None:
    for array in (
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.array(5, np.int64),
        np.zeros((0, 3), np.float16),
    ):
        made = DeviceArray.from_numpy(array)
        assert (made.shape, made.dtype, made.ndim) == (array.shape, array.dtype, array.ndim)
        assert (made.size, made.nbytes) == (array.size, array.nbytes)
        assert np.array_equal(made.numpy(), array)
        assert np.array_equal(np.asarray(made), array)
        seen = view(made, "x")
        assert (seen.framework, seen.device, seen.stream) == ("device", 0, 0)
        assert (seen.owner, seen.contiguous) == (made, True)
        assert np.array_equal(to_host(made), array)
        assert np.array_equal(copy.deepcopy(made).numpy(), array)
        del made, seen
    assert fake.leaked == 0


def test_the_memory_of_a_device_array_is_freed_without_waiting(fake: FakeDriver) -> None:
    made = DeviceArray((3, 4), "float16")
    assert fake.leaked == 1
    fake.reset()
    del made
    assert "cuMemFreeAsync" in fake.calls
    assert not {"cuCtxSynchronize", "cuStreamSynchronize"} & set(fake.calls)
    assert (fake.leaked, fake.events) == (0, 0)


def test_without_memory_pools_plain_allocation_is_used(fake: FakeDriver) -> None:
    fake.has_pools(False)
    made = DeviceArray(8)
    assert "cuMemAlloc_v2" in fake.calls
    del made
    assert fake.calls[-1] == "cuMemFree_v2"
    assert fake.leaked == 0


def test_a_device_array_is_a_cuda_array_that_is_ready_on_the_default_stream(
    fake: FakeDriver,
) -> None:
    stream = fake.stream()
    made = DeviceArray((3, 4), "float16", stream=stream)
    written = fake.work(stream)
    made.record_stream(stream)
    assert not fake.comes_before(written, 0)
    interface = made.__cuda_array_interface__
    assert interface["data"] == (made.address, False)
    assert (interface["version"], interface["stream"]) == (3, 1)
    assert (interface["shape"], interface["typestr"]) == ((3, 4), "<f2")
    assert fake.comes_before(written, 0)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_a_device_array_exports_a_dlpack_tensor_that_keeps_it(
    fake: FakeDriver, max_version: tuple[int, int] | None, shape: tuple[int, ...]
) -> None:
    made = DeviceArray.from_numpy(np.ones(shape, np.float32))
    assert made.__dlpack_device__() == (2, 0)
    capsule = made.__dlpack__(max_version=max_version)
    address = made.address
    del made
    gc.collect()
    seen = view(capsule, "x")
    assert (seen.address, seen.shape, seen.dtype, seen.device) == (address, shape, "float32", 0)
    assert not seen.readonly
    if 0 not in shape:
        assert set(elements(seen)) == {1.0}
    del seen, capsule
    gc.collect()
    assert fake.leaked == 0


def test_a_consumer_of_the_capsule_gives_the_memory_back(fake: FakeDriver) -> None:
    class OnCpu:
        """Lies about the device, so that numpy takes it."""

        def __init__(self, array: DeviceArray) -> None:
            self.array = array

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **arguments: Any) -> object:
            capsule = self.array.__dlpack__(max_version=arguments.get("max_version"))
            tensor, _ = arrays._tensor_of(capsule, "x")
            tensor.device_type = 1
            return capsule

    taken = np.from_dlpack(OnCpu(DeviceArray.from_numpy(np.arange(5, dtype=np.float32))))  # type: ignore[arg-type]
    gc.collect()
    assert fake.leaked == 1
    assert taken.tolist() == [0, 1, 2, 3, 4]
    del taken
    gc.collect()
    assert fake.leaked == 0


@pytest.mark.usefixtures("fake")
def test_a_device_array_is_not_exported_to_another_device_or_as_a_copy() -> None:
    made = DeviceArray(3)
    for arguments in ({"dl_device": (1, 0)}, {"copy": True}):
        with pytest.raises(BufferError, match=r"copy it with numpy\(\)"):
            made.__dlpack__(**arguments)


def test_who_takes_a_device_array_waits_for_what_was_recorded(fake: FakeDriver) -> None:
    stream = fake.stream()
    made = DeviceArray(8, stream=stream)
    written = fake.work(stream)
    made.record_stream(stream)
    later = fake.work(stream)
    views, capsules = fake.stream(), fake.stream()
    takes: list[tuple[Callable[[], object], int]] = [
        (lambda: view(made, "x"), 0),
        (lambda: view(made, "x", stream=views), views),
        (lambda: made.__dlpack__(stream=None), 0),
        (lambda: made.__dlpack__(stream=2), 2),
        (lambda: made.__dlpack__(stream=capsules), capsules),
    ]
    for take, where in takes:
        take()
        assert fake.comes_before(written, where)
        assert not fake.comes_before(later, where)
    other = fake.stream()
    made.__dlpack__(stream=-1)
    assert not fake.comes_before(written, other)
    assert view(made, "x", stream=other).stream == other
    assert view(made, "x").stream == 0


def test_memory_is_used_by_others_once_it_is_allocated(fake: FakeDriver) -> None:
    stream, other = fake.stream(), fake.stream()
    before = fake.work(stream)
    made = DeviceArray(8, stream=stream)
    view(made, "out", stream=other, writable=True)
    assert fake.comes_before(before, other)


def test_what_numpy_gave_is_ready_everywhere(fake: FakeDriver) -> None:
    stream, other = fake.stream(), fake.stream()
    made = DeviceArray.from_numpy(np.arange(4), stream=stream)
    fake.reset()
    view(made, "x", stream=other)
    made.__dlpack__(stream=other)
    _ = made.__cuda_array_interface__
    assert fake.calls == []
    assert fake.events == 0


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("make", [DeviceArray, DeviceArray.from_numpy])
def test_a_device_array_outlives_the_stream_that_it_was_made_on(
    fake: FakeDriver, make: Any, blocking: bool
) -> None:
    stream = fake.stream(blocking=blocking)
    made = make(np.arange(4) if make == DeviceArray.from_numpy else 4, stream=stream)
    written = fake.work(stream)
    made.record_stream(stream)
    fake.destroy(stream)
    view(made, "x")
    view(made, "x", stream=fake.stream())
    assert made.__cuda_array_interface__["stream"] == 1
    made.__dlpack__(stream=None)
    assert made.numpy().shape == to_host(made).shape == (4,)
    copy.copy(made)
    del made
    gc.collect()
    assert fake.freed_after(written)
    assert (fake.misuse, fake.leaked, fake.events) == ([], 0, 0)


def test_a_view_and_what_is_made_like_it_outlive_the_stream(fake: FakeDriver) -> None:
    stream = fake.stream()
    seen = view(DeviceArray(4, stream=stream), "x")
    fake.destroy(stream)
    made = empty((4,), "float16", seen)
    assert made.numpy().shape == (4,)


def test_memory_is_freed_after_its_last_uses(fake: FakeDriver) -> None:
    """On any stream that was told of, on the default stream, and on all that wait for that one."""
    one, two, blocking = fake.stream(), fake.stream(), fake.stream(blocking=True)
    made = DeviceArray(8, stream=one)
    pieces = [fake.work(one)]
    made.record_stream(one)
    pieces.append(fake.work(two))
    made.record_stream(two)
    pieces += [fake.work(blocking), fake.work(2), fake.work(0)]
    unknown = fake.work(one)
    del made
    assert [fake.freed_after(piece) for piece in pieces] == [True] * 5
    assert not fake.freed_after(unknown)


def test_readers_do_not_wait_for_each_other_but_the_memory_waits_for_them(
    fake: FakeDriver,
) -> None:
    one, two = fake.stream(), fake.stream()
    made, result = DeviceArray(8), DeviceArray(8)
    seen, written = view(made, "x", stream=one), view(result, "out", stream=one, writable=True)
    read = fake.work(one)
    arrays.used(one, [seen], written)
    view(made, "x", stream=two)
    assert not fake.comes_before(read, two)
    view(result, "x", stream=two)
    assert fake.comes_before(read, two)
    fake.destroy(one)
    del made, seen
    assert fake.freed_after(read)


def test_arrays_of_no_elements_leave_nothing(fake: FakeDriver) -> None:
    made = DeviceArray((0, 3))
    made.record_stream(fake.stream())
    assert made.address == fake.events == fake.leaked == 0


def test_cuda_arrays_of_others_are_ordered_too(fake: FakeDriver) -> None:
    one, two = fake.stream(), fake.stream()
    value = Cuda(np.zeros(8, np.float16), stream=one)
    written = fake.work(one)
    assert view(value, "x", stream=two).stream == two
    assert fake.comes_before(written, two)
    fake.reset()
    view(value, "x", stream=one)
    view(Cuda(np.zeros(8), stream=1), "x", stream=0)
    view(Cuda(np.zeros(8), stream=None), "x", stream=one)
    assert fake.calls == []


def test_a_capture_does_not_wait_for_what_is_outside_and_nothing_is_freed_in_it(
    fake: FakeDriver,
) -> None:
    with driver.use_device(0), driver.Stream.create() as stream:
        outside, ends = DeviceArray(8), DeviceArray(8, stream=stream.handle)
        fake.reset()
        with driver.capture(stream) as captured:
            assert driver.is_capturing()
            seen = view(outside, "x", stream=stream.handle, writable=True)
            outside.record_stream(stream.handle)
            arrays.used(stream.handle, [seen], seen)
            with pytest.raises(DeviceError, match=r"captured: make the array before.*\(out=\)"):
                DeviceArray(8, stream=stream.handle)
            with pytest.raises(DeviceError, match="graph is being captured: copy"):
                driver.copy_to_host(np.zeros(8), outside.address, stream)
            del ends
            assert fake.calls == []
            assert fake.leaked == 2
        with captured.graph as graph:
            graph.launch(stream)
        kept = DeviceArray(1)
        assert fake.leaked == 2  # ``ends`` is freed
        del outside, seen, kept


@pytest.mark.parametrize("blocking", [False, True])
def test_captures_of_others_are_not_disturbed(fake: FakeDriver, blocking: bool) -> None:
    """The default stream must not be used while a blocking stream is captured."""
    stream, other = fake.stream(blocking=blocking), fake.stream()
    made, dies = DeviceArray(8), DeviceArray(8, stream=other)
    with fake.capturing(stream):
        for where in (None, stream, other):
            view(made, "x", stream=where)
        made.__dlpack__(stream=stream)
        _ = made.__cuda_array_interface__
        del dies
        assert fake.leaked == 1 + blocking
        if blocking:
            with pytest.raises(DeviceError, match="graph is being captured"):
                made.numpy()
    del made
    assert (fake.leaked, fake.events) == (0, 0)


def test_a_capture_that_fails_leaves_no_graph(fake: FakeDriver) -> None:
    with driver.use_device(0), driver.Stream.create() as stream:
        with pytest.raises(KeyError), driver.capture(stream) as captured:
            raise KeyError
        assert not driver.is_capturing()
        assert "cuGraphDestroy" in fake.calls
        with pytest.raises(DeviceError, match="after the with block"):
            _ = captured.graph


@pytest.mark.usefixtures("fake")
def test_arrays_move_to_the_gpu_and_back() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    made = DeviceArray.from_numpy(array)
    assert np.array_equal(to_host(made), array)
    for part in (array[:, ::2], array[::-1], array.T[::-1, ::-1], array[:0]):
        assert np.array_equal(to_host(Cuda(part)), part)
    assert isinstance(empty((4,), "float16", view(made, "x")), DeviceArray)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DeviceArray(3, "bfloat17"), "dtype is 'bfloat17'"),
        (lambda: DeviceArray(3, object), "expected numbers"),
        (lambda: DeviceArray((2, -1)), r"shape is \[2, -1\]"),
        (lambda: DeviceArray("ab"), "shape is 'ab'"),  # type: ignore[arg-type]
        (lambda: DeviceArray.from_numpy([1]), "array is a list"),  # type: ignore[arg-type]
        (lambda: DeviceArray.from_numpy(np.zeros(2, object)), "native numbers"),
    ],
)
def test_a_device_array_of_no_numbers_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        make()


# ---- The driver, on the stand-in and without one ----


def test_what_the_driver_says_of_a_device(fake: FakeDriver) -> None:
    assert fake.calls == []
    assert driver.driver_version() == 13000
    assert fake.calls == []  # cuInit
    assert driver.device_count() == 1
    assert driver.device_name(0) == "Fake H200"
    assert (driver.sm_count(0), driver.l2_bytes(0)) == (132, 60 << 20)
    assert driver.compute_capability(0) == (9, 0)
    assert driver.compute_mode(0) == "default"
    assert fake.calls == ["cuInit"]
    with pytest.raises(DeviceError, match=r"there is no device 3, but only device 0"):
        driver.device_name(3)


def test_a_device_is_current_within_the_block(fake: FakeDriver) -> None:
    assert driver.current_device() == 0
    with driver.use_device(0) as device:
        assert device == 0
        with driver.use_device(0):
            pass
        assert driver.memory_info() == (1 << 20, 1 << 30)
        address = driver.allocate(64, 0)
        driver.memset(address, 0x11, 64, 0)
        driver.copy(address, address + 32, 16, 0)
        host = np.zeros(64, np.uint8)
        driver.copy_to_host(host, address, 0)
        assert set(host.tolist()) == {0x11}
        driver.free(address, 0)
    with pytest.raises(DeviceError, match="make a device current"):
        driver.allocate(1, 0)
    assert fake.leaked == 0


@pytest.mark.usefixtures("fake")
def test_too_large_an_allocation_says_what_is_free() -> None:
    with (
        driver.use_device(0),
        pytest.raises(DeviceError, match=r"\d+ bytes were asked for, 1048576 of 1073741824 are"),
    ):
        driver.allocate(1 << 40, 0)


def test_a_driver_that_finds_no_gpu_says_what_to_look_at(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    fake.fail(100)
    with pytest.raises(DeviceError, match=r"CUDA_VISIBLE_DEVICES hides it \(it is '7'\)"):
        driver.device_count()
    assert driver.device_count() == 1  # tried again


@pytest.mark.usefixtures("fake")
def test_after_a_fork_the_driver_is_refused_and_nothing_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = DeviceArray(4)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_forked", True)
        with pytest.raises(DeviceError, match="'spawn'"):
            driver.device_count()
        with pytest.raises(DeviceError, match="'spawn'"):
            made.numpy()
        assert not driver.usable()


def test_a_default_stream_that_torch_cannot_ask_about_counts_as_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> bool:  # while a stream that the legacy one waits for is captured
        raise RuntimeError("operation would make the legacy stream depend on a capturing stream")

    cuda = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=refuse)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert driver.is_capturing()


def test_without_a_driver_the_first_use_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY_NAME", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr(driver, "_loaded", None)
    assert not driver.usable()
    assert not driver.is_capturing()
    for use in (
        driver.device_count,
        driver.driver_version,
        lambda: DeviceArray(3),
        lambda: view(Cuda(np.zeros(3)), "x"),
        lambda: DeviceArray.from_numpy(np.zeros(3)),
    ):
        with pytest.raises(DeviceError, match=r"there is no NVIDIA driver here: .*install one"):
            use()
