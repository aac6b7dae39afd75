"""`W4A16Linear` as a module: state dicts, moves, copies; on a CPU."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from w4a16.modules import W4A16Linear

from tests.runtime.checkpoints import case_of, weight

NAMES = ("packed", "scales", "zeros", "columns", "bias")
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "per column": {"symmetric": True, "group_size": -1},
    "zeros and bias": {"bias": True},
    "act-order": {"act_order": "shuffled"},
    "padded": {"k": 100, "n": 21, "bias": True},
}


def case(kind: str) -> Any:
    rng = np.random.default_rng(len(kind))
    return case_of(rng, **{"format": "plain", "k": 128, "n": 24, "group_size": 64, **KINDS[kind]})


def layer(kind: str) -> W4A16Linear:
    positional, named = case(kind).arguments()
    return W4A16Linear.from_packed(w4a16.pack(*positional, **named))


def same(one: W4A16Linear, other: W4A16Linear) -> bool:
    sizes = (one.in_features, one.out_features) == (other.in_features, other.out_features)
    pairs = [(getattr(one, name), getattr(other, name)) for name in NAMES]
    return sizes and all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
    )


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_module_multiplies_with_the_checkpoints_weight(kind: str) -> None:
    module, numbers = layer(kind), case(kind)
    x = torch.randn(2, 3, numbers.k).half()
    exact = x.double() @ torch.from_numpy(weight(numbers)).double()
    if numbers.bias is not None:
        exact += torch.from_numpy(numbers.bias).double()
    norm = torch.linalg.vector_norm
    assert norm(module(x).double() - exact) < 1e-3 * norm(exact)


def test_a_checkpoints_tensors_make_a_module() -> None:
    numbers = case_of(
        np.random.default_rng(1), format="gptq", k=128, n=24, group_size=64, act_order="shuffled"
    )
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
    tensors = {name: torch.from_numpy(array) for name, array in numbers.tensors().items()}
    made = W4A16Linear.from_checkpoint(tensors, config)
    assert same(made, W4A16Linear(w4a16.pack(tensors, config=config)))
    assert torch.equal(w4a16.dequantize(made.packed_weight), torch.from_numpy(weight(numbers)))


def test_the_state_dict_is_the_arrays_and_goes_into_an_empty_module(kind: str) -> None:
    module, numbers = layer(kind), case(kind)
    state = module.state_dict()
    assert set(state) == {name for name in NAMES if getattr(module, name) is not None}
    for device, assign in ((None, False), ("meta", True)):
        empty = W4A16Linear.empty(
            numbers.k,
            numbers.n,
            group_size=numbers.group_size,
            zeros=module.zeros is not None,
            act_order=module.columns is not None,
            bias=module.bias is not None,
            device=device,
        )
        assert not empty.load_state_dict(state, strict=True, assign=assign).missing_keys
        assert same(empty, module)
        assert repr(empty) == repr(module)


def test_a_state_dict_of_other_dtypes_is_refused_not_converted() -> None:
    module = layer("zeros and bias")
    before = copy.deepcopy(module)
    state = {**module.state_dict(), "scales": module.scales.float() * 2}
    with pytest.raises(RuntimeError, match=r"scales is torch.float32: expected torch.float16"):
        module.load_state_dict(state)
    assert same(module, before)


def test_a_state_dict_of_another_number_of_inputs_is_refused() -> None:
    module = layer("padded")  # 100 inputs in 128
    state = dict(module.state_dict())
    state["columns"] = torch.arange(128, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="columns is of 128 inputs: expected 100"):
        module.load_state_dict(state)


def test_a_state_dict_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="columns"):
        layer("symmetric").load_state_dict(layer("act-order").state_dict())
    with pytest.raises(RuntimeError, match="zeros"):
        layer("zeros and bias").load_state_dict(layer("symmetric").state_dict())


def test_conversions_of_dtype_leave_the_arrays_alone(kind: str) -> None:
    module = layer(kind)
    before = copy.deepcopy(module)
    model = torch.nn.Sequential(module, torch.nn.Linear(4, 4))
    conversions: list[Callable[[], Any]] = [
        lambda: model.float(),
        lambda: model.bfloat16(),
        lambda: model.half(),
        lambda: model.double(),
        lambda: model.to(torch.bfloat16),
        lambda: model.to("cpu", torch.float64),
        lambda: model.type(torch.float32),
    ]
    for convert in conversions:
        convert()
        assert same(module, before)
    assert model[1].weight.dtype == torch.float32


def test_the_module_moves_between_devices() -> None:
    module = layer("padded").to("meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    module.to_empty(device="cpu")
    module.load_state_dict(layer("padded").state_dict())
    assert same(module, layer("padded"))
    assert module.to("meta", torch.bfloat16).scales.dtype == torch.float16


def test_copies_and_pickles_are_the_same_module(kind: str) -> None:
    module = layer(kind)
    assert same(copy.deepcopy(module), module)
    assert same(pickle.loads(pickle.dumps(module)), module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == set(module.state_dict())


def test_it_has_no_parameters_and_says_what_it_is() -> None:
    module = layer("padded")
    assert not list(module.parameters())
    assert repr(module) == (
        "W4A16Linear(in_features=100, out_features=21, group_size=64, zeros=True, columns=True,"
        " bias=True)"
    )


def test_it_compiles_without_breaking_the_graph(kind: str) -> None:
    torch._dynamo.reset()
    module = layer(kind)
    x = torch.randn(2, module.in_features).half()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def test_arrays_that_do_not_fit_together_make_no_module() -> None:
    packed: Any = layer("zeros and bias").packed_weight
    for name, value in (
        ("scales", packed.scales.float()),
        ("zeros", packed.zeros[:1]),
        ("bias", packed.bias[:-1]),
        ("packed", packed.packed.to("meta")),
    ):
        arrays = {**{each: getattr(packed, each) for each in NAMES}, name: value}
        with pytest.raises(w4a16.ArgumentError, match=name):
            W4A16Linear(w4a16.PackedWeight(**arrays, in_features=128, out_features=24))
    arrays = {**{each: getattr(packed, each) for each in NAMES}, "bias": 3}
    with pytest.raises(w4a16.ArgumentError, match="bias is a int: expected a torch tensor"):
        W4A16Linear(w4a16.PackedWeight(**arrays, in_features=128, out_features=24))


@pytest.mark.parametrize("sizes", [(-64, 64), (64, -8), (0, 8), ("64", 8), (64.0, 8), (True, 8)])
def test_an_empty_module_of_no_size_is_refused_by_name(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(w4a16.ArgumentError, match=r"(in|out)_features is .*: expected an integer"):
        W4A16Linear.empty(*sizes)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"group_size": -5}, "group_size is -5"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": "64"}, "group_size is '64'"),
        ({"k": 63}, "k is 63 and n is 24: expected multiples of 128 and 8"),
        ({"k": 192}, "k is 192"),
        ({"n": 25}, "n is 25"),
        ({"n": 16}, "n is 16"),
    ],
)
def test_an_empty_module_of_sizes_that_do_not_fit_is_refused(
    given: dict[str, Any], text: str
) -> None:
    with pytest.raises(w4a16.ArgumentError, match=text):
        W4A16Linear.empty(128, 24, **given)


@pytest.mark.parametrize("group_size", [32, 48, 96, 64, 128, 0, -1])
@pytest.mark.parametrize("zeros", [False, True])
def test_an_empty_module_takes_the_groups_that_packing_takes(group_size: int, zeros: bool) -> None:
    k = 384
    groups = k // group_size if group_size > 0 else 1
    q, scales = np.zeros((k, 16), np.uint8), np.ones((groups, 16), np.float16)
    points = np.full((groups, 16), 3) if zeros else None

    def outcome(make: Callable[[], Any]) -> str:
        try:
            make()
        except w4a16.UnsupportedError as error:
            return str(error).replace(f"size {k}", "size").replace(f"size {group_size}", "size")
        return "taken"

    size = group_size or -1
    packed = outcome(lambda: w4a16.pack(q=q, scales=scales, zeros=points, group_size=size))
    made = outcome(lambda: W4A16Linear.empty(k, 16, group_size=group_size, zeros=zeros))
    assert made == packed
