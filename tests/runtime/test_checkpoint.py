"""Model folders: configurations, shards, indices, and which tensors make a layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from w4a16.checkpoint import Checkpoint
from w4a16.errors import FormatError, UnsupportedError
from w4a16.library import QuantOp

from tests.runtime.models import BLOCK, CONFIGS, Model, model, save

FORMATS = tuple(CONFIGS)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rewrite(made: Model, edit: Callable[[dict[str, torch.Tensor]], Any], shards: int = 1) -> None:
    """Edits the tensors."""
    tensors = dict(made.others)
    for name, members in made.layers.items():
        for last, value in members.items():
            array = value if isinstance(value, torch.Tensor) else torch.tensor(np.array(value))
            tensors[f"{name}.{last}"] = array.contiguous()
    edit(tensors)
    for old in (*made.path.glob("*.safetensors"), *made.path.glob("*.index.json")):
        old.unlink()
    save(made.path, tensors, shards)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_layers_are_found_wherever_their_tensors_lie(
    tmp_path: Path, format: str, shards: int
) -> None:
    made = model(tmp_path / "m", format=format, shards=shards)
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.files) == shards
        assert set(checkpoint.layers) == set(made.layers)
        assert set(checkpoint.others) == set(made.others)
        spread = 0
        for name, layer in checkpoint.layers.items():
            assert set(layer.tensors) == set(made.layers[name])
            k, n = BLOCK[name.split(".", 3)[3]]
            sizes = layer.sizes
            assert (sizes.in_features, sizes.out_features, sizes.k, sizes.n) == (k, n, k, n)
            assert (layer.quant_op, layer.group_size) == (QuantOp.GROUP_SCALE_ZERO, 128)
            arrays = checkpoint.arrays(layer)
            for last, expected in made.layers[name].items():
                np.testing.assert_array_equal(arrays[last], np.asarray(expected))
            checkpoint.release(layer)
            spread += len({checkpoint.tensors[t] for t in layer.tensors.values()}) > 1
        assert (spread > 0) == (shards > 1)


@pytest.mark.parametrize("format", FORMATS)
def test_symmetric_layers_are_said_to_have_no_zeros(tmp_path: Path, format: str) -> None:
    settings: dict[str, Any] = {"gptq": {"sym": True}, "awq": {"zero_point": False}}.get(format, {})
    if format == "compressed-tensors":
        settings = json.loads(json.dumps(CONFIGS[format]))
        settings["config_groups"]["group_0"]["weights"]["symmetric"] = True
    made = model(tmp_path / "m", format=format, symmetric=True, quantization_config=settings)
    with Checkpoint(made.path) as checkpoint:
        assert {layer.quant_op for layer in checkpoint.layers.values()} == {QuantOp.GROUP_SCALE}


def test_scales_in_bf16_are_widened_exactly(tmp_path: Path) -> None:
    made = model(tmp_path / "m", scales=torch.bfloat16)
    with Checkpoint(made.path) as checkpoint:
        for name, layer in checkpoint.layers.items():
            scales = checkpoint.arrays(layer)["scales"]
            assert scales.dtype == np.float32
            np.testing.assert_array_equal(scales, made.layers[name]["scales"].float().numpy())


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("with_config", [True, False])
def test_configurations_of_old_programs_are_read(
    tmp_path: Path, name: str, with_config: bool
) -> None:
    made = model(tmp_path / "m")
    (made.path / name).write_text(json.dumps({**made.config, "desc_act": False}))
    if with_config:
        change(made.path / "config.json", lambda c: c.pop("quantization_config"))
    else:
        (made.path / "config.json").unlink()
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.layers) == len(made.layers)
        assert checkpoint.quantization_config["bits"] == 4


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("section", ["quantization_config", "compression_config"])
def test_a_configuration_is_found_in_each_of_its_places(
    tmp_path: Path, nested: bool, section: str
) -> None:
    made = model(tmp_path / "m", format="compressed-tensors")

    def edit(content: dict[str, Any]) -> None:
        found = {section: content.pop("quantization_config")}
        content.update({"text_config": found} if nested else found)

    change(made.path / "config.json", edit)
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.layers) == len(made.layers)


def test_a_single_file_of_any_name_and_numbered_files_without_an_index_are_read(
    tmp_path: Path,
) -> None:
    made = model(tmp_path / "one", shards=1)
    (made.path / "model.safetensors").rename(made.path / "gptq_model-4bit-128g.safetensors")
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.layers) == len(made.layers)
    made = model(tmp_path / "several", shards=3)
    (made.path / "model.safetensors.index.json").unlink()
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.layers) == len(made.layers)
    (made.path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"lacks 1 of 3 shards of model: number 2"):
        Checkpoint(made.path)


def test_a_whole_file_counts_before_an_index_and_an_index_before_other_files(
    tmp_path: Path,
) -> None:
    made = model(tmp_path / "m", shards=2)
    (made.path / "consolidated.safetensors").write_bytes(b"of another program")
    with Checkpoint(made.path) as checkpoint:
        assert len(checkpoint.files) == 2
    save(
        made.path,
        {
            f"{n}.{t}": torch.tensor(np.array(v))
            for n, m in made.layers.items()
            for t, v in m.items()
        },
        1,
    )
    with Checkpoint(made.path) as checkpoint:
        assert list(checkpoint.files) == ["model.safetensors"]
        assert checkpoint.others == ()


def test_an_old_copy_of_a_tensor_that_the_index_leaves_aside_is_left_aside(
    tmp_path: Path,
) -> None:
    made = model(tmp_path / "m", shards=2)
    index = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    place = index["model.norm.weight"]
    other = next(name for name in set(index.values()) if name != place)
    from safetensors.torch import load_file, save_file

    tensors = load_file(made.path / other)
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, made.path / other)
    with Checkpoint(made.path) as checkpoint:
        assert checkpoint.tensors["model.norm.weight"] == place
        assert checkpoint.entry("model.norm.weight").shape == (256,)
    (made.path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match=r"model.norm.weight is in .* and in"):
        Checkpoint(made.path)


# ---- What is wrong ----


def quantization(**values: Any) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        change(path / "config.json", lambda c: c["quantization_config"].update(values))

    return edit


def weight_map(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda path: change(
        path / "model.safetensors.index.json", lambda c: edit(c["weight_map"])
    )


def put(name: str, content: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(content)


def without_quantization(path: Path) -> None:
    change(path / "config.json", lambda c: c.pop("quantization_config"))


def without_shards(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
        file.unlink()


def cut(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[1]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 5)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no quantization": (without_quantization, "does not say how its weights are quantised"),
    "config of another kind": (put("config.json", "[]"), "config.json is no JSON object"),
    "config that is no JSON": (put("config.json", "{"), "config.json is no JSON"),
    "config nested deeply": (put("config.json", '{"a":' * 100_000), "nested too deeply"),
    "quantization of another kind": (
        put("config.json", '{"quantization_config": 4}'),
        "quantization_config is no JSON object",
    ),
    "unknown method": (quantization(quant_method="exl2"), "quant_method is 'exl2'"),
    "8 bits": (quantization(bits=8), "bits is 8"),
    "another group size": (quantization(group_size=64), r"model.layers.0.*: .*group size"),
    "only pickled weights": (without_shards, r"pytorch_model.bin.*pickle.*safe_serialization=True"),
    "a truncated shard": (cut, r"00002-of-00003.safetensors is no safetensors file: .*truncated"),
    "a missing shard": (
        lambda path: (path / "model-00002-of-00003.safetensors").unlink(),
        r"lacks 1 of 3 shards .*: model-00002-of-00003.safetensors",
    ),
    "two indices": (
        lambda path: [
            (path / "model.safetensors.index.json").rename(path / "a.safetensors.index.json"),
            (path / "b.safetensors.index.json").write_text("{}"),
        ],
        "several indices",
    ),
    "a path in the index": (
        weight_map(lambda m: m.update({"lm_head.weight": "../../secret.safetensors"})),
        r"'lm_head.weight' is in '../../secret.safetensors': expected a file in the same folder",
    ),
    "an absolute path": (
        weight_map(lambda m: m.update({"lm_head.weight": "/etc/model.safetensors"})),
        "in the same folder",
    ),
    "a Windows path": (
        weight_map(lambda m: m.update({"lm_head.weight": "..\\x.safetensors"})),
        "in the same folder",
    ),
    "a zero in a name": (
        weight_map(lambda m: m.update({"lm_head.weight": "x\0.safetensors"})),
        "in the same folder",
    ),
    "a device in the index": (
        weight_map(lambda m: m.update({"lm_head.weight": "/dev/zero"})),
        r"expected \*.safetensors",
    ),
    "a number in the index": (
        weight_map(lambda m: m.update({"lm_head.weight": 3})),
        r"expected \*.safetensors",
    ),
    "an empty index": (weight_map(lambda m: m.clear()), "weight_map is empty"),
    "an index without a map": (put("model.safetensors.index.json", "{}"), "weight_map is no JSON"),
    "a name twice in the index": (
        put(
            "model.safetensors.index.json",
            '{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}',
        ),
        "'a' stands there twice",
    ),
    "a tensor that is not there": (
        weight_map(lambda m: m.update({"x.weight": "model-00001-of-00003.safetensors"})),
        "1 tensors are not in the files that the index says, such as x.weight",
    ),
    "already converted": (put("w4a16.json", "{}"), "was made by w4a16 convert"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_the_file_and_the_reason(tmp_path: Path, case: str) -> None:
    made = model(tmp_path / "m", shards=3)
    edit, message = BROKEN[case]
    edit(made.path)
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint(made.path)
    assert str(made.path) in str(caught.value) or "is '" in message or "bits" in message


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: value})


UP = "model.layers.1.mlp.up_proj"
MISFITS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no scales": ("gptq", drop(f"{UP}.scales"), f"{UP}: .*scales is missing"),
    "no qweight": ("gptq", drop(f"{UP}.qweight"), f"has {UP}.qzeros, but no {UP}.qweight"),
    "no weight_packed": (
        "compressed-tensors",
        drop(f"{UP}.weight_packed"),
        f"but no {UP}.weight_packed",
    ),
    "AWQ without qweight": ("awq", drop(f"{UP}.qweight"), f"but no {UP}.qweight"),
    "scales of another shape": (
        "gptq",
        replace(f"{UP}.scales", torch.ones(2, 8, dtype=torch.float16)),
        f"{UP}: scales is float16 .2, 8.",
    ),
    "scales in FP8": (
        "gptq",
        replace(f"{UP}.scales", torch.ones(2, 384).to(torch.float8_e4m3fn)),
        f"{UP}: {UP}.scales is F8_E4M3",
    ),
    "qweight in int8": (
        "awq",
        replace(f"{UP}.qweight", torch.ones(256, 48, dtype=torch.int8)),
        f"{UP}: qweight is int8",
    ),
    "AWQ shapes in a GPTQ model": (
        "gptq",
        replace(f"{UP}.qweight", torch.ones(256, 48, dtype=torch.int32)),
        f"{UP}: .*as in an AWQ",
    ),
    "three dimensions": (
        "gptq",
        replace(f"{UP}.qweight", torch.ones(2, 32, 384, dtype=torch.int32)),
        f"{UP}: qweight is int32 .2, 32, 384.",
    ),
    "no quantised layer": (
        "gptq",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name],
        r"no tensor \*.qweight",
    ),
    "layers of another method": (
        "gptq",
        lambda tensors: [
            tensors.update({name.replace("qweight", "weight_packed"): tensors.pop(name)})
            if name.endswith(".qweight")
            else tensors.pop(name)
            for name in list(tensors)
            if ".layers." in name
        ],
        "its weight_packed tensors are of another method",
    ),
    "a lonely tensor": (
        "gptq",
        lambda tensors: tensors.update({"qweight": torch.ones(1, dtype=torch.int32)}),
        "qweight stands alone",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_layer_that_does_not_fit_is_named_before_any_work(tmp_path: Path, case: str) -> None:
    format, edit, message = MISFITS[case]
    made = model(tmp_path / "m", format=format)
    rewrite(made, edit)
    with pytest.raises(FormatError, match=message):
        Checkpoint(made.path)


def test_a_group_size_that_no_kernel_takes_is_an_error_before_any_work(tmp_path: Path) -> None:
    made = model(tmp_path / "m", quantization_config={"group_size": 16})

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith((".scales", ".qzeros")):
                tensors[name] = tensors[name].repeat_interleave(8, 0)

    rewrite(made, edit)
    with pytest.raises(UnsupportedError, match=r"model.layers.0.*group size 16"):
        Checkpoint(made.path)


def test_a_module_that_the_configuration_leaves_out_may_not_be_quantised(tmp_path: Path) -> None:
    made = model(
        tmp_path / "m", quantization_config={"dynamic": {rf"-:{UP}".replace(".", r"\."): {}}}
    )
    with pytest.raises(FormatError, match=f"says that {UP} is not quantised, but there is"):
        Checkpoint(made.path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    made = model(tmp_path / "m", shards=1)
    file = made.path / "model.safetensors"
    with Checkpoint(made.path) as checkpoint:
        checkpoint.check_unchanged()
        file.touch()
        with pytest.raises(FormatError, match="was changed while it was read"):
            checkpoint.check_unchanged()
        file.unlink()
        with pytest.raises(FormatError, match="is gone"):
            checkpoint.check_unchanged()


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(FormatError, match="is no folder"):
            Checkpoint(tmp_path / name)
    with pytest.raises(FormatError, match=r"does not say|no safetensors files"):
        Checkpoint(tmp_path)
