"""What runs again, and what does not: unchanged, changed, failed and damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.forge import (
    SMALL_WRAPPER,
    Site,
    commit_edit,
    compiled_since,
    contents,
    read_json,
)
from tests.upstream import Upstream

Fresh = Callable[..., Site]
STAGES = ("generate", "select", "vendor", "render")
LAUNCHER = (
    "cpp/tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"
)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


# --- unchanged -----------------------------------------------------------------------------------


def test_a_second_extract_says_that_nothing_changed_and_takes_two_seconds_at_most(
    demo: Site,
) -> None:
    before = contents(demo.folder, times=True)
    results = [demo.extract() for _ in range(2)]
    for result in results:
        assert result.says(*(f"{stage}: unchanged, skipped" for stage in STAGES))
    assert contents(demo.folder, times=True) == before
    # The best of two: the machine may be busy.
    assert min(result.seconds for result in results) < 2


def test_a_second_build_says_that_nothing_changed_and_compiles_nothing(demo: Site) -> None:
    objects, before = demo.compiled(), contents(demo.folder, times=True)
    result = demo.build()
    assert result.says("build: unchanged, skipped", "verify: unchanged, skipped")
    assert compiled_since(objects, demo) == []
    assert contents(demo.folder, times=True) == before


def test_another_folder_of_checkouts_changes_nothing(small: Site, fresh: Fresh) -> None:
    moved = small.elsewhere(small.folder, vendor=fresh(own_vendor=True).vendor)
    result = moved.extract()
    assert result.says(*(f"{stage}: unchanged, skipped" for stage in STAGES))


def test_a_rewritten_profile_of_the_same_content_changes_nothing(small: Site) -> None:
    text = small.config.read_text(encoding="utf-8")
    other = small.config.with_name("rewritten.yaml")
    other.write_text("# a remark\n" + text, encoding="utf-8")
    result = small.elsewhere(small.folder, config=other).extract()
    assert result.says(*(f"{stage}: unchanged, skipped" for stage in STAGES))


def test_a_plan_is_printed_and_nothing_is_compiled(small: Site, fresh: Fresh) -> None:
    site = fresh()
    site.extract()
    before = contents(site.folder, times=True)
    printed = site.build("--plan").out
    assert "1 units" in printed or "units, " in printed
    assert "GB memory" in printed
    assert "gemm_00" in printed
    assert contents(site.folder, times=True) == before
    assert not (site.folder / "build").exists()


# --- changed by hand -----------------------------------------------------------------------------


def test_a_change_in_one_wrapper_compiles_its_unit_alone_and_is_marked(
    demo_to_change: Site,
) -> None:
    site = demo_to_change
    objects = site.compiled()
    family = site.manifest["gemv"]["selected"][0]["ident"]
    wrapper = f"src/gemv/{family}.cu"
    append(site.source / wrapper, "// changed by hand\n")
    result = site.build()
    assert result.says("source/ was changed by hand", wrapper)
    assert result.seconds < 60
    (unit,) = (u for u in site.manifest["build"]["units"] if wrapper in u["members"])
    compiled = [name for name in compiled_since(objects, site) if name.endswith(".cu.o")]
    assert len(compiled) == 1, compiled
    assert unit["name"] in compiled[0] or family in compiled[0]
    assert "w4a16_gemv" in compiled[0]
    # What the library says of its bundle is compiled into one small source.
    others = set(compiled_since(objects, site)) - set(compiled)
    assert all("build_info" in name for name in others), others
    assert site.manifest["build"]["changed_by_hand"] == [wrapper]
    assert site.info()["bundle_digest"].endswith("-dirty")


def test_a_failing_unit_shows_the_compilers_message_in_full_and_its_fix_compiles_it_alone(
    small: Site,
) -> None:
    installed = contents(small.install, times=True)
    wrapper = small.source / SMALL_WRAPPER
    whole = wrapper.read_text(encoding="utf-8")
    append(wrapper, "#error first message of the compiler\n#error second message of the compiler\n")
    result = small.build(code=12)
    assert result.says(
        "1 unit failed to build",
        "gemm_gs_64x32x64_1x1x1.cu",
        "first message of the compiler",
        "second message of the compiler",
        "What to do:",
    )
    assert contents(small.install, times=True) == installed, "the library that was there stays"

    objects = small.compiled()
    wrapper.write_text(whole + "// mended\n", encoding="utf-8")
    small.build()
    compiled = compiled_since(objects, small)
    assert [name for name in compiled if name.endswith(".cu.o")] == [
        f"CMakeFiles/w4a16_gemm.dir/{SMALL_WRAPPER}.o"
    ]


def test_a_plain_copy_of_the_bundle_with_new_times_compiles_nothing(small: Site) -> None:
    objects = small.compiled()
    for path in small.source.rglob("*"):
        path.touch()
    shutil.rmtree(small.install)
    small.build()
    assert compiled_since(objects, small) == []


# --- damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", ["cut off", "no JSON", "of another shape", "gone"])
def test_a_damaged_state_file_is_noticed_and_made_again(
    small: Site, stage: str, damage: str
) -> None:
    before = contents(small.folder, without=(".state",))
    file = small.folder / ".state" / f"{stage}.json"
    text = file.read_text(encoding="utf-8")
    if damage == "cut off":
        file.write_text(text[: len(text) // 2], encoding="utf-8")
    elif damage == "no JSON":
        file.write_bytes(b"\0\xff\xfe")
    elif damage == "of another shape":
        file.write_text('{"stage": 1, "result": []}', encoding="utf-8")
    else:
        file.unlink()
    result = small.extract()
    assert not result.says(f"{stage}: unchanged, skipped")
    assert contents(small.folder, without=(".state",)) == before
    assert read_json(file)["stage"] == stage
    assert small.extract().says(f"{stage}: unchanged, skipped")


@pytest.mark.parametrize("damage", ["changed", "gone", "stray file", "link", "whole folder"])
def test_a_damaged_bundle_is_noticed_and_made_again(small: Site, damage: str) -> None:
    before = contents(small.source)
    header = small.source / "include/w4a16.h"
    if damage == "changed":
        header.write_text("int broken;\n", encoding="utf-8")
    elif damage == "gone":
        header.unlink()
    elif damage == "stray file":
        (small.source / "src/stray.cu").write_text("stray\n", encoding="utf-8")
    elif damage == "link":
        header.unlink()
        header.symlink_to("/etc/passwd")
    else:
        shutil.rmtree(small.source)
    result = small.extract()
    assert result.says("render: its result is missing or damaged; making it again")
    assert contents(small.source) == before
    objects = small.compiled()
    small.build()
    assert compiled_since(objects, small) == []


def test_a_header_missing_from_the_bundle_is_said_by_build_which_names_it(small: Site) -> None:
    (small.source / "include/w4a16.h").unlink()
    installed = contents(small.install, times=True)
    result = small.build(code=17)
    assert result.says("lacks 1 files", "include/w4a16.h", "What to do:", "extract")
    assert contents(small.install, times=True) == installed


def test_damaged_generated_files_are_made_again(small: Site) -> None:
    before = contents(small.folder / "generated")
    next((small.folder / "generated").rglob("*.cu")).write_text("damaged")
    assert small.extract().says("generate: its result is missing or damaged")
    assert contents(small.folder / "generated") == before


def test_a_damaged_checkout_is_checked_out_again(small: Site, fresh: Fresh) -> None:
    site = fresh(own_vendor=True)
    site.extract()
    before = contents(site.source)
    checkout = next(path for path in site.vendor.glob("cutlass-*") if path.is_dir())
    append(checkout / "include/cutlass/cutlass.h", "// damaged\n")
    assert site.extract().says("is damaged; checking it out again")
    assert contents(site.source) == before


def test_a_damaged_store_of_git_is_made_again(fresh: Fresh) -> None:
    site = fresh(own_vendor=True)
    site.extract()
    before = contents(site.source)
    store = next(site.vendor.glob("stores/trtllm-*"))
    (store / "HEAD").write_text("damaged")
    site.extract()
    assert contents(site.source) == before


@pytest.mark.parametrize("damage", ["library cut off", "header gone", "whole tree"])
def test_a_damaged_install_tree_is_noticed_and_installed_again(small: Site, damage: str) -> None:
    before, objects = contents(small.install), small.compiled()
    if damage == "library cut off":
        small.library.write_bytes(small.library.read_bytes()[:1000])
    elif damage == "header gone":
        (small.install / "include/w4a16.h").unlink()
    else:
        shutil.rmtree(small.install)
    result = small.build()
    assert result.says("build: its result is missing or damaged; making it again")
    assert contents(small.install) == before
    assert compiled_since(objects, small) == []


def test_a_damaged_build_folder_is_overcome(small: Site) -> None:
    before = contents(small.install)
    shutil.rmtree(small.install)
    for name in ("plan.json", "sources.json", "toolchain.json", "peaks.json", "configured.json"):
        (small.folder / "build" / name).write_bytes(b"\0 damaged")
    small.build()
    assert contents(small.install) == before


def test_a_damaged_manifest_is_written_again_by_extract(small: Site) -> None:
    before = small.manifest
    (small.folder / "manifest.json").write_text("{", encoding="utf-8")
    small.extract()
    small.build()
    assert small.manifest == before


# --- changed upstream ----------------------------------------------------------------------------


def test_a_changed_upstream_header_is_vendored_anew_and_compiles_what_includes_it(
    small: Site, own_upstream: Upstream
) -> None:
    site = small.elsewhere(small.folder, upstream=own_upstream)
    commit_edit(own_upstream.trtllm, "v1.0.0", LAUNCHER, "\n// corrected\n", tag="v1.0.0-fix")
    before, objects = site.manifest, site.compiled()
    site = site.elsewhere(site.folder, ref="v1.0.0-fix")
    result = site.extract()
    assert not result.says("vendor: unchanged, skipped")
    name = f"third_party/tensorrt_llm/{LAUNCHER}"
    old = {entry["path"]: entry["sha256"] for entry in before["vendored"]}
    new = {entry["path"]: entry["sha256"] for entry in site.manifest["vendored"]}
    assert [path for path in new if new[path] != old.get(path)] == [name]
    assert site.manifest["bundle"] != before["bundle"]
    site.build()
    compiled = [path for path in compiled_since(objects, site) if path.endswith(".cu.o")]
    assert compiled == [f"CMakeFiles/w4a16_gemm.dir/{SMALL_WRAPPER}.o"]


def test_a_ref_that_moved_since_the_lock_stops_the_run_and_changes_nothing(
    small: Site, own_upstream: Upstream
) -> None:
    site = small.elsewhere(small.folder, upstream=own_upstream)
    site.extract()
    before = contents(site.folder, times=True)
    commit_edit(own_upstream.trtllm, "v1.0.0", LAUNCHER, "\n// moved\n", tag="v1.0.0")
    result = site.extract(code=5)
    assert result.says(
        "TensorRT-LLM v1.0.0 is not what", "upstream.lock.yaml holds", "What to do:", "regenerate"
    )
    assert result.says("cpp/tensorrt_llm/kernels/cutlass_kernels: ")
    assert contents(site.folder, times=True) == before
