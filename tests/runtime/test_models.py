"""Quantised linear layers of whole models are replaced: from modules, and from folders."""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import w4a16
from torch import nn
from w4a16.convert import convert
from w4a16.models import load_converted, replace_linears
from w4a16.modules import W4A16Linear

from tests.runtime import models as stored_models
from tests.runtime.checkpoints import case_of
from tests.runtime.models import BLOCK, HIDDEN, INNER, VOCABULARY

FORMATS = ("gptq", "awq", "compressed-tensors")


# ---- A model like the ones on disk ----


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Any) -> Any:
        return self.o_proj(self.q_proj(x) / 1000)


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(torch.tanh(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()

    def forward(self, x: Any) -> Any:
        x = x + self.self_attn(x) / 100
        return x + self.mlp(x) / 100


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(HIDDEN, bias=False)

    def forward(self, ids: Any) -> Any:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Causal(nn.Module):
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = Base()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Any) -> Any:
        return self.lm_head(self.model(ids))


LINEARS = {f"model.layers.{block}.{name}" for block in range(2) for name in BLOCK}


def replaced(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, W4A16Linear)}


def assert_from(model: Any, stored: stored_models.Model, prefix: str = "") -> None:
    """Every layer holds what packing its tensors gives."""
    for name, tensors in stored.layers.items():
        module = model.get_submodule(name.removeprefix(prefix))
        expected = w4a16.pack(tensors, config=stored.config)
        for field, array in expected.arrays().items():
            assert np.array_equal(getattr(module, field).numpy(), np.asarray(array)), (name, field)


# ---- From folders ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("converted", [False, True])
def test_linears_named_in_a_folder_are_replaced(
    tmp_path: Path, format: str, converted: bool
) -> None:
    stored = stored_models.model(tmp_path / "in", format=format, act_order=True)
    folder = stored.path
    if converted:
        folder = tmp_path / "out"
        convert(stored.path, folder, device="cpu")
    model = Causal()
    head = model.lm_head
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace_linears(model, folder) is model
    assert replaced(model) == LINEARS
    assert model.lm_head is head
    assert_from(model, stored)
    assert all(not buffer.is_inference() for buffer in model.buffers())


def test_names_may_lack_or_have_the_base_models_prefix(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    base = Base()
    base.base_model_prefix = "model"
    replace_linears(base, stored.path)
    assert_from(base, stored, "model.")


def test_modules_on_the_meta_device_are_made_on_the_cpu(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    with torch.device("meta"):
        model = Causal()
    replace_linears(model, stored.path)
    assert_from(model, stored)
    assert model.lm_head.weight.is_meta


def test_modules_to_skip_are_left(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    for skip, left in (
        (["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
        (["up_proj"], {name for name in LINEARS if name.endswith("up_proj")}),
        ("up_proj", {name for name in LINEARS if name.endswith("up_proj")}),
        (["model.layers.1.*"], {name for name in LINEARS if ".1." in name}),
        (["layers.1.*", "p_proj", "1"], set()),
    ):
        model = replace_linears(Causal(), stored.path, skip=skip)
        assert replaced(model) == LINEARS - left


def test_weights_that_no_module_has_are_reported(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    model = Causal()
    model.model.layers[0].self_attn.qkv_proj = model.model.layers[0].self_attn.q_proj
    del model.model.layers[0].self_attn.q_proj  # fused in the model, apart in the folder
    with pytest.warns(w4a16.W4A16Warning, match=r"1 of .* left out: model.layers.0.self_attn.q_"):
        replace_linears(model, stored.path)
    assert replaced(model) == LINEARS - {"model.layers.0.self_attn.q_proj"}


def test_a_folder_for_another_model_is_refused(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    with pytest.raises(w4a16.ArgumentError, match=r"model.layers.*none of which.*has up, down"):
        replace_linears(
            nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}), stored.path
        )
    model = Causal()
    model.model.layers[1].mlp.up_proj = nn.Linear(HIDDEN, INNER + 8)
    with pytest.raises(
        w4a16.ArgumentError, match=f"layers.1.mlp.up_proj has out_features {INNER + 8}"
    ):
        replace_linears(model, stored.path)


def test_what_is_said_twice_is_refused(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    with pytest.raises(w4a16.ArgumentError, match="config was given with source"):
        replace_linears(Causal(), stored.path, config=stored.config)
    convert(stored.path, tmp_path / "out", device="cpu")
    with pytest.raises(w4a16.ArgumentError, match="zero_points was given"):
        replace_linears(Causal(), tmp_path / "out", zero_points="v1")
    with pytest.raises(w4a16.FormatError, match="no folder"):
        replace_linears(Causal(), tmp_path / "nowhere")


def test_zero_points_overrule_a_folders_configuration(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    model = replace_linears(Causal(), stored.path, zero_points="v2")
    name, tensors = next(iter(stored.layers.items()))
    expected: Any = w4a16.pack(tensors, config=stored.config, zero_points="v2")
    assert np.array_equal(model.get_submodule(name).zeros.numpy(), expected.zeros)


def test_a_module_with_two_names_is_replaced_by_one(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    model = Causal()
    attention = model.model.layers[0].self_attn
    attention.again = attention.q_proj
    replace_linears(model, stored.path)
    assert attention.again is attention.q_proj
    assert isinstance(attention.again, W4A16Linear)


def test_training_mode_and_hooks_of_accelerate_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_models.model(tmp_path / "in")
    added = []
    fake = types.ModuleType("accelerate.hooks")
    fake.add_hook_to_module = lambda module, hook: added.append((module, hook))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate.hooks", fake)
    model = Causal().eval()
    model.model.layers[0].mlp.up_proj._hf_hook = "moves"
    replace_linears(model, stored.path)
    assert not model.model.layers[0].mlp.up_proj.training
    assert added == [(model.model.layers[0].mlp.up_proj, "moves")]


def test_a_bar_may_be_shown(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    assert replaced(replace_linears(Causal(), stored.path, progress=True)) == LINEARS


# ---- Whole models ----


def fitting(path: Path, **options: Any) -> stored_models.Model:
    """Without the tensors that only test the copying of files."""
    made = stored_models.model(path, **options)
    odd = {"model.rotary.mask", "model.step", "model.fp8.weight", "model.empty"}
    tensors = {name: tensor for name, tensor in made.others.items() if name not in odd}
    for name, members in made.layers.items():
        tensors |= {
            f"{name}.{last}": stored_models._torch(value) for last, value in members.items()
        }
    for file in path.glob("*.safetensors*"):
        file.unlink()
    stored_models.save(path, tensors, 2)
    return stored_models.Model(
        path=made.path,
        config=made.config,
        layers=made.layers,
        others={name: made.others[name] for name in made.others if name not in odd},
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_converted_model_is_filled(tmp_path: Path, device: str) -> None:
    stored = fitting(tmp_path / "in", act_order=True)
    convert(stored.path, tmp_path / "out", device="cpu")
    with torch.device(device):
        model = Causal().half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_converted(model, tmp_path / "out") is model
    assert_from(model, stored)
    for name, tensor in stored.others.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, tensor.half())
        assert parameter.requires_grad
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    stored = fitting(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    from safetensors.torch import load_file, save_file

    shard = path.with_name(index["weight_map"].pop("lm_head.weight"))
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard, {"format": "pt"})
    path.write_text(json.dumps(index))
    convert(stored.path, tmp_path / "out", device="cpu")
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Causal().half()
        model.lm_head.weight = model.model.embed_tokens.weight
        load_converted(model, tmp_path / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, stored.others["model.embed_tokens.weight"].half())
    # Not tied, and the folder does not have it.
    with pytest.raises(w4a16.FormatError, match=r"lacks 1 tensors of Causal: lm_head.weight"):
        load_converted(Causal().half(), tmp_path / "out")


def test_tensors_that_no_module_has_are_reported_and_wrong_shapes_refused(tmp_path: Path) -> None:
    stored = stored_models.model(tmp_path / "in")
    convert(stored.path, tmp_path / "out", device="cpu")
    with pytest.warns(w4a16.W4A16Warning, match=r"4 tensors in .* left out"):
        load_converted(Causal().half(), tmp_path / "out")
    model = Causal().half()
    model.model.norm = nn.LayerNorm(HIDDEN + 1, bias=False)
    with pytest.raises(w4a16.FormatError, match=r"model.norm.weight is F32 \[256\]"):
        load_converted(model, tmp_path / "out")


def test_what_the_folder_cannot_fill_is_named(tmp_path: Path) -> None:
    stored = fitting(tmp_path / "in")
    convert(stored.path, tmp_path / "out", device="cpu")
    model = Causal().half()
    model.extra = nn.Linear(8, 8)
    with pytest.raises(w4a16.FormatError, match=r"lacks 2 tensors of Causal: extra.weight, extra"):
        load_converted(model, tmp_path / "out")
    del model.extra
    model = Causal().half()
    model.register_buffer("frequencies", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(w4a16.ArgumentError, match="frequencies: still on the meta device"):
        load_converted(model, tmp_path / "out")
    with pytest.raises(w4a16.FormatError, match=r"w4a16\.json"):
        load_converted(Causal().half(), stored.path)


# ---- From modules ----


class Quantised(nn.Module):
    """As GPTQModel, AutoAWQ and compressed-tensors hold a layer: by names alone."""

    def __init__(self, tensors: dict[str, Any], **attributes: Any) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, torch.as_tensor(value))
        if "bias" not in tensors:
            self.bias = None
        for name, value in attributes.items():
            setattr(self, name, value)


def quantised(format: str, seed: int = 1, **kind: Any) -> tuple[Any, dict[str, Any]]:
    case = case_of(
        np.random.default_rng(seed),
        **{"format": format, "k": 256, "n": 24, "group_size": 128, "bias": True, **kind},
    )
    return case, case.tensors()


def model_of(config: Any, **modules: Any) -> Any:
    model = nn.ModuleDict(modules)
    model.config = types.SimpleNamespace(quantization_config=config)
    return model


class ConfigObject:
    """As transformers keeps a quantization_config."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def to_dict(self) -> dict[str, Any]:
        return self.content


def assert_packed(module: Any, tensors: dict[str, Any], **options: Any) -> None:
    assert isinstance(module, W4A16Linear)
    for field, array in w4a16.pack(tensors, **options).arrays().items():
        assert np.array_equal(getattr(module, field).numpy(), np.asarray(array)), field


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("as_object", [False, True])
def test_quantised_modules_are_replaced(format: str, as_object: bool) -> None:
    _, tensors = quantised(format)
    config: Any = stored_models.CONFIGS[format]
    plain = nn.Linear(3, 3)
    model = model_of(
        ConfigObject(config) if as_object else config, up=Quantised(tensors), lm_head=plain
    )
    assert replace_linears(model) is model
    assert model["lm_head"] is plain
    assert_packed(model["up"], tensors, config=config)


def test_gptq_and_awq_are_told_apart_without_a_configuration() -> None:
    _, tensors = quantised("awq")
    model = nn.ModuleDict({"a": Quantised(tensors)})
    assert_packed(replace_linears(model)["a"], tensors, format="awq")
    _, tensors = quantised("compressed-tensors")
    assert_packed(
        replace_linears(nn.ModuleDict({"a": Quantised(tensors)}))["a"],
        tensors,
        format="compressed-tensors",
    )
    with pytest.raises(w4a16.FormatError, match=r"a is a .*Quantised.*zero_points.*'v1'.*'v2'"):
        replace_linears(nn.ModuleDict({"a": Quantised(quantised("gptq")[1])}))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_module_knows_better_than_the_configuration_how_its_zero_points_are_stored(
    version: str,
) -> None:
    """GPTQModel adds 1 when it loads a checkpoint of the format gptq."""
    _, tensors = quantised("gptq_v2" if version == "v2" else "gptq")
    number = int(version[1])
    module = Quantised(tensors, qzero_format=lambda: number)
    model = model_of(stored_models.CONFIGS["gptq"], a=module)
    assert_packed(replace_linears(model)["a"], tensors, format="gptq", zero_points=version)
    # What the caller says counts most.
    other: Any = "v2" if version == "v1" else "v1"
    model = model_of(stored_models.CONFIGS["gptq"], a=Quantised(tensors, qzero_format=number))
    found = replace_linears(model, zero_points=other)["a"]
    assert_packed(found, tensors, format="gptq", zero_points=other)


def test_a_configuration_can_be_passed() -> None:
    _, tensors = quantised("gptq_v2")
    config = {**stored_models.CONFIGS["gptq"], "checkpoint_format": "gptq_v2"}
    model = nn.ModuleDict({"a": Quantised(tensors)})
    assert_packed(replace_linears(model, config=config)["a"], tensors, config=config)


def test_a_module_that_is_the_model_is_returned_replaced() -> None:
    _, tensors = quantised("awq")
    assert_packed(replace_linears(Quantised(tensors)), tensors, format="awq")


def test_an_unused_g_idx_is_no_act_order() -> None:
    case, tensors = quantised("gptq", symmetric=True)
    ordered = {**tensors, "g_idx": np.arange(case.k, dtype=np.int32) // 128}
    model = model_of(stored_models.CONFIGS["gptq"], a=Quantised(ordered), b=Quantised(tensors))
    replace_linears(model)
    assert model["a"].columns is None
    assert torch.equal(model["a"].packed, model["b"].packed)


@pytest.mark.parametrize("attribute", ["q4", "q_handle"])
def test_weights_that_a_kernel_has_rearranged_are_refused(attribute: str) -> None:
    _, tensors = quantised("gptq")
    model = model_of(
        stored_models.CONFIGS["gptq"], a=Quantised(tensors), b=Quantised(tensors, **{attribute: 5})
    )
    before = model["a"]
    with pytest.raises(w4a16.FormatError, match=r"b is a .*rearranged.*backend.*source"):
        replace_linears(model)
    assert model["a"] is before
    wrong = {**tensors, "qweight": np.zeros((16, 48), np.int32)}
    with pytest.raises(w4a16.FormatError, match=r"a.qweight is \[16, 48\].*rearranged"):
        replace_linears(model_of(stored_models.CONFIGS["gptq"], a=Quantised(wrong)))


def test_a_configuration_of_another_method_is_refused() -> None:
    _, tensors = quantised("awq")
    with pytest.raises(w4a16.FormatError, match=r"a holds tensors as awq.*gptq.*config"):
        replace_linears(model_of(stored_models.CONFIGS["gptq"], a=Quantised(tensors)))


def test_a_model_without_quantised_modules_is_refused() -> None:
    with pytest.raises(w4a16.ArgumentError, match=r"Causal has no quantised modules.*source"):
        replace_linears(Causal())


def test_errors_of_a_layer_name_it() -> None:
    _, tensors = quantised("gptq")
    wrong = {**tensors, "scales": tensors["scales"][:1]}
    with pytest.raises(w4a16.FormatError, match=r"^a: .*scales"):
        replace_linears(model_of(stored_models.CONFIGS["gptq"], a=Quantised(wrong)))


def test_what_is_no_module_is_refused_by_name(tmp_path: Path) -> None:
    for call in (w4a16.replace_linears, w4a16.load_converted):
        with pytest.raises(w4a16.ArgumentError, match=r"^model is a NoneType: expected a torch"):
            call(None, tmp_path)
