"""The bundle is the same for the same inputs, wherever and from whatever shape it is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.integration.forge import Site, contents, files_holding
from tests.upstream import Upstream, write_upstream

Fresh = Callable[..., Site]


def test_the_bundle_is_identical_in_another_folder_with_another_vendor_and_other_repositories(
    demo: Site, fresh: Fresh, tmp_path: Path
) -> None:
    moved = write_upstream(tmp_path / "somewhere else", bare=True)
    other = fresh(upstream=moved, own_vendor=True).elsewhere(tmp_path / "out", config=demo.config)
    other.extract()
    assert contents(other.source) == contents(demo.source)
    assert other.manifest["bundle"] == demo.manifest["bundle"]
    assert files_holding(other.source, str(tmp_path)) == []


def test_the_bundle_of_the_newer_shape_is_identical_too_and_builds(
    modern: Upstream, fresh: Fresh, tmp_path: Path
) -> None:
    first = fresh("first", upstream=modern)
    first.extract()
    assert first.manifest["release"] == "v1.3.0"
    assert first.manifest["sources"]["cutlass"]["commit"] == modern.cutlass_commit
    moved = tmp_path / "moved"
    shutil.copytree(modern.trtllm, moved / "trtllm")
    shutil.copytree(modern.cutlass, moved / "cutlass")
    places = Upstream(**{**vars(modern), "trtllm": moved / "trtllm", "cutlass": moved / "cutlass"})
    second = fresh("second", upstream=places, own_vendor=True)
    second.extract()
    assert contents(first.source) == contents(second.source)

    result = first.build()
    assert result.says("checks passed")
    assert [tactic["name"] for tactic in first.info()["tactics"]] == ["sm90:64x32x64:1x1x1"]
    wrapper = (first.source / "src/gemm/gemm_gs_64x32x64_1x1x1.cu").read_text(encoding="utf-8")
    assert "TRTLLM_NAMESPACE_BEGIN" in wrapper


def test_a_url_gives_the_bundle_that_a_local_repository_gives(small: Site, fresh: Fresh) -> None:
    other = fresh(own_vendor=True)
    other.extract("--trtllm", f"file://{small.upstream.trtllm}@{small.ref}")
    assert contents(other.source) == contents(small.source)


def test_a_release_is_also_taken_by_branch_and_by_commit(small: Site, fresh: Fresh) -> None:
    commit = small.manifest["sources"]["trtllm"]["commit"]
    by_commit = fresh("commit", ref=commit)
    by_commit.extract()
    assert contents(by_commit.source) == contents(small.source)
    by_branch = fresh("branch", ref="main")  # stands at the release after it
    by_branch.extract()
    assert by_branch.manifest["release"] == "v1.1.0"
    assert by_branch.manifest["sources"]["cutlass"]["commit"] == small.upstream.next_cutlass_commit


def test_a_release_before_the_hopper_gemv_is_extracted_without_one_and_says_why(
    demo: Site, fresh: Fresh, tmp_path: Path
) -> None:
    """It is told by its version, and its generator takes no architecture."""
    version = "tensorrt_llm/version.py"
    generator = "cpp/tensorrt_llm/kernels/cutlass_kernels/python/generate_kernels.py"
    checkout = next(demo.vendor.glob("trtllm-*/LICENSE")).parent
    script = (checkout / generator).read_text(encoding="utf-8")
    script = script.replace(
        '"-a", "--architectures", required=True', '"-a", "--architectures", default="90"'
    )
    old = write_upstream(
        tmp_path / "old", edits={version: '__version__ = "0.14.0"\n', generator: script}
    )
    site = fresh(upstream=old, gemv=dict(from_demo(demo)))
    site.extract()
    gemv = site.manifest["gemv"]
    assert gemv["selected"] == []
    assert "column-major" in gemv["reason"]
    assert not (site.source / "src/gemv").exists()


def from_demo(demo: Site) -> dict[str, object]:
    return dict(demo.manifest["profile"]["gemv"])
