"""A GPTQ model from disk to logits, without a download.

    python examples/hf_gptq.py

Makes a small random Llama (a stack of plain layers where transformers is not installed), quantises
its linear layers to 4 bits and writes them as a GPTQ checkpoint; from there on it is what one does
with any GPTQ checkpoint: ``w4a16.convert`` packs it, ``w4a16.load_converted`` fills a model with
it. The logits are compared with those of the same weights in FP16. Runs on a GPU that the library
was built for, elsewhere on the CPU, with the reference instead of the kernels.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import w4a16
from torch import Tensor, nn
from w4a16 import safetensors
from w4a16.library import LIBRARY

HIDDEN, INNER, BLOCKS, VOCABULARY = 256, 512, 2, 512
GROUP = 128
QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": True,
    "sym": False,
    "checkpoint_format": "gptq",
}


def main() -> None:
    torch.manual_seed(0)
    device = place()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, converted = Path(folder, "gptq"), Path(folder, "w4a16")
        reference = make_model()
        write_checkpoint(reference, checkpoint)

        start = time.perf_counter()
        w4a16.convert(checkpoint, converted)
        model = w4a16.load_converted(make_model(), converted, device=device)
        seconds = time.perf_counter() - start
        layers = [part for part in model.modules() if isinstance(part, w4a16.W4A16Linear)]
        print(f"converted and loaded {len(layers)} layers in {seconds:.1f} s; one of them:")
        print(f"  {layers[0]}")
        compare("converted model", model, reference, device)

        # Or without a converted folder: an FP16 model's layers are replaced by the checkpoint's.
        model = make_model()
        model.load_state_dict(reference.state_dict())
        model = w4a16.replace_linears(model.to(device), checkpoint)
        compare("packed in place", model, reference, device)


def place() -> str:
    """A GPU that the kernels run on, or the CPU."""
    if torch.cuda.is_available():
        problem = LIBRARY.device(0).problem
        if not problem:
            print(f"on {torch.cuda.get_device_name(0)}")
            return "cuda:0"
        print(f"the GPU cannot be used: {problem}")
    print("on the CPU, with the slow reference")
    return "cpu"


def compare(name: str, model: nn.Module, reference: nn.Module, device: str) -> None:
    """Prints how far apart the logits of two models are."""
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = logits(model, ids.to(device))
        expected = logits(reference.to(device), ids.to(device))
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"{name}: relative error of the logits {error:.1e}, same token at {agree:.0%}")


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Any = model(ids)
    found: Tensor = getattr(out, "logits", out)
    return found.double()


# ---- A small model ----


def make_model() -> nn.Module:
    """Random, in FP16."""
    if not find_spec("transformers"):
        return Plain().half().eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config).half().eval()
    return model


class Plain(nn.Module):
    """For want of transformers: token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer(x)
        head: Tensor = self.lm_head(self.norm(x))
        return head


# ---- Quantisation: rounding to nearest, in GPTQ's format ----


def write_checkpoint(model: nn.Module, folder: Path) -> None:
    """Quantises all linear layers but the head; the model keeps what 4 bits left of them."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for number, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            del tensors[f"{name}.weight"]
            stored, weight = quantise(module.weight.detach().float(), act_order=number % 2 == 0)
            tensors |= {f"{name}.{last}": tensor for last, tensor in stored.items()}
            module.weight.data.copy_(weight)
    folder.mkdir()
    names = {torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}
    parts = {
        name: (names[tensor.dtype], tensor.shape, tensor.numpy().tobytes())
        for name, tensor in tensors.items()
    }
    safetensors.write(folder / "model.safetensors", parts, {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config))


def quantise(weight: Tensor, *, act_order: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors in a GPTQ checkpoint, and the weight ``[out, in]`` that they stand for.

    ``w = (q - zero) * scale`` with q and zero in 0..15. With act-order inputs belong to groups by
    their importance, here a random order, instead of by their place.
    """
    inputs = weight.shape[1]
    order = torch.randperm(inputs) if act_order else torch.arange(inputs)
    g_idx = torch.empty(inputs, dtype=torch.int32)
    g_idx[order] = torch.arange(inputs, dtype=torch.int32) // GROUP
    by_group = weight.T[order].reshape(-1, GROUP, weight.shape[0])
    low, high = by_group.amin(1).clamp_max(0), by_group.amax(1).clamp_min(0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).int()
    group = g_idx.long()
    q = (weight.T / scales.float()[group]).round() + zeros[group]
    q = q.clamp(0, 15).int()
    restored = (q - zeros[group]) * scales.float()[group]
    stored = {
        "qweight": words(q.T).T.contiguous(),
        # The format "gptq" stores zero points minus 1, subtracted from whole words.
        "qzeros": words(zeros) - 0x11111111,
        "scales": scales,
        "g_idx": g_idx,
    }
    return stored, restored.T.half()


def words(values: Tensor) -> Tensor:
    """Eight 4-bit numbers of a row in each int32, the first one in the lowest bits."""
    shifted = values.long().reshape(values.shape[0], -1, 8) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


if __name__ == "__main__":
    main()
