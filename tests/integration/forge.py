"""Drives the real command in a subprocess, on a copy of this project, and looks at what it left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml

from tests.upstream import Upstream

ROOT = Path(__file__).resolve().parent.parent.parent
#: What of this project a run needs; the tests work on a copy, so that `artifacts/`, `vendor/` and
#: `configs/` here are never written, and an edit made here meanwhile changes nothing for them.
PARTS = ("pipeline", "templates", "kernels", "configs", "runtime", "tests/upstream", "LICENSE")
SECONDS = 600.0
#: Lock files of runs; they hold the process that had them last.
LOCKS = (".lock", ".checkouts.lock")
#: Where the small profile's only kernel is.
SMALL_WRAPPER = "src/gemm/gemm_gs_64x32x64_1x1x1.cu"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One call of the command, at its end."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def shown(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.out}\n{self.err}"

    def says(self, *texts: str) -> bool:
        """Whether all ``texts`` were printed; line breaks count as spaces."""
        everything = " ".join((self.out + self.err).split())
        return all(" ".join(text.split()) in everything for text in texts)


@dataclass(frozen=True, kw_only=True)
class Forge:
    """A copy of the project, the folder of checkouts and tools, and the environment of its runs."""

    project: Path
    vendor: Path

    def run(
        self,
        *arguments: str | Path,
        code: int | None = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        """Run ``python -m pipeline ARGUMENTS`` to its end; ``code`` is what it must exit with."""
        begin = time.monotonic()
        finished = subprocess.run(
            self._command(arguments),
            cwd=cwd or self.project,
            env=self._environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        result = Result(
            code=finished.returncode,
            out=finished.stdout,
            err=finished.stderr,
            seconds=time.monotonic() - begin,
        )
        assert code is None or result.code == code, f"{arguments}: {result.shown}"
        # A generator's traceback may be shown, our own never.
        assert f"{self.project}/pipeline/" not in result.err, result.shown
        return result

    def start(self, *arguments: str | Path, log: IO[str]) -> subprocess.Popen[str]:
        """Start it in the background; what it prints goes to ``log``."""
        return subprocess.Popen(
            self._command(arguments),
            cwd=self.project,
            env=self._environment(None),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _command(self, arguments: Iterable[str | Path]) -> list[str]:
        return [sys.executable, "-m", "pipeline", *map(str, arguments)]

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {**os.environ, "TERM": "dumb", "COLUMNS": "200", **(more or {})}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A folder DIR with a profile, an upstream and the stages run on them."""

    forge: Forge
    folder: Path
    config: Path
    upstream: Upstream
    ref: str
    vendor: Path

    def arguments(self) -> list[str | Path]:
        return [
            *("--config", self.config),
            *("--trtllm", f"{self.upstream.trtllm}@{self.ref}"),
            *("--cutlass", self.upstream.cutlass),
            *("--out", self.folder),
            *("--vendor", self.vendor),
        ]

    def run(
        self,
        stage: str,
        *more: str | Path,
        code: int | None = 0,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """A stage; options in ``more`` win over the site's own."""
        return self.forge.run(stage, *self.arguments(), *more, code=code, env=env)

    def extract(self, *more: str | Path, code: int | None = 0) -> Result:
        return self.run("extract", *more, code=code)

    def build(self, *more: str | Path, code: int | None = 0) -> Result:
        return self.run("build", *more, code=code)

    def elsewhere(self, folder: Path, **changes: Any) -> Site:
        return replace(self, folder=folder, **changes)

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def install(self) -> Path:
        return self.folder / "dist" / "install"

    @property
    def library(self) -> Path:
        (found,) = (p for p in self.install.glob("lib/libw4a16.so.*.*") if not p.is_symlink())
        return found

    @property
    def manifest(self) -> Json:
        return read_json(self.folder / "manifest.json")

    @property
    def report(self) -> Json:
        return read_json(self.folder / "report.json")

    def info(self) -> Json:
        """What the built ``w4a16_info --json`` says."""
        program = self.install / "bin" / "w4a16_info"
        done = subprocess.run([program, "--json"], capture_output=True, text=True, check=True)
        values: Json = json.loads(done.stdout)
        return values

    def compiled(self) -> dict[str, str]:
        """Object → when and for how long it was compiled last, from Ninja's log."""
        log = self.folder / "build" / ".ninja_log"
        lines = log.read_text(encoding="utf-8").splitlines()[1:] if log.exists() else []
        rows = [line.split("\t") for line in lines]
        return {row[3]: " ".join(row[:3]) for row in rows if row[3].endswith(".o")}

    def save(self) -> None:
        """Keep a copy aside for :meth:`restore`; objects are of use at their own path only."""
        copy(self.folder, self.folder.with_name(f"{self.folder.name}.saved"))

    def restore(self) -> None:
        saved = self.folder.with_name(f"{self.folder.name}.saved")
        if not self.folder.is_dir() or _states(self.folder) != _states(saved):
            copy(saved, self.folder)


def _states(root: Path) -> set[tuple[str, int, int]]:
    """What tells a changed file from one that was left alone, without reading it."""
    found = set()
    for path in root.rglob("*"):
        seen = path.lstat()
        if path.is_symlink() or not path.is_dir():
            found.add((path.relative_to(root).as_posix(), seen.st_size, seen.st_mtime_ns))
    return found


def copy(source: Path, target: Path) -> None:
    """``cp -a``, over nothing: times are kept, links stay links."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True)


def compiled_since(before: Mapping[str, str], site: Site) -> list[str]:
    """The objects that were compiled since ``before`` was taken."""
    return sorted(name for name, when in site.compiled().items() if before.get(name) != when)


def read_json(path: Path) -> Json:
    values: Json = json.loads(path.read_text(encoding="utf-8"))
    return values


def contents(root: Path, *, without: tuple[str, ...] = (), times: bool = False) -> dict[str, str]:
    """Everything below ``root``: path → content (and time of change, if ``times``).

    ``without`` are first path components; the runs' lock files are never counted.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if relative.parts[0] in without or relative.name in LOCKS:
            continue
        if path.is_symlink():
            found[relative.as_posix()] = f"-> {os.readlink(path)}"
        elif path.is_file():
            text = hashlib.sha256(path.read_bytes()).hexdigest()
            stamp = f" {path.stat().st_mtime_ns}" if times else ""
            found[relative.as_posix()] = text + stamp
    return found


def files_holding(root: Path, text: str) -> list[str]:
    """Regular files below ``root`` in whose bytes ``text`` stands."""
    return [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    ]


def write_profile(path: Path, base: Mapping[str, Any], **changes: Any) -> Path:
    """A profile from ``base``; ``changes`` are merged into its mappings, None removes a key."""
    values = {**base}
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, dict):
            values[key] = {**(values.get(key) or {}), **value}
        else:
            values[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def git(folder: Path, *arguments: str) -> str:
    """Git without this machine's configuration; its output, stripped."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for role in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{role}_NAME"] = "Test"
        env[f"GIT_{role}_EMAIL"] = "test@example.invalid"
        env[f"GIT_{role}_DATE"] = "1700000000 +0000"
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit_edit(repository: Path, ref: str, path: str, append: str, *, tag: str) -> None:
    """A commit on ``ref`` with ``append`` at the end of a file; ``tag`` is put (or moved) there."""
    git(repository, "checkout", "--quiet", "--detach", ref)
    file = repository / path
    file.write_text(file.read_text(encoding="utf-8") + append, encoding="utf-8")
    git(repository, "commit", "--quiet", "--all", "-m", "edit")
    git(repository, "tag", "--force", tag)
