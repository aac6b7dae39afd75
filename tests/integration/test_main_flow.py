"""What extract, build and test leave behind on the miniature."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.elf import read_elf
from tests.integration.forge import ROOT, Forge, Site, contents, files_holding, read_json

Tool = Callable[..., str]

TACTICS = {
    "sm90:64x16x64:1x1x1",
    "sm90:64x32x64:1x1x1",
    "sm90:128x32x64:1x1x1",
    "sm90:128x32x64:2x1x1",
}
DECODE = ["decode:64x8", "decode:64x16:s1:o2:stream"]
QUANT_OPS = ["per_column", "group_scale", "group_scale_zero"]


def test_twelve_instantiations_are_kept_with_all_that_names_them(demo: Site) -> None:
    selected = demo.manifest["selected"]
    assert len(selected) == 12
    assert Counter(entry["quant_op"] for entry in selected) == dict.fromkeys(QUANT_OPS, 4)
    assert {entry["tactic"] for entry in selected} == TACTICS
    for entry in selected:
        assert entry["types"] == {
            "activation": "half",
            "weight": "cutlass::uint4b_t",
            "scale_zero": "half",
            "bias": "half",
            "output": "half",
        }
        assert entry["tactic"] == f"sm90:{entry['cta_tile']}:{entry['cluster']}"
        assert entry["mainloop_schedule"].startswith("cutlass::gemm::KernelTmaWarpSpecialized")
        file, _, line = entry["origin"].rpartition(":")
        text = (demo.folder / "generated" / file).read_text(encoding="utf-8").splitlines()
        assert text[int(line) - 1].startswith("template void sm90_generic_mixed_gemm")


def test_thirty_six_instantiations_are_dropped_with_a_reason_each(demo: Site) -> None:
    dropped = demo.manifest["dropped"]
    assert len(dropped) == 36
    reasons = Counter(entry["reason"] for entry in dropped)
    assert sorted(reasons.values()) == [12, 12, 12]
    assert all(word in " ".join(reasons) for word in ("fp8", "bfloat16", "uint8_t"))
    assert all(entry["name"] and entry["origin"] and entry["line"] for entry in dropped)


def test_files_of_grouped_gemms_are_listed_as_ignored(demo: Site) -> None:
    ignored = demo.manifest["ignored"]
    assert ignored
    assert all(entry["origin"].startswith("gemm_grouped/") for entry in ignored)
    assert all("no mixed-input GEMM" in entry["reason"] for entry in ignored)
    generated = set(demo.manifest["generator"]["files"])
    parsed = {e["origin"].rpartition(":")[0] for e in demo.manifest["selected"]}
    parsed |= {e["origin"] for e in demo.manifest["dropped"]}
    assert parsed | {entry["origin"] for entry in ignored} == generated


def test_gemv_kernels_are_selected_by_the_profile_and_the_rest_has_reasons(demo: Site) -> None:
    gemv = demo.manifest["gemv"]
    families = {
        (family["group_size"], family["zero"], family["bias"]) for family in gemv["selected"]
    }
    grouped = {(group, zero, bias) for group in (64, 128) for zero in (0, 1) for bias in (0, 1)}
    assert families == grouped | {(0, 0, 0), (0, 0, 1)}
    assert all([k["m"] for k in family["kernels"]] == [1, 2, 3, 4] for family in gemv["selected"])
    assert gemv["dropped"]
    assert all(entry["reason"] for entry in gemv["dropped"])
    assert gemv["reason"] == ""


def test_the_manifest_names_versions_commits_and_digests_of_what_made_it(demo: Site) -> None:
    manifest = demo.manifest
    assert manifest["release"] == "v1.0.0"
    assert manifest["sources"]["cutlass"]["commit"] == demo.upstream.cutlass_commit
    assert re.fullmatch("[0-9a-f]{40}", manifest["sources"]["trtllm"]["commit"])
    for name in ("trtllm", "cutlass"):
        digests = manifest["sources"][name]["digests"]
        assert digests
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())
    assert manifest["bundle"]["digest"] == read_json(demo.source / "bundle.json")["digest"]
    assert manifest["build"]["compiler"].startswith("nvcc ")
    assert manifest["build"]["changed_by_hand"] == []


def test_each_vendored_file_is_in_the_bundle_with_its_digest_and_licence(demo: Site) -> None:
    found = contents(demo.source)
    for entry in demo.manifest["vendored"]:
        assert found[entry["path"]] == entry["sha256"]
    assert "licenses/TensorRT-LLM.txt" in found
    assert "licenses/CUTLASS.txt" in found
    assert not [name for name in found if "conv2d" in name], "nothing includes CUTLASS's conv"


def test_no_checkout_path_of_this_machine_is_in_the_bundle_or_manifest(
    demo: Site, workshop: Path
) -> None:
    assert files_holding(demo.source, str(workshop)) == []
    manifest = demo.manifest
    for source in (manifest["sources"].pop("trtllm"), manifest["sources"].pop("cutlass")):
        # A repository given by its path is named so: that is what was asked for, and all.
        assert "folder" not in source
        assert str(demo.vendor) not in str(source)
    assert str(workshop) not in str(manifest)


def test_no_path_of_this_machine_is_in_what_is_installed(demo: Site, workshop: Path) -> None:
    assert files_holding(demo.install, str(workshop)) == []
    assert files_holding(demo.install, str(ROOT)) == []


def test_the_install_tree_has_header_libraries_programs_package_and_licences(demo: Site) -> None:
    installed = set(contents(demo.install))
    assert installed >= {
        "include/w4a16.h",
        "lib/libw4a16.a",
        "lib/libw4a16.so",
        "lib/cmake/w4a16/w4a16Config.cmake",
        "lib/cmake/w4a16/w4a16ConfigVersion.cmake",
        "lib/cmake/w4a16/w4a16Targets.cmake",
        "bin/w4a16_info",
        "bin/w4a16_test",
        "share/doc/w4a16/NOTICE",
        "share/doc/w4a16/licenses/TensorRT-LLM.txt",
        "share/doc/w4a16/licenses/CUTLASS.txt",
    }


def test_the_library_exports_its_own_functions_only_and_needs_system_libraries(demo: Site) -> None:
    facts = read_elf(demo.library)
    header = (demo.install / "include/w4a16.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"\b(w4a16_\w+)\(", header))
    assert all(name.startswith("w4a16_") for name in facts.exported)
    assert set(facts.exported) <= declared
    assert {"w4a16_run", "w4a16_pack", "w4a16_version"} <= set(facts.exported)
    allowed = (
        "libc.",
        "libm.",
        "libstdc++.",
        "libgcc_s.",
        "libdl.",
        "libpthread.",
        "librt.",
        "ld-",
    )
    assert all(name.startswith(allowed) for name in facts.needed), facts.needed
    assert not facts.runpath


def test_every_check_of_the_library_passed(demo: Site) -> None:
    checks = demo.report["verification"]["checks"]
    assert len(checks) >= 10
    assert all(check["ok"] for check in checks)
    kernels = [kernel for kernel in demo.report["kernels"] if kernel["kind"] == "gemm"]
    # Per-column and group scale share a device kernel.
    assert len(kernels) == 8
    assert all(kernel["registers"] > 0 and kernel["code_bytes"] > 0 for kernel in kernels)


def test_decode_tactics_are_in_the_library_with_all_of_their_kernels(demo: Site) -> None:
    selected = demo.manifest["decode"]["selected"]
    assert [tactic["name"] for tactic in selected] == DECODE
    kernels = {
        kernel["kernel"]: kernel for kernel in demo.report["kernels"] if kernel["kind"] == "decode"
    }
    opcode = {
        kernel["ident"]: wanted
        for tactic, wanted in zip(selected, ("HMMA", "HGMMA"), strict=True)
        for kernel in tactic["kernels"]
    }
    assert len(opcode) == 6 + 3
    assert set(kernels) == set(opcode)
    for name, kernel in kernels.items():
        assert kernel["spill_bytes"] == 0
        assert {opcode[name], "UTMALDG"} <= set(kernel["opcodes"])
    for tactic in selected:
        assert (demo.source / f"src/decode/{tactic['name'].replace(':', '_')}.cu").is_file()


def test_info_lists_the_tactics_of_the_manifest(demo: Site) -> None:
    info = demo.info()
    listed = {tactic["name"]: tactic["quant_ops"] for tactic in info["tactics"]}
    gemm = {name: ops for name, ops in listed.items() if name.startswith("sm90:")}
    assert gemm == dict.fromkeys(TACTICS, QUANT_OPS)
    assert "gemv" in listed
    assert all(listed[name] == QUANT_OPS for name in DECODE)
    assert set(listed) == {*TACTICS, "gemv", *DECODE}
    assert info["bundle_digest"] == demo.manifest["bundle"]["digest"]
    assert (info["profile"], info["release"]) == ("demo", "v1.0.0")


def test_info_prints_the_tactics_for_people(demo: Site, run_tool: Tool) -> None:
    text = run_tool(demo.install / "bin/w4a16_info")
    assert all(name in text for name in TACTICS)
    assert "built for sm_90a" in text


def test_the_test_program_lists_tactics_where_no_gpu_is(demo: Site, run_tool: Tool) -> None:
    text = run_tool(demo.install / "bin/w4a16_test", "--list")
    assert all(name in text for name in TACTICS)


def test_packing_was_compared_with_upstreams_preprocessor(demo: Site) -> None:
    outcomes = {outcome["name"]: outcome for outcome in demo.manifest["test"]["outcomes"]}
    assert outcomes["packing equals upstream's preprocessor"]["ok"]


def test_report_and_manifest_agree(demo: Site) -> None:
    report, manifest = demo.report, demo.manifest
    counts = report["selection"]
    assert counts["gemm"] == len(manifest["selected"])
    assert counts["dropped"] == len(manifest["dropped"])
    assert counts["ignored_files"] == len(manifest["ignored"])
    assert counts["vendored_files"] == len(manifest["vendored"])
    assert counts["gemv_kernels"] == 40
    assert (counts["decode_tactics"], counts["decode_kernels"]) == (2, 6 + 3)
    assert report["bundle"] == manifest["bundle"]
    size = demo.library.stat().st_size
    assert manifest["verification"]["library_bytes"] == size
    assert report["verification"]["library_bytes"] == size
    text = (demo.folder / "report.md").read_text(encoding="utf-8")
    assert f"{size} bytes stripped" in text
    assert "| GEMM instantiations kept" in text


def test_units_of_the_report_are_the_sources_of_the_library(demo: Site) -> None:
    members = [m for unit in demo.manifest["build"]["units"] for m in unit["members"]]
    assert len(members) == len(set(members))
    assert {f"src/gemm/{e['ident']}.cu" for e in demo.manifest["selected"]} <= set(members)


@pytest.mark.parametrize("stage", ["extract", "build", "verify", "test", "wheel", "regenerate"])
def test_help_of_a_stage_names_the_shared_options(forge: Forge, stage: str) -> None:
    text = forge.run(stage, "--help").out
    for option in ("--config", "--trtllm", "--cutlass", "--out", "--jobs", "--toolchain", "-v"):
        assert option in text
