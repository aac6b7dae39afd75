"""A folder with a quantised model: its configuration, shards, and which tensors make a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w4a16.errors import FormatError, W4A16Error
from w4a16.files import json_object, read_json
from w4a16.formats import awq, compressed_tensors, gptq
from w4a16.formats.config import LayerConfig, QuantizationConfig
from w4a16.formats.order import extent
from w4a16.formats.reading import check_supported, read_layer
from w4a16.library import QuantOp
from w4a16.safetensors import Entry, SafetensorsFile

CONFIG = "config.json"
#: Where a quantisation's configuration is if not in config.json: AutoGPTQ's, AutoAWQ's.
LEGACY_CONFIGS = ("quantize_config.json", "quant_config.json")
#: Where config.json has it; it may also be in its text_config.
SECTIONS = ("quantization_config", "compression_config")
SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
#: What :func:`w4a16.convert` writes beside the tensors.
MANIFEST = "w4a16.json"

_ENDING = ".safetensors"
_LARGEST_INDEX = 200 << 20
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

#: For each method the tensor that makes a module a quantised one, and what belongs to it.
_ANCHORS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
_MEMBERS = {
    "gptq": gptq.TENSORS,
    "awq": awq.TENSORS,
    "compressed-tensors": compressed_tensors.TENSORS,
}
#: Names that nothing but a quantised module has: alone they are what is left of one.
_TELLING = {
    "gptq": ("qzeros", "g_idx"),
    "awq": ("qzeros",),
    "compressed-tensors": ("weight_zero_point", "weight_g_idx", "weight_scale"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a layer as it will be packed, as far as shapes tell."""

    in_features: int
    out_features: int
    n: int
    k: int
    groups: int
    has_points: bool
    """Whether zero points are stored; they may all turn out to be 8."""
    has_order: bool
    """Whether a ``g_idx`` is stored; it may turn out to be in order."""
    has_bias: bool

    @property
    def pads_inputs(self) -> bool:
        return self.k != self.in_features


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantised linear module."""

    name: str
    config: LayerConfig
    tensors: Mapping[str, str]
    """Names in the checkpoint, by last name (``qweight``, …)."""
    sizes: Sizes
    nbytes: int
    """Of all its tensors."""

    @property
    def quant_op(self) -> QuantOp:
        """The one it probably has: zero points of a weight said to be symmetric are all 8."""
        if self.sizes.has_points and not self.config.symmetric:
            return QuantOp.GROUP_SCALE_ZERO
        return QuantOp.PER_COLUMN if self.sizes.groups == 1 else QuantOp.GROUP_SCALE

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0: all (per column, without zeros)."""
        if self.quant_op is QuantOp.PER_COLUMN:
            return 0
        return self.sizes.k // self.sizes.groups


class Checkpoint:
    """A quantised safetensors checkpoint; shards are mapped, tensors read when asked for."""

    path: Path
    config: Mapping[str, Any]
    """``config.json``, empty if there is none."""
    quantization: QuantizationConfig
    quantization_config: Mapping[str, Any]
    """As it was found."""
    files: Mapping[str, SafetensorsFile]
    """Shards by name, in the order of their names."""
    tensors: Mapping[str, str]
    """For each tensor its file."""
    layers: Mapping[str, Layer]
    """Quantised modules, in the order in which they lie in the files."""
    others: tuple[str, ...]
    """All other tensors, likewise."""

    def __init__(self, path: str | Path) -> None:
        """Reads configurations and headers, and checks that each layer can be packed.

        Raises :class:`w4a16.FormatError`, or :class:`w4a16.UnsupportedError` for a layer that no
        kernel takes; messages name the file or the layer.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise FormatError(f"{self.path} is no folder: expected one with a model's files")
        if (self.path / MANIFEST).exists():
            raise FormatError(f"{self.path} was made by w4a16 convert: there is nothing to do")
        names, index = _shards(self.path)
        self.config, self.quantization_config = _configuration(self.path)
        try:
            self.quantization = QuantizationConfig.parse(self.quantization_config)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        self.files = {}
        try:
            for name in names:
                self.files[name] = SafetensorsFile(self.path / name)
            self.tensors = _places(self.path, self.files, index)
            self.layers = dict(self._find_layers())
        except BaseException:
            self.close()
            raise
        taken = {tensor for layer in self.layers.values() for tensor in layer.tensors.values()}
        self.others = tuple(name for name in self.tensors if name not in taken)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        for file in self.files.values():
            file.close()

    def file(self, tensor: str) -> SafetensorsFile:
        """The shard of a tensor."""
        try:
            return self.files[self.tensors[tensor]]
        except KeyError:
            raise FormatError(f"{self.path} has no tensor {tensor!r}") from None

    def entry(self, tensor: str) -> Entry:
        return self.file(tensor).tensors[tensor]

    def arrays(self, layer: Layer) -> dict[str, Any]:
        """A layer's tensors as :func:`w4a16.pack` takes them: views of the files, except that BF16
        is widened to float32, which is exact."""
        return {last: _numbers(self.file(tensor), tensor) for last, tensor in layer.tensors.items()}

    def release(self, layer: Layer) -> None:
        """Takes a layer's tensors out of this process's memory."""
        for tensor in layer.tensors.values():
            self.file(tensor).release(tensor)

    def prefetch(self, layer: Layer) -> None:
        """Lets the system read a layer's tensors ahead."""
        for tensor in layer.tensors.values():
            self.file(tensor).prefetch(tensor)

    def check_unchanged(self) -> None:
        """Raises :class:`w4a16.FormatError` if a shard was changed since it was opened."""
        for file in self.files.values():
            try:
                status = file.path.stat()
            except OSError as error:
                raise FormatError(f"{file.path} is gone: {error.strerror}") from error
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise FormatError(f"{file.path} was changed while it was read")

    def _find_layers(self) -> Iterator[tuple[str, Layer]]:
        method = self.quantization.method
        anchor = _ANCHORS[method]
        found = 0
        for tensor in self.tensors:
            module, _, last = tensor.rpartition(".")
            if last == anchor:
                if not module:
                    raise FormatError(f"{self.path}: {tensor} stands alone, not in a module")
                found += 1
                yield module, self._layer(module)
            elif last in _TELLING[method] and f"{module}.{anchor}" not in self.tensors:
                self._check_alone(module, last, anchor)
        if not found:
            other = next((name for name in _ANCHORS.values() if self._has(name)), None)
            hint = f"; its {other} tensors are of another method" if other else ""
            raise FormatError(
                f"{self.path} is {method} by its configuration, but has no tensor *.{anchor}{hint}"
            )

    def _has(self, last: str) -> bool:
        return any(tensor.endswith(f".{last}") for tensor in self.tensors)

    def _check_alone(self, module: str, last: str, anchor: str) -> None:
        """What is left of a layer, unless the module is said to be something else."""
        if self.quantization.for_module(module) is not None:
            raise FormatError(
                f"{self.path} has {module}.{last}, but no {module}.{anchor}: a part of the"
                " checkpoint is missing"
            )

    def _layer(self, name: str) -> Layer:
        config = self.quantization.for_module(name)
        method = self.quantization.method
        if config is None:
            raise FormatError(
                f"{self.path}: the configuration says that {name} is not quantised, but there is"
                f" {name}.{_ANCHORS[method]}"
            )
        tensors = {
            last: f"{name}.{last}" for last in _MEMBERS[method] if f"{name}.{last}" in self.tensors
        }
        try:
            sizes = _sizes({last: self._stand_in(last, t) for last, t in tensors.items()}, config)
        except W4A16Error as error:
            raise type(error)(f"{self.path}: {name}: {error}") from error
        nbytes = sum(self.entry(tensor).nbytes for tensor in tensors.values())
        return Layer(name=name, config=config, tensors=tensors, sizes=sizes, nbytes=nbytes)

    def _stand_in(self, last: str, tensor: str) -> Any:
        """An array of a tensor's dtype and shape; nothing of the tensor is read."""
        file = self.file(tensor)
        if last == "weight_shape":
            return _numbers(file, tensor)
        _check_numbers(file, tensor)
        array = file.array(tensor)
        dtype = np.float32 if file.tensors[tensor].dtype == "BF16" else array.dtype
        return np.empty(array.shape, dtype)


def _sizes(tensors: Mapping[str, Any], config: LayerConfig) -> Sizes:
    layer = read_layer(tensors, config)
    found = extent(
        layer.in_features, layer.out_features, layer.groups, layer.group_size, None, "", []
    )
    check_supported(layer, found)
    return Sizes(
        in_features=layer.in_features,
        out_features=layer.out_features,
        n=found.n,
        k=found.k,
        groups=found.groups,
        has_points=layer.points is not None,
        has_order=layer.g_idx is not None,
        has_bias=layer.bias is not None,
    )


def _numbers(file: SafetensorsFile, tensor: str) -> Any:
    _check_numbers(file, tensor)
    array = file.array(tensor)
    if file.tensors[tensor].dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if array.flags.aligned else array.copy()


def _check_numbers(file: SafetensorsFile, tensor: str) -> None:
    dtype = file.tensors[tensor].dtype
    if dtype.startswith(("F8", "F6", "F4")):
        raise FormatError(f"{tensor} is {dtype}: expected float16, bfloat16 or float32")


# ---- Configurations ----


def _configuration(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The content of config.json, and what it or a legacy file says of the quantisation."""
    config: Mapping[str, Any] = {}
    if (path / CONFIG).exists():
        config = _object(path / CONFIG)
        text = config.get("text_config")
        for outer in (config, text):
            for section in SECTIONS:
                found = outer.get(section) if isinstance(outer, Mapping) else None
                if found is not None:
                    return config, json_object(found, f"{path / CONFIG}: {section}")
    for name in LEGACY_CONFIGS:
        if (path / name).exists():
            return config, _object(path / name)
    raise FormatError(
        f"{path} does not say how its weights are quantised: no {SECTIONS[0]} in {CONFIG}, and no"
        f" {' or '.join(LEGACY_CONFIGS)}. If they are, write one of these files (GPTQ:"
        ' {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false,'
        ' "sym": true})'
    )


def _object(path: Path) -> Mapping[str, Any]:
    return json_object(read_json(path), str(path))


# ---- Shards ----


def _shards(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The names of the files, and for each tensor the file that the index says, if there is one.

    As transformers does: model.safetensors, or else the index's files.
    """
    if (path / SINGLE).exists():
        return [SINGLE], None
    names = sorted(entry.name for entry in path.iterdir())
    indices = [name for name in names if name.endswith(INDEX_ENDING)]
    preferred = SINGLE + INDEX_ENDING.removeprefix(_ENDING)
    if preferred in indices:
        indices = [preferred]
    if len(indices) > 1:
        raise FormatError(f"{path} has several indices, {', '.join(indices)}: expected one")
    if indices:
        index = _index(path / indices[0])
        files = sorted(set(index.values()))
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise FormatError(
                f"{path} lacks {len(missing)} of {len(files)} shards that {indices[0]} names:"
                f" {_some(missing)}"
            )
        return files, index
    files = [name for name in names if name.endswith(_ENDING)]
    if not files:
        raise FormatError(_no_files(path, names))
    if len(files) > 1:
        _check_numbered(path, files)
    return files, None


def _index(path: Path) -> Mapping[str, str]:
    content = json_object(read_json(path, limit=_LARGEST_INDEX, unique=True), str(path))
    index = json_object(content.get("weight_map"), f"{path}: weight_map")
    if not index:
        raise FormatError(f"{path}: weight_map is empty")
    for tensor, name in index.items():
        if not isinstance(name, str) or not name.endswith(_ENDING):
            raise FormatError(f"{path}: {tensor!r:.120} is in {name!r:.120}: expected *{_ENDING}")
        if name != Path(name).name or not name.isprintable() or "\\" in name:
            raise FormatError(
                f"{path}: {tensor!r:.120} is in {name!r:.120}: expected a file in the same folder"
            )
    return index


def _check_numbered(path: Path, files: list[str]) -> None:
    """Without an index, several files must be all the parts of one model."""
    parts = [_NUMBERED.fullmatch(name) for name in files]
    totals = {(part[1], int(part[3])) for part in parts if part}
    if None in parts or len(totals) != 1:
        raise FormatError(
            f"{path} has {len(files)} safetensors files and no index: {_some(files)}; expected"
            f" {SINGLE}, or model{INDEX_ENDING}"
        )
    (stem, total) = totals.pop()
    found = {int(part[2]) for part in parts if part}
    missing = sorted(set(range(1, total + 1)) - found)
    if missing:
        raise FormatError(
            f"{path} lacks {len(missing)} of {total} shards of {stem}: number"
            f" {_some([str(number) for number in missing])}"
        )


def _no_files(path: Path, names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if not pickled:
        return f"{path} has no safetensors files: expected {SINGLE}, or shards and their index"
    return (
        f"{path} has its weights in {_some(pickled)}, and no safetensors files. Such files are"
        " Python programs (pickle), which are not run here. Store the model anew:"
        " transformers.AutoModelForCausalLM.from_pretrained(…).save_pretrained(…,"
        " safe_serialization=True), or in a process that you trust"
        " safetensors.torch.save_file(torch.load(…, weights_only=True), …)"
    )


def _places(
    path: Path, files: Mapping[str, SafetensorsFile], index: Mapping[str, str] | None
) -> dict[str, str]:
    """For each tensor its file, in the order in which they lie there."""
    if index is not None:
        missing = [tensor for tensor, name in index.items() if tensor not in files[name].tensors]
        if missing:
            raise FormatError(
                f"{path}: {len(missing)} tensors are not in the files that the index says, such as"
                f" {missing[0]} in {index[missing[0]]}"
            )
    places: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.tensors:
            if index is not None and index.get(tensor, name) != name:
                continue  # an old copy, which the index leaves aside
            if tensor in places:
                raise FormatError(f"{path}: {tensor} is in {places[tensor]} and in {name}")
            places[tensor] = name
    return places


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
