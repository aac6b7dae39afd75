"""The GEMV's selection: variant by variant, only for a layout that the GEMM reads too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SelectError
from pipeline.gemv import select
from pipeline.model import Gemv, Sources
from pipeline.releases import ReleaseFacts

from .conftest import GEMV, make_profile, raw_profile

HOPPER = "ColumnMajorInterleavedForHopper"
GROUPWISE = f"kernelDispatcherFp16Int4Groupwise{HOPPER}True.cu"
Edit = Callable[[Path], None]


@pytest.fixture
def checkout(fetched: tuple[Sources, ReleaseFacts], tmp_path: Path) -> Path:
    """A copy of the miniature's GEMV that a test may change."""
    target = tmp_path / "checkout"
    shutil.copytree(Path(fetched[0].trtllm.folder) / GEMV, target / GEMV)
    return target


def chosen(
    checkout: Path, fetched: tuple[Sources, ReleaseFacts], facts: dict[str, object], **gemv: object
) -> Gemv:
    default = raw_profile()["gemv"]
    assert isinstance(default, dict)
    profile = make_profile(gemv={**default, **gemv})
    return select(profile, replace(fetched[1], **facts), checkout)  # type: ignore[arg-type]


@pytest.fixture
def run(checkout: Path, fetched: tuple[Sources, ReleaseFacts]) -> Callable[..., Gemv]:
    def go(facts: dict[str, object] | None = None, **gemv: object) -> Gemv:
        return chosen(checkout, fetched, facts or {}, **gemv)

    return go


Run = Callable[..., Gemv]


def test_the_default_profile_gets_each_quant_op_group_and_bias(run: Run) -> None:
    found = run()
    assert found.reason == ""
    assert [family.ident for family in found.selected] == [
        "gemv_pc",
        "gemv_pc_bias",
        *(f"gemv_gs_g{group}{bias}" for group in (64, 128) for bias in ("", "_bias")),
        *(f"gemv_gsz_g{group}{bias}" for group in (64, 128) for bias in ("", "_bias")),
    ]
    for family in found.selected:
        assert [kernel.m for kernel in family.kernels] == list(range(1, 16))
        assert {k.cta_n for k in family.kernels} == {4 if family.zero else 8}
        assert {k.threads for k in family.kernels} == {128}
        assert f"Int4DetailsW, {HOPPER}, true, 64>" in family.details
        assert family.origin.endswith(".cu")


def test_each_other_kernel_is_dropped_with_a_reason(run: Run) -> None:
    dropped = run().dropped
    text = "\n".join(f"{entry.name}: {entry.reason}" for entry in dropped)
    assert "kernel type BF16Int4Groupwise" in text
    assert "kernel type FP16Int8Groupwise" in text
    assert "layout ColumnMajorInterleaved belongs to other architectures" in text
    assert "K tile 128" in text
    assert "act_scale=true" in text
    assert all(entry.line > 1 and entry.origin.startswith(GEMV) for entry in dropped)


@pytest.mark.parametrize(
    ("choice", "idents"),
    [
        ({"groups": [128], "zeros": [False], "bias": [False]}, ["gemv_pc", "gemv_gs_g128"]),
        ({"groups": [], "bias": [True]}, ["gemv_pc_bias"]),
        ({"per_column": False, "groups": [64], "zeros": [True], "bias": [False]}, ["gemv_gsz_g64"]),
    ],
)
def test_the_profile_can_ask_for_less(
    run: Run, choice: dict[str, object], idents: list[str]
) -> None:
    assert [family.ident for family in run(**choice).selected] == idents


def test_a_range_of_m_is_kept_to_and_the_rest_is_dropped(run: Run) -> None:
    found = run(m={"from": 2, "to": 4})
    assert {tuple(k.m for k in family.kernels) for family in found.selected} == {(2, 3, 4)}
    assert any("M = 1, 5, 6" in entry.name for entry in found.dropped)


def test_an_empty_choice_gives_its_reason(run: Run) -> None:
    found = run(groups=[], per_column=False)
    assert found.selected == ()
    assert "empty" in found.reason


def test_a_variant_that_the_profile_turns_off_is_dropped_with_a_reason(run: Run) -> None:
    names = [entry.name for entry in run(per_column=False).dropped]
    assert any("PerChannel" in name and "bias" in name for name in names)


def test_a_profile_without_a_gemv_gets_none_and_the_reason(
    checkout: Path, fetched: tuple[Sources, ReleaseFacts]
) -> None:
    found = select(make_profile(gemv=None), fetched[1], checkout)
    assert (found.selected, found.reason) == ((), "the profile asks for no GEMV")


def test_a_quant_op_that_the_gemm_leaves_out_has_no_gemv(
    checkout: Path, fetched: tuple[Sources, ReleaseFacts]
) -> None:
    profile = make_profile(gemm={"quant_ops": ["group_scale"]})
    found = select(profile, fetched[1], checkout)
    assert {family.quant_op for family in found.selected} == {"group_scale"}


def test_a_release_without_a_hopper_layout_is_taken_without_a_gemv(run: Run) -> None:
    found = run({"gemv_layouts": {}, "gemv_without": "no Hopper layout"})
    assert found.selected == ()
    assert found.reason == "no Hopper layout"
    assert {entry.reason for entry in found.dropped} == {"no Hopper layout"}


def test_a_release_without_a_gemv_folder_is_taken_without_one(run: Run) -> None:
    found = run({"gemv_folder": "no/such/folder"})
    assert found.reason == "the release has no CUDA-core GEMV"


def test_a_layout_that_no_kernel_has_is_refused(run: Run) -> None:
    with pytest.raises(SelectError, match="no FP16Int4PerChannel GEMV"):
        run({"gemv_layouts": {90: "SomeNewLayout"}})


def edit(checkout: Path, name: str, old: str, new: str) -> None:
    path = checkout / GEMV / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (", true, 64);", ", true, 64)"),
        (", true, 64);", ", kConverter, 64);"),
        (", true, 64);", ", true, 64, 1);"),
        ("KernelType::FP16", "kType::FP16"),
        ("Int4DetailsW", "Details<int, 4>"),
    ],
)
def test_a_gemv_instantiation_of_another_form_stops_the_run(
    run: Run, checkout: Path, old: str, new: str
) -> None:
    edit(checkout, GROUPWISE, old, new)
    with pytest.raises(SelectError, match="understood") as caught:
        run()
    assert "INSTANTIATE_WEIGHT_ONLY" in caught.value.details


def test_a_commented_out_gemv_instantiation_is_none(run: Run, checkout: Path) -> None:
    edit(checkout, GROUPWISE, "INSTANTIATE_", "// INSTANTIATE_")
    with pytest.raises(SelectError, match="no FP16Int4Groupwise GEMV"):
        run()


def test_two_gemv_instantiations_of_one_name_are_refused(run: Run, checkout: Path) -> None:
    text = (checkout / GEMV / GROUPWISE).read_text().replace("true, 64", "false, 64")
    (checkout / GEMV / "other.cu").write_text(text)
    with pytest.raises(SelectError, match="would both be FP16Int4Groupwise") as caught:
        run()
    assert "other.cu" in caught.value.details


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if constexpr (EnableZero)", "if (zero)"),
        ("DISPATCHER_FOR_M(3, 3, 8, 128)", "DISPATCHER_FOR_M(3, 4, 8, 128)"),
        ("DISPATCHER_FOR_M(3, 3, 8, 128);", ""),
        ("DISPATCHER_FOR_M(3, 3, 8, 128)", "DISPATCHER_FOR_M(4, 4, 8, 128)"),
        ("DISPATCHER_FOR_M(3, 3, 8, 128)", "DISPATCHER_FOR_M(kM, kM, 8, 128)"),
    ],
)
def test_a_table_of_tiles_of_another_form_stops_the_run(
    run: Run, checkout: Path, old: str, new: str
) -> None:
    edit(checkout, "kernelDispatcher.h", old, new)
    with pytest.raises(SelectError):
        run()


def test_a_missing_table_of_tiles_stops_the_run(run: Run, checkout: Path) -> None:
    (checkout / GEMV / "kernelDispatcher.h").unlink()
    with pytest.raises(SelectError, match="tile table"):
        run()


def test_bytes_that_are_no_text_do_no_harm(run: Run, checkout: Path) -> None:
    (checkout / GEMV / "odd.cu").write_bytes(b"// caf\xe9\n")
    assert run().selected
