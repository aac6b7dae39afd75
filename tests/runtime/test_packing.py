"""Packing on the CPU against references that place one nibble at a time; and unpacking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from w4a16.errors import FormatError, UnsupportedError, W4A16Warning
from w4a16.formats.backends import Torch
from w4a16.library import LIBRARY

from tests.runtime.checkpoints import FORMATS, Case, cases, weight
from tests.runtime.packings import V1, api, check_packed, converted, pack, random_case

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_packing_is_what_the_formats_and_the_kernels_define(case: Case) -> None:
    tensors = case.tensors()
    before = {name: array.copy() for name, array in tensors.items()}
    check_packed(pack(case), case)
    for name, array in case.tensors().items():
        assert (before[name] == array).all(), "an input was written to"


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_unpacking_gives_every_number_back_and_packs_to_the_same_bytes(case: Case) -> None:
    packed = pack(case)
    found = api.unpack(packed)
    assert found.q.dtype == np.uint8
    assert (found.q == case.q).all()
    assert found.scales.tobytes() == case.scales.tobytes()
    if case.points is None or (case.points == 8).all():
        assert found.zeros is None
        assert found.z is None
    else:
        assert found.zeros.dtype == np.float32
        assert (found.zeros == case.points).all()
        assert found.z.dtype == np.float16
    trivial = case.g_idx is None or (case.g_idx == np.arange(case.k) // case.size).all()
    assert (found.g_idx is None) == trivial
    if found.g_idx is not None:
        assert (found.g_idx == case.g_idx).all()
    assert (found.bias is None) == (case.bias is None)
    if case.bias is not None:
        assert (found.bias == case.bias).all()
    again = api.pack(
        q=found.q,
        scales=found.scales,
        zeros=found.zeros,
        g_idx=found.g_idx,
        bias=found.bias,
        group_size=found.group_size,
    )
    assert again.arrays().keys() == packed.arrays().keys()
    for name, array in again.arrays().items():
        assert array.tobytes() == getattr(packed, name).tobytes(), name


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_dequantising_is_the_exact_weight_rounded_once(case: Case) -> None:
    found = api.dequantize(pack(case))
    assert found.dtype == np.float16
    assert (found == weight(case)).all()


def test_dequantising_rounds_once_where_float32_would_round_twice() -> None:
    # A small z takes a product beyond the 24 bits of float32, and then to what looks like a tie.
    rng = np.random.default_rng(2)
    scales = np.exp2(rng.uniform(-3, 0, (1, 4096))).astype(np.float16)
    z = (rng.uniform(-1, 1, (1, 4096)) * 2.0**-12).astype(np.float16)
    q = rng.integers(0, 16, (64, 4096), dtype=np.uint8)
    packed = api.pack(q=q, scales=scales, zeros=np.zeros((1, 4096)), group_size=-1)
    packed = replace(packed, zeros=z.copy())
    exact = (q - 8.0) * scales.astype(np.float64) + z.astype(np.float64)
    wanted = exact.astype(np.float16)
    assert (wanted != exact.astype(np.float32).astype(np.float16)).any(), "the test tests nothing"
    assert (api.dequantize(packed) == wanted).all()
    found = Torch(0).half(torch.from_numpy(exact))
    assert (found.numpy() == wanted).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act_order", ["none", "shuffled"])
def test_any_number_of_threads_packs_the_same_bytes(format: str, act_order: str) -> None:
    if format == "awq" and act_order != "none":
        pytest.skip("AWQ has no act-order")
    case = random_case(format=format, k=1024, n=520, act_order=act_order)
    one = pack(case, threads=1)
    for threads in (0, 2, 3, 64):
        assert (pack(case, threads=threads).packed == one.packed).all()


@pytest.mark.parametrize("format", FORMATS)
def test_torch_tensors_make_torch_tensors_with_the_same_bytes(format: str) -> None:
    case = random_case(format=format, k=320, n=40, bias=True)
    positional, named = converted(case, torch.from_numpy)
    packed = api.pack(*positional, **named)
    for name, array in pack(case).arrays().items():
        tensor = getattr(packed, name)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        assert tensor.numpy().tobytes() == array.tobytes()
    found = api.unpack(packed)
    assert isinstance(found.q, torch.Tensor)
    assert (found.q.numpy() == case.q).all()
    dequantised = api.dequantize(packed)
    assert isinstance(dequantised, torch.Tensor)
    assert (dequantised.numpy() == weight(case)).all()


def test_parameters_that_require_a_gradient_are_packed() -> None:
    case = random_case()
    tensors = {name: torch.from_numpy(array) for name, array in case.tensors().items()}
    tensors["scales"] = torch.nn.Parameter(tensors["scales"])
    packed = api.pack(tensors, format="gptq")
    assert not packed.scales.requires_grad
    assert (packed.packed.numpy() == pack(case).packed).all()


def test_strided_scales_and_plain_numbers_need_not_be_contiguous() -> None:
    case = random_case(format="plain", n=16)
    wide = np.zeros((case.k, 32), np.uint8)
    wide[:, ::2] = case.q
    packed = api.pack(
        q=wide[:, ::2],
        scales=np.asfortranarray(case.scales),
        zeros=np.asfortranarray(case.points),
        group_size=128,
    )
    check_packed(packed, case)


def test_results_share_no_memory_with_the_inputs() -> None:
    case = random_case(format="plain", bias=True, k=128, group_size=-1)
    scales, bias = case.scales.copy(), case.bias.copy()
    packed = api.pack(q=case.q.astype(np.uint8), scales=scales, bias=bias, group_size=-1)
    found = api.unpack(packed)
    scales.fill(7)
    bias.fill(7)
    assert (packed.scales == case.scales).all()
    packed.scales.fill(9)
    packed.bias.fill(9)
    assert (found.scales == case.scales).all()
    assert (found.bias == case.bias).all()


# ---- Shapes and groups ----


def test_a_group_larger_than_k_is_one_group() -> None:
    case = random_case(k=64, group_size=128, symmetric=True)
    packed = pack(case)
    assert packed.quant_op is api.QuantOp.PER_COLUMN
    assert (packed.k, packed.groups) == (64, 1)


def test_per_column_scales_may_have_one_dimension() -> None:
    case = random_case(format="plain", group_size=-1)
    packed = api.pack(
        q=case.q.astype(np.uint8), scales=case.scales[0], zeros=case.points[0], group_size=-1
    )
    check_packed(packed, case)


def test_plain_numbers_may_come_in_a_mapping() -> None:
    case = random_case(format="plain", bias=True)
    check_packed(api.pack(case.tensors(), format="plain", group_size=128), case)


def test_a_layer_is_packed_by_its_own_configuration() -> None:
    dynamic = {r"+:.*down_proj": {"group_size": 64, "sym": False}}
    config = api.QuantizationConfig.parse({**V1, "dynamic": dynamic})
    case = random_case(group_size=64)
    layer = config.for_module("model.layers.0.mlp.down_proj")
    check_packed(api.pack(case.tensors(), config=layer), case)
    with pytest.raises(FormatError, match="4 groups, but 256 inputs with group size 128 make 2"):
        api.pack(case.tensors(), config=config)


def test_the_group_size_is_read_off_the_shapes_where_nothing_says_it() -> None:
    case = random_case(group_size=64)
    assert (api.pack(case.tensors(), format="gptq").packed == pack(case).packed).all()


def test_zero_points_need_not_be_integers() -> None:
    case = random_case(format="plain")
    points = np.random.default_rng(5).uniform(-3, 20, case.scales.shape)
    packed = api.pack(q=case.q.astype(np.uint8), scales=case.scales, zeros=points, group_size=128)
    product = np.float32(8) - points.astype(np.float32)
    assert (packed.zeros == (product * case.scales.astype(np.float32)).astype(np.float16)).all()
    found = api.unpack(packed)
    assert np.allclose(found.zeros, points, rtol=0, atol=0.02)
    assert (found.z == packed.zeros).all()


def test_zero_points_of_8_throughout_cost_nothing() -> None:
    case = random_case(format="plain", k=256, group_size=-1)
    packed = api.pack(
        q=case.q.astype(np.uint8), scales=case.scales, zeros=np.full((1, case.n), 8.0)
    )
    assert packed.zeros is None
    assert packed.quant_op is api.QuantOp.PER_COLUMN


def test_zero_points_under_scales_of_zero_are_given_back_as_8() -> None:
    case = random_case(format="plain")
    scales = case.scales.copy()
    scales[1, 3] = 0
    with pytest.warns(W4A16Warning, match="are 0"):
        packed = api.pack(q=case.q.astype(np.uint8), scales=scales, zeros=np.full(scales.shape, 5))
    zeros = api.unpack(packed).zeros
    assert zeros[1, 3] == 8
    zeros[1, 3] = 5
    assert (zeros == 5).all()


def test_every_integer_zero_point_comes_back_from_every_finite_scale() -> None:
    bits = np.arange(1, 0x7000, dtype=np.uint16)  # up to 8192, whose eighth fold is too large
    scales = np.concatenate([bits, bits | 0x8000]).view(np.float16)[None, :]
    scales = np.ascontiguousarray(scales[:, : scales.shape[1] // 8 * 8])
    for point in range(16):
        points = np.full(scales.shape, point)
        points[0, 0] = 8 - (point == 8)
        packed = api.pack(
            q=np.zeros((64, scales.shape[1]), np.uint8), scales=scales, zeros=points, group_size=-1
        )
        assert (api.unpack(packed).zeros == points).all()


def test_compressed_tensors_need_no_shape_and_may_have_zero_points_of_8_bits() -> None:
    case = random_case(format="compressed-tensors", n=20)
    tensors = case.tensors()
    del tensors["weight_shape"]
    check_packed(api.pack(tensors, group_size=128), case)
    tensors["weight_zero_point"] = np.ascontiguousarray((case.points - 8).T.astype(np.int8))
    check_packed(api.pack(tensors, group_size=128), case)


@pytest.mark.parametrize("placeholder", [-1, None])
def test_a_g_idx_that_says_nothing_is_no_act_order(placeholder: int | None) -> None:
    case = random_case(format="compressed-tensors")
    rows = 0 if placeholder is None else case.k
    tensors = {**case.tensors(), "weight_g_idx": np.full(rows, -1, np.int32)}
    check_packed(api.pack(tensors, format="compressed-tensors"), case)


def test_a_g_idx_of_no_groups_is_refused_where_the_format_gives_it_no_meaning() -> None:
    case = random_case()
    tensors = {**case.tensors(), "g_idx": np.full(case.k, -1, np.int32)}
    with pytest.raises(FormatError, match="g_idx holds -1, first for input 0: expected groups 0"):
        api.pack(tensors, format="gptq")
    check_packed(api.pack({**tensors, "g_idx": np.empty(0, np.int32)}, format="gptq"), case)


def test_a_g_idx_of_zeros_is_no_act_order_but_warned_about() -> None:
    case = random_case()
    tensors = {**case.tensors(), "g_idx": np.zeros(case.k, np.int32)}
    with pytest.warns(W4A16Warning, match="all 256 inputs belong to group 0 of 2"):
        packed = api.pack(tensors, format="gptq")
    check_packed(packed, case)


def test_a_group_that_no_kernel_takes_is_refused_with_the_way_out() -> None:
    case = random_case(group_size=16)
    with pytest.raises(UnsupportedError, match=r"group size 16 .*: quantise the model again with"):
        pack(case)


def test_groups_of_32_are_packed_where_the_library_has_decode_tactics_for_them() -> None:
    if not any(32 in tactic.groups for tactic in LIBRARY.tactics):
        pytest.skip("no tactic of this library takes groups of 32")
    for act_order in ("none", "shuffled"):
        case = random_case(group_size=32, k=232, act_order=act_order)
        check_packed(pack(case), case)


def test_any_group_that_the_library_takes_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(LIBRARY), "why_unsupported", lambda *_: "")
    for size in (32, 48, 96, 16):
        for act_order in ("none", "shuffled", "uneven"):
            case = random_case(group_size=size, k=232, act_order=act_order)
            packed = pack(case)
            check_packed(packed, case)
            assert (api.unpack(packed).q == case.q).all()
            assert (api.dequantize(packed) == weight(case)).all()
