"""What the integration tests share: a copy of the project, the miniature, and runs made once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.forge import PARTS, ROOT, Forge, Json, Site, write_profile
from tests.upstream import Upstream, write_upstream

NO_COMPILER = 9


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def project(workshop: Path) -> Path:
    """This project as a user has it, without artifacts and without a lock."""
    target = workshop / "project"
    for part in PARTS:
        if (ROOT / part).is_file():
            shutil.copy2(ROOT / part, target / part)
            continue
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, target / part, ignore=ignored, symlinks=True)
    for package in ("tests",):
        (target / package / "__init__.py").write_text("")
    return target


@pytest.fixture(scope="session")
def classic(workshop: Path) -> Upstream:
    """The miniature in the shape of v1.0.0; nobody writes to it."""
    return write_upstream(workshop / "classic")


@pytest.fixture(scope="session")
def modern(workshop: Path) -> Upstream:
    """The miniature in the shape of newer releases; nobody writes to it."""
    return write_upstream(workshop / "modern", shape="modern")


@pytest.fixture(scope="session")
def demo_profile(project: Path) -> Json:
    values: Json = yaml.safe_load((project / "configs/demo.yaml").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="session")
def small_profile(demo_profile: Json) -> Json:
    """One GEMM kernel and nothing else, so that a build takes seconds."""
    return {
        **{key: value for key, value in demo_profile.items() if key not in ("gemv", "decode")},
        "name": "small",
        "gemm": {"quant_ops": ["group_scale"], "tiles": ["64x32x64"], "clusters": ["1x1x1"]},
        "build": {"compress": "none", "static": False},
    }


@pytest.fixture(scope="session")
def forge(project: Path, workshop: Path) -> Forge:
    return Forge(project=project, vendor=workshop / "vendor")


@pytest.fixture(scope="session")
def _demo(forge: Forge, classic: Upstream, workshop: Path) -> Site:
    """Extract, build and test of the demo profile, once; skips what needs a compiler if none is."""
    site = Site(
        forge=forge,
        folder=workshop / "demo",
        config=forge.project / "configs/demo.yaml",
        upstream=classic,
        ref=classic.ref,
        vendor=forge.vendor,
    )
    for stage in ("extract", "build", "test"):
        result = site.run(stage, code=None)
        if result.code == NO_COMPILER:
            pytest.skip(f"no CUDA compiler here or on the package index: {result.err[-500:]}")
        assert result.code == 0, f"{stage}: {result.shown}"
        (workshop / f"demo-{stage}.log").write_text(result.err)
    site.save()
    return site


@pytest.fixture(scope="session")
def _small(_demo: Site, small_profile: Json, workshop: Path) -> Site:
    config = write_profile(workshop / "configs/small.yaml", small_profile)
    site = _demo.elsewhere(workshop / "small", config=config)
    site.extract()
    site.build()
    site.save()
    return site


@pytest.fixture
def demo(_demo: Site) -> Site:
    """The demo run, to be read only."""
    return _demo


@pytest.fixture
def demo_to_change(_demo: Site) -> Iterator[Site]:
    """The demo run; whatever a test does to it is undone."""
    yield _demo
    _demo.restore()


@pytest.fixture
def small(_small: Site) -> Iterator[Site]:
    """A built run of the small profile; whatever a test does to it is undone."""
    yield _small
    _small.restore()


@pytest.fixture
def own_upstream(classic: Upstream, tmp_path: Path) -> Upstream:
    """A miniature of the test's own, to commit to."""
    return write_upstream(tmp_path / "upstream")


@pytest.fixture
def fresh(_demo: Site, small_profile: Json, tmp_path: Path) -> Callable[..., Site]:
    """A run of the small profile that has not begun, with ``changes`` to profile or upstream."""

    def make(
        name: str = "run",
        *,
        upstream: Upstream | None = None,
        ref: str | None = None,
        own_vendor: bool = False,
        **changes: Any,
    ) -> Site:
        source = upstream or _demo.upstream
        return _demo.elsewhere(
            tmp_path / name,
            config=write_profile(tmp_path / f"{name}.yaml", small_profile, **changes),
            upstream=source,
            ref=ref or source.ref,
            vendor=vendor_with_tools(_demo.vendor, tmp_path / f"{name}-vendor")
            if own_vendor
            else _demo.vendor,
        )

    return make


def vendor_with_tools(known: Path, target: Path) -> Path:
    """An empty folder for checkouts that shares the tools already installed."""
    target.mkdir(parents=True)
    (target / "toolchain").symlink_to(known / "toolchain")
    return target


@pytest.fixture(scope="session")
def cmake() -> Path:
    import cmake as package

    return Path(package.CMAKE_BIN_DIR, "cmake")


@pytest.fixture(scope="session")
def ninja() -> Path:
    import ninja as package

    return Path(package.BIN_DIR, "ninja")


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., str]:
    """Run a program that must succeed; its output, both streams together."""

    def run(*command: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    return run
