"""The report, from results made up here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LibraryTestError
from pipeline.files import read_json, write_json
from pipeline.report import table, write_report

MANIFEST: dict[str, Any] = {
    "pipeline": "0.1.0",
    "release": "v1.0.0",
    "profile": {"name": "w4a16-sm90"},
    "sources": {
        "trtllm": {"url": "https://x/t.git", "ref": "v1.0.0", "commit": "aaa"},
        "cutlass": {"url": "https://x/c.git", "ref": "dc48", "commit": ""},
        "matches_lock": True,
    },
    "selected": [
        {"quant_op": "per_column", "tactic": "sm90:a"},
        {"quant_op": "group_scale", "tactic": "sm90:a"},
    ],
    "dropped": [{"reason": "activation is bf16"}, {"reason": "activation is bf16"}],
    "ignored": [],
    "gemv": {"selected": [{"kernels": [1, 2, 3]}], "dropped": [], "reason": ""},
    "vendored": [{}, {}],
    "bundle": {"digest": "0123456789abcdef0123", "files": 7},
}
PLAN: dict[str, Any] = {"units": [{"name": "gemm_00", "seconds": 130, "peak_bytes": 8_000_000_000}]}
BUILD: dict[str, Any] = {
    "compiler": "nvcc 13.0.88 (system)",
    "cmake": "4.0.0",
    "flags": ["-O3", "-DNDEBUG"],
    "jobs": 2,
    "seconds": 301.5,
    "peak_bytes": 16_200_000_000,
    "units": [
        {"name": "gemm_00", "members": ["a", "b"], "seconds": 128.25, "peak_bytes": 7_900_000_000},
        {"name": "new.cpp", "members": ["c"], "seconds": 1.0, "peak_bytes": 0},
    ],
}
VERIFICATION: dict[str, Any] = {
    "library": "lib/libw4a16.so.1",
    "library_bytes": 4_200_000,
    "needed": ["libc.so.6"],
    "exported": ["w4a16_run"],
    "checks": [
        {"name": "no undefined symbol", "ok": True, "detail": "none"},
        {"name": "spills", "ok": False, "detail": "over gemm | x"},
    ],
    "kernels": [
        {
            "kernel": "gemm 64x16x64 1x1x1",
            "kind": "gemm",
            "registers": 168,
            "spill_bytes": 0,
            "stack_bytes": 0,
            "shared_bytes": 1024,
            "code_bytes": 32384,
            "opcodes": {"UTMALDG": 3, "HGMMA": 12},
        }
    ],
}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "tactic": "sm90:a",
        "quant_op": "group_scale",
        "group": 128,
        "m": 16,
        "n": 4096,
        "k": 4096,
        "bias": False,
        "rel_err": 2.0e-4,
        "limit": 3.0e-4,
        "ok": True,
        "us": 12.345,
        "tflops": 43.5,
        "gbps": 712.0,
        **changes,
    }


def report(folder: Path, test: object = None) -> str:
    if test is not None:
        write_json(folder / "test.json", test)
    write_report(folder, manifest=MANIFEST, plan=PLAN, build=BUILD, verification=VERIFICATION)
    return (folder / "report.md").read_text()


def test_versions_commits_and_counts_are_listed(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "TensorRT-LLM v1.0.0" in text
    assert "| cutlass | https://x/c.git | dc48   | unknown |" in text
    assert re.search(r"\| … activation is bf16 +\| +2 \|", text)
    data = read_json(tmp_path / "report.json")
    assert data["selection"]["gemm"] == 2
    assert data["selection"]["gemv_kernels"] == 3


def test_each_unit_stands_with_foreseen_and_measured_cost(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "| gemm_00 |       2 | 128.2 |        130 | 7.9 |         8.0 |" in text
    assert "| new.cpp |       1 |   1.0 |            | 0.0 |             |" in text


def test_failed_checks_stand_out_and_cannot_break_the_table(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "| **FAILED** | spills" in text
    assert "over gemm \\| x" in text
    assert read_json(tmp_path / "report.json")["verification"]["ok"] is False


def test_kernels_have_registers_spills_shared_memory_and_bytes(tmp_path: Path) -> None:
    assert "| gemm 64x16x64 1x1x1 |       168 |      0 |   1024 | 32384 |" in report(tmp_path)


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert report(tmp_path / "a") == report(tmp_path / "b")
    same = [(tmp_path / name / "report.json").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_stages_that_have_not_run_are_left_out(tmp_path: Path) -> None:
    write_report(tmp_path, manifest=MANIFEST)
    text = (tmp_path / "report.md").read_text()
    assert "## Selection" in text
    for title in ("## Build", "## Checks", "## Kernels", "## Correctness"):
        assert title not in text


def test_the_gpu_test_s_worst_case_and_its_timing_are_merged(tmp_path: Path) -> None:
    rows = [row(), row(m=17, rel_err=2.9e-4), row(tactic="gemv", group=0, us=None)]
    text = report(tmp_path, {"device": "NVIDIA H200", "driver": "580.1", "rows": rows})
    assert "NVIDIA H200, driver 580.1: 3 of 3 cases" in text
    assert "17×4096×4096" in text
    assert "16×4096×4096" in text.partition("gemv")[2]
    assert "per column" in text
    assert "| 12.3 |" in text
    assert len(read_json(tmp_path / "report.json")["test"]["rows"]) == 3


def test_failed_cases_are_listed_one_by_one(tmp_path: Path) -> None:
    rows = [row(), row(m=3, rel_err=5e-4, ok=False), row(m=5, rel_err=None, ok=False, us=None)]
    text = report(tmp_path, {"device": "d", "driver": "1", "rows": rows})
    assert "1 of 3 cases" in text
    failed = text.partition("Failed cases:")[2].partition("## Timing")[0]
    assert failed.count("sm90:a") == 2


def test_a_release_without_a_gemv_says_why(tmp_path: Path) -> None:
    manifest = {**MANIFEST, "gemv": {"selected": [], "reason": "no Hopper layout"}}
    write_report(tmp_path, manifest=manifest)
    assert "No GEMV: no Hopper layout" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{}]}', '{"rows": 3}'])
def test_a_damaged_test_result_is_an_error_that_names_the_file(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(LibraryTestError, match=r"test\.json cannot be read"):
        report(tmp_path)


def test_columns_of_numbers_are_set_to_the_right() -> None:
    assert table(("name", "n"), [("a", 1), ("bb", 22)]) == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |   1 |",
        "| bb   |  22 |",
    ]
