"""What the bundle takes from this repository's own kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import render


def test_each_folder_of_kernels_becomes_one_of_src_and_a_new_one_needs_no_further_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("packing/pack.cpp", "decode/split_k.cu", "decode/deep/tile.cuh", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "decode/README.md").write_text("not for the bundle", encoding="utf-8")
    monkeypatch.setattr(render, "KERNELS", tmp_path)
    assert render.own_files() == {
        "src/packing/pack.cpp": tmp_path / "packing/pack.cpp",
        "src/decode/split_k.cu": tmp_path / "decode/split_k.cu",
        "src/decode/deep/tile.cuh": tmp_path / "decode/deep/tile.cuh",
    }
    assert render.own_sources() == ("src/decode/split_k.cu", "src/packing/pack.cpp")


def test_no_folder_of_kernels_has_the_name_of_one_that_is_generated() -> None:
    folders = {name.split("/")[1] for name in render.own_files()}
    assert {"activations", "packing"} <= folders
    assert not folders & {"gemm", "gemv", "wrappers"}
