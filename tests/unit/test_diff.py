"""What changed between two releases, from their manifests."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from pipeline.diff import as_markdown, compare

Manifest = dict[str, Any]


def kernel(tile: str, **changes: object) -> dict[str, object]:
    plain = {
        "ident": f"gemm_pc_{tile}_1x1x1",
        "tactic": f"sm90:{tile}:1x1x1",
        "quant_op": "per_column",
        "cta_tile": tile,
        "cluster": "1x1x1",
        "mainloop_schedule": "Pingpong",
        "origin": "gemm/90/a.cu:7",
    }
    return {**plain, **changes}


@pytest.fixture
def old() -> Manifest:
    return {
        "release": "v1.0.0",
        "sources": {"trtllm": {"commit": "a" * 40}, "cutlass": {"commit": "b" * 40}},
        "selected": [kernel("64x16x64"), kernel("64x32x64")],
        "dropped": [{"name": "x"}] * 3,
        "gemv": {
            "reason": "",
            "selected": [
                {
                    "ident": "gemv_pc",
                    "details": "KernelDetails<1>",
                    "kernels": [{"m": m, "cta_n": 8, "threads": 128} for m in (1, 2)],
                }
            ],
        },
        "vendored": [{"path": "a.h", "sha256": "1"}, {"path": "b.h", "sha256": "2"}],
        "verification": {"library_bytes": 4_000_000},
    }


@pytest.fixture
def new(old: Manifest) -> Manifest:
    new = copy.deepcopy(old)
    new["release"] = "v1.1.0"
    new["sources"]["trtllm"]["commit"] = "c" * 40
    new["selected"] = [
        kernel("64x32x64", mainloop_schedule="Cooperative", origin="gemm/90/z.cu:99"),
        kernel("64x64x64"),
    ]
    new["vendored"] = [{"path": "b.h", "sha256": "3"}, {"path": "c.h", "sha256": "4"}]
    new["verification"]["library_bytes"] = 4_100_000
    return new


def test_a_release_compared_with_itself_has_no_changes(old: Manifest) -> None:
    change = compare(old, old)
    for key in ("instantiations", "gemv", "tactics", "vendored"):
        part = change[key]
        assert (part["added"], part["removed"], part["changed"]) == ([], [], {})
    assert change["instantiations"]["same"] == 2


def test_what_is_added_removed_and_changed_is_told_apart(old: Manifest, new: Manifest) -> None:
    change = compare(old, new)
    assert change["instantiations"]["added"] == ["gemm_pc_64x64x64_1x1x1"]
    assert change["instantiations"]["removed"] == ["gemm_pc_64x16x64_1x1x1"]
    assert change["instantiations"]["changed"] == {
        "gemm_pc_64x32x64_1x1x1": ["mainloop_schedule: Pingpong -> Cooperative"]
    }
    assert change["tactics"]["added"] == ["sm90:64x64x64:1x1x1"]
    assert change["tactics"]["same"] == 2
    assert change["vendored"] == {
        "added": ["c.h"],
        "removed": ["a.h"],
        "changed": {"b.h": []},
        "same": 0,
    }
    assert change["library_bytes"] == {"from": 4_000_000, "to": 4_100_000}


def test_the_way_back_is_the_opposite(old: Manifest, new: Manifest) -> None:
    there, back = compare(old, new), compare(new, old)
    for key in ("instantiations", "gemv", "tactics", "vendored"):
        assert there[key]["added"] == back[key]["removed"]
        assert there[key]["removed"] == back[key]["added"]
        assert there[key]["changed"].keys() == back[key]["changed"].keys()


def test_another_place_in_the_generated_files_is_no_change(old: Manifest) -> None:
    moved = copy.deepcopy(old)
    moved["selected"][0]["origin"] = "gemm/other.cu:1"
    moved["selected"].reverse()
    assert compare(old, moved)["instantiations"]["changed"] == {}


def test_a_gemv_that_comes_or_goes_is_told_with_its_reason(old: Manifest) -> None:
    without = copy.deepcopy(old)
    without["gemv"] = {"selected": [], "reason": "no Hopper layout"}
    change = compare(without, old)
    assert change["gemv"]["added"] == ["gemv_pc M=1", "gemv_pc M=2"]
    assert change["tactics"]["added"] == ["gemv"]
    text = as_markdown(change)
    assert "- GEMV: no Hopper layout (before); present (now)" in text


def test_a_release_that_was_not_built_says_so(old: Manifest, new: Manifest) -> None:
    del new["verification"]
    change = compare(old, new)
    assert change["library_bytes"]["to"] is None
    assert "4,000,000 bytes to not built" in as_markdown(change)


def test_the_text_names_every_change(old: Manifest, new: Manifest) -> None:
    text = as_markdown(compare(old, new))
    assert text.startswith("# From v1.0.0 to v1.1.0\n")
    for line in (
        "- TensorRT-LLM aaaaaaaaaaaa to cccccccccccc",
        "- mixed-input instantiations upstream: 5 to 5",
        "1 added, 1 removed, 1 changed, 0 the same",
        "- added: c.h",
        "- removed: a.h",
        "- changed: b.h",
        "- changed: gemm_pc_64x32x64_1x1x1 (mainloop_schedule: Pingpong -> Cooperative)",
    ):
        assert line in text.splitlines()


def test_the_data_can_be_stored(old: Manifest, new: Manifest) -> None:
    change = compare(old, new)
    assert json.loads(json.dumps(change)) == change
