"""Tensors and arguments that are no weight are refused, by name, shape and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from w4a16.errors import ArgumentError, FormatError

from tests.runtime.packings import V1, api, pack, random_case

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def broken(change: dict[str, Any], **options: Any) -> Any:
    case = random_case(bias=True, act_order="shuffled")
    tensors = {**case.tensors(), **change}
    return api.pack(
        {name: value for name, value in tensors.items() if value is not None},
        **{"format": "gptq", "group_size": 128, **options},
    )


BROKEN: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("no qweight", {"qweight": None}, {}, "qweight is missing"),
    ("no qzeros", {"qzeros": None}, {}, "qzeros is missing"),
    ("other tensor", {"weight": np.zeros(3)}, {}, "'weight' is none of them"),
    (
        "qweight of another type",
        {"qweight": np.zeros((32, 24), np.uint8)},
        {},
        r"qweight is uint8 \[32, 24\] .*: expected int32 \[…, …\]",
    ),
    (
        "qweight of 3 dimensions",
        {"qweight": np.zeros((4, 8, 24), np.int32)},
        {},
        r"qweight is int32 \[4, 8, 24\] .*: expected int32 \[…, …\]",
    ),
    (
        "empty qweight",
        {"qweight": np.zeros((0, 24), np.int32)},
        {},
        r"qweight is int32 \[0, 24\] .*: expected int32 \[…, …\] of sizes above 0",
    ),
    (
        "qweight not contiguous",
        {"qweight": np.zeros((32, 48), np.int32)[:, ::2]},
        {},
        r"qweight is .*: expected a contiguous array",
    ),
    (
        "scales of another shape",
        {"scales": np.ones((2, 16), np.float16)},
        {},
        r"scales is float16 \[2, 16\] .*: expected .* \[…, 24\], since qweight is \[32, 24\], so K"
        r" is 256 and N is 24",
    ),
    (
        "scales of integers",
        {"scales": np.ones((2, 24), np.int32)},
        {},
        r"scales is int32 \[2, 24\] .*: expected float16 or bfloat16 or float32 or float64",
    ),
    (
        "too many groups",
        {"scales": np.ones((4, 24), np.float16)},
        {},
        r"scales is float16 \[4, 24\] .*, so there are 4 groups, but 256 inputs with group size 128"
        r" make 2 .*: expected 2 groups or group size 64",
    ),
    (
        "groups where there is to be one",
        {},
        {"group_size": -1},
        r"there are 2 groups, but the group size is -1, one group of all 256 inputs .*: expected 1"
        r" group, or group size 128",
    ),
    (
        "groups that leave the group size open",
        {"scales": np.ones((3, 24), np.float16)},
        {"group_size": None},
        r"there are 3 groups of 256 inputs, which they do not divide .*: pass group_size",
    ),
    (
        "qzeros of another shape",
        {"qzeros": np.zeros((3, 2), np.int32)},
        {},
        r"qzeros is int32 \[3, 2\] .*: expected int32 \[2, 3\], eight outputs a word",
    ),
    (
        "g_idx of another length",
        {"g_idx": np.zeros(128, np.int32)},
        {},
        r"g_idx is int32 \[128\] .*: expected int32 or int64 \[256\], one for each input",
    ),
    (
        "g_idx of numbers with fractions",
        {"g_idx": np.zeros(256, np.float32)},
        {},
        r"g_idx is float32 \[256\] .*: expected int32 or int64 \[256\]",
    ),
    (
        "negative g_idx",
        {"g_idx": np.r_[np.zeros(200), -2, np.ones(55)].astype(np.int32)},
        {},
        r"g_idx holds -2, first for input 200: expected groups 0 to 1",
    ),
    (
        "g_idx of groups that are not there",
        {"g_idx": np.r_[np.zeros(200), 2, np.ones(55)].astype(np.int64)},
        {},
        r"g_idx holds 2, first for input 200: expected groups 0 to 1",
    ),
    (
        "g_idx with too many inputs in a group",
        {"g_idx": np.r_[np.zeros(100), np.ones(156)].astype(np.int32)},
        {},
        r"g_idx puts 156 inputs into group 1: expected at most 128, the group size",
    ),
    (
        "bias of another length",
        {"bias": np.zeros(8, np.float16)},
        {},
        r"bias is float16 \[8\] .*: expected .* \[24\], one for each output",
    ),
    ("AWQ said to be GPTQ", {}, {"format": "awq"}, "'g_idx' is none of them"),
    (
        "the GPTQ of another group size in the configuration",
        {},
        {"format": None, "config": V1, "group_size": 64},
        "group_size is 64, but the configuration says 128",
    ),
    (
        "format and config that disagree",
        {},
        {"format": "awq", "config": V1},
        "format is 'awq', but config is one of gptq",
    ),
    ("unknown format", {}, {"format": "gguf"}, "format is 'gguf': expected one of gptq, gptq_v2"),
    (
        "nothing said",
        {},
        {"format": None},
        r"neither format nor config was given for the tensors qweight, .*: expected config=",
    ),
    ("unknown zero points", {}, {"zero_points": "v3"}, "zero_points is 'v3': expected 'v1'"),
    ("group size 0", {}, {"group_size": 0}, "group_size is 0: expected a positive number, or -1"),
    ("group size of text", {}, {"group_size": "128"}, "group_size is '128'"),
    ("numbers beside tensors", {}, {"scales": 1}, "scales given beside a checkpoint's tensors"),
    ("negative threads", {}, {"threads": -1}, r"threads is -1: expected 0 \(all cores\) or more"),
    ("another device", {}, {"device": "tpu"}, "device is 'tpu': expected 'cpu', 'cuda'"),
]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [row[1:] for row in BROKEN],
    ids=[row[0] for row in BROKEN],
)
def test_bad_tensors_are_refused(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        broken(change, **options)


def test_awq_tensors_taken_for_gptq_and_the_other_way_round_are_recognised() -> None:
    case = random_case(format="awq", n=64)
    with pytest.raises(FormatError, match=r"as in an AWQ checkpoint.*expected format='awq'"):
        api.pack(case.tensors(), format="gptq")
    case = random_case(n=64)
    with pytest.raises(FormatError, match=r"as in a GPTQ checkpoint.*expected format='gptq'"):
        api.pack(case.tensors(), format="awq")


def test_a_weight_shape_that_is_not_that_of_the_weight_is_refused() -> None:
    tensors = random_case(format="compressed-tensors").tensors()
    for shape in ([24, 248], [24, 257], [16, 256]):
        tensors["weight_shape"] = np.array(shape)
        with pytest.raises(FormatError, match=r"expected \[24, 249 to 256\]"):
            api.pack(tensors)
    tensors["weight_shape"] = np.array([24.0, 256.0])
    with pytest.raises(FormatError, match=r"weight_shape is float64 \[2\]"):
        api.pack(tensors)


def test_zero_points_of_more_than_4_bits_are_refused() -> None:
    tensors = random_case(format="compressed-tensors").tensors()
    tensors["weight_zero_point"] = np.full((24, 2), 8, np.int8)
    with pytest.raises(FormatError, match=r"outside -8\.\.7"):
        api.pack(tensors)


def test_asymmetric_compressed_tensors_need_zero_points() -> None:
    tensors = random_case(format="compressed-tensors", symmetric=True).tensors()
    weights = {"num_bits": 4, "symmetric": False, "group_size": 128, "strategy": "group"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    with pytest.raises(FormatError, match="weight_zero_point is missing"):
        api.pack(tensors, config=config)


@pytest.mark.parametrize("n", [8, 7])
def test_plain_numbers_above_15_are_refused(n: int) -> None:
    q = np.zeros((1000, n), np.uint8)
    q[777, 6] = 16
    with pytest.raises(ArgumentError, match=r"q holds 16 at \[777, 6\]: expected 0 to 15"):
        api.pack(q=q, scales=np.ones((1, n), np.float16), group_size=-1)


def test_plain_arguments_that_make_no_weight_are_refused() -> None:
    q, scales = np.zeros((64, 8), np.uint8), np.ones((1, 8), np.float16)
    with pytest.raises(ArgumentError, match=r"no weight was given: .*given: scales"):
        api.pack(scales=scales)
    with pytest.raises(ArgumentError, match="scales is missing"):
        api.pack(q=q)
    with pytest.raises(ArgumentError, match="q was given with a format or config"):
        api.pack(q=q, scales=scales, format="gptq")
    with pytest.raises(ArgumentError, match=r"q is int64 \[64, 8\] .*: expected uint8"):
        api.pack(q=q.astype(np.int64), scales=scales)
    with pytest.raises(ArgumentError, match=r"zeros is float64 \[8, 1\] .*: expected .* \[1, 8\]"):
        api.pack(q=q, scales=scales, zeros=np.zeros((8, 1)))
    with pytest.raises(ArgumentError, match="zeros holds NaN or infinity"):
        api.pack(q=q, scales=scales, zeros=np.full((1, 8), np.nan))
    with pytest.raises(ArgumentError, match="only GPTQ has two ways"):
        api.pack(q=q, scales=scales, zero_points="v1")
    with pytest.raises(ArgumentError, match="the weight is list: expected a mapping"):
        api.pack([q])
    with pytest.raises(ArgumentError, match="q"):
        api.pack(q=[[1]], scales=scales)


def test_arrays_that_are_no_packed_weight_are_refused() -> None:
    packed = pack(random_case(act_order="shuffled", bias=True))
    columns = packed.columns.copy()
    columns[0] = columns[1]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"packed": packed.packed[:, :100]}, "packed is uint8"),
        ({"scales": packed.scales[:, :8]}, "scales is float16"),
        ({"zeros": packed.zeros[:1]}, "zeros is float16"),
        ({"columns": columns}, "columns is .* expected each of 0 to 255 once"),
        ({"columns": columns[:8]}, "columns is int32"),
        ({"bias": packed.bias[:8]}, r"bias is float16 \[8\] .*: expected float16 \[24\]"),
        ({"in_features": 300}, "in_features is 300"),
        ({"out_features": 0}, "out_features is 0"),
    ]
    for change, message in changes:
        for call in (api.unpack, api.dequantize):
            with pytest.raises(ArgumentError, match=message):
                call(replace(packed, **change))


def test_a_stream_for_packing_on_the_cpu_is_refused() -> None:
    for stream in (0, 4711):
        with pytest.raises(ArgumentError, match=f"stream is {stream}, but .* on the CPU"):
            pack(random_case(), stream=stream)
