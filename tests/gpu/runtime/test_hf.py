"""Models of transformers on the kernels: a small random Llama, quantised here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import w4a16
from w4a16.models import load_converted, replace_linears
from w4a16.modules import W4A16Linear

from tests.gpu.runtime.products import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from examples import hf_gptq

ROOT = Path(__file__).resolve().parents[3]


class Gptq(torch.nn.Module):
    """As transformers loads a layer of a GPTQ checkpoint."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)
        self.bias = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint in ``gptq``, the same weights in FP16 in ``reference.pt``."""
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    reference = hf_gptq.make_model()
    hf_gptq.write_checkpoint(reference, made / "gptq")
    torch.save(reference.state_dict(), made / "reference.pt")
    return made


@pytest.fixture
def reference(folder: Path) -> Any:
    model = hf_gptq.make_model()
    model.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
    return model.cuda()


def ids() -> Any:
    random = torch.Generator().manual_seed(4)
    return torch.randint(hf_gptq.VOCABULARY, (2, 40), generator=random).cuda()


def check_logits(model: Any, reference: Any) -> None:
    with torch.no_grad():
        found = model(ids()).logits.double()
        expected = reference(ids()).logits.double()
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert error < 5e-3


def quantised_layers(model: Any) -> int:
    return sum(isinstance(module, W4A16Linear) for module in model.modules())


def test_modules_as_transformers_loads_them_are_replaced(folder: Path, reference: Any) -> None:
    from safetensors.torch import load_file

    stored = load_file(folder / "gptq" / "model.safetensors")
    model = hf_gptq.make_model()
    model.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        tensors = {
            last: stored[f"{name}.{last}"] for last in ("qweight", "qzeros", "scales", "g_idx")
        }
        setattr(model.get_submodule(owner), leaf, Gptq(tensors))
    model.config.quantization_config = hf_gptq.QUANTIZATION
    replace_linears(model.cuda())
    assert quantised_layers(model) == len(names) == 7 * hf_gptq.BLOCKS
    assert isinstance(model.lm_head, torch.nn.Linear)
    check_logits(model, reference)


def test_a_converted_model_gives_the_same_logits_and_generates(
    folder: Path, reference: Any
) -> None:
    from w4a16.convert import convert

    converted = folder / "converted"
    if not converted.exists():
        convert(folder / "gptq", converted)
    model: Any = load_converted(hf_gptq.make_model(), converted, device="cuda")
    check_logits(model, reference)
    found = model.generate(ids(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 48)


def test_a_checkpoint_replaces_an_fp16_models_layers(folder: Path, reference: Any) -> None:
    model: Any = hf_gptq.make_model()
    model.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
    replace_linears(model.cuda(), folder / "gptq", skip=["o_proj"])
    assert quantised_layers(model) == 6 * hf_gptq.BLOCKS
    check_logits(model, reference)
    with pytest.raises(w4a16.ArgumentError, match="no quantised modules"):
        replace_linears(model)


def test_the_example_runs_on_the_gpu() -> None:
    program = (
        f"import sys, runpy; sys.path[:0] = [{str(ROOT / 'runtime')!r}];"
        f" runpy.run_path({str(ROOT / 'examples' / 'hf_gptq.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on NVIDIA" in done.stdout, done.stdout
    assert done.stdout.count("relative error of the logits") == 2
