"""Git, as far as the pipeline needs it: resolve a ref, read one file, check out a few paths.

A URL is cloned partially (no blobs) and shallowly; a local repository, bare or not, is borrowed
through ``objects/info/alternates``, which works where blobs outside the wanted paths are missing.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# GitPython looks for git when it is imported; that it is missing is said by Repository.open.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
from git import Git, GitCommandError

from pipeline.errors import PathError, SourceError
from pipeline.files import remove_tree, stays_inside
from pipeline.process import Printer

#: The user's configuration must not change what is checked out or run anything.
_CONFIG = {
    "advice.detachedHead": "false",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.longpaths": "true",
    "filter.lfs.process": "",
    "filter.lfs.required": "false",
    "filter.lfs.smudge": "",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "safe.directory": "*",
}
#: What `git rev-parse --local-env-vars` lists: a hook that runs us has its own repository in them.
_FOREIGN = (
    *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR", "GIT_CONFIG", "GIT_CONFIG_PARAMETERS"),
    *("GIT_DIR", "GIT_GRAFT_FILE", "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_NAMESPACE"),
    *("GIT_NO_REPLACE_OBJECTS", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_REPLACE_REF_BASE"),
    *("GIT_SHALLOW_FILE", "GIT_WORK_TREE"),
)


class _Shown(logging.Handler):
    """Hands git's command lines, as GitPython logs them, to a printer."""

    def __init__(self, show: Printer) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(f"$ {record.getMessage()}")


def show_commands(show: Printer) -> None:
    """Show every git command from now on (passwords in URLs are blotted out by GitPython)."""
    Git.GIT_PYTHON_TRACE = "1"
    logger = logging.getLogger("git.cmd")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_Shown(show)]


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a repository is: a URL or a local folder, and the ref wanted of it (None: not said)."""

    url: str
    ref: str | None
    local: bool

    @property
    def shown(self) -> str:
        return self.url if self.ref is None else f"{self.url}@{self.ref}"


def parse_location(text: str) -> Location:
    """Read ``SRC[@REF]`` as the command line takes it; SRC is a URL or a local repository."""
    url, ref = text, None
    path = text.removeprefix("file://")
    if not os.path.exists(path) and "@" in path:
        left, _, right = text.rpartition("@")
        # The '@' of git@host:path stands before a ':', which no ref holds, and that of
        # ssh://git@host/path before the first '/' of what follows the scheme.
        in_host = "://" in left and "/" not in left.partition("://")[2]
        if left and right and ":" not in right and not in_host:
            url, ref = left, right
    return locate(url, ref)


def locate(url: str, ref: str | None) -> Location:
    if "\0" in url:
        raise SourceError(f"{url!r} is not a repository", hint="give SRC[@REF]")
    remote = "://" in url or re.match(r"^[\w.-]+@[\w.-]+:", url) is not None
    if remote and not url.startswith("file://"):
        return Location(url=url, ref=ref, local=False)
    path = Path(os.path.expanduser(url.removeprefix("file://")))
    if not os.path.exists(path):
        raise SourceError(
            f"there is no repository at {url}",
            hint="give a git URL or a local repository as SRC[@REF]",
        )
    return Location(url=str(path.resolve()), ref=ref, local=True)


class Repository:
    """A small bare store in ``folder`` that borrows from, or fetches from, ``location``."""

    def __init__(self, folder: Path, location: Location) -> None:
        self.folder = folder
        self.location = location
        for name in _FOREIGN:
            os.environ.pop(name, None)
        self._git = Git(str(folder))
        self._git.update_environment(
            GIT_DIR=str(folder.absolute()),  # never a repository above a damaged store
            GIT_ATTR_NOSYSTEM="1",
            GIT_CONFIG_NOSYSTEM="1",
            GIT_CONFIG_GLOBAL=os.devnull,
            GIT_TERMINAL_PROMPT="0",
            GIT_LFS_SKIP_SMUDGE="1",
            GIT_CONFIG_COUNT=str(len(_CONFIG)),
            **{f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(_CONFIG)},
            **{f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(_CONFIG.values())},
        )

    def open(self) -> Repository:
        """Create or refresh the store."""
        if shutil.which("git") is None:
            raise SourceError("git is not installed", hint="install git 2.36 or later")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_sound():
            remove_tree(self.folder)
            self.folder.mkdir()
            self._run("init", "--bare", "--quiet", "--template=", ".")
            (self.folder / "objects" / "info").mkdir(exist_ok=True)
        if self.location.local:
            objects = self._source_objects()
            (self.folder / "objects" / "info" / "alternates").write_text(f"{objects}\n")
        else:
            self._run("config", "remote.origin.url", self.location.url)
            self._run("config", "remote.origin.promisor", "true")
            self._run("config", "remote.origin.partialclonefilter", "blob:none")
        return self

    def commit_of(self, ref: str) -> str:
        """The commit that ``ref`` (tag, branch or commit) names, fetched if it is remote."""
        if ref.startswith("-"):
            raise SourceError(f"{ref!r} is not a ref", hint="name a tag, branch or commit")
        if self.location.local:
            return self._local_commit(ref)
        if re.fullmatch(r"[0-9a-f]{40}", ref) and self._has(ref):
            return ref
        try:
            self._git.execute(
                ["git", "fetch", "--quiet", "--depth=1", "--no-tags", "--filter=blob:none",
                 "origin", ref]
            )  # fmt: skip
        except GitCommandError as error:
            raise self._fetch_error(ref, str(error.stderr)) from error
        return self._run("rev-parse", "--verify", "FETCH_HEAD^{commit}")

    def gitlink(self, commit: str, path: str) -> str | None:
        """The commit that a submodule at ``path`` is pinned to."""
        line = self._run("ls-tree", commit, "--", path)
        match = re.match(r"^160000 commit ([0-9a-f]{40})\t", line)
        return match.group(1) if match else None

    def read(self, commit: str, path: str) -> str | None:
        """The text of one file, or None where the commit has no such file."""
        if not self._run("ls-tree", commit, "--", path):
            return None
        return self._run("show", f"{commit}:{path}")

    def check_out(self, commit: str, paths: Sequence[str], target: Path) -> None:
        """Write just ``paths`` of ``commit`` below ``target`` (sparse checkout)."""
        index = self.folder / f"sparse-{os.getpid()}.index"
        patterns = "".join(f"/{path}\n" for path in paths)
        (self.folder / "info").mkdir(exist_ok=True)
        (self.folder / "info" / "sparse-checkout").write_text(patterns)
        try:
            with self._git.custom_environment(
                GIT_INDEX_FILE=str(index), GIT_WORK_TREE=str(target), GIT_DIR=str(self.folder)
            ):
                self._git.execute(
                    ["git", "-c", "core.bare=false", "-c", "core.sparseCheckout=true",
                     "-c", "core.sparseCheckoutCone=false", "read-tree", "-m", "-u", commit]
                )  # fmt: skip
        except GitCommandError as error:
            raise SourceError(
                f"{self.location.shown} lacks files of {commit[:12]} that the run needs",
                details=str(error.stderr).strip(),
                hint="give a repository that holds these folders whole: " + ", ".join(paths),
            ) from error
        finally:
            index.unlink(missing_ok=True)
        _refuse_leading_links(target)

    def _source_objects(self) -> Path:
        source = Path(self.location.url)
        for candidate in (source / ".git", source):
            if candidate.is_file():  # a work tree of `git worktree` or a submodule
                pointer = candidate.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
                candidate = (source / pointer).resolve()
                common = candidate / "commondir"
                if common.is_file():
                    candidate = (candidate / common.read_text().strip()).resolve()
            if (candidate / "objects").is_dir() and (candidate / "HEAD").exists():
                return (candidate / "objects").resolve()
        raise SourceError(
            f"{self.location.url} is not a git repository",
            hint="give a clone (bare or not) of the upstream repository",
        )

    def _local_commit(self, ref: str) -> str:
        source = self._source_objects().parent
        for candidate in (ref, f"origin/{ref}"):
            try:
                return str(
                    self._git.execute(
                        ["git", f"--git-dir={source}", "rev-parse", "--verify", "--quiet",
                         f"{candidate}^{{commit}}"]
                    )
                )  # fmt: skip
            except GitCommandError:
                continue
        raise SourceError(
            f"{self.location.url} has no tag, branch or commit {ref!r}",
            hint=f"see `git -C {self.location.url} tag`, and name one as {self.location.url}@REF",
        )

    def _is_sound(self) -> bool:
        try:
            self._git.execute(["git", "rev-parse", "--git-dir"])
        except GitCommandError:
            return False
        return True

    def _has(self, commit: str) -> bool:
        try:
            with self._git.custom_environment(GIT_NO_LAZY_FETCH="1"):
                self._git.execute(["git", "cat-file", "-e", f"{commit}^{{tree}}"])
        except GitCommandError:
            return False
        return True

    def _fetch_error(self, ref: str, stderr: str) -> SourceError:
        text = stderr.strip()
        if "couldn't find remote ref" in text or "not our ref" in text:
            return SourceError(
                f"{self.location.url} has no tag, branch or commit {ref!r}",
                details=text,
                hint="name one that exists; tags of releases look like v1.0.0",
            )
        return SourceError(
            f"cannot fetch from {self.location.url}",
            details=text,
            hint="check the URL and the network, or give a local repository: "
            "--trtllm PATH@REF --cutlass PATH",
        )

    def _run(self, *arguments: str) -> str:
        try:
            return str(self._git.execute(["git", *arguments]))
        except GitCommandError as error:
            raise SourceError(
                f"git {arguments[0]} failed on {self.location.shown}",
                details=str(error.stderr).strip(),
                hint="check that the repository is whole (`git fsck`) or give another copy",
            ) from error


def _refuse_leading_links(root: Path) -> None:
    """A link in an upstream tree may point inside that tree only."""
    for folder, folders, names in os.walk(root, followlinks=False):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink() and not stays_inside(root, path):
                shown = path.relative_to(root).as_posix()
                shutil.rmtree(root, ignore_errors=True)
                raise PathError(
                    f"upstream's {shown} is a link that leads outside its repository",
                    hint="use another copy of the repository; this one may have been tampered with",
                )
