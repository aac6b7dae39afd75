"""`W4A16Linear` and `replace_linears` on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import w4a16
from w4a16.models import load_converted, replace_linears
from w4a16.modules import W4A16Linear

from tests.gpu.runtime.products import KINDS, NAMES, Product, torch

nn: Any = torch.nn
Module: Any = torch.nn.Module


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest) -> Product:
    return Product(request.param)


def test_a_module_computes_where_it_is_moved(product: Product) -> None:
    module = W4A16Linear.from_packed(product.host)
    x = product.x(2, 9)
    on_cpu = module(x.cpu())
    moves: list[Callable[[], Any]] = [
        lambda: module.cuda(),
        lambda: module.to("cuda", torch.bfloat16),
    ]
    for move in moves:
        move()
        assert all(buffer.is_cuda for buffer in module.buffers())
        product.check(module(x), x)
    module.cpu()
    assert torch.equal(module(x.cpu()), on_cpu)


def test_a_packed_weight_on_the_gpu_is_not_copied(product: Product) -> None:
    module = W4A16Linear(product.packed)
    for name, tensor in zip(NAMES, product.weight, strict=True):
        assert getattr(module, name) is tensor
    x = product.x(3)
    product.check(module(x), x)


def test_state_dicts_cross_devices(product: Product) -> None:
    module = W4A16Linear(product.packed)
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    empty = copy.deepcopy(module)
    for buffer in empty.buffers():
        buffer.zero_()
    empty.load_state_dict(state)
    x = product.x(3)
    product.check(empty(x), x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_stack_of_modules_breaks_no_graph(mode: str) -> None:
    torch._dynamo.reset()
    first, second = Product("act-order", k=512, n=256), Product("zeros and bias", k=256, n=128)
    stack = nn.Sequential(W4A16Linear(first.packed), nn.SiLU(), W4A16Linear(second.packed))
    compiled = torch.compile(stack, mode=mode, fullgraph=True)
    with torch.no_grad():
        for m in (1, 64, 64, 64):
            x = first.x(m, seed=m)
            found, expected = compiled(x).clone(), stack(x)
            norm = torch.linalg.vector_norm
            assert norm((found - expected).double()) <= 2e-3 * norm(expected.double())


class Quantised(Module):
    """As GPTQModel holds a layer."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, torch.from_numpy(value).cuda())


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_modules_are_packed_on_the_gpu_where_they_are(format: str) -> None:
    product = Product("zeros and bias", format=format)
    model = nn.ModuleDict({"up": Quantised(product.case.tensors()), "head": nn.Linear(4, 4)})
    options: dict[str, Any] = {"zero_points": "v1"} if format == "gptq" else {}
    replace_linears(model, **options)
    assert all(buffer.is_cuda for buffer in model["up"].buffers())
    x = product.x(6)
    product.check(model["up"](x), x)


def test_a_converted_folder_fills_a_model_on_the_gpu(tmp_path: Path) -> None:
    stored_models = pytest.importorskip("tests.runtime.models", reason="writes checkpoints")
    from w4a16.convert import convert

    stored = stored_models.model(tmp_path / "in", act_order=True)
    convert(stored.path, tmp_path / "out")
    names = list(stored.layers)

    def model(device: str) -> Any:
        made = nn.Module()
        for name in names:
            k, n = stored_models.BLOCK[name.split(".", 3)[3]]
            owner = made
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(leaf, nn.Linear(k, n, device=device))
        return made

    with pytest.warns(w4a16.W4A16Warning, match="7 tensors"):
        filled = load_converted(model("meta"), tmp_path / "out", device="cuda")
    replaced = replace_linears(model("cuda"), stored.path)
    for name in names:
        one, other = filled.get_submodule(name), replaced.get_submodule(name)
        expected = w4a16.pack(stored.layers[name], config=stored.config)
        for field, array in expected.arrays().items():
            for module in (one, other):
                found = getattr(module, field)
                assert found.is_cuda
                assert (found.cpu().numpy() == array).all(), (name, field)
