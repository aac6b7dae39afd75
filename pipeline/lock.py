"""``upstream.lock.yaml``: which upstream content a release means, by digest."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field

from pipeline.errors import LockError, ProfileError
from pipeline.files import write_text
from pipeline.model import Checkout, Sources
from pipeline.profile import Model, load_yaml_model

_HEADER = """\
# Which upstream content the release means. `nox -s regenerate -- --to REF` moves it.
# digests: sha256 over the sorted lines `PATH NUL sha256(content) LF` of the files below each path,
# so that any mirror of the repository can be checked; commit: null where it is not known.
"""


class LockedRepository(Model):
    url: str
    ref: str
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    digests: dict[str, str]


class Lock(Model):
    release: str
    trtllm: LockedRepository
    cutlass: LockedRepository


def load_lock(path: Path) -> Lock | None:
    if not path.exists():
        return None
    try:
        return load_yaml_model(path, Lock, what="lock")
    except ProfileError as error:
        raise LockError(
            error.what,
            details=error.details,
            hint="restore the file from version control, or delete it to lock what is there now",
        ) from error


def lock_of(sources: Sources) -> Lock:
    return Lock(
        release=sources.release,
        trtllm=_locked(sources.trtllm),
        cutlass=_locked(sources.cutlass),
    )


def _locked(checkout: Checkout) -> LockedRepository:
    return LockedRepository(
        url=checkout.url, ref=checkout.ref, commit=checkout.commit, digests=checkout.digests
    )


def render_lock(lock: Lock) -> str:
    return _HEADER + yaml.safe_dump(lock.model_dump(), sort_keys=False, allow_unicode=True)


def write_lock(path: Path, lock: Lock) -> None:
    write_text(path, render_lock(lock))


def differences(locked: LockedRepository, found: Checkout, *, commit: bool) -> list[str]:
    """How ``found`` is not what ``locked`` says; ``commit`` compares the commit as well."""
    faults = []
    if commit and locked.commit is not None and locked.commit != found.commit:
        faults.append(f"commit {found.commit}, locked {locked.commit}")
    for path in sorted(locked.digests.keys() | found.digests.keys()):
        if locked.digests.get(path) != found.digests.get(path):
            faults.append(
                f"{path}: {found.digests.get(path, 'absent')}, "
                f"locked {locked.digests.get(path, 'absent')}"
            )
    return faults


def require_locked(lock: Lock, sources: Sources, *, path: Path) -> None:
    """Refuse upstream content that is not what the lock says (a tag that was moved, say)."""
    for name, locked, found in (
        ("TensorRT-LLM", lock.trtllm, sources.trtllm),
        ("CUTLASS", lock.cutlass, sources.cutlass),
    ):
        # A mirror may have the content under commits of its own.
        faults = differences(locked, found, commit=locked.url == found.url)
        if faults:
            raise LockError(
                f"{name} {found.ref} is not what {path} holds",
                details="\n".join(f"  {fault}" for fault in faults),
                hint="if upstream moved the ref on purpose, run "
                f"`nox -s regenerate -- --to {sources.trtllm.ref}`",
            )


def matches(lock: Lock | None, sources: Sources) -> bool | None:
    """Whether ``sources`` hold the locked content; None when another release is locked."""
    if lock is None or lock.release != sources.release:
        return None
    return not (
        differences(lock.trtllm, sources.trtllm, commit=False)
        or differences(lock.cutlass, sources.cutlass, commit=False)
    )
