"""`w4a16.linear` on a CPU: the reference, its arguments, and what it says of wrong ones."""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from hypothesis import given, settings
from hypothesis import strategies as st
from w4a16 import driver
from w4a16.arrays import DeviceArray, View
from w4a16.library import LIBRARY

from tests.runtime.checkpoints import Case, case_of, cases, weight
from tests.runtime.fake import FakeDriver, install
from tests.runtime.host_kernels import HostKernels

linear = w4a16.linear
linear_module: Any = sys.modules["w4a16.linear"]
RNG = np.random.default_rng(5)


def exact(x: Any, case: Case, bias: Any = None) -> Any:
    """float64, not rounded."""
    product = x.astype(np.float64) @ weight(case).astype(np.float64)
    bias = case.bias if bias is None else bias
    return product if bias is None else product + bias.astype(np.float64)


def packed_of(case: Case) -> w4a16.PackedWeight:
    positional, named = case.arguments()
    return w4a16.pack(*positional, **named)


def relative_error(found: Any, expected: Any) -> float:
    wrong = np.linalg.norm(found.astype(np.float64) - expected)
    return float(wrong / np.linalg.norm(expected)) if wrong else 0.0


@pytest.fixture
def small() -> tuple[Case, w4a16.PackedWeight]:
    """Act-order, padded inputs and outputs, bias."""
    case = case_of(
        np.random.default_rng(7),
        format="gptq",
        k=200,
        n=45,
        group_size=64,
        act_order="uneven",
        bias=True,
    )
    return case, packed_of(case)


@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32 - 1))
def test_the_product_is_that_of_the_checkpoints_weight(
    case: Case, leading: list[int], seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((*leading, case.k)).astype(np.float16)
    found = linear(x, packed_of(case))
    assert found.shape == (*leading, case.n)
    assert found.dtype == np.float16
    if found.size:
        assert relative_error(found, exact(x, case)) < 1e-3


def test_a_bias_stands_in_for_the_packed_one(small: tuple[Case, Any]) -> None:
    case, packed = small
    x = RNG.standard_normal((3, case.k)).astype(np.float16)
    bias = RNG.standard_normal(case.n).astype(np.float16)
    assert relative_error(linear(x, packed, bias), exact(x, case, bias)) < 1e-3
    padded = np.zeros(packed.n, np.float16)
    padded[: case.n] = bias
    np.testing.assert_array_equal(linear(x, packed, padded), linear(x, packed, bias))


def test_out_receives_the_result(small: tuple[Case, Any]) -> None:
    case, packed = small
    x = RNG.standard_normal((2, 3, case.k)).astype(np.float16)
    out = np.full((2, 3, case.n), np.nan, np.float16)
    assert linear(x, packed, out=out) is out
    np.testing.assert_array_equal(out, linear(x, packed))


def test_no_rows_give_no_rows(small: tuple[Case, Any]) -> None:
    case, packed = small
    assert linear(np.zeros((4, 0, case.k), np.float16), packed).shape == (4, 0, case.n)


def test_strides_of_x_do_not_matter(small: tuple[Case, Any]) -> None:
    case, packed = small
    x = RNG.standard_normal((case.k, 6)).astype(np.float16).T
    np.testing.assert_array_equal(linear(x, packed), linear(np.ascontiguousarray(x), packed))


def test_too_large_results_are_infinite_and_nothing_is_said(small: tuple[Case, Any]) -> None:
    case, packed = small
    large = replace(packed, scales=np.full_like(packed.scales, 6000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = linear(np.full((1, case.k), 6e4, np.float16), large)
    assert np.isinf(found).any()


def test_torch_tensors_on_a_cpu_give_torch_tensors(small: tuple[Case, Any]) -> None:
    case, packed = small
    tensors = replace(
        packed, **{name: torch.from_numpy(array) for name, array in packed.arrays().items()}
    )
    x = RNG.standard_normal((3, case.k)).astype(np.float16)
    found = linear(torch.from_numpy(x), tensors)
    assert isinstance(found, torch.Tensor)
    assert relative_error(found.numpy(), exact(x, case)) < 1e-3
    # A weight of numpy's, activations of torch's: the result is where the activations are.
    mixed = linear(torch.from_numpy(x), packed)
    assert isinstance(mixed, torch.Tensor)
    np.testing.assert_array_equal(mixed.numpy(), found.numpy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((1, 200), np.float32)}, ("x is float32 [1, 200]", "float16")),
        ({"x": np.zeros((1, 201), np.float16)}, ("x is float16 [1, 201]", "[..., 200]")),
        ({"x": np.float16(1)}, ("x is",)),
        ({"x": [[1.0]]}, ("x is a list", "numpy array")),
        ({"bias": np.zeros(44, np.float16)}, ("bias is float16 [44]", "[45]")),
        ({"bias": np.zeros(45, np.float32)}, ("bias is float32 [45]", "float16")),
        ({"out": np.zeros((1, 44), np.float16)}, ("out is float16 [1, 44]", "[1, 45]")),
        ({"out": np.zeros((1, 90), np.float16)[:, ::2]}, ("out is", "contiguous")),
        ({"tactic": "fastest"}, ("tactic is 'fastest'", "sm90:")),
        ({"tactic": 10**6}, ("tactic is 1000000",)),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(
    small: tuple[Case, Any], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    case, packed = small
    arguments: dict[str, Any] = {"x": np.zeros((1, case.k), np.float16), **change}
    with pytest.raises(w4a16.ArgumentError) as error:
        linear(arguments.pop("x"), packed, **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("packed", np.zeros((48, 100), np.int8)),
        ("packed", np.zeros((47, 128), np.uint8)),
        ("packed", np.zeros((48, 96), np.uint8)),
        ("scales", np.zeros((5, 48), np.float16)),
        ("scales", np.zeros((4, 48), np.float32)),
        ("zeros", np.zeros((2, 48), np.float16)),
        ("columns", np.zeros(255, np.int32)),
        ("columns", np.zeros(256, np.int64)),
        ("columns", None),
        ("bias", np.zeros(7, np.float16)),
    ],
)
def test_arrays_that_are_no_packed_weight_are_refused(
    small: tuple[Case, Any], name: str, array: Any
) -> None:
    case, packed = small
    broken = replace(packed, **{name: array})
    with pytest.raises(w4a16.ArgumentError, match=name):
        linear(np.zeros((1, case.k), np.float16), broken)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((8,), (1,), 8),
        ((8,), (2,), None),
        ((3, 8), (8, 1), 8),
        ((3, 8), (20, 1), 20),
        ((3, 8), (4, 1), None),
        ((3, 8), (0, 1), None),
        ((1, 8), (999, 1), 8),
        ((2, 3, 8), (60, 20, 1), 20),
        ((2, 3, 8), (61, 20, 1), None),
        ((2, 1, 8), (24, 7, 1), 24),
        ((3, 1), (5, 9), 5),
    ],
)
def test_rows_that_are_evenly_spaced_are_recognised(
    shape: tuple[int, ...], strides: tuple[int, ...], expected: int | None
) -> None:
    view = View(
        address=0,
        shape=shape,
        strides=strides,
        dtype="float16",
        device=0,
        framework="other",
        owner=None,
        stream=None,
    )
    assert linear_module._row_stride(view) == expected


# ---- On a GPU whose memory is the host's ----


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = install(tmp_path, monkeypatch)
    yield made
    gc.collect()
    assert made.misuse == []


@pytest.fixture
def kernels(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    def copy_2d(
        to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, stream: int
    ) -> None:
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)

    monkeypatch.setattr(driver, "copy_2d", copy_2d)
    return HostKernels().install(monkeypatch, linear_module)


def on_gpu(packed: w4a16.PackedWeight) -> w4a16.PackedWeight:
    arrays: dict[str, Any] = {
        name: DeviceArray.from_numpy(array) for name, array in packed.arrays().items()
    }
    return replace(packed, **arrays)


class Cuda:
    """What another framework's array looks like; ``array`` stays where it is."""

    def __init__(self, array: Any, stream: int | None = None) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": array.strides,
            "stream": stream,
        }


KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "zeros and bias": {"bias": True},
    "act-order": {"act_order": "shuffled"},
    "padded": {"k": 100, "n": 21, "bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_array_gives_a_device_array(
    fake: FakeDriver, kernels: HostKernels, kind: str
) -> None:
    case = case_of(RNG, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **KINDS[kind]})
    packed = on_gpu(packed_of(case))
    x = RNG.standard_normal((2, 3, case.k)).astype(np.float16)
    stream = fake.stream()
    found = linear(DeviceArray.from_numpy(x, stream=stream), packed)
    assert isinstance(found, DeviceArray)
    assert relative_error(found.numpy(), exact(x, case)) < 1e-3
    assert kernels.launches[0]["stream"] == 0
    assert kernels.plans[0] == (
        *(0, int(packed.quant_op), 6, packed.n, packed.k, packed.group_size),
        packed.bias is not None,
    )
    # Another bias, given without its padding.
    bias = RNG.standard_normal(case.n).astype(np.float16)
    found = linear(DeviceArray.from_numpy(x), packed, DeviceArray.from_numpy(bias))
    assert relative_error(found.numpy(), exact(x, case, bias)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["dense", "row-strided", "misaligned"])
def test_arrays_of_other_frameworks_are_taken_in_place(
    fake: FakeDriver, kernels: HostKernels, kind: str, form: str
) -> None:
    case = case_of(RNG, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **KINDS[kind]})
    packed = on_gpu(packed_of(case))
    wide = RNG.standard_normal((5, case.k + 11)).astype(np.float16)
    dense = np.ascontiguousarray(wide[:, : case.k])
    flat = np.empty(dense.size + 9, np.float16)
    flat[9:] = dense.reshape(-1)
    x = {
        "dense": dense,
        "row-strided": wide[:, : case.k],
        "misaligned": flat[9:].reshape(dense.shape),
    }[form]
    stream = fake.stream()
    found = linear(Cuda(x, stream=stream), packed)
    assert relative_error(found.numpy(), exact(x, case)) < 1e-3
    assert kernels.launches[0]["stream"] == stream


def test_out_and_stream_are_respected(fake: FakeDriver, kernels: HostKernels) -> None:
    case = case_of(RNG, format="plain", k=100, n=21, group_size=64, bias=True)
    packed = on_gpu(packed_of(case))
    x = RNG.standard_normal((4, case.k)).astype(np.float16)
    out = Cuda(np.full((4, case.n), np.nan, np.float16))
    one, two = fake.stream(), fake.stream()
    assert linear(Cuda(x, stream=one), packed, out=out, stream=two) is out
    assert relative_error(out.array, exact(x, case)) < 1e-3
    assert kernels.launches[0]["stream"] == two
    assert kernels.gathers[0]["stream"] == two


def test_launches_overlap_once_a_weight_was_launched_without_outside_of_a_capture(
    fake: FakeDriver, kernels: HostKernels
) -> None:
    case = case_of(RNG, format="plain", k=128, n=24, group_size=64)
    packed = on_gpu(packed_of(case))
    x = DeviceArray.from_numpy(RNG.standard_normal((2, case.k)).astype(np.float16))
    bias = DeviceArray.from_numpy(RNG.standard_normal(case.n).astype(np.float16))
    out = DeviceArray.from_numpy(np.zeros((2, case.n), np.float16))
    stream = driver.Stream.create()
    for _ in range(2):
        with driver.capture(stream) as capture:
            linear(x, packed, out=out, stream=stream.handle)
        with capture.graph:
            pass
    for _ in range(2):
        linear(x, packed)
    linear(x, packed, bias)
    linear(x, replace(packed))
    stream.destroy()
    found = [launch["overlap"] for launch in kernels.launches]
    assert found == [False, False, False, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_may_go_before_what_was_made_on_it(
    fake: FakeDriver, kernels: HostKernels, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(RNG, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **KINDS[kind]})
    packed = on_gpu(packed_of(case))
    x = RNG.standard_normal((3, case.k)).astype(np.float16)
    stream = fake.stream()
    pieces = []
    run = LIBRARY.run

    def counted(*arguments: Any) -> None:
        run(*arguments)
        pieces.append(fake.work(arguments[14]))

    monkeypatch.setattr(LIBRARY, "run", counted)
    out = DeviceArray((3, case.n), stream=stream)
    linear(DeviceArray.from_numpy(x, stream=stream), packed, out=out, stream=stream)  # x is gone
    assert fake.freed_after(pieces[0])
    found = linear(DeviceArray.from_numpy(x, stream=stream), packed, stream=stream)
    assert not fake.comes_before(pieces[1], 0)
    fake.destroy(stream)
    for result in (out, found):
        assert relative_error(result.numpy(), exact(x, case)) < 1e-3
    assert fake.comes_before(pieces[1], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_captured_with_out_and_refused_without(
    fake: FakeDriver, kernels: HostKernels, kind: str
) -> None:
    case = case_of(RNG, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **KINDS[kind]})
    packed = on_gpu(packed_of(case))
    values = RNG.standard_normal((3, case.k)).astype(np.float16)
    stream = fake.stream()
    x, out = DeviceArray.from_numpy(values), DeviceArray((3, case.n), stream=stream)
    before = fake.live
    with fake.capturing(stream):
        assert linear(x, packed, out=out, stream=stream) is out
        assert fake.live == before
        with pytest.raises(w4a16.DeviceError, match=r"being captured: .*\(out=\)"):
            linear(x, packed, stream=stream)
    assert len(kernels.launches) == 1
    assert relative_error(out.numpy(), exact(values, case)) < 1e-3


def test_no_memory_is_left_behind(
    tmp_path: Path, kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(RNG, format="plain", k=100, n=21, group_size=64, bias=True)
    packed = on_gpu(packed_of(case))
    freed = []
    monkeypatch.setattr(driver, "free", lambda address, stream: freed.append(address))
    x = DeviceArray.from_numpy(np.zeros((4, case.k), np.float16))
    out = DeviceArray((4, case.n))
    linear(x, packed, out=out)
    assert len(freed) == 1

    def fails(*_: object) -> None:
        raise w4a16.DeviceError("no")

    monkeypatch.setattr(LIBRARY, "run", fails)
    with pytest.raises(w4a16.DeviceError):
        linear(x, packed, out=out)
    assert len(freed) == 2


def test_no_rows_launch_nothing(kernels: HostKernels) -> None:
    case = case_of(RNG, format="plain", k=128, n=24, group_size=64)
    found = linear(DeviceArray((2, 0, 128)), on_gpu(packed_of(case)))
    assert found.shape == (2, 0, 24)
    assert not kernels.launches


def test_what_cannot_be_launched_is_refused(kernels: HostKernels) -> None:
    case = case_of(RNG, format="plain", k=128, n=24, group_size=64)
    packed = packed_of(case)
    with pytest.raises(w4a16.ArgumentError, match=r"cuda:0, but packed .* cpu"):
        linear(DeviceArray((2, 128)), packed)
    with pytest.raises(w4a16.ArgumentError, match=r"on cpu, but packed .* cuda:0"):
        linear(np.zeros((2, 128), np.float16), on_gpu(packed))
    columns = np.zeros((128, 2), np.float16).T
    with pytest.raises(w4a16.ArgumentError, match=r"x is .*strides.*contiguous"):
        linear(Cuda(columns), on_gpu(packed))
    assert not kernels.launches


@pytest.mark.parametrize("call", ["linear", "linear of torch", "unpack", "dequantize", "module"])
@pytest.mark.parametrize("value", [None, {}, "packed", 3])
def test_what_is_no_packed_weight_is_refused_by_name(call: str, value: Any) -> None:
    calls: dict[str, Any] = {
        "linear": lambda: linear(np.ones((1, 64), np.float16), value),
        "linear of torch": lambda: linear(torch.ones(1, 64).half(), value),
        "unpack": lambda: w4a16.unpack(value),
        "dequantize": lambda: w4a16.dequantize(value),
        "module": lambda: w4a16.W4A16Linear(value),
    }
    wanted = f"packed is a {type(value).__name__}: expected a w4a16.PackedWeight"
    with pytest.raises(w4a16.ArgumentError, match=wanted):
        calls[call]()
