"""One run: its options, its folder DIR, and what the stages of a run share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline import fetch, releases
from pipeline.console import Reporter
from pipeline.errors import ProfileError
from pipeline.files import recover_folder
from pipeline.git import Location
from pipeline.lock import load_lock
from pipeline.profile import NAME, Profile, load_profile
from pipeline.runlock import held
from pipeline.state import Stages
from pipeline.toolchain import Mode, Toolchain, find_toolchain

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PROFILE = ROOT / "configs" / "w4a16-sm90.yaml"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; the same for every stage."""

    config: Path = DEFAULT_PROFILE
    trtllm: Location | None = None
    cutlass: Location | None = None
    out: Path | None = None
    jobs: int | None = None
    memory_gb: float | None = None
    toolchain: Mode = "auto"
    vendor: Path = ROOT / "vendor"
    verbose: bool = False


class Run:
    """One run on one folder DIR."""

    def __init__(
        self, options: Options, reporter: Reporter, run_dir: Path, profile: Profile
    ) -> None:
        self.options = options
        self.reporter = reporter
        self.run_dir = run_dir
        self.profile = profile
        self.table = releases.load_table()
        self.stages = Stages(run_dir, reporter.say)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs off DIR, and put right what a killed one left."""
        with held(self.run_dir / ".lock", what=str(self.run_dir), say=self.reporter.say):
            for name in ("generated", "dist/install"):
                recover_folder(self.run_dir / name)
            yield

    def toolchain(self, *, sass_tools: bool = False) -> Toolchain:
        return find_toolchain(
            self.options.toolchain,
            need_sass_tools=sass_tools,
            environment=self.options.vendor / "toolchain",
            architecture=self.profile.architecture,
            say=self.reporter.say,
            show=self.reporter.show,
        )

    @property
    def source(self) -> Path:
        """The bundle."""
        return self.run_dir / "source"

    @property
    def install(self) -> Path:
        """The install tree: header, libraries, programs, CMake package."""
        return self.run_dir / "dist" / "install"


def locate_run(options: Options, reporter: Reporter) -> tuple[Run, fetch.Resolved | None]:
    """The folder of the run: ``--out``, or ``artifacts/PROFILE/RELEASE``.

    The release's name is asked of a source given on the command line; for the profile's own it
    is in the lock, so that stages after *extract* need no network.
    """
    profile = load_profile(options.config)
    resolved = None
    if options.out is not None:
        run_dir = options.out
    else:
        if options.trtllm is not None:
            resolved = resolve(options, profile)
            release = resolved.release
        else:
            release = _release_of_profile(options, profile)
        run_dir = ROOT / "artifacts" / profile.name / release
    return Run(options, reporter, run_dir.resolve(), profile), resolved


def resolve(options: Options, profile: Profile) -> fetch.Resolved:
    wanted = fetch.wanted_sources(profile, options.trtllm, options.cutlass)
    return fetch.resolve(wanted, releases.load_table(), options.vendor)


def _release_of_profile(options: Options, profile: Profile) -> str:
    lock = load_lock(options.vendor / fetch.LOCK_NAME)
    ref = profile.upstream.trtllm.ref
    assert ref is not None, "the profile model requires it"
    release = lock.release if lock is not None and lock.trtllm.ref == ref else ref
    if not NAME.match(release):
        raise ProfileError(
            f"upstream.trtllm.ref {release!r} cannot name a folder",
            hint="give the folder of the run with --out",
        )
    return release
