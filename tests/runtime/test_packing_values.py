"""Zero points, scales and bias: what stored numbers mean, and warnings about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from w4a16.errors import FormatError, W4A16Warning

from tests.runtime.checkpoints import words
from tests.runtime.packings import V1, V2, Array, api, check_packed, random_case

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


# ---- Zero points of GPTQ ----


def gptq(zeros: Array, **options: Any) -> Array:
    """The zero points that stored ones are read as; one group of 64 inputs."""
    n = zeros.shape[1] * 8
    tensors = {
        "qweight": np.zeros((8, n), np.int32),
        "qzeros": zeros,
        "scales": np.ones((1, n), np.float16),
    }
    found = api.unpack(api.pack(tensors, **options)).zeros
    return np.full((1, n), 8.0) if found is None else found


def test_v1_stores_the_zero_point_minus_1_and_v2_the_zero_point() -> None:
    points = np.arange(16).reshape(1, 16) % 15
    stored = words(points)
    assert (gptq(stored, format="gptq") == points + 1).all()
    assert (gptq(stored, format="gptq_v2") == points).all()
    assert (gptq(stored, format="gptq", zero_points="v2") == points).all()
    assert (gptq(stored, format="gptq_v2", zero_points="v1") == points + 1).all()


@settings(max_examples=200, deadline=None)
@given(points=st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_v1_zero_points_written_with_borrows_are_read_as_they_were(points: list[int]) -> None:
    """GPTQModel and AutoRound subtract 0x11111111 from words; so zero point 0 borrows."""
    stored = words(np.array([points])).view(np.uint32) - np.uint32(0x11111111)
    expected_points = np.array([points])
    if set(points) == {9}:
        return  # taken for v2
    assert (gptq(stored.view(np.int32), format="gptq") == expected_points).all()


def test_a_stored_15_of_v1_is_zero_point_0_not_16() -> None:
    stored = words(np.array([[7] * 7 + [15]]))
    assert gptq(stored, format="gptq").tolist() == [[8, 8, 8, 8, 8, 8, 8, 0]]


SYMMETRIC_V1 = np.full((1, 2), 0x77777777, np.int32)
SYMMETRIC_V2 = np.full((1, 2), -0x77777778, np.int32)


def test_a_file_that_says_v1_and_stores_v2_is_read_as_v2_with_a_warning() -> None:
    config = {**V1, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    with pytest.warns(W4A16Warning, match=r"gptqmodel:5\.0\.0.*read as v2; pass zero_points='v1'"):
        assert (gptq(SYMMETRIC_V2, config=config) == 8).all()
    with pytest.warns(W4A16Warning, match="read as v2"):
        assert (gptq(SYMMETRIC_V2, format="gptq") == 8).all()


def test_the_other_version_is_noticed_where_the_last_word_is_not_full() -> None:
    case = random_case(format="gptq_v2", n=12, symmetric=True)
    tensors = {**case.tensors()}
    tensors["qzeros"][:, -1] |= 0x70000  # behind the last output
    with pytest.warns(W4A16Warning, match="read as v2"):
        check_packed(api.pack(tensors, format="gptq", group_size=128), case)
    tensors["qzeros"][:, -1] ^= 0x1000  # the last output's
    packed = api.pack(tensors, format="gptq", group_size=128)
    assert (api.unpack(packed).zeros == [[9] * 11 + [10]]).all()


def test_a_file_that_says_v2_and_stores_v1_is_read_as_v1_with_a_warning() -> None:
    with pytest.warns(W4A16Warning, match=r"read as v1; pass zero_points='v2'"):
        assert (gptq(SYMMETRIC_V1, config=V2) == 8).all()
    assert (gptq(SYMMETRIC_V1, format="gptq_v2") == 7).all(), "nothing says it is symmetric"


def test_files_that_store_what_they_say_are_not_warned_about() -> None:
    assert (gptq(SYMMETRIC_V1, config=V1) == 8).all()
    assert (gptq(SYMMETRIC_V2, config=V2) == 8).all()


def test_zero_points_overrule_what_is_detected() -> None:
    with pytest.warns(W4A16Warning, match="says that weights are symmetric"):
        assert (gptq(SYMMETRIC_V2, config=V1, zero_points="v1") == 9).all()
    assert (gptq(SYMMETRIC_V2, config=V1, zero_points="v2") == 8).all()
    with pytest.warns(W4A16Warning, match="says that weights are symmetric"):
        assert (gptq(SYMMETRIC_V1, config=V2, zero_points="v2") == 7).all()


def test_symmetric_weights_need_no_zero_points() -> None:
    case = random_case(symmetric=True)
    tensors = case.tensors()
    del tensors["qzeros"]
    check_packed(api.pack(tensors, config=V1), case)


def test_a_symmetric_configuration_does_not_hide_zero_points() -> None:
    case = random_case()
    with pytest.warns(W4A16Warning, match=r"says that weights are symmetric, but \d+ of 48 zero"):
        packed = api.pack(case.tensors(), config=V1)
    check_packed(packed, case)


# ---- Scales and bias of other types ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scales_and_bias_of_other_types_are_rounded_to_float16(dtype: torch.dtype) -> None:
    case = random_case(format="plain", bias=True, symmetric=True)
    scales = torch.rand(case.scales.shape, dtype=torch.float64).add(0.5).to(dtype)
    bias = torch.randn(case.n, dtype=torch.float64).to(dtype)
    packed = api.pack(
        q=torch.from_numpy(case.q.astype(np.uint8)), scales=scales, bias=bias, group_size=128
    )
    assert (packed.scales == scales.float().half()).all()
    assert (packed.bias == bias.float().half()).all()


def plain(scales: Array, **options: Any) -> Any:
    return api.pack(
        q=np.full((128, 8), 3, np.uint8), scales=np.asarray(scales), group_size=64, **options
    )


def scales_with(value: float, dtype: str = "float32") -> Array:
    scales = np.full((2, 8), 0.5, dtype)
    scales[1, 6] = value
    return scales


PLACE = "first in group 1 of output 6"


def test_scales_too_large_for_float16_are_refused() -> None:
    with pytest.raises(FormatError, match=f"1 of 16 scales are too large for float16, {PLACE}"):
        plain(scales_with(65520))
    assert plain(scales_with(65519.9)).scales[1, 6] == 65504


def test_scales_too_small_for_float16_are_warned_about() -> None:
    with pytest.warns(W4A16Warning, match=f"1 of 16 scales are too small .* become 0, {PLACE}"):
        assert plain(scales_with(1e-8)).scales[1, 6] == 0
    with pytest.warns(W4A16Warning, match=f"1 of 16 scales are less than 6.1e-5.*, {PLACE}"):
        plain(scales_with(1e-5))
    assert plain(scales_with(1e-5, "float16")).scales[1, 6] == np.float16(1e-5), "nothing is lost"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers_are_warned_about(value: float, dtype: str) -> None:
    with pytest.warns(W4A16Warning, match=f"1 of 16 scales are NaN or infinite, {PLACE}"):
        packed = plain(scales_with(value, dtype), zeros=np.full((2, 8), 3))
    assert not np.isfinite(packed.scales[1, 6])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_of_zero_are_warned_about(dtype: str) -> None:
    with pytest.warns(W4A16Warning, match=f"1 of 16 scales are 0, {PLACE}"):
        plain(scales_with(0, dtype))


def test_zeros_too_large_for_float16_are_refused() -> None:
    points = np.full((2, 8), 7)
    points[1, 6:] = 0
    with pytest.raises(FormatError, match=r"2 zeros .* too large .*, first in group 1 of output 6"):
        plain(np.full((2, 8), 8192, np.float16), zeros=points)
    assert plain(np.full((2, 8), 8188, np.float16), zeros=np.zeros((2, 8))).zeros.max() == 65504


def test_a_bias_too_large_for_float16_is_refused() -> None:
    bias = np.zeros(8, np.float32)
    bias[5] = 1e6
    with pytest.raises(FormatError, match=r"1 of 8 numbers of bias .*, first for output 5"):
        plain(scales_with(1), bias=bias)


def test_act_order_without_a_g_idx_is_warned_about() -> None:
    case = random_case(symmetric=True)
    with pytest.warns(W4A16Warning, match="says act-order, but no g_idx says"):
        packed = api.pack(case.tensors(), config={**V1, "desc_act": True})
    check_packed(packed, case)
    whole = random_case(symmetric=True, group_size=-1)
    config = {**V1, "desc_act": True, "group_size": -1}
    check_packed(api.pack(whole.tensors(), config=config), whole)
