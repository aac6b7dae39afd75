"""What a profile may choose, and the gates that a library must pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.forge import Json, Site, compiled_since, contents, write_profile

Fresh = Callable[..., Site]


def changed(site: Site, name: str, **changes: Any) -> Site:
    """The same folder with another profile."""
    profile: Json = yaml.safe_load(site.config.read_text(encoding="utf-8"))
    path = write_profile(site.folder.with_name("configs") / f"{name}.yaml", profile, **changes)
    return site.elsewhere(site.folder, config=path)


@pytest.mark.parametrize(
    ("gemm", "idents"),
    [
        (
            {"quant_ops": ["group_scale"], "tiles": "all", "clusters": ["2x1x1"]},
            ["gs_128x32x64_2x1x1"],
        ),
        (
            {"quant_ops": ["per_column", "group_scale_zero"], "tiles": ["64x16x64"]},
            ["gsz_64x16x64_1x1x1", "pc_64x16x64_1x1x1"],
        ),
        (
            {
                "quant_ops": ["group_scale"],
                "tiles": ["64x32x64", "128x32x64"],
                "clusters": ["1x1x1"],
            },
            ["gs_128x32x64_1x1x1", "gs_64x32x64_1x1x1"],
        ),
    ],
)
def test_quant_ops_tiles_and_clusters_of_the_profile_decide_what_is_kept(
    fresh: Fresh, gemm: dict[str, Any], idents: list[str]
) -> None:
    site = fresh(gemm={"clusters": "all", **gemm})
    site.extract()
    manifest = site.manifest
    assert sorted(entry["ident"] for entry in manifest["selected"]) == [f"gemm_{i}" for i in idents]
    assert len(manifest["selected"]) + len(manifest["dropped"]) == 48
    reasons = {entry["reason"] for entry in manifest["dropped"]}
    assert any(reason.endswith("is not in the profile") for reason in reasons)
    assert sorted(p.stem for p in site.source.glob("src/gemm/*.cu")) == [
        f"gemm_{i}" for i in idents
    ]


@pytest.mark.parametrize(
    ("gemv", "families", "kernels"),
    [
        ({"m": {"from": 2, "to": 3}}, 10, 20),
        ({"groups": [64], "per_column": False}, 4, 16),
        ({"groups": [], "zeros": [False], "bias": [False]}, 1, 4),
        # Per column has no zeros to choose.
        ({"zeros": [True], "bias": [True]}, 3, 12),
    ],
)
def test_gemv_variants_of_the_profile_decide_what_is_kept(
    fresh: Fresh, demo_profile: Json, gemv: dict[str, Any], families: int, kernels: int
) -> None:
    every = {"quant_ops": demo_profile["gemm"]["quant_ops"]}
    site = fresh(gemm=every, gemv={**demo_profile["gemv"], **gemv})
    site.extract()
    selected = site.manifest["gemv"]["selected"]
    assert sum(len(family["kernels"]) for family in selected) == kernels
    assert len(list(site.source.glob("src/gemv/*.cu"))) == len(selected) == families


def test_decode_tactics_of_the_profile_are_units_of_the_bundle(fresh: Fresh) -> None:
    entries = {
        "narrow": [{"rows": 32, "tokens": 8, "ctas_per_sm": 2, "normalizes": True}],
        "wide": [{"rows": 128, "tokens": 32, "sets": 2, "cluster": 2}],
    }
    site = fresh(decode=entries)
    site.extract()
    names = ["decode:32x8:o2", "decode:128x32:s2:c2"]
    assert [tactic["name"] for tactic in site.manifest["decode"]["selected"]] == names
    assert {path.stem for path in site.source.glob("src/decode/*.cu")} == {
        "decode_32x8_o2",
        "decode_128x32_s2_c2",
    }
    narrow = (site.source / "src/decode/decode_32x8_o2.cu").read_text(encoding="utf-8")
    assert "normalizing_kernel<decode_32x8_o2_g128_z_norm>" in narrow
    table = (site.source / "src/kernels.cpp").read_text(encoding="utf-8")
    assert '"decode:128x32:s2:c2", "wgmma", 2, &decode::decode_128x32_s2_c2' in table


def test_a_profile_without_decode_tactics_has_none_and_says_so(small: Site) -> None:
    found = small.manifest["decode"]
    assert found == {"selected": [], "reason": "the profile asks for no decode kernels"}


def test_a_profile_without_gemv_has_none_and_says_so(small: Site) -> None:
    manifest = small.manifest
    assert manifest["gemv"]["selected"] == []
    assert manifest["gemv"]["reason"] == "the profile asks for no GEMV"
    assert [tactic["name"] for tactic in small.info()["tactics"]] == ["sm90:64x32x64:1x1x1"]


def test_a_static_library_can_be_added_to_what_is_built_without_compiling_kernels_again(
    small: Site,
) -> None:
    assert not (small.install / "lib/libw4a16.a").exists()
    objects = small.compiled()
    both = changed(small, "both", build={"static": True})
    both.extract()
    both.build()
    assert (both.install / "lib/libw4a16.a").is_file()
    assert (both.install / "lib/libw4a16.so").exists()
    assert [name for name in compiled_since(objects, both) if "gemm" in name] == []


@pytest.mark.parametrize(
    ("gates", "failed"),
    [
        ({"library_bytes": 1000}, "library at most 1000 B"),
        ({"gemm_sass": ["HGMMA"]}, "SASS of every GEMM kernel has HGMMA"),
    ],
)
def test_a_library_that_misses_a_gate_fails_with_the_gate_named(
    small: Site, gates: dict[str, Any], failed: str
) -> None:
    strict = changed(small, "strict", gates=gates)
    strict.extract()
    installed = contents(small.install, times=True)
    result = strict.build(code=13)
    assert result.says("1 of", "checks of lib/libw4a16.so", "failed", f"- {failed}", "What to do:")
    assert contents(small.install, times=True) == installed
    checks = {check["name"]: check["ok"] for check in strict.report["verification"]["checks"]}
    assert [name for name, ok in checks.items() if not ok] == [failed]
    assert "**FAILED**" in (small.folder / "report.md").read_text(encoding="utf-8")
    # It fails again, though nothing changed, and the stage alone does too.
    assert strict.run("verify", code=13).says(failed)
    small.extract()
    assert small.build().says("checks passed")


def test_the_default_folder_of_a_run_is_named_for_profile_and_release(
    small: Site, tmp_path: Path
) -> None:
    forge = small.forge
    forge.run(
        *("extract", "--config", small.config, "--vendor", small.vendor),
        *("--trtllm", f"{small.upstream.trtllm}@v1.1.0", "--cutlass", small.upstream.cutlass),
    )
    place = forge.project / "artifacts/small/v1.1.0"
    assert (place / "source/CMakeLists.txt").is_file()
    assert (place / "upstream.lock.yaml").is_file()
    assert not (small.vendor / "upstream.lock.yaml").exists()


def test_build_with_a_profile_of_other_kernels_than_extracts_is_refused(small: Site) -> None:
    other = changed(small, "other", gemm={"tiles": ["64x16x64"]})
    before = contents(small.folder, times=True)
    assert other.build(code=17).says("extract", "What to do:")
    assert contents(small.folder, times=True) == before
