"""Packing for GPUs, on stand-ins for them: tensors and memory that are really the CPU's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from w4a16 import arrays, driver, packing, places
from w4a16.errors import ArgumentError, FormatError, W4A16Warning
from w4a16.formats.backends import Torch
from w4a16.library import LIBRARY, Source

from tests.runtime.checkpoints import FORMATS, Case, cases, weight
from tests.runtime.fake import FakeDriver, install
from tests.runtime.packings import api, check_packed, converted, pack, random_case

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class OnCpu(places.TorchGpu):
    """What is done with tensors on a GPU, done with tensors on the CPU; packing by the library's
    CPU functions."""

    def __init__(self, *_: Any) -> None:
        super().__init__(0, None)
        self.backend = backend = Torch(0)
        backend._device = "cpu"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    def take(self, view: Any) -> Any:
        return view.owner.detach()

    def give(self, array: Any) -> Any:
        return torch.from_numpy(array) if isinstance(array, np.ndarray) else array.contiguous()

    def pack(self, layer: Any, extent: Any, rows: Any, seen: Any) -> Any:
        if layer.source is Source.BYTES:  # a GPU takes the lower nibble
            seen.add("q", layer.q.owner)
            layer = replace(layer, q=arrays.view(layer.q.owner & 15, "q"))
        return places.Host(True, 0).pack(layer, extent, rows, seen)

    def unpack(self, packed: Any) -> Any:
        return torch.from_numpy(places.Host(True, 0).unpack(packed))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "place_of", OnCpu)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_tensors_on_a_gpu_are_computed_with_as_numpys_arrays(case: Case, on_cpu: None) -> None:
    positional, named = converted(case, torch.from_numpy)
    packed = api.pack(*positional, **named)
    numpys = {name: tensor.numpy() for name, tensor in packed.arrays().items()}
    check_packed(replace(packed, **numpys), case)
    found = api.unpack(packed)
    assert (found.q.numpy() == case.q).all()
    if found.zeros is not None:
        assert (found.zeros.numpy() == case.points).all()
    assert (api.dequantize(packed).numpy() == weight(case)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_on_a_gpu_are_rounded_as_numpys_arrays(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(8)

    def numbers(*shape: int) -> Any:
        exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 36 - 26
        return exponents.exp2().to(dtype)

    given = {
        "q": torch.randint(0, 16, (128, 512), generator=generator, dtype=torch.uint8),
        "scales": numbers(2, 512),
        "zeros": numbers(2, 512) % 16,
        "bias": numbers(512),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_host = api.pack(**given)
        monkeypatch.setattr(packing, "place_of", OnCpu)
        packed = api.pack(**given)
    for name, tensor in on_host.arrays().items():
        assert tensor.numpy().tobytes() == getattr(packed, name).numpy().tobytes(), name


@pytest.mark.parametrize("n", [8, 7])
def test_tensors_on_a_gpu_are_checked_as_numpys_arrays(n: int, on_cpu: None) -> None:
    scales = torch.ones(2, n)
    q = torch.zeros(128, n, dtype=torch.uint8)
    q[77, 6] = 16
    with pytest.raises(ArgumentError, match=r"q holds 16 at \[77, 6\]: expected 0 to 15"):
        api.pack(q=q, scales=scales)
    q[77, 6] = 15
    scales[1, 3] = 1e6
    with pytest.raises(FormatError, match=f"1 of {2 * n} scales .* first in group 1 of output 3"):
        api.pack(q=q, scales=scales)
    scales[1, 3] = np.nan
    with pytest.warns(W4A16Warning, match="are NaN or infinite, first in group 1 of output 3"):
        api.pack(q=q, scales=scales)


ORDERS = {
    "in order": np.arange(256) // 64,
    "any order": np.random.default_rng(3).permutation(256) // 64,
    "a group with too few": np.minimum(np.arange(250) // 60, 3),
    "all in group 0": np.zeros(256),
    "-1": np.full(256, -1),
    "a group that is not there": np.where(np.arange(256) == 7, 4, np.arange(256) // 64),
    "far away": np.where(np.arange(256) == 7, 2**40, np.arange(256) // 64),
    "negative": np.where(np.arange(256) == 7, -2, np.arange(256) // 64),
    "a group with too many": np.where(np.arange(256) == 70, 0, np.arange(256) // 64),
}


@pytest.mark.parametrize("name", ORDERS)
def test_tensors_on_a_gpu_are_sorted_as_numpys_arrays(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, errors and warnings; in order nothing is picked at run time."""
    rng = np.random.default_rng(4)
    order = ORDERS[name].astype(np.int64)
    q = rng.integers(0, 16, (len(order), 24), dtype=np.uint8)
    given = {"q": q, "scales": rng.random((4, 24), np.float32), "g_idx": order}
    tensors = {key: torch.from_numpy(value) for key, value in given.items()}

    def outcome(arguments: dict[str, Any]) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                packed = api.pack(**arguments, group_size=64)
            except FormatError as error:
                return str(error)
        found = {key: np.asarray(value) for key, value in packed.arrays().items()}
        parts = {key: (value.dtype, value.tobytes()) for key, value in found.items()}
        return parts, [str(warning.message) for warning in caught]

    wanted = outcome(given)
    monkeypatch.setattr(packing, "place_of", OnCpu)
    assert outcome(tensors) == wanted
    if name == "in order":
        assert "columns" not in wanted[0]


class Counted(TorchDispatchMode):
    """What torch is asked to do: kernels (anything but views and allocations), and what would wait
    for a GPU, or copy to it."""

    VIEWS = frozenset(
        (
            *("alias", "as_strided", "detach", "empty", "expand", "lift_fresh", "permute"),
            *("reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze"),
            *("view", "_unsafe_view", "_reshape_alias", "unbind"),
        )
    )
    WAITS = frozenset(("_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "nonzero"))

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.WAITS:
            self.waits.append(name)
        elif name not in self.VIEWS:
            self.kernels.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("act_order", ["none", "shuffled"])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_on_a_gpu_waits_once_and_launches_little(
    format: str, act_order: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if act_order != "none" and format == "awq":
        pytest.skip("AWQ has no act-order")
    read_backs = []
    extremes = Torch.extremes

    def counted(backend: Torch, wanted: Any) -> Any:
        read_backs.append(len(wanted))
        return extremes(backend, wanted)

    monkeypatch.setattr(Torch, "extremes", counted)
    case = random_case(format=format, act_order=act_order, symmetric=False)
    positional, named = converted(case, torch.from_numpy)
    api.pack(*positional, **named)  # constants are copied there once
    read_backs.clear()
    with Counted() as count:
        api.pack(*positional, **named)
    print(f"{format}, act-order {act_order}: {len(count.kernels)} operators: {count.kernels}")
    assert len(read_backs) == 1
    assert count.waits == []
    assert len(count.kernels) <= (18 if act_order == "none" else 36)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """GPU memory that is host memory, and packing there by the library's CPU function."""
    made = install(tmp_path, monkeypatch)

    def pack_device(*arguments: Any, stream: int, **named: Any) -> None:
        LIBRARY.pack(*arguments, **named)

    monkeypatch.setattr(LIBRARY, "pack_device", pack_device)
    yield made
    gc.collect()
    assert made.misuse == []


def as_numpy(packed: Any) -> Any:
    arrays_ = {name: array.numpy() for name, array in packed.arrays().items()}
    return replace(packed, **arrays_)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_gpu_arrays_of_other_frameworks_make_device_arrays(case: Case, gpu: FakeDriver) -> None:
    before = gpu.live
    positional, named = converted(case, w4a16.DeviceArray.from_numpy)
    packed = api.pack(*positional, **named)
    for array in packed.arrays().values():
        assert isinstance(array, w4a16.DeviceArray)
        assert array.address % 16 == 0
    check_packed(as_numpy(packed), case)
    found = api.unpack(packed)
    assert isinstance(found.q, w4a16.DeviceArray)
    assert (found.q.numpy() == case.q).all()
    assert (api.dequantize(packed).numpy() == weight(case)).all()
    del positional, named, packed, found, array
    assert gpu.live == before


@pytest.mark.parametrize("format", FORMATS)
def test_weights_move_to_a_gpu_and_back(format: str, gpu: FakeDriver) -> None:
    case = random_case(format=format, k=328, n=40, bias=True)
    for device in ("cuda", "cuda:0", 0):
        packed = pack(case, device=device)
        assert isinstance(packed.packed, w4a16.DeviceArray)
        check_packed(as_numpy(packed), case)
    positional, named = converted(case, w4a16.DeviceArray.from_numpy)
    packed = api.pack(*positional, **named, device="cpu")
    assert isinstance(packed.packed, np.ndarray)
    check_packed(packed, case)
    del positional, named


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_are_packed_on_the_stream_that_is_given(
    format: str, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(format=format)
    stream = gpu.stream()
    pieces = []
    pack_device = LIBRARY.pack_device

    def counted(*arguments: Any, **named: Any) -> None:
        pack_device(*arguments, **named)
        pieces.append(gpu.work(named["stream"]))

    def copy_to_device(address: int, array: Any, _: int) -> None:
        """Without waiting for the stream."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    monkeypatch.setattr(LIBRARY, "pack_device", counted)
    monkeypatch.setattr(driver, "copy_to_device", copy_to_device)
    positional, named = converted(case, w4a16.DeviceArray.from_numpy)
    packed = api.pack(*positional, **named, stream=stream)
    assert not gpu.comes_before(pieces[0], 0)
    gpu.destroy(stream)
    del positional, named
    gc.collect()
    assert gpu.freed_after(pieces[0])
    check_packed(as_numpy(packed), case)
    assert gpu.comes_before(pieces[0], 0)


def test_devices_are_not_mixed(gpu: FakeDriver) -> None:
    tensors = random_case().tensors()
    tensors["scales"] = w4a16.DeviceArray.from_numpy(tensors["scales"])
    with pytest.raises(FormatError, match=r"scales is .* on cuda:0, but qweight is .* on cpu"):
        api.pack(tensors, format="gptq")
