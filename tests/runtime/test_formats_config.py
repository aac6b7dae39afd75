"""Quantisation configurations as they stand in real models' files, and what is not supported."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import pytest
import w4a16
from w4a16.errors import FormatError
from w4a16.formats.config import LayerConfig, QuantizationConfig

parse = QuantizationConfig.parse

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": None,
}
WEIGHTS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 128,
    "num_bits": 4,
    "observer": "minmax",
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    scheme = {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {**WEIGHTS, **(weights or {})},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        **changes,
    }


def scheme(targets: list[str], **changes: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": WEIGHTS, **changes}


# ---- GPTQ ----


def test_gptq_of_gptqmodel_is_read() -> None:
    config = parse({
        **GPTQ,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:1.9.0"], "uri": "…"},
    })  # fmt: skip
    assert config.method == "gptq"
    assert config.layer == LayerConfig(
        method="gptq",
        group_size=128,
        symmetric=True,
        zero_points="v1",
        act_order=True,
        producer="gptqmodel:1.9.0",
    )
    assert config.for_module("model.layers.0.self_attn.q_proj") == config.layer


def test_gptq_v2_says_so_in_its_checkpoint_format_or_format() -> None:
    for key in ("checkpoint_format", "format"):
        assert parse({**GPTQ, key: "gptq_v2"}).layer.zero_points == "v2"
        assert parse({**GPTQ, key: "GPTQ"}).layer.zero_points == "v1"


def test_a_quantize_config_of_early_autogptq_names_no_method() -> None:
    config = parse({"bits": 4, "group_size": -1, "damp_percent": 0.01, "desc_act": False})
    assert config.layer.method == "gptq"
    assert config.layer.group_size == -1
    assert config.layer.symmetric is None


def test_the_whole_config_json_will_do() -> None:
    whole = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert parse({**whole, "quantization_config": GPTQ}).method == "gptq"
    assert parse({**whole, "text_config": {"quantization_config": AWQ}}).method == "awq"
    assert parse({**whole, "compression_config": compressed()}).method == "compressed-tensors"
    with pytest.raises(FormatError, match=r"config has no quantization_config: .* not quantised"):
        parse(whole)


def test_objects_of_transformers_will_do() -> None:
    class Method(Enum):
        GPTQ = "gptq"

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {**GPTQ, "quant_method": Method.GPTQ}

    assert parse(Config()).layer == parse(GPTQ).layer
    config = parse(GPTQ)
    assert parse(config) is config


def test_dynamic_rules_of_gptqmodel_count_in_their_order() -> None:
    config = parse({
        **GPTQ,
        "dynamic": {
            r"-:model\.layers\.0\..*": {},
            r"+:.*\.down_proj$": {"group_size": 64, "desc_act": False, "sym": False},
            r".*\.down_proj$": {"group_size": 32},
            r".*\.gate$": {"bits": 8},
        },
    })  # fmt: skip
    assert config.for_module("model.layers.0.mlp.down_proj") is None
    layer = config.for_module("model.layers.1.mlp.down_proj")
    assert layer is not None
    assert (layer.group_size, layer.act_order, layer.symmetric) == (64, False, False)
    assert config.for_module("model.layers.1.mlp.up_proj") == config.layer
    with pytest.raises(FormatError, match=r"model\.layers\.1\.gate: dynamic\[.*bits is 8: supp"):
        config.for_module("model.layers.1.gate")


def test_the_head_is_quantised_only_if_the_configuration_says_so() -> None:
    assert parse(GPTQ).for_module("lm_head") is None
    assert parse(GPTQ).for_module("model.lm_head") is None
    assert parse(GPTQ).for_module("model.lm_head_norm") is not None
    assert parse({**GPTQ, "lm_head": True}).for_module("lm_head") is not None
    dynamic = {"+:lm_head": {"group_size": 64}}
    assert parse({**GPTQ, "dynamic": dynamic}).for_module("lm_head") is not None


def test_modules_in_blocks_that_are_not_named_are_not_quantised() -> None:
    inside = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    config = parse({**GPTQ, "modules_in_block_to_quantize": inside})
    assert config.for_module("model.layers.3.self_attn.k_proj") is not None
    assert config.for_module("mlp.up_proj") is not None
    assert config.for_module("model.layers.3.self_attn.o_proj") is None
    assert config.for_module("model.layers.3.xmlp.up_proj") is None


# ---- AWQ ----


def test_awq_of_transformers_and_of_autoawq_are_read() -> None:
    layer = parse(AWQ).layer
    assert (layer.method, layer.group_size, layer.symmetric) == ("awq", 128, False)
    own = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    layer = parse(own).layer
    assert (layer.method, layer.group_size, layer.symmetric) == ("awq", 64, False)
    assert parse({**AWQ, "zero_point": False}).layer.symmetric is True


def test_modules_to_not_convert_are_parts_of_names() -> None:
    config = parse({**AWQ, "modules_to_not_convert": ["visual", "mlp.gate"]})
    assert config.for_module("visual.blocks.0.attn.qkv") is None
    assert config.for_module("model.layers.0.mlp.gate_proj") is None
    assert config.for_module("model.layers.0.mlp.up_proj") is not None


# ---- compressed-tensors ----


def test_compressed_tensors_are_read() -> None:
    config = parse(compressed())
    layer = config.for_module("model.layers.0.self_attn.q_proj")
    assert layer == LayerConfig(
        method="compressed-tensors", group_size=128, symmetric=True, act_order=False
    )
    assert config.layer == layer
    assert config.for_module("lm_head") is None


@pytest.mark.parametrize(
    ("actorder", "reordered"),
    [
        (None, False),
        (False, False),
        (True, True),
        ("group", True),
        ("dynamic", True),
        ("GROUP", True),
        ("weight", False),
        ("static", False),
    ],
)
def test_activation_ordering_reorders_groups_or_only_the_quantiser(
    actorder: Any, reordered: bool
) -> None:
    assert parse(compressed({"actorder": actorder})).layer.act_order is reordered


def test_channels_have_one_scale() -> None:
    channel = {"strategy": "channel", "group_size": None, "symmetric": False}
    layer = parse(compressed(channel)).layer
    assert (layer.group_size, layer.symmetric) == (-1, False)
    assert parse(compressed({"strategy": None, "group_size": -1})).layer.group_size == -1
    assert parse(compressed({"strategy": None, "group_size": 64})).layer.group_size == 64


def test_exact_targets_count_before_expressions_and_those_before_classes() -> None:
    small = {**WEIGHTS, "group_size": 64}
    smaller = {**WEIGHTS, "group_size": 256}
    config = parse(
        compressed(
            config_groups={
                "a": scheme(["Linear"]),
                "b": scheme([r"re:.*\.down_proj$"], weights=small),
                "c": scheme(["model.layers.1.mlp.down_proj"], weights=smaller),
                "d": scheme(["Embedding", "LlamaRMSNorm"]),
            },
            ignore=["lm_head", r"re:.*\.gate$"],
        )
    )
    sizes = {
        "model.layers.0.mlp.up_proj": 128,
        "model.layers.0.mlp.down_proj": 64,
        "model.layers.1.mlp.down_proj": 256,
    }
    for name, size in sizes.items():
        layer = config.for_module(name)
        assert layer is not None
        assert layer.group_size == size
    assert config.for_module("model.layers.0.mlp.gate") is None
    with pytest.raises(FormatError, match=r"in different ways: pass config\.for_module\(name\)"):
        _ = config.layer


def test_modules_that_no_group_targets_are_not_quantised() -> None:
    config = parse(compressed(config_groups={"a": scheme([r"re:.*\.q_proj$"])}))
    assert config.for_module("model.layers.0.self_attn.q_proj") is not None
    assert config.for_module("model.layers.0.self_attn.k_proj") is None


def test_a_group_that_is_not_supported_matters_only_to_its_modules() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    config = parse(
        compressed(
            format="mixed-precision",
            config_groups={
                "a": scheme([r"re:.*mlp.*"], format="pack-quantized"),
                "b": scheme([r"re:.*attn.*"], weights=fp8, format="float-quantized"),
            },
        )
    )
    assert config.for_module("model.layers.0.mlp.up_proj") is not None
    with pytest.raises(FormatError, match=r"q_proj: config_groups\['b'\]\.format is 'float-quan"):
        config.for_module("model.layers.0.self_attn.q_proj")


# ---- What is not supported ----

SUPPORTED = "supported are 4-bit gptq"

REFUSED: list[tuple[str, Any, str]] = [
    ("no mapping", 3, f"config is 3: expected a mapping, .*{SUPPORTED}"),
    ("nothing", None, "config is None: expected a mapping"),
    ("nothing in it", {}, rf"config has no quant_method, only \[\]; {SUPPORTED}"),
    ("another method", {"quant_method": "bitsandbytes"}, f"'bitsandbytes'; {SUPPORTED}"),
    ("auto-round", {"quant_method": "auto-round"}, "export it with the format auto_gptq or auto"),
    ("a method of no text", {"quant_method": 4}, f"quant_method is 4: .*{SUPPORTED}"),
    ("8 bits", {**GPTQ, "bits": 8}, "bits is 8: supported is the number 4"),
    ("no bits", {**GPTQ, "bits": None}, "bits is None: supported is the number 4"),
    ("true bits", {**AWQ, "bits": True}, "bits is True: supported is the number 4"),
    ("group size 0", {**GPTQ, "group_size": 0}, "group_size is 0: expected a positive number, or"),
    ("group size text", {**AWQ, "group_size": "128"}, "group_size is '128': expected a positive"),
    ("Marlin", {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin': .* own"),
    ("old Marlin", {**GPTQ, "is_marlin_format": True}, "is_marlin_format is true: .* Marlin"),
    ("int16 words", {**GPTQ, "pack_dtype": "int16"}, "pack_dtype is 'int16': supported is int32"),
    ("sym of text", {**GPTQ, "sym": "yes"}, "sym is 'yes': expected true or false"),
    ("dynamic of a list", {**GPTQ, "dynamic": ["a"]}, r"dynamic is \['a'\]: expected a mapping"),
    ("bad expression", {**GPTQ, "dynamic": {"+:(": {}}}, r"dynamic\['\+:\('\] is no regular expr"),
    ("GEMV", {**AWQ, "version": "gemv"}, "version is 'gemv': supported is gemm; quantise the mod"),
    ("llm-awq", {**AWQ, "backend": "llm-awq"}, "backend is 'llm-awq', whose weights lie diff"),
    ("texts", {**AWQ, "modules_to_not_convert": [3]}, "modules_to_not_convert holds 3: expected"),
    ("a text", {**AWQ, "modules_to_not_convert": "a"}, "modules_to_not_convert is 'a': expected"),
    (
        "another format",
        compressed(format="int-quantized"),
        f"format is 'int-quantized': supported is 'pack-quantized'; {SUPPORTED}",
    ),
    ("8 bits", compressed({"num_bits": 8}), r"weights\.num_bits is 8: supported is the number 4"),
    ("floats", compressed({"type": "float"}), r"weights\.type is 'float': supported is 'int'"),
    ("blocks", compressed({"strategy": "block"}), r"weights\.strategy is 'block': supported are"),
    ("no group", compressed({"group_size": None}), r"weights\.group_size is None: expected a pos"),
    ("order", compressed({"actorder": "random"}), r"weights\.actorder is 'random': supported are"),
    ("no groups", compressed(config_groups={}), r"config_groups is \{\}: expected groups with"),
    ("groups of a list", compressed(config_groups=[]), r"config_groups is \[\]: expected a map"),
    (
        "preset",
        compressed(config_groups={"W4A16": ["Linear"]}),
        r"config_groups\['W4A16'\] is \['Linear'\]: expected a mapping",
    ),
    (
        "activations",
        compressed(config_groups={"a": scheme(["Linear"], input_activations={"num_bits": 8})}),
        r"config_groups\['a'\]\.input_activations is .*: supported is null",
    ),
    (
        "no weights",
        compressed(config_groups={"a": scheme(["Linear"], weights=None)}),
        r"config_groups\['a'\]\.weights is null",
    ),
    ("bad target", compressed(ignore=["re:("]), "ignore is no regular expression"),
]


@pytest.mark.parametrize(
    ("config", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_not_supported_is_refused_by_name_and_value(config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(config)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(FormatError) as error:
        parse({"quant_method": "x" * 10_000})
    assert len(str(error.value)) < 400


def test_a_configuration_read_from_json_needs_nothing_more() -> None:
    text = json.dumps(compressed({"symmetric": False}))
    assert w4a16.QuantizationConfig.parse(json.loads(text)).layer.symmetric is False
