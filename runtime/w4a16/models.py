"""Models of torch: their quantised linear layers replaced by :class:`w4a16.W4A16Linear`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w4a16 import packing
from w4a16.checkpoint import Checkpoint
from w4a16.converted import Converted, is_converted, open_converted
from w4a16.errors import ArgumentError, FormatError, W4A16Warning
from w4a16.foreign import layer_config, tensors_of
from w4a16.formats.config import LayerConfig, QuantizationConfig, ZeroPoints
from w4a16.modules import W4A16Linear
from w4a16.packed import PackedWeight

#: What safetensors' names are in torch, where the last part of torch's name is not the same.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}
_SHOWN = 5


def replace_linears(
    model: nn.Module,
    source: str | PathLike[str] | None = None,
    *,
    config: Any = None,
    zero_points: ZeroPoints | None = None,
    device: Any = None,
    skip: Collection[str] = (),
    progress: bool = False,
) -> nn.Module:
    """Puts :class:`W4A16Linear` in the place of a model's quantised linear layers; returns it.

    Without ``source``: of the quantised modules that the model already has (made by GPTQModel,
    AutoGPTQ, AutoAWQ or compressed-tensors, as transformers loads them), each where its tensors
    are. How they are stored is read off the modules and ``model.config.quantization_config``.

    With ``source``, a folder that ``w4a16 convert`` made, or a GPTQ, AWQ or compressed-tensors
    checkpoint: of every ``nn.Linear`` (on the meta device or not) and every quantised module that
    the folder has a quantised weight for, by its name. All else is left alone: fused modules, whose
    names differ, an ``lm_head`` that is not quantised, embeddings, also if they share the weight of
    a module that is replaced. :func:`load_converted` takes a folder's other tensors too.

    Args:
        config: A ``quantization_config`` to go by instead of the model's, without ``source``.
        zero_points: How GPTQ's are stored, whatever the configuration says.
        device: Where new layers go. Default: where the replaced one is; the CPU for the meta
            device.
        skip: Modules to leave as they are: names, last parts of names (``"lm_head"``), or patterns
            as of :mod:`fnmatch`.
        progress: Whether to show a bar, if ``rich`` is installed.

    Raises:
        ArgumentError: Nothing to replace, or sizes that do not fit.
        FormatError: A configuration that is missing where it is needed; tensors that are not what
            it says.

    Warns :class:`w4a16.W4A16Warning` with the names of quantised weights that no module has. If a
    layer cannot be made, those before it stay replaced.
    """
    _require_module(model)
    if source is None:
        return _replace(model, _in_model(model, config, zero_points, device), skip, progress)
    if config is not None:
        raise ArgumentError(
            "config was given with source: expected one of them, since a folder holds its own"
            " configuration"
        )
    with _opened(Path(source), zero_points) as stored:
        return _replace(model, _in_folder(model, stored, device, skip), skip, progress)


def load_converted(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    device: Any = None,
    skip: Collection[str] = (),
    progress: bool = False,
) -> nn.Module:
    """Fills a model from a folder that ``w4a16 convert`` made; returns it.

    Quantised layers are replaced as by :func:`replace_linears`; all other tensors go into the
    model's parameters and buffers of their names, in these parameters' dtypes. The whole model goes
    to ``device`` (default: all stays where it is; the CPU for the meta device). A model for it,
    without weights::

        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(config).half()

    Raises :class:`w4a16.FormatError` for a parameter that the folder does not have, unless it is
    tied to one that it has, or of another shape; :class:`w4a16.ArgumentError` as
    :func:`replace_linears`, and if a tensor is left on the meta device. Warns
    :class:`w4a16.W4A16Warning` of tensors that no module has.
    """
    _require_module(model)
    with open_converted(Path(directory)) as folder:
        stored = _of_converted(folder)
        model = _replace(model, _in_folder(model, stored, device, skip), skip, progress)
        _load_others(model, folder, device, skip)
    # What no checkpoint holds (positions, masks) was made with the model.
    return model if device is None else model.to(device)


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: expected a torch.nn.Module")


@dataclass(frozen=True)
class _Layer:
    """What is to be replaced, and how. Holds no tensor: memory is given back layer by layer."""

    names: tuple[str, ...]
    """More than one where the model uses a module in several places."""
    make: Callable[[nn.Module], PackedWeight]
    """The weight, from the module that is to be replaced."""


def _replace(
    model: nn.Module, layers: Sequence[_Layer], skip: Collection[str], progress: bool
) -> nn.Module:
    wanted = [layer for layer in layers if not any(_skipped(name, skip) for name in layer.names)]
    for layer in _tracked(wanted, progress):
        module = model.get_submodule(layer.names[0])
        try:
            made = W4A16Linear(layer.make(module))
        except ArgumentError as error:
            raise type(error)(f"{layer.names[0]}: {error}") from error
        _check_sizes(layer.names[0], module, made)
        made.train(module.training)
        _carry_hook(module, made)
        del module
        for name in layer.names:
            if not name:
                return made
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made)
    return model


def _check_sizes(name: str, module: nn.Module, made: W4A16Linear) -> None:
    for size in ("in_features", "out_features"):
        expected, found = getattr(module, size, None), getattr(made, size)
        if isinstance(expected, int) and expected != found:
            raise ArgumentError(
                f"{name} has {size} {expected}, its quantised weight {found}: the weight is of"
                " another model"
            )


def _carry_hook(old: nn.Module, new: nn.Module) -> None:
    """accelerate moves inputs between devices by a hook on each module."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        import_module("accelerate.hooks").add_hook_to_module(new, hook)


def _tracked(layers: Sequence[_Layer], progress: bool) -> Iterable[_Layer]:
    if progress and find_spec("rich"):
        tracked: Iterable[_Layer] = import_module("rich.progress").track(
            layers, description="Packing"
        )
        return tracked
    return layers


def _modules(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all of its names."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def _skipped(name: str, skip: Collection[str]) -> bool:
    items = (skip,) if isinstance(skip, str) else skip  # not its characters
    return any(fnmatchcase(name, item) or f".{name}".endswith(f".{item}") for item in items)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# ---- Quantised modules in the model ----


def _in_model(
    model: nn.Module, config: Any, zero_points: ZeroPoints | None, device: Any
) -> list[_Layer]:
    found = [names for module, names in _modules(model).items() if tensors_of(module) is not None]
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} has no quantised modules (with qweight, qzeros and scales, or"
            " weight_packed and weight_scale): pass source, the folder of a converted model or of a"
            " quantised checkpoint, to replace its nn.Linear modules"
        )
    parsed = _config_of(model) if config is None else QuantizationConfig.parse(config)
    layers = []
    for names in found:
        module = model.get_submodule(names[0])
        tensors = tensors_of(module) or {}
        layer = layer_config(names[0], module, tensors, parsed, zero_points)
        layers.append(_Layer(names, partial(_pack_module, layer, device)))
    return layers


def _config_of(model: nn.Module) -> QuantizationConfig | None:
    """As transformers keeps it."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return None if found is None else QuantizationConfig.parse(found)


def _pack_module(layer: LayerConfig, device: Any, module: nn.Module) -> PackedWeight:
    tensors = tensors_of(module) or {}
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return packing.pack(detached, config=layer, device=device)


# ---- Folders ----


@dataclass(frozen=True)
class _Stored:
    """The quantised weights of a folder."""

    path: Path
    names: Collection[str]
    read: Callable[[str, torch.device], PackedWeight]
    """One of them as torch tensors on a device."""


@contextmanager
def _opened(path: Path, zero_points: ZeroPoints | None) -> Iterator[_Stored]:
    if is_converted(path):
        if zero_points is not None:
            raise ArgumentError(
                f"zero_points was given for {path}, which is converted already: expected None"
            )
        with open_converted(path) as folder:
            yield _of_converted(folder)
    else:
        with Checkpoint(path) as checkpoint:
            read = partial(_read_packing, checkpoint, zero_points)
            yield _Stored(path, checkpoint.layers, read)


def _of_converted(folder: Converted) -> _Stored:
    return _Stored(folder.path, folder.layers, partial(_read_packed, folder))


def _read_packed(folder: Converted, name: str, device: torch.device) -> PackedWeight:
    weight = folder.weight(name)
    arrays: dict[str, Tensor | None] = dict.fromkeys(("zeros", "columns", "bias"))
    arrays |= {name: torch.tensor(array).to(device) for name, array in weight.arrays().items()}
    folder.release(name)
    return PackedWeight(**arrays, in_features=weight.in_features, out_features=weight.out_features)


def _read_packing(
    checkpoint: Checkpoint, zero_points: ZeroPoints | None, name: str, device: torch.device
) -> PackedWeight:
    layer = checkpoint.layers[name]
    tensors = {last: torch.tensor(array) for last, array in checkpoint.arrays(layer).items()}
    checkpoint.release(layer)
    return packing.pack(tensors, config=layer.config, zero_points=zero_points, device=str(device))


def _in_folder(
    model: nn.Module, stored: _Stored, device: Any, skip: Collection[str]
) -> list[_Layer]:
    known = {name: names for names in _modules(model).values() for name in names}
    layers: dict[tuple[str, ...], _Layer] = {}
    unknown = []
    for weight in stored.names:
        names = next((known[name] for name in _aliases(weight, model) if name in known), None)
        if names is not None and _replaceable(model.get_submodule(names[0])):
            layers[names] = _Layer(names, partial(_read, stored, weight, device))
        elif not _skipped(weight, skip):
            unknown.append(weight)
    if not layers:
        linears = [names[0] for module, names in _modules(model).items() if _replaceable(module)]
        raise ArgumentError(
            f"{stored.path} has quantised weights for {_some(unknown) or 'no module'}, none of"
            f" which is a linear module of {type(model).__name__}, which has"
            f" {_some(linears) or 'none'}"
        )
    if unknown:
        warnings.warn(
            f"{len(unknown)} of the quantised weights in {stored.path} are of no linear module of"
            f" {type(model).__name__} and were left out: {_some(unknown)}",
            W4A16Warning,
            stacklevel=3,
        )
    return list(layers.values())


def _aliases(name: str, model: nn.Module) -> Iterator[str]:
    """Checkpoints of a model with a head name its base model's modules with a prefix (in
    transformers: ``base_model_prefix``), those of the base model do not."""
    yield name
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(prefix, str) and prefix:
        yield f"{prefix}.{name}"
        if name.startswith(f"{prefix}."):
            yield name[len(prefix) + 1 :]


def _replaceable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | W4A16Linear) or tensors_of(module) is not None


def _read(stored: _Stored, name: str, device: Any, module: nn.Module) -> PackedWeight:
    if device is None:
        tensors = (*module.parameters(), *module.buffers())
        device = tensors[0].device if tensors and not tensors[0].is_meta else "cpu"
    return stored.read(name, torch.device(device))


# ---- All other tensors of a folder ----


def _load_others(model: nn.Module, folder: Converted, device: Any, skip: Collection[str]) -> None:
    targets = _state(model)
    loaded: dict[int, Tensor] = {}
    unknown = []
    for tensor, entry in folder.others().items():
        name = next((name for name in _aliases(tensor, model) if name in targets), None)
        if name is None:
            unknown.append(tensor)
            continue
        target = targets[name]
        if tuple(target.shape) != entry.shape:
            raise FormatError(
                f"{folder.path}: {tensor} is {entry.dtype} {list(entry.shape)}, but {name} of the"
                f" model is {list(target.shape)}"
            )
        value = _tensor(folder, tensor, entry.dtype, entry.shape)
        # A tied parameter has several names.
        same = [other for other, held in targets.items() if held is target]
        made = _fill(model, same, target, value, device)
        loaded[id(made)] = made
        targets |= dict.fromkeys(same, made)
        folder.release(tensor)
    _tie(model)
    _check_loaded(model, folder, loaded, skip)
    if unknown:
        warnings.warn(
            f"{len(unknown)} tensors in {folder.path} are of no module of {type(model).__name__}"
            f" and were left out: {_some(unknown)}",
            W4A16Warning,
            stacklevel=3,
        )


def _tie(model: nn.Module) -> None:
    """As transformers does after loading; a packed head has nothing to tie."""
    head = getattr(model, "get_output_embeddings", None)
    tie = getattr(model, "tie_weights", None)
    if callable(tie) and not (callable(head) and isinstance(head(), W4A16Linear)):
        tie()


def _state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _tensor(folder: Converted, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    known = getattr(torch, _DTYPES.get(dtype, ""), None)
    if known is None:
        raise FormatError(f"{folder.path}: {name} is {dtype}, which torch does not have")
    stored = torch.frombuffer(bytearray(folder.data(name)) or bytearray(1), dtype=torch.uint8)
    return stored[: folder.data(name).nbytes].view(known).reshape(shape)


def _fill(
    model: nn.Module, names: Sequence[str], target: Tensor, value: Tensor, device: Any
) -> Tensor:
    """Copies the value, or puts a new tensor in the target's place if it has to move."""
    place = torch.device("cpu" if target.is_meta else target.device) if device is None else device
    if not target.is_meta and torch.device(place) == target.device:
        with torch.no_grad():
            target.copy_(value)
        return target
    made: Tensor = value.to(device=place, dtype=target.dtype)
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = made
    return made


def _check_loaded(
    model: nn.Module, folder: Converted, loaded: Mapping[int, Tensor], skip: Collection[str]
) -> None:
    missing = []
    for name, tensor in _state(model).items():
        owner = name.rpartition(".")[0]
        own = isinstance(model.get_submodule(owner), W4A16Linear)
        if not own and id(tensor) not in loaded and not _skipped(owner, skip):
            missing.append(name)
    if missing:
        raise FormatError(
            f"{folder.path} lacks {len(missing)} tensors of {type(model).__name__}:"
            f" {_some(missing)}"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise ArgumentError(
            f"{_some(left)}: still on the meta device, and the folder does not hold them, since"
            " they are computed when a model is made: make it on a CPU or a GPU"
        )
