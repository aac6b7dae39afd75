"""The work of a conversion: layers packed one by one, written, digested; going on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from w4a16 import packing
from w4a16.arrays import to_host
from w4a16.checkpoint import CONFIG, INDEX_ENDING, MANIFEST, SECTIONS, Checkpoint, Layer
from w4a16.converted import FORMAT_VERSION, LAYOUT, METHOD, ConvertedLayer, FileRecord, Manifest
from w4a16.errors import (
    ArgumentError,
    DeviceError,
    InternalError,
    OutOfMemoryError,
    W4A16Error,
)
from w4a16.files import OutputError, dump_json, open_regular, replace_file, sha256_file
from w4a16.library import LIBRARY
from w4a16.packed import PackedWeight
from w4a16.partial import Partial, digest
from w4a16.safetensors import OF_NUMPY, SafetensorsFile, Writer
from w4a16.shards import METADATA, Shard, expected_of

#: Room that is asked for beyond what is known: manifest, journal, the file system's own.
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """How far a conversion is; bytes are the checkpoint's."""

    what: str
    """The layer or tensor that is worked on."""
    layers_done: int
    layers: int
    bytes_done: int
    bytes: int


Progress: TypeAlias = Callable[[Step], None]


class Place:
    """Where layers are packed."""

    def __init__(self, device: int | str | None) -> None:
        self._chosen_here = device is None
        if device is None:
            found = LIBRARY.device()
            self.name = f"cuda:{found.device}" if not found.problem else "cpu"
            return
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
        if isinstance(device, bool) or match is None:
            raise ArgumentError(
                f"device is {device!r}: expected 'cpu', 'cuda', 'cuda:0' or the number of a GPU"
            )
        if name != "cpu":
            ordinal = int(match[1] or 0)
            LIBRARY.check_device(ordinal)
            name = f"cuda:{ordinal}"
        self.name = name

    def pack(
        self, tensors: Mapping[str, Any], layer: Layer, threads: int, zero_points: Any
    ) -> PackedWeight:
        """With numpy's arrays."""

        def packed() -> PackedWeight:
            weight = packing.pack(
                tensors,
                config=layer.config,
                zero_points=zero_points,
                device=self.name,
                threads=threads,
            )
            arrays = {name: _as_numpy(array) for name, array in weight.arrays().items()}
            return replace(weight, **arrays)

        try:
            return packed()
        except (DeviceError, OutOfMemoryError):
            # The CPU makes the same bytes; a GPU that nobody asked for may be in use.
            if not self._chosen_here or self.name == "cpu":
                raise
            self.name = "cpu"
            return packed()


def _as_numpy(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return array
    host = to_host(array)
    return host if isinstance(host, np.ndarray) else host.numpy()


class Run:
    """One conversion: this thread packs, one writes, one finishes files, one digests the source.

    At most two packed layers are in memory; pages of the checkpoint leave it after use.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: Sequence[Shard],
        partial: Partial,
        place: Place,
        threads: int,
        zero_points: str | None,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._shards = shards
        self._partial = partial
        self._place = place
        self._threads = threads
        self._zero_points = zero_points
        self._progress = progress
        self._stop = threading.Event()
        self._digests: dict[str, str] = {}
        self._digesting: dict[str, Future[None]] = {}
        self._layers_done = 0
        self._bytes_done = 0
        self._records: dict[int, dict[str, Any]] = {}
        self.total = sum(shard.source_bytes for shard in shards)
        self.bytes_kept = 0

    def worth_keeping(self) -> bool:
        """Whether a shard is finished."""
        return bool(self._records)

    def execute(self, copies: Sequence[str], inputs: Mapping[str, Any]) -> Manifest:
        self._digests = self._partial.sources()
        self._find_kept()
        self._check_space(copies)
        finished: list[Future[None]] = []
        with (
            ThreadPoolExecutor(1, "w4a16-write") as writing,
            ThreadPoolExecutor(1, "w4a16-finish") as finishing,
            ThreadPoolExecutor(1, "w4a16-digest") as digesting,
        ):
            try:
                for shard in self._shards:
                    if shard.number in self._records:
                        self._layers_done += len(shard.layers)
                        self._bytes_done += shard.source_bytes
                        continue
                    if len(finished) > 1:
                        finished[-2].result()
                    finished.append(self._make(shard, writing, finishing, digesting))
                self._say("")
                self._digest_up_to(len(self._checkpoint.files), digesting)
                for future in (*finished, *self._digesting.values()):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        manifest = self._complete(copies, inputs)
        self._checkpoint.check_unchanged()
        return manifest

    # What was there before.

    def _find_kept(self) -> None:
        """Shards of an earlier run that are as it left them."""
        for shard in self._shards:
            record = self._partial.record(shard.number)
            path = self._partial.out / shard.name
            if record is not None and _is_intact(path, shard, record):
                self._records[shard.number] = record
                self.bytes_kept += record["bytes"]
            else:
                self._partial.forget(shard.number)
        kept = {shard.name for shard in self._shards if shard.number in self._records}
        self._partial.keep_only(kept)

    def _check_space(self, copies: Sequence[str]) -> None:
        needed = _SPARE_BYTES + sum(
            shard.tensor_bytes + shard.reserve
            for shard in self._shards
            if shard.number not in self._records
        )
        needed += sum((self._checkpoint.path / name).stat().st_size for name in copies)
        free = shutil.disk_usage(self._partial.root).free
        if needed > free:
            raise OutputError(
                f"{self._partial.target} needs {size_of(needed)}"
                f"{' more' if self._records else ''}, but {size_of(free)} are free on the disk of"
                f" {self._partial.root.parent}: make room there, or give an OUT_DIR on another disk"
            )

    # Shards.

    def _make(
        self,
        shard: Shard,
        writing: ThreadPoolExecutor,
        finishing: ThreadPoolExecutor,
        digesting: ThreadPoolExecutor,
    ) -> Future[None]:
        path = self._partial.out / shard.name
        writer = Writer(path, reserve=shard.reserve, metadata=METADATA)
        last: Future[None] | None = None
        try:
            layers: dict[str, ConvertedLayer] = {}
            for place, layer in enumerate(shard.layers):
                for following in shard.layers[place + 1 : place + 2]:
                    self._checkpoint.prefetch(following)
                self._reach(layer.tensors.values(), digesting)
                self._say(layer.name)
                arrays, layers[layer.name] = self._pack(layer, shard.name)
                if last is not None:
                    last.result()
                last = writing.submit(_write_layer, writer, layer.name, arrays)
                del arrays
                self._layers_done += 1
                self._bytes_done += layer.nbytes
            for tensor in shard.others:
                self._reach([tensor], digesting)
                self._say(tensor)
                if last is not None:
                    last.result()
                last = writing.submit(self._write_other, writer, tensor)
                self._bytes_done += self._checkpoint.entry(tensor).nbytes
            if last is not None:
                last.result()
        except BaseException:
            if last is not None:
                with contextlib.suppress(Exception):
                    last.result()
            writer.abort()
            raise
        return finishing.submit(self._finish, shard, writer, layers)

    def _pack(self, layer: Layer, file: str) -> tuple[dict[str, Any], ConvertedLayer]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                packed = self._place.pack(
                    self._checkpoint.arrays(layer), layer, self._threads, self._zero_points
                )
            except W4A16Error as error:
                raise type(error)(f"{layer.name}: {error}") from error
        self._checkpoint.release(layer)
        columns = packed.columns
        made = ConvertedLayer(
            file=file,
            in_features=packed.in_features,
            out_features=packed.out_features,
            n=packed.n,
            k=packed.k,
            group_size=packed.group_size,
            quant_op=packed.quant_op,
            act_order=columns is not None and not _ascends(columns[columns >= 0]),
            columns=columns is not None,
            bias=packed.bias is not None,
            warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        )
        arrays = packed.arrays()
        _check_expected(layer, made, arrays)
        return arrays, made

    def _write_other(self, writer: Writer, tensor: str) -> None:
        file = self._checkpoint.file(tensor)
        entry = file.tensors[tensor]
        writer.add(tensor, entry.dtype, entry.shape, file.chunks(tensor))

    def _finish(self, shard: Shard, writer: Writer, layers: dict[str, ConvertedLayer]) -> None:
        size = writer.finish()
        record = {
            "file": shard.name,
            "bytes": size,
            "sha256": sha256_file(writer.path),
            "layers": {name: layer.to_json() for name, layer in layers.items()},
        }
        self._partial.store(shard.number, record)
        self._records[shard.number] = record

    # Digests of the source, not far ahead of the packing, while its pages are in memory.

    def _reach(self, tensors: Iterable[str], digesting: ThreadPoolExecutor) -> None:
        names = list(self._checkpoint.files)
        place = max(names.index(self._checkpoint.tensors[tensor]) for tensor in tensors)
        self._digest_up_to(place + 2, digesting)

    def _digest_up_to(self, count: int, digesting: ThreadPoolExecutor) -> None:
        for name in list(self._checkpoint.files)[:count]:
            if name not in self._digests and name not in self._digesting:
                self._digesting[name] = digesting.submit(self._digest, name)

    def _digest(self, name: str) -> None:
        found = sha256_file(self._checkpoint.path / name, self._stop.is_set)
        if found:
            self._digests[name] = found
            self._partial.store_sources(self._digests)

    # The rest.

    def _complete(self, copies: Sequence[str], inputs: Mapping[str, Any]) -> Manifest:
        """Writes everything that is small."""
        out, checkpoint = self._partial.out, self._checkpoint
        files: dict[str, FileRecord] = {}
        layers: dict[str, ConvertedLayer] = {}
        places: dict[str, str] = {}
        total = 0
        for shard in self._shards:
            record = self._records[shard.number]
            files[shard.name] = FileRecord(bytes=record["bytes"], sha256=record["sha256"])
            for name, layer in record["layers"].items():
                layers[name] = ConvertedLayer.from_json(layer, name)
            with SafetensorsFile(out / shard.name) as written:
                for tensor, entry in written.tensors.items():
                    places[tensor] = shard.name
                    total += entry.nbytes

        def write(name: str, data: bytes) -> None:
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
            digest_ = hashlib.sha256(data).hexdigest()
            files[name] = FileRecord(bytes=len(data), sha256=digest_)

        if len(self._shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            write(f"model{INDEX_ENDING}", dump_json(index))
        if checkpoint.config:
            write(CONFIG, dump_json(_new_config(checkpoint.config)))
        for name in copies:
            write(name, _content(checkpoint.path / name))
        manifest = Manifest(
            package_version=LIBRARY.build.version,
            library_digest=LIBRARY.build.bundle_digest,
            conversion=digest(inputs),
            layers=layers,
            files=files,
            source_method=checkpoint.quantization.method,
            source_config=checkpoint.quantization_config,
            source_files={
                name: FileRecord(
                    bytes=file.size, sha256=self._digests[name], mtime_ns=file.mtime_ns
                )
                for name, file in checkpoint.files.items()
            },
        )
        replace_file(out / MANIFEST, dump_json(manifest.to_json()))
        return manifest

    def _say(self, what: str) -> None:
        if self._progress is not None:
            layers = len(self._checkpoint.layers)
            self._progress(Step(what, self._layers_done, layers, self._bytes_done, self.total))


def _write_layer(writer: Writer, name: str, arrays: Mapping[str, Any]) -> None:
    for last, array in arrays.items():
        writer.add(f"{name}.{last}", OF_NUMPY[array.dtype.name], array.shape, array)


def _ascends(columns: Any) -> bool:
    return bool((np.diff(columns) > 0).all())


def _check_expected(layer: Layer, made: ConvertedLayer, arrays: Mapping[str, Any]) -> None:
    """Raises :class:`w4a16.InternalError` unless the manifest will say what is in the file."""
    found = {
        last: (OF_NUMPY.get(array.dtype.name), tuple(array.shape)) for last, array in arrays.items()
    }
    names = {name for name, _, _ in expected_of(layer)}
    if found != made.arrays() or not all(f"{layer.name}.{last}" in names for last in found):
        raise InternalError(f"{layer.name} was packed to {found}, planned were {names}")


def _is_intact(path: Path, shard: Shard, record: Any) -> bool:
    """Whether a shard of an earlier run is what its record says."""
    try:
        if record["file"] != shard.name or path.stat().st_size != record["bytes"]:
            return False
        layers = {
            name: ConvertedLayer.from_json(value, name) for name, value in record["layers"].items()
        }
        if list(layers) != [layer.name for layer in shard.layers]:
            return False
        return bool(sha256_file(path) == record["sha256"])
    except (OSError, W4A16Error, LookupError, TypeError, AttributeError):
        return False


def _content(path: Path) -> bytes:
    with open(open_regular(path), "rb") as stream:
        return stream.read()


def _new_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with what says how weights are stored replaced."""
    found = {key: value for key, value in config.items() if key not in SECTIONS}
    text = found.get("text_config")
    if isinstance(text, dict):
        found["text_config"] = {key: text[key] for key in text if key not in SECTIONS}
    found[SECTIONS[0]] = {
        "quant_method": METHOD,
        "bits": 4,
        "format_version": FORMAT_VERSION,
        "layout": LAYOUT,
        "manifest": MANIFEST,
    }
    return found


def size_of(count: float) -> str:
    """In words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
