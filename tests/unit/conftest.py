"""What the unit tests share: the miniature upstream, a profile, a run of stage fetch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline import fetch, releases
from pipeline.generate import generate
from pipeline.model import GeneratedTree, Sources
from pipeline.profile import Profile
from pipeline.releases import ReleaseFacts
from tests.upstream import Upstream, write_upstream

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = "sm90_generic_mixed_gemm_kernelLauncher"
KERNELS = "cpp/tensorrt_llm/kernels/cutlass_kernels"
GENERATOR = f"{KERNELS}/python/generate_kernels.py"
GEMV = "cpp/tensorrt_llm/kernels/weightOnlyBatchedGemv"


def git(folder: Path, *arguments: str, text: str | None = None) -> str:
    """Git without this machine's configuration; its output, stripped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = {
        f"GIT_{role}_{part}": value
        for role in ("AUTHOR", "COMMITTER")
        for part, value in (
            ("NAME", "Test"),
            ("EMAIL", "test@example.invalid"),
            ("DATE", "1700000000 +0000"),
        )
    }
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **identity}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def commit_all(folder: Path, message: str = "change") -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """The miniature as it comes; nobody writes to it."""
    return write_upstream(tmp_path_factory.mktemp("classic"))


@pytest.fixture(scope="session")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    return write_upstream(tmp_path_factory.mktemp("modern"), shape="modern")


Raw = dict[str, object]


def raw_profile(**changes: object) -> Raw:
    """A profile as YAML holds it; ``changes`` replace whole top-level keys (None removes one)."""
    text = (ROOT / "configs" / "w4a16-sm90.yaml").read_text(encoding="utf-8")
    values: Raw = {**yaml.safe_load(text), **changes}
    return {key: value for key, value in values.items() if value is not None}


def make_profile(**changes: object) -> Profile:
    return Profile.model_validate(raw_profile(**changes))


def profile_for(source: Upstream, **changes: object) -> Profile:
    """The default profile, with the miniature in upstream's place."""
    repositories = {
        "trtllm": {"url": str(source.trtllm), "ref": source.ref},
        "cutlass": {"url": str(source.cutlass)},
    }
    return make_profile(**{"name": "unit", "upstream": repositories, **changes})


Fetch = Callable[..., tuple[Sources, ReleaseFacts]]


def fetch_from(
    source: Upstream, vendor: Path, run_dir: Path | None = None
) -> tuple[Sources, ReleaseFacts]:
    """Stage fetch, with the miniature's repositories in the profile."""
    table = releases.load_table()
    wanted = fetch.wanted_sources(profile_for(source), None, None)
    resolved = fetch.resolve(wanted, table, vendor)
    return fetch.fetch(
        resolved, table, vendor=vendor, run_dir=run_dir or vendor / "run", say=lambda text: None
    )


@pytest.fixture(scope="session")
def fetched(
    mini: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sources, ReleaseFacts]:
    return fetch_from(mini, tmp_path_factory.mktemp("vendor"))


@pytest.fixture(scope="session")
def generated(
    fetched: tuple[Sources, ReleaseFacts], tmp_path_factory: pytest.TempPathFactory
) -> GeneratedTree:
    """What the miniature's own generator writes."""
    sources, facts = fetched
    return generate(sources, facts, sm=90, target=tmp_path_factory.mktemp("tree") / "generated")
