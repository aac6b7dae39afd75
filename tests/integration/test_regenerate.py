"""Moving to another release: what changed is told, and nothing is lost where it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.integration.forge import (
    Forge,
    Json,
    Site,
    commit_edit,
    contents,
    read_json,
    write_profile,
)
from tests.upstream import Upstream, write_upstream

Fresh = Callable[..., Site]
EXTENSIONS = "cpp/tensorrt_llm/cutlass_extensions/include/cutlass_extensions"
NEW_HEADER = f"{EXTENSIONS}/arch/grid_dependency.h"


def test_regenerate_tells_what_changed_and_puts_the_new_release_in_the_place_of_the_old(
    demo_to_change: Site,
) -> None:
    site = demo_to_change
    old = site.manifest
    printed = site.run("regenerate", "--to", "v1.1.0").out

    assert "# From v1.0.0 to v1.1.0" in printed
    assert "- added: sm90:64x64x64:1x1x1" in printed
    assert "- removed: sm90:64x16x64:1x1x1" in printed
    assert f"- added: third_party/tensorrt_llm/{NEW_HEADER}" in printed
    assert "fpA_intB_launcher_sm90.inl" in printed
    sizes = [m["verification"]["library_bytes"] for m in (old, site.manifest)]
    assert f"library: {sizes[0]:,} bytes to {sizes[1]:,} bytes" in printed

    change = read_json(site.folder / "changes.json")
    assert change["tactics"]["added"] == ["sm90:64x64x64:1x1x1"]
    assert change["tactics"]["removed"] == ["sm90:64x16x64:1x1x1"]
    shorts = ("gs", "gsz", "pc")
    assert change["instantiations"]["added"] == [f"gemm_{s}_64x64x64_1x1x1" for s in shorts]
    assert change["instantiations"]["removed"] == [f"gemm_{s}_64x16x64_1x1x1" for s in shorts]
    assert change["instantiations"]["changed"] == {}
    assert change["instantiations"]["same"] == 9
    assert change["vendored"]["added"] == [f"third_party/tensorrt_llm/{NEW_HEADER}"]
    assert change["vendored"]["removed"] == []
    changed = [Path(path).name for path in change["vendored"]["changed"]]
    assert changed == ["version.h", "fpA_intB_launcher_sm90.inl"]
    assert change["gemv"]["same"] == 40
    assert (site.folder / "changes.md").read_text(encoding="utf-8") == printed

    assert site.manifest["release"] == "v1.1.0"
    names = [tactic["name"] for tactic in site.info()["tactics"]]
    assert "sm90:64x64x64:1x1x1" in names
    assert "sm90:64x16x64:1x1x1" not in names
    lock = yaml.safe_load((site.folder / "upstream.lock.yaml").read_text(encoding="utf-8"))
    assert lock["release"] == "v1.1.0"
    assert lock["cutlass"]["commit"] == site.upstream.next_cutlass_commit
    assert [p.name for p in site.folder.parent.glob("demo.*")] == ["demo.saved"]

    following = site.elsewhere(site.folder, ref="v1.1.0")
    assert following.extract().says("render: unchanged, skipped")
    assert following.build().says("build: unchanged, skipped")


def test_the_old_artifacts_stand_when_the_new_release_does_not_compile(
    small: Site, own_upstream: Upstream
) -> None:
    site = small.elsewhere(small.folder, upstream=own_upstream)
    site.extract()
    broken = '\nstatic_assert(sizeof(int) == 5, "this release is broken");\n'
    commit_edit(own_upstream.trtllm, "v1.1.0", NEW_HEADER, broken, tag="v1.1.0")
    before = contents(site.folder, times=True)
    result = site.run("regenerate", "--to", "v1.1.0", code=12)
    assert result.says("failed to build", "this release is broken", "What to do:")
    assert contents(site.folder, times=True) == before
    assert site.extract().says("render: unchanged, skipped")
    shutil.rmtree(site.folder.with_name("small.next"), ignore_errors=True)


def test_the_old_artifacts_stand_when_the_new_release_lacks_what_the_profile_asks_for(
    small: Site,
) -> None:
    profile: Json = yaml.safe_load(small.config.read_text(encoding="utf-8"))
    gone = write_profile(small.config.with_name("gone.yaml"), profile, gemm={"tiles": ["64x16x64"]})
    before = contents(small.folder, times=True)
    result = small.elsewhere(small.folder, config=gone).run("regenerate", "--to", "v1.1.0", code=8)
    assert result.says("gemm.tiles: upstream has no kernel", "What to do:")
    assert contents(small.folder, times=True) == before
    shutil.rmtree(small.folder.with_name("small.next"), ignore_errors=True)


@pytest.mark.parametrize("ref", ["v9.9.9", "v0.8.0"])
def test_regenerate_to_a_release_that_cannot_be_is_refused_and_writes_nothing(
    small: Site, ref: str
) -> None:
    before = contents(small.folder, times=True)
    result = small.run("regenerate", "--to", ref, code={"v9.9.9": 4, "v0.8.0": 6}[ref])
    assert result.says("What to do:")
    assert contents(small.folder, times=True) == before
    assert not small.folder.with_name("small.next").exists()


def test_regenerate_with_nothing_to_compare_with_says_what_to_run_first(fresh: Fresh) -> None:
    site = fresh()
    result = site.run("regenerate", "--to", "v1.1.0", code=17)
    assert result.says("nothing in", "to compare", "nox -s extract build")
    assert not site.folder.exists()


@pytest.fixture
def own_project(demo: Site, small_profile: Json, tmp_path: Path) -> tuple[Forge, Path, Upstream]:
    """A project whose profile names its repositories itself: no --trtllm, --out or --vendor."""
    project = tmp_path / "project"
    shutil.copytree(demo.forge.project, project)
    upstream = write_upstream(project / "artifacts/upstream")
    (project / "vendor").mkdir()
    (project / "vendor/toolchain").symlink_to(demo.vendor / "toolchain")
    sources = {
        "trtllm": {"url": "artifacts/upstream/trtllm", "ref": "v1.0.0"},
        "cutlass": {"url": "artifacts/upstream/cutlass"},
    }
    config = write_profile(
        project / "configs/own.yaml", small_profile, upstream=sources, name="own"
    )
    config.write_text("# ours\n" + config.read_text(encoding="utf-8"), encoding="utf-8")
    return Forge(project=project, vendor=project / "vendor"), config, upstream


def test_a_profiles_own_sources_are_locked_and_moved_with_the_profile(
    own_project: tuple[Forge, Path, Upstream],
) -> None:
    forge, config, _ = own_project
    lock = forge.vendor / "upstream.lock.yaml"
    forge.run("extract", "--config", config)
    runs = forge.project / "artifacts/own"
    assert [path.name for path in runs.iterdir()] == ["v1.0.0"]
    assert yaml.safe_load(lock.read_text(encoding="utf-8"))["release"] == "v1.0.0"
    before = contents(runs / "v1.0.0", times=True)

    printed = forge.run("regenerate", "--config", config, "--to", "v1.1.0", "--extract-only").out
    assert "# From v1.0.0 to v1.1.0" in printed
    assert "library: not built to not built" in printed
    assert yaml.safe_load(lock.read_text(encoding="utf-8"))["release"] == "v1.1.0"
    text = config.read_text(encoding="utf-8")
    assert text.startswith("# ours\n")
    assert yaml.safe_load(text)["upstream"]["trtllm"]["ref"] == "v1.1.0"
    assert contents(runs / "v1.0.0", times=True) == before
    assert (runs / "v1.1.0/changes.md").read_text(encoding="utf-8") == printed
    assert forge.run("extract", "--config", config).says("render: unchanged, skipped")


def test_the_lock_and_the_profile_stand_when_moving_fails(
    own_project: tuple[Forge, Path, Upstream],
) -> None:
    forge, config, upstream = own_project
    forge.run("extract", "--config", config)
    generator = "cpp/tensorrt_llm/kernels/cutlass_kernels/python/generate_kernels.py"
    broken = '\nraise SystemExit("this release is broken")\n'
    commit_edit(upstream.trtllm, "v1.1.0", generator, broken, tag="v1.1.0")
    kept = [forge.vendor / "upstream.lock.yaml", config]
    before = [path.read_bytes() for path in kept]
    artifacts = contents(forge.project / "artifacts/own/v1.0.0", times=True)
    result = forge.run("regenerate", "--config", config, "--to", "v1.1.0", code=7)
    assert result.says("generator failed", "this release is broken")
    assert [path.read_bytes() for path in kept] == before
    assert contents(forge.project / "artifacts/own/v1.0.0", times=True) == artifacts
    assert forge.run("extract", "--config", config).says("render: unchanged, skipped")


def test_a_moved_ref_of_the_profile_is_refused_until_regenerate_asks_for_it(
    own_project: tuple[Forge, Path, Upstream],
) -> None:
    forge, config, upstream = own_project
    forge.run("extract", "--config", config)
    launcher = (
        "cpp/tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/"
        "fpA_intB_launcher_sm90.inl"
    )
    commit_edit(upstream.trtllm, "v1.0.0", launcher, "\n// moved\n", tag="v1.0.0")
    lock = forge.vendor / "upstream.lock.yaml"
    before = lock.read_bytes()
    result = forge.run("extract", "--config", config, code=5)
    assert result.says("is not what", "upstream.lock.yaml holds", "regenerate -- --to v1.0.0")
    assert lock.read_bytes() == before
    printed = forge.run("regenerate", "--config", config, "--to", "v1.0.0", "--extract-only").out
    assert "- changed: third_party/tensorrt_llm/" in printed
    assert lock.read_bytes() != before
    assert forge.run("extract", "--config", config).says("render: unchanged, skipped")
