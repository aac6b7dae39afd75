"""Small quantised models on disk, written with the safetensors package, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.runtime.checkpoints import Case, case_of

HIDDEN, INNER, VOCABULARY = 256, 384, 96
#: Shapes [K, N] of the linear modules of a block.
BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 128,
                    "symmetric": False,
                },
            }
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was written."""

    path: Path
    config: dict[str, Any]
    """``quantization_config``."""
    layers: Mapping[str, dict[str, Any]]
    """Tensors by last name, as :func:`w4a16.pack` takes them."""
    others: Mapping[str, torch.Tensor]


def model(
    path: Path,
    *,
    format: str = "gptq",
    shards: int = 3,
    blocks: int = 2,
    act_order: bool = False,
    symmetric: bool = False,
    bias: bool = True,
    seed: int = 1,
    scales: torch.dtype = torch.float16,
    quantization_config: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, int]] = BLOCK,
    group_size: int = 128,
) -> Model:
    """Tensors are dealt out to the shards in turn, so that layers lie in several of them."""
    rng = np.random.default_rng(seed)
    config = {**CONFIGS[format]}
    if format == "gptq":
        config |= {"desc_act": act_order, "sym": symmetric, "group_size": group_size}
    config |= quantization_config or {}
    layers: dict[str, dict[str, Any]] = {}
    for block in range(blocks):
        for place, (name, (k, n)) in enumerate(shapes.items()):
            case = case_of(
                rng,
                format=format,
                k=k,
                n=n,
                group_size=group_size,
                symmetric=symmetric,
                act_order="shuffled" if act_order else "none",
                bias=bias and place % 2 == 0,
            )
            layers[f"model.layers.{block}.{name}"] = _tensors(case, scales)
    others: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": _random(rng, (VOCABULARY, HIDDEN), torch.bfloat16),
        "model.norm.weight": _random(rng, (HIDDEN,), torch.float32),
        "lm_head.weight": _random(rng, (VOCABULARY, HIDDEN), torch.float16),
        "model.rotary.mask": torch.tensor(rng.integers(0, 2, 7), dtype=torch.bool),
        "model.step": torch.tensor(12345678901234, dtype=torch.int64),
        "model.fp8.weight": _random(rng, (3, 5), torch.float32).to(torch.float8_e4m3fn),
        "model.empty": torch.empty((0, 4), dtype=torch.int8),
    }
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {**others}
    for name, members in layers.items():
        tensors |= {f"{name}.{last}": _torch(value) for last, value in members.items()}
    save(path, tensors, shards)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "tie_word_embeddings": False,
        "quantization_config": config,
        "vocab_size": VOCABULARY,
    }
    (path / "config.json").write_text(json.dumps(content))
    (path / "tokenizer.json").write_text('{"model": "ä"}')
    (path / "generation_config.json").write_text("{}")
    (path / "templates").mkdir()
    (path / "templates" / "chat.jinja").write_text("{{ messages }}")
    (path / ".cache").mkdir()
    (path / ".cache" / "download").write_text("not of the model")
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return Model(path=path, config=config, layers=layers, others=others)


def save(path: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """In one file, or in several with an index."""
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        return
    index: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(part, path / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def _tensors(case: Case, scales: torch.dtype) -> dict[str, Any]:
    made = case.tensors()
    name = "weight_scale" if "weight_scale" in made else "scales"
    if scales is not torch.float16:
        made[name] = torch.from_numpy(made[name]).to(scales)
    return made


def _torch(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    return torch.from_numpy(np.ascontiguousarray(value))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape)).to(dtype)
