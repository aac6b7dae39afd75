"""Stage 1, fetch: both upstream repositories at their commits, just the paths that are used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from pipeline import releases
from pipeline.errors import LockError, ReleaseError, SourceError
from pipeline.files import (
    digest_json,
    digest_of_files,
    read_json,
    recover_folder,
    replaced_folder,
    sha256_bytes,
    sha256_file,
    tree_digests,
    write_json,
)
from pipeline.git import Location, Repository, locate
from pipeline.lock import Lock, load_lock, matches, require_locked
from pipeline.model import Checkout, Sources
from pipeline.profile import Profile
from pipeline.releases import ReleaseFacts, ReleaseTable
from pipeline.runlock import held

Say = Callable[[str], None]
LOCK_NAME = "upstream.lock.yaml"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The sources of a run: the profile's, or those given on the command line."""

    trtllm: Location
    cutlass: Location
    given: bool
    """Whether the command line named either of them."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What is known before anything is checked out: commits, version, release name."""

    wanted: Wanted
    trtllm: Repository
    trtllm_ref: str
    trtllm_commit: str
    version: str
    release: str
    pin: str


def wanted_sources(profile: Profile, trtllm: Location | None, cutlass: Location | None) -> Wanted:
    """The command line's locations where given, else the profile's."""
    upstream = profile.upstream
    first = trtllm or locate(upstream.trtllm.url, upstream.trtllm.ref)
    if first.ref is None:
        first = Location(url=first.url, ref=upstream.trtllm.ref, local=first.local)
    second = cutlass or locate(upstream.cutlass.url, upstream.cutlass.ref)
    return Wanted(trtllm=first, cutlass=second, given=trtllm is not None or cutlass is not None)


def resolve(wanted: Wanted, table: ReleaseTable, vendor: Path) -> Resolved:
    """Find the release's commit, version and CUTLASS pin; checks nothing out."""
    with _vendor_lock(vendor):
        trtllm = _open(vendor, "trtllm", wanted.trtllm)
        ref = wanted.trtllm.ref
        if ref is None:
            raise SourceError("no ref of TensorRT-LLM is named", hint="give --trtllm SRC@REF")
        commit = trtllm.commit_of(ref)
        text = trtllm.read(commit, releases.VERSION_FILE)
        if text is None:
            raise ReleaseError(
                f"{wanted.trtllm.shown} has no {releases.VERSION_FILE}",
                hint="check that the source is a TensorRT-LLM repository",
            )
        version = releases.parse_version(text)
        releases.entry_for(table, version)  # refuses releases that cannot be extracted
        return Resolved(
            wanted=wanted,
            trtllm=trtllm,
            trtllm_ref=ref,
            trtllm_commit=commit,
            version=str(version),
            release=f"v{version}",
            pin=_cutlass_pin(trtllm, commit, str(version)),
        )


def fetch(
    resolved: Resolved,
    table: ReleaseTable,
    *,
    vendor: Path,
    run_dir: Path,
    allow_moved: bool = False,
    say: Say,
) -> tuple[Sources, ReleaseFacts]:
    """Check both repositories out and compare them with the lock.

    The profile's own sources are held to ``vendor/upstream.lock.yaml``, given ones to the lock
    that their first run left in ``run_dir``. ``allow_moved`` is for ``regenerate``.
    """
    entry = releases.entry_for(table, Version(resolved.version))
    wanted = resolved.wanted
    with _vendor_lock(vendor):
        trtllm = _check_out(
            resolved.trtllm,
            vendor,
            name="trtllm",
            ref=resolved.trtllm_ref,
            commit=resolved.trtllm_commit,
            paths=entry.paths,
            say=say,
        )
        cutlass_store = _open(vendor, "cutlass", wanted.cutlass)
        ref = wanted.cutlass.ref or resolved.pin
        cutlass = _check_out(
            cutlass_store,
            vendor,
            name="cutlass",
            ref=ref,
            commit=_cutlass_commit(cutlass_store, ref, resolved),
            paths=table.cutlass_paths,
            say=say,
        )
    if not _is_pinned(cutlass_store, wanted.cutlass, resolved.pin, cutlass.commit):
        say(
            f"note: CUTLASS {cutlass.commit[:12]} as asked for, "
            f"not {resolved.pin[:12]} that {resolved.release} pins"
        )
    facts = releases.facts_of(table, entry, Path(trtllm.folder))
    vendor_lock = load_lock(vendor / LOCK_NAME)
    sources = Sources(
        release=resolved.release,
        version=resolved.version,
        trtllm=trtllm,
        cutlass=cutlass,
        matches_lock=None,
    )
    sources = Sources(**{**vars(sources), "matches_lock": matches(vendor_lock, sources)})
    if not allow_moved:
        path = (run_dir if wanted.given else vendor) / LOCK_NAME
        lock = load_lock(path)
        if lock is not None:
            _hold_to(lock, sources, path=path, given=wanted.given)
    return sources, facts


def _is_pinned(store: Repository, asked: Location, pin: str, commit: str) -> bool:
    """Whether ``commit`` is what the release pins; the store need not have the pinned one."""
    if asked.ref is None or pin in (commit, asked.ref):
        return True
    try:
        return asked.local and store.commit_of(pin) == commit
    except SourceError:
        return False


def _hold_to(lock: Lock, sources: Sources, *, path: Path, given: bool) -> None:
    """The same release must have the locked content; the profile's must be the locked release."""
    if given and (lock.trtllm.url, lock.trtllm.ref) != (sources.trtllm.url, sources.trtllm.ref):
        return
    if not given and lock.release != sources.release:
        raise LockError(
            f"the profile asks for TensorRT-LLM {sources.release}, {path} holds {lock.release}",
            hint=f"run `nox -s regenerate -- --to {sources.trtllm.ref}` to move the lock",
        )
    require_locked(lock, sources, path=path)


def _cutlass_pin(trtllm: Repository, commit: str, version: str) -> str:
    """CUTLASS as the release pins it: a submodule's commit, or a tag in fetch_content.json."""
    pin = trtllm.gitlink(commit, releases.CUTLASS_SUBMODULE)
    if pin is not None:
        return pin
    text = trtllm.read(commit, releases.FETCH_CONTENT)
    if text is not None:
        try:
            for dependency in json.loads(text)["dependencies"]:
                if dependency["name"] == "cutlass":
                    tag = dependency["git_tag"]
                    if not isinstance(tag, str) or not tag:
                        raise ValueError(f"git_tag is {tag!r}")
                    return tag
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ReleaseError(
                f"{releases.FETCH_CONTENT} of {version} has a shape that is not known",
                details=repr(error),
                hint="name CUTLASS's commit yourself: --cutlass SRC@COMMIT",
            ) from error
    raise ReleaseError(
        f"TensorRT-LLM {version} pins no CUTLASS "
        f"(no submodule {releases.CUTLASS_SUBMODULE}, none in {releases.FETCH_CONTENT})",
        hint="check that the source is a whole TensorRT-LLM repository",
    )


def _cutlass_commit(store: Repository, ref: str, resolved: Resolved) -> str:
    try:
        return store.commit_of(ref)
    except SourceError as error:
        if store.location.ref is not None:
            raise
        raise SourceError(
            f"CUTLASS at {store.location.url} lacks {ref}, "
            f"which TensorRT-LLM {resolved.release} pins",
            details=error.details,
            hint="bring the repository up to date (`git fetch --all`), or give one that has it: "
            "--cutlass SRC",
        ) from error


def _open(vendor: Path, name: str, location: Location) -> Repository:
    key = sha256_bytes(location.url.encode())[:12]
    return Repository(vendor / "stores" / f"{name}-{key}.git", location).open()


def _check_out(
    store: Repository,
    vendor: Path,
    *,
    name: str,
    ref: str,
    commit: str,
    paths: tuple[str, ...],
    say: Say,
) -> Checkout:
    folder = vendor / f"{name}-{commit[:12]}-{digest_json(paths)[:8]}"
    stamp = folder.with_name(f"{folder.name}.json")
    recover_folder(folder)
    digests = _digests(folder, paths) if folder.is_dir() else {}
    recorded = _recorded(stamp)
    if not digests or digests != recorded:
        if folder.is_dir() and recorded is not None:
            say(f"{folder.name} is damaged; checking it out again")
        with replaced_folder(folder) as fresh:
            store.check_out(commit, paths, fresh)
            digests = _digests(fresh, paths)
        write_json(stamp, digests)
    return Checkout(
        name=name,
        # Names and passwords in a URL are nobody's business.
        url=re.sub(r"://[^/@]*@", "://", store.location.url),
        ref=ref,
        commit=commit,
        folder=str(folder),
        digests=digests,
    )


def _recorded(stamp: Path) -> Any:
    try:
        return read_json(stamp)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return "damaged"


def _digests(folder: Path, paths: tuple[str, ...]) -> dict[str, str]:
    """Digest of each of ``paths`` that exists (paths a release does not have are left out)."""
    found = {}
    for path in paths:
        place = folder / path
        if place.is_file():
            found[path] = sha256_file(place)
        elif place.is_dir():
            files = tree_digests(place)
            for link in (p for p in place.rglob("*") if p.is_symlink()):
                target = f"link to {link.readlink()}"
                files[link.relative_to(place).as_posix()] = sha256_bytes(target.encode())
            found[path] = digest_of_files(files)
    return found


@contextmanager
def _vendor_lock(vendor: Path) -> Iterator[None]:
    # Not the name of a run's lock: --out and --vendor may be one folder.
    with held(vendor / ".checkouts.lock", what=f"the checkouts in {vendor}"):
        yield
