"""``w4a16 convert``: a quantised safetensors checkpoint to one whose layers are packed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w4a16.checkpoint import CONFIG, INDEX_ENDING, LEGACY_CONFIGS, MANIFEST, Checkpoint
from w4a16.conversion import Place, Progress, Run, Step, size_of
from w4a16.converted import (
    FORMAT_VERSION,
    LAYOUT,
    Converted,
    Manifest,
    is_converted,
    open_converted,
)
from w4a16.errors import ArgumentError, FormatError, W4A16Warning
from w4a16.files import OutputError
from w4a16.library import LIBRARY
from w4a16.partial import SUFFIX, Partial, claimed, digest
from w4a16.shards import plan

if TYPE_CHECKING:
    import typer

__all__ = ["Conversion", "Converted", "Progress", "Step", "convert", "open_converted", "register"]

SHARD_BYTES = 5_000_000_000

#: Files with weights, in whatever form: never copied.
_WEIGHTS = (
    ".safetensors",
    INDEX_ENDING,
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".tflite",
)
_LARGEST_COPY = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What :func:`convert` did."""

    path: Path
    manifest: Manifest
    warnings: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_kept: int
    """Of shards that an earlier, interrupted run had made."""
    device: str
    """Where layers were packed."""
    seconds: float


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    device: int | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 0,
    zero_points: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Packs a quantised checkpoint, layer by layer, into a new folder.

    ``source`` holds a safetensors checkpoint in one of the formats of :func:`w4a16.pack`.
    ``target`` gets the packed layers, all other tensors byte by byte, ``config.json`` with
    ``quantization_config`` ``{"quant_method": "w4a16", …}``, the tokenizer and other small files,
    and ``w4a16.json``, which describes them (:func:`w4a16.converted.open_converted`).

    ``target`` is complete or absent. The work is done in ``target.partial`` beside it; killed and
    called again with the same arguments, it goes on after the last finished shard, and the result
    is the same, byte for byte. It depends on neither ``device`` nor ``threads``.

    Args:
        device: Where to pack: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an ordinal. Default: a GPU that
            the kernels run on, or else the CPU.
        shard_bytes: The largest size of a file, unless one layer is larger.
        threads: For packing on the CPU; 0: all cores.
        zero_points: How GPTQ's are stored (``"v1"``, ``"v2"``), whatever the configuration says.
        progress: Called in this thread before each layer or tensor, and at the end.
        overwrite: Whether a converted folder that is there is replaced, at once when all is done.

    Raises:
        ArgumentError: Folders that are in each other or in the way, or at work in another process.
        FormatError: A checkpoint that is damaged, incomplete or not of a known format.
        UnsupportedError: A layer that no kernel takes.
        OutputError: No space, no permission; ``target`` is as it was (:mod:`w4a16.files`).
        DeviceError: A GPU that was asked for cannot be used.

    Warns :class:`w4a16.W4A16Warning`, each reason once, with the layers that it concerns.
    """
    begin = time.monotonic()
    start, end = Path(source), Path(os.path.abspath(target))
    _check_options(shard_bytes, threads, zero_points)
    _check_folders(start, end)
    place = Place(device)
    with Checkpoint(start) as checkpoint:
        if zero_points is not None and checkpoint.quantization.method != "gptq":
            raise ArgumentError(
                f"zero_points is {zero_points!r}, but {start} is"
                f" {checkpoint.quantization.method}: only GPTQ has two ways to store them"
            )
        shards = plan(checkpoint, shard_bytes)
        copies, left = _copies(start)
        inputs = _inputs(checkpoint, copies, shard_bytes, zero_points)
        with claimed(end) as partial:
            partial.recover()
            done = _already_done(partial, inputs, overwrite)
            if done is None:
                said = [note for note in (partial.begin(inputs), left) if note]
                run = Run(checkpoint, shards, partial, place, threads, zero_points, progress)
                try:
                    done = run.execute(copies, inputs)
                    partial.finish()
                except BaseException as error:
                    if not run.worth_keeping():
                        partial.discard()
                    elif isinstance(error, OutputError):
                        raise OutputError(
                            f"{error}. What is finished is kept in {partial.root}: make room and"
                            " convert again, and it goes on"
                        ) from error
                    raise
                kept, read = run.bytes_kept, run.total
            else:
                said, kept, read = [], sum(f.bytes for f in done.files.values()), 0
    found = [*said, *_summaries(done)]
    for text in found:
        warnings.warn(text, W4A16Warning, stacklevel=2)
    return Conversion(
        path=end,
        manifest=done,
        warnings=tuple(found),
        bytes_read=read,
        bytes_written=sum(file.bytes for file in done.files.values()) - kept,
        bytes_kept=kept,
        device=place.name,
        seconds=time.monotonic() - begin,
    )


def _already_done(partial: Partial, inputs: Mapping[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest of a target that an earlier run finished, but was killed cleaning up after."""
    target = partial.target
    if not target.is_dir() or not any(target.iterdir()):
        return None
    if overwrite:
        return None
    with contextlib.suppress(FormatError):
        manifest = Manifest.read(target)
        if manifest.conversion == digest(inputs) and partial.finished_before():
            partial.discard()
            return manifest
    partial.discard_if_new()
    raise ArgumentError(
        f"{target} exists: give another OUT_DIR, or overwrite=True (--overwrite) to replace it"
    )


# ---- What is asked for ----


def _check_options(shard_bytes: int, threads: int, zero_points: str | None) -> None:
    for name, value, least in (("shard_bytes", shard_bytes, 1), ("threads", threads, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} is {value!r}: expected an integer from {least} up")
    if zero_points not in (None, "v1", "v2"):
        raise ArgumentError(f"zero_points is {zero_points!r}: expected 'v1', 'v2' or None")


def _check_folders(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise FormatError(f"{source} is no folder: expected one with a model's files")
    if not target.name:
        raise ArgumentError(f"{target} cannot be made: expected a new folder")
    real, goal = source.resolve(), target.resolve()
    if goal == real or real in goal.parents:
        raise ArgumentError(f"{target} is in the folder of the model, {source}: give one outside")
    if goal in real.parents or target.with_name(target.name + SUFFIX).resolve() in (
        real,
        *real.parents,
    ):
        raise ArgumentError(f"the model, {source}, is in {target}: give another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArgumentError(f"{target} exists and is no folder: give another name")
    if target.is_dir() and any(target.iterdir()):
        if not is_converted(target):
            raise ArgumentError(
                f"{target} exists, and w4a16 convert did not make it, so it is not replaced: give"
                " another folder, or remove it yourself"
            )
        _check_own(target)


def _check_own(target: Path) -> None:
    """A converted folder that is replaced must hold nothing else: that would be lost."""
    try:
        with open_converted(target) as converted:
            own = {MANIFEST, *converted.manifest.files}
    except FormatError as error:
        raise ArgumentError(
            f"{target} exists, and what it holds is not known, so it is not replaced: give another"
            f" folder, or remove it yourself ({error})"
        ) from None
    found = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({path.relative_to(target).as_posix() for path in found} - own)
    if others:
        raise ArgumentError(
            f"{target} exists, and holds {others[0]}, which w4a16 convert did not write: move it"
            " elsewhere, or give another folder"
        )


def _inputs(
    checkpoint: Checkpoint,
    copies: Sequence[str],
    shard_bytes: int,
    zero_points: str | None,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    files: dict[str, list[int]] = {}
    for name in (*checkpoint.files, *copies, CONFIG, *LEGACY_CONFIGS):
        with contextlib.suppress(FileNotFoundError):
            status = (checkpoint.path / name).stat()
            files[name] = [status.st_size, status.st_mtime_ns]
    return {
        "format_version": FORMAT_VERSION,
        "layout": LAYOUT,
        "package_version": LIBRARY.build.version,
        "library_digest": LIBRARY.build.bundle_digest,
        "shard_bytes": shard_bytes,
        "zero_points": zero_points,
        "files": files,
    }


def _copies(source: Path) -> tuple[list[str], str]:
    """Files to copy as they are, by their path in the model; and what is said of those left out."""
    found: list[str] = []
    large: list[str] = []
    own = {CONFIG, MANIFEST, *LEGACY_CONFIGS}
    for folder, folders, names in os.walk(source):
        inside = Path(folder).relative_to(source)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__")) and not Path(folder, name).is_symlink()
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or name.endswith(_WEIGHTS) or not path.is_file():
                continue
            relative = (inside / name).as_posix()
            if relative in own:
                continue
            (large if path.stat().st_size > _LARGEST_COPY else found).append(relative)
    said = f"not copied, being large: {', '.join(large)}" if large else ""
    return found, said


def _summaries(manifest: Manifest) -> list[str]:
    """Each warning once, with the layers that it is of; texts may differ in their numbers."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for name, layer in manifest.layers.items():
        for text in layer.warnings:
            groups.setdefault(re.sub(r"\d+", "#", text), (text, []))[1].append(name)
    found = []
    for text, names in groups.values():
        if len(names) == 1:
            found.append(f"{names[0]}: {text}")
        else:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(
                f"{len(names)} layers ({', '.join(names[:3])}{more}), here of the first: {text}"
            )
    return found


# ---- Command ----


def parse_size(text: str) -> int:
    """``5GB``, ``500 MB``, ``4096``: bytes; units are powers of 1000. Raises
    :class:`w4a16.ArgumentError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if match is None:
        raise ArgumentError(
            f"--shard-size is {text!r:.40}: expected a number of bytes, such as 5GB"
        )
    size = float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")
    if not 1 <= size <= 2**63:
        raise ArgumentError(f"--shard-size is {text!r:.40}: expected 1 byte to 2**63, such as 5GB")
    return int(size)


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 convert``."""
    import typer

    model = typer.Argument(metavar="MODEL_DIR", help="Folder of a quantised checkpoint.")
    out = typer.Argument(metavar="OUT_DIR", help="Folder to make.")
    place = typer.Option(None, "--device", help="cpu, cuda, cuda:1. Default: a GPU if there is.")
    shard = typer.Option("5GB", "--shard-size", metavar="SIZE", help="Largest size of a file.")
    cores = typer.Option(0, "--threads", min=0, help="For packing on the CPU. 0: all cores.")
    points = typer.Option(
        None, "--zero-points", metavar="v1|v2", help="How GPTQ's are stored, whatever it says."
    )
    replace_ = typer.Option(False, "--overwrite", help="Replace a converted folder.")
    as_json = typer.Option(False, "--json", help="Print JSON.")

    @app.command("convert")
    def command(
        model_dir: str = model,
        out_dir: str = out,
        device: str | None = place,
        shard_size: str = shard,
        threads: int = cores,
        zero_points: str | None = points,
        overwrite: bool = replace_,
        json_: bool = as_json,
    ) -> None:
        """Pack a quantised safetensors checkpoint for these kernels."""
        with _bar(quiet=json_) as progress:
            result = convert(
                model_dir,
                out_dir,
                device=device,
                shard_bytes=parse_size(shard_size),
                threads=threads,
                zero_points=zero_points,
                progress=progress,
                overwrite=overwrite,
            )
        typer.echo(_report(result, json_))


def _report(result: Conversion, as_json: bool) -> str:
    layers, files = len(result.manifest.layers), len(result.manifest.files)
    if as_json:
        content = {
            "path": str(result.path),
            "layers": layers,
            "files": files,
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "bytes_kept": result.bytes_kept,
            "device": result.device,
            "seconds": round(result.seconds, 3),
            "warnings": list(result.warnings),
        }
        return json.dumps(content, indent=2)
    kept = f", {size_of(result.bytes_kept)} kept" if result.bytes_kept else ""
    return (
        f"{result.path}: {layers} layers, {files} files, {size_of(result.bytes_written)}"
        f" written{kept} in {result.seconds:.1f} s, packed on {result.device}"
    )


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar on the terminal; None where there is none."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        TextColumn("{task.fields[layers]}", table_column=Column(no_wrap=True)),
        BarColumn(16),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[what]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, layers="", what="")

        def show(step: Step) -> None:
            bar.update(
                task,
                completed=step.bytes_done,
                total=step.bytes,
                layers=f"{step.layers_done}/{step.layers} layers",
                what=step.what or "finishing",
            )

        yield show
