"""Stage 2, generate: run upstream's own generator, beside its checkout and not in it."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import GenerateError
from pipeline.files import replaced_folder, tree_digests
from pipeline.model import GeneratedTree, Sources
from pipeline.process import CommandError, Printer, run
from pipeline.releases import ReleaseFacts

_SECONDS = 300.0


def generate(
    sources: Sources, facts: ReleaseFacts, *, sm: int, target: Path, show: Printer | None = None
) -> GeneratedTree:
    """Fill ``target`` with what the release's ``generate_kernels.py`` writes for ``sm``."""
    script = Path(sources.trtllm.folder, facts.script)
    checkouts = [Path(sources.trtllm.folder), Path(sources.cutlass.folder)]
    before = _state_of(checkouts)
    with replaced_folder(target) as fresh, tempfile.TemporaryDirectory() as scratch:
        options = [option.format(out=fresh, sm=sm) for option in facts.options]
        try:
            finished = run(
                # -B: no __pycache__ in the checkouts; -s: no packages of the user's.
                [sys.executable, "-B", "-s", script, *options],
                cwd=Path(scratch),
                env=_environment(Path(sources.cutlass.folder), Path(scratch)),
                show=show,
                timeout=_SECONDS,
                separate_stderr=True,
            )
        except CommandError as error:
            raise GenerateError(
                f"upstream's generator failed: {error.what}",
                details=error.output,
                hint="check that the release and the CUTLASS commit belong together; "
                "configs/releases.yaml says how the generator is called",
            ) from error
        if finished.stdout.strip():
            raise GenerateError(
                "upstream's generator printed something unforeseen",
                details=finished.stdout,
                hint="see whether it still wrote every kernel; if so, "
                "its entry in configs/releases.yaml needs other options",
            )
        if show is not None and finished.stderr.strip():
            show(finished.stderr.rstrip())
        files = _written(fresh)
        touched = {name for name, _ in _state_of(checkouts) ^ before}
        if touched:
            raise GenerateError(
                "upstream's generator wrote into its own checkout",
                details="\n".join(sorted(touched)),
                hint=f"remove {sources.trtllm.folder} and look at what {facts.script} does",
            )
    command = ["python", facts.script, *(o.format(out="OUT", sm=sm) for o in facts.options)]
    return GeneratedTree(folder=str(target), command=command, files=files)


def _environment(cutlass: Path, scratch: Path) -> Mapping[str, str]:
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": str(scratch),
        "PYTHONPATH": str(cutlass / "python"),
        "PYTHONHASHSEED": "0",
    }


def _state_of(folders: Iterable[Path]) -> set[tuple[str, tuple[int, ...]]]:
    """What tells a touched file from one that was left alone, without reading it."""
    found: set[tuple[str, tuple[int, ...]]] = set()
    for folder in folders:
        for path in folder.rglob("*"):
            seen = path.lstat()
            if not stat.S_ISDIR(seen.st_mode):
                found.add((str(path), (seen.st_ino, seen.st_size, seen.st_mtime_ns)))
    return found


def _written(folder: Path) -> dict[str, str]:
    others = [
        path
        for path in folder.rglob("*")
        if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]
    files = tree_digests(folder)
    strange = sorted(
        [path.relative_to(folder).as_posix() for path in others]
        + [path for path in files if not re.fullmatch(r"[\w./-]+\.cu", path)]
    )
    if strange:
        raise GenerateError(
            "upstream's generator wrote files of a kind that is not known",
            details="\n".join(strange),
            hint="the release needs an entry of its own in configs/releases.yaml",
        )
    if not files:
        raise GenerateError(
            "upstream's generator wrote nothing",
            hint="see its options (`--help`) against the release's entry in configs/releases.yaml",
        )
    return files
