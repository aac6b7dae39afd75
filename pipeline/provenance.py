"""What a wheel was made from: commits, digests, compiler, flags, profile, state of this project."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.elf import read_elf
from pipeline.errors import MissingStageError
from pipeline.files import digest_json, sha256_file
from pipeline.model import Build, Bundle
from pipeline.process import CommandError, Printer, run
from pipeline.profile import Profile

SCHEMA = 1
#: The first moment that a zip archive can hold, for a project that is in no repository.
EPOCH = 315532800
#: A repository of another owner is read, and no program of its configuration is started.
_GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", "log.showSignature=no")


@dataclass(frozen=True, kw_only=True)
class Project:
    """This project's own state."""

    version: str
    commit: str | None
    """None: not known, it is in no repository of its own."""
    dirty: bool | None
    """Whether files differ from the commit's, or are not in it."""
    time: int
    """Of the commit, in seconds since 1970: the time of everything in the wheel."""


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A repository whose code is compiled in."""

    name: str
    url: str | None
    """None: not known to the public (a folder of this machine)."""
    ref: str
    commit: str
    mirrored: bool
    """Read from a copy of ``url``, whose commits may have other names; the content is the same."""
    license: str
    digests: dict[str, str]
    """sha256 tree digest of each path that was read, as in ``vendor/upstream.lock.yaml``."""
    files: dict[str, str]
    """Vendored file → sha256; what the compiler may have read."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """The shared library, as it was built and verified."""

    sha256: str
    bytes: int
    soname: str
    architecture: str
    cuda_runtime: str
    compiler: str
    cmake: str
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    gemm: int
    """Instantiations of upstream's GEMM, by tactic and quant op."""
    gemv: int
    decode: int
    """Kernels of this project's decode tactics."""
    device: int
    """Kernels in the device code, those written here among them."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """All that goes into a wheel, before it is made."""

    project: Project
    release: str
    trtllm: Upstream
    cutlass: Upstream
    matches_lock: bool | None
    profile: str
    profile_digest: str
    profile_values: dict[str, Any]
    bundle_digest: str
    changed_by_hand: tuple[str, ...]
    """Files of the bundle that differ from what *extract* made."""
    library: Library
    kernels: Kernels
    tools: dict[str, str]
    """Python packages that make the wheel → version."""

    @property
    def version(self) -> str:
        return self.project.version


def gather(
    project: Project,
    profile: Profile,
    manifest: Mapping[str, Any],
    bundle: Bundle,
    build: Build,
    *,
    library: Path,
    info: Mapping[str, Any],
    device_kernels: int,
    tools: Mapping[str, str],
) -> Origin:
    """Everything that the stages left, and what the library says of itself (``info``).

    A library that was built from another bundle than the one in DIR is refused.
    """
    if info["bundle_digest"] != bundle.digest:
        raise MissingStageError(
            "the library was built from another bundle than the one that is there now",
            details=f"bundle {bundle.digest}, the library's {info['bundle_digest']}",
            hint="run `nox -s build` first",
        )
    values = profile.model_dump(mode="json", by_alias=True)
    cuda = int(info["cuda_runtime_version"])
    return Origin(
        project=project,
        release=manifest["release"],
        trtllm=_upstream("TensorRT-LLM", "trtllm", "Apache-2.0", manifest, profile),
        cutlass=_upstream("CUTLASS", "cutlass", "BSD-3-Clause", manifest, profile),
        matches_lock=manifest["sources"]["matches_lock"],
        profile=profile.name,
        profile_digest=digest_json(values),
        profile_values={k: v for k, v in values.items() if k not in ("name", "upstream")},
        bundle_digest=bundle.digest,
        changed_by_hand=tuple(manifest["build"]["changed_by_hand"]),
        library=Library(
            sha256=sha256_file(library),
            bytes=library.stat().st_size,
            soname=read_elf(library).soname,
            architecture=info["architecture"],
            cuda_runtime=f"{cuda // 1000}.{cuda % 1000 // 10}",
            compiler=build.compiler,
            cmake=build.cmake,
            flags=tuple(build.flags),
        ),
        kernels=Kernels(
            gemm=len(manifest["selected"]),
            gemv=sum(len(family["kernels"]) for family in manifest["gemv"]["selected"]),
            decode=sum(len(tactic["kernels"]) for tactic in manifest["decode"]["selected"]),
            device=device_kernels,
        ),
        tools=dict(tools),
    )


def library_info(program: Path, *, show: Printer | None = None) -> dict[str, Any]:
    """What ``w4a16_info --json`` of the install tree says."""
    try:
        output = run([program, "--json"], show=show, timeout=60, separate_stderr=True).stdout
        info: dict[str, Any] = json.loads(output)
    except (CommandError, ValueError) as error:
        raise MissingStageError(
            f"{program} does not run", details=str(error), hint="run `nox -s build` first"
        ) from error
    return info


def _upstream(
    name: str, key: str, license: str, manifest: Mapping[str, Any], profile: Profile
) -> Upstream:
    source = manifest["sources"][key]
    given, wanted = public_url(source["url"]), public_url(getattr(profile.upstream, key).url)
    mirrored = bool(wanted and given != wanted and manifest["sources"]["matches_lock"])
    prefix = f"{key}:"
    return Upstream(
        name=name,
        url=wanted if mirrored else given,
        mirrored=mirrored,
        ref=source["ref"],
        commit=source["commit"],
        license=license,
        digests=source["digests"],
        files={
            entry["origin"].removeprefix(prefix): entry["sha256"]
            for entry in manifest["vendored"]
            if entry["origin"].startswith(prefix)
        },
    )


def provenance(origin: Origin, policy: str) -> dict[str, Any]:
    """``w4a16/data/provenance.json``; vendored files are listed in the SBOM."""
    values = asdict(origin)
    for name in ("trtllm", "cutlass"):
        del values[name]["files"]
    return {"schema": SCHEMA, **values, "policy": policy}


def public_url(url: str) -> str | None:
    """The URL, if it means the same on any machine."""
    is_public = url.startswith(("https://", "http://", "ssh://", "git://"))
    return url.removesuffix("/").removesuffix(".git") if is_public and "@" not in url else None


def project_state(root: Path, version: str, *, show: Printer | None = None) -> Project:
    """The commit that ``root`` is at; a copy of this project inside another repository has none."""
    unknown = Project(version=version, commit=None, dirty=None, time=EPOCH)
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        command = [*_GIT, *arguments]
        return run(command, cwd=root, env=env, show=show, separate_stderr=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return unknown
        commit, time = git("log", "-1", "--format=%H %ct").split()
        changes = git("status", "--porcelain", "--untracked-files=normal")
    except (CommandError, ValueError):
        return unknown
    return Project(version=version, commit=commit, dirty=bool(changes), time=max(int(time), EPOCH))
