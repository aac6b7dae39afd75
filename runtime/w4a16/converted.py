"""What ``w4a16 convert`` writes: the manifest ``w4a16.json``, and the tensors it describes.

A converted folder holds ``config.json`` (with ``quantization_config`` ``{"quant_method": "w4a16",
…}``), safetensors files as transformers names them, and the manifest. A layer's arrays are those
of :class:`w4a16.PackedWeight` under ``<layer>.packed``, ``.scales``, ``.zeros``, ``.columns`` and
``.bias``, with the last three only where it has them; all other tensors are the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from w4a16.arguments import K_MULTIPLE, N_MULTIPLE
from w4a16.checkpoint import MANIFEST
from w4a16.errors import FormatError
from w4a16.files import json_object, read_json, sha256_file
from w4a16.library import QuantOp
from w4a16.packed import PackedWeight
from w4a16.safetensors import Entry, SafetensorsFile

FORMAT = "w4a16"
FORMAT_VERSION = 1
LAYOUT = "sm_90"
METHOD = "w4a16"

_LARGEST_MANIFEST = 100 << 20


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """A packed layer, as the manifest describes it."""

    file: str
    """Where its arrays are."""
    in_features: int
    out_features: int
    n: int
    """``out_features``, padded."""
    k: int
    """``in_features``, padded."""
    group_size: int
    """Inputs that share a scale; 0: all (per column, without zeros)."""
    quant_op: QuantOp
    act_order: bool
    """Whether rows of the weight were put in another order."""
    columns: bool
    """Whether there are columns: for act-order, or because inputs were padded."""
    bias: bool
    warnings: tuple[str, ...] = ()
    """What was said when it was packed."""

    @property
    def zeros(self) -> bool:
        return self.quant_op is QuantOp.GROUP_SCALE_ZERO

    @property
    def groups(self) -> int:
        return self.k // self.group_size if self.group_size else 1

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as safetensors names it) and shape by the names of :class:`w4a16.PackedWeight`."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "packed": ("U8", (self.n, self.k // 2)),
            "scales": ("F16", (self.groups, self.n)),
        }
        if self.zeros:
            found["zeros"] = ("F16", (self.groups, self.n))
        if self.columns:
            found["columns"] = ("I32", (self.k,))
        if self.bias:
            found["bias"] = ("F16", (self.n,))
        return found

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["quant_op"] = self.quant_op.name.lower()
        content["zeros"] = self.zeros
        content["warnings"] = list(self.warnings)
        return content

    @classmethod
    def from_json(cls, value: Any, where: str) -> ConvertedLayer:
        """Raises :class:`w4a16.FormatError` for what is no layer."""
        keys = json_object(value, where)
        file = _get(keys, "file", str, where)
        if file != Path(file).name:
            raise FormatError(f"{where}: file is {file!r:.120}: expected a name without a folder")
        op = _get(keys, "quant_op", str, where)
        if op not in (known.name.lower() for known in QuantOp):
            raise FormatError(f"{where}: quant_op is {op!r:.40}")
        notes = _get(keys, "warnings", list, where)
        if not all(isinstance(note, str) for note in notes):
            raise FormatError(f"{where}: warnings are no texts")
        layer = cls(
            file=file,
            quant_op=QuantOp[op.upper()],
            warnings=tuple(notes),
            **{
                name: _get(keys, name, int, where)
                for name in ("in_features", "out_features", "n", "k", "group_size")
            },
            **{name: _get(keys, name, bool, where) for name in ("act_order", "columns", "bias")},
        )
        layer._check(where)
        return layer

    def _check(self, where: str) -> None:
        group = self.group_size
        per_column = self.quant_op is QuantOp.PER_COLUMN
        fits = (
            0 < self.out_features <= self.n
            and self.n % N_MULTIPLE == 0
            and 0 < self.in_features <= self.k
            and self.k % K_MULTIPLE == 0
            and (group == 0 if per_column else group > 0 and self.k % group == 0)
        )
        if not fits:
            raise FormatError(f"{where}: its sizes do not fit together")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the folder."""

    bytes: int
    sha256: str
    mtime_ns: int | None = None
    """Of the source's files."""

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"bytes": self.bytes, "sha256": self.sha256}
        if self.mtime_ns is not None:
            content["mtime_ns"] = self.mtime_ns
        return content

    @classmethod
    def from_json(cls, value: Any, where: str) -> FileRecord:
        """Raises :class:`w4a16.FormatError`."""
        keys = json_object(value, where)
        mtime = keys.get("mtime_ns")
        return cls(
            bytes=_get(keys, "bytes", int, where),
            sha256=_get(keys, "sha256", str, where),
            mtime_ns=mtime if isinstance(mtime, int) else None,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``w4a16.json``."""

    package_version: str
    library_digest: str
    """Of the library's source tree (``bundle_digest``)."""
    conversion: str
    """A digest of everything that the result depends on."""
    layers: Mapping[str, ConvertedLayer]
    files: Mapping[str, FileRecord]
    """All other files of the folder."""
    source_method: str
    source_config: Mapping[str, Any]
    """``quantization_config`` of the checkpoint."""
    source_files: Mapping[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": self.package_version,
            "library_digest": self.library_digest,
            "layout": LAYOUT,
            "conversion": self.conversion,
            "source": {
                "method": self.source_method,
                "quantization_config": dict(self.source_config),
                "files": {name: file.to_json() for name, file in self.source_files.items()},
            },
            "files": {name: file.to_json() for name, file in self.files.items()},
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
        }

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Raises :class:`w4a16.FormatError`, also for one of a later version."""
        path = Path(directory) / MANIFEST
        if not path.exists():
            raise FormatError(
                f"{directory} has no {MANIFEST}: expected a folder made by w4a16 convert"
            )
        where = str(path)
        keys = json_object(read_json(path, limit=_LARGEST_MANIFEST), where)
        if keys.get("format") != FORMAT:
            raise FormatError(f"{where} is no manifest of w4a16 convert")
        version, layout = keys.get("format_version"), keys.get("layout")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where} has format version {version!r:.20}, this package reads"
                f" {FORMAT_VERSION}: convert the model again, or update the package"
            )
        if layout != LAYOUT:
            raise FormatError(f"{where} has the layout {layout!r:.40}: expected {LAYOUT!r}")
        source = json_object(keys.get("source"), f"{where}: source")
        files = json_object(keys.get("files"), f"{where}: files")
        layers = json_object(keys.get("layers"), f"{where}: layers")
        inputs = json_object(source.get("files"), f"{where}: source.files")
        return cls(
            package_version=_get(keys, "package_version", str, where),
            library_digest=_get(keys, "library_digest", str, where),
            conversion=_get(keys, "conversion", str, where),
            layers={
                name: ConvertedLayer.from_json(value, f"{where}: {name:.200}")
                for name, value in layers.items()
            },
            files={
                name: FileRecord.from_json(value, f"{where}: {name:.200}")
                for name, value in files.items()
            },
            source_method=_get(source, "method", str, where),
            source_config=json_object(source.get("quantization_config"), f"{where}: source"),
            source_files={
                name: FileRecord.from_json(value, f"{where}: {name:.200}")
                for name, value in inputs.items()
            },
        )


class Converted:
    """A folder made by ``w4a16 convert``; files are opened, and tensors read, when asked for.

    May be used from several threads.
    """

    path: Path
    manifest: Manifest
    layers: Mapping[str, ConvertedLayer]

    def __init__(self, directory: str | Path) -> None:
        """Reads the manifest only. Raises :class:`w4a16.FormatError`."""
        self.path = Path(directory)
        self.manifest = Manifest.read(self.path)
        self.layers = self.manifest.layers
        self._files: dict[str, SafetensorsFile] = {}
        self._places: dict[str, str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Converted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; arrays that are held stay valid."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def weight(self, name: str) -> PackedWeight:
        """A layer, as read-only numpy arrays that are views of the file.

        Raises :class:`w4a16.FormatError` if it is not there or not as the manifest says.
        """
        layer = self.layers.get(name)
        if layer is None:
            raise FormatError(f"{self.path} has no layer {name!r:.200}")
        file = self._file(layer.file)
        arrays: dict[str, Any] = dict.fromkeys(("packed", "scales", "zeros", "columns", "bias"))
        for last, (dtype, shape) in layer.arrays().items():
            entry = file.entry(f"{name}.{last}")
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise FormatError(
                    f"{file.path}: {name}.{last} is {entry.dtype} {list(entry.shape)}: expected"
                    f" {dtype} {list(shape)}, as {MANIFEST} says"
                )
            arrays[last] = file.array(f"{name}.{last}")
        return PackedWeight(
            **arrays, in_features=layer.in_features, out_features=layer.out_features
        )

    def others(self) -> Mapping[str, Entry]:
        """All tensors that are of no layer: embeddings, norms, what was not quantised."""
        taken = {f"{name}.{last}" for name, layer in self.layers.items() for last in layer.arrays()}
        return {
            tensor: self._file(file).tensors[tensor]
            for tensor, file in self._all().items()
            if tensor not in taken
        }

    def data(self, tensor: str) -> memoryview:
        """The bytes of any tensor, read-only, not copied."""
        return self._of(tensor).data(tensor)

    def array(self, tensor: str) -> Any:
        """Any tensor as a read-only numpy array; BF16 as uint16, F8 as uint8 (see
        :meth:`w4a16.safetensors.SafetensorsFile.array`)."""
        return self._of(tensor).array(tensor)

    def release(self, name: str) -> None:
        """Takes a layer's or a tensor's pages out of this process's memory."""
        layer = self.layers.get(name)
        if layer is None:
            self._of(name).release(name)
            return
        for last in layer.arrays():
            self._file(layer.file).release(f"{name}.{last}")

    def verify(self) -> None:
        """Reads every file and compares its digest; :class:`w4a16.FormatError` for a difference."""
        for name, record in self.manifest.files.items():
            if sha256_file(self.path / name) != record.sha256:
                raise FormatError(f"{self.path / name} is not as it was written: copy it again")

    def _of(self, tensor: str) -> SafetensorsFile:
        file = self._all().get(tensor)
        if file is None:
            raise FormatError(f"{self.path} has no tensor {tensor!r:.200}")
        return self._file(file)

    def _all(self) -> dict[str, str]:
        """For each tensor its file."""
        if self._places is None:
            self._places = {
                tensor: name
                for name in self.manifest.files
                if name.endswith(".safetensors")
                for tensor in self._file(name).tensors
            }
        return self._places

    def _file(self, name: str) -> SafetensorsFile:
        with self._lock:
            if name not in self._files:
                if name != Path(name).name:
                    raise FormatError(f"{self.path}: {name!r:.120} is no name of a shard")
                self._files[name] = SafetensorsFile(self.path / name)
            return self._files[name]


def open_converted(directory: str | Path) -> Converted:
    """Opens a folder made by ``w4a16 convert``. Raises :class:`w4a16.FormatError`."""
    return Converted(directory)


def is_converted(directory: str | Path) -> bool:
    """Whether ``w4a16 convert`` made the folder, by its looks."""
    return (Path(directory) / MANIFEST).is_file()


def _get(keys: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = keys.get(name)
    if type(value) is not kind:
        raise FormatError(f"{where}: {name} is {value!r:.80}: expected {kind.__name__}")
    return value
