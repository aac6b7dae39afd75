"""What a stage left and from what: a stage whose inputs' content did not change is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from pipeline.files import digest_json, read_json, sha256_file, tree_digest, write_json
from pipeline.profile import Model

R = TypeVar("R")
Say = Callable[[str], None]
_ROOT = Path(__file__).resolve().parent.parent


class Stamp(Model):
    """Written last, after a stage's outputs are in place; a killed stage leaves none."""

    stage: str
    inputs: str
    outputs: dict[str, str]
    result: Any
    digest: str = ""
    """Of all the rest, so that a damaged stamp is noticed."""


def code_digest() -> str:
    """Digest of the pipeline itself: its modules, templates, kernels and release data."""
    return digest_json(
        {
            **{folder: tree_digest(_ROOT / folder) for folder in ("templates", "kernels")},
            "pipeline": {p.name: sha256_file(p) for p in sorted(_ROOT.glob("pipeline/*.py"))},
        }
    )


class Stages:
    """The stages of one run folder."""

    def __init__(self, run_dir: Path, say: Say) -> None:
        self._run_dir = run_dir
        self._say = say

    def run(
        self,
        stage: str,
        kind: type[R],
        make: Callable[[], R],
        *,
        inputs: Mapping[str, Any],
        outputs: tuple[Path, ...] = (),
    ) -> R:
        """The result of ``make``, or the stored one when inputs and outputs are as they were.

        ``outputs`` are the files and folders that the stage writes; their content is part of
        what is compared, so that a damaged result is noticed and made again.
        """
        key = digest_json(to_jsonable_python(inputs))
        stamp = self._stamp(stage)
        if stamp is not None and stamp.inputs == key:
            if stamp.outputs == self._digests(outputs):
                try:
                    result = TypeAdapter(kind).validate_python(stamp.result)
                except ValidationError:
                    pass
                else:
                    self._say(f"{stage}: unchanged, skipped")
                    return result
            self._say(f"{stage}: its result is missing or damaged; making it again")
        path = self._path(stage)
        path.unlink(missing_ok=True)
        result = make()
        written = Stamp(
            stage=stage,
            inputs=key,
            outputs=self._digests(outputs),
            result=TypeAdapter(kind).dump_python(result, mode="json"),
        )
        write_json(path, {**written.model_dump(), "digest": _digest_of(written)})
        return result

    def last(self, stage: str, kind: type[R]) -> R | None:
        """What the stage left, whatever it was made from; None if it left nothing."""
        stamp = self._stamp(stage)
        try:
            return None if stamp is None else TypeAdapter(kind).validate_python(stamp.result)
        except ValidationError:
            return None

    def _path(self, stage: str) -> Path:
        return self._run_dir / ".state" / f"{stage}.json"

    def _stamp(self, stage: str) -> Stamp | None:
        try:
            stamp = Stamp.model_validate(read_json(self._path(stage)))
        except (OSError, ValueError, RecursionError):
            return None
        return stamp if stamp.digest == _digest_of(stamp) else None

    def _digests(self, outputs: tuple[Path, ...]) -> dict[str, str]:
        found = {}
        for path in outputs:
            name = path.relative_to(self._run_dir).as_posix()
            if path.is_file():
                found[name] = sha256_file(path)
            elif path.is_dir():
                found[name] = tree_digest(path)
            else:
                found[name] = "absent"
        return found


def _digest_of(stamp: Stamp) -> str:
    return digest_json(stamp.model_dump(exclude={"digest"}))
