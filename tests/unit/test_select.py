"""Stage select on the miniature: by instantiation, never by file, with a reason for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SelectError
from pipeline.files import tree_digests, write_text
from pipeline.model import GeneratedTree, Selection, Sources, shape_text
from pipeline.profile import Profile
from pipeline.releases import ReleaseFacts
from pipeline.select import select

from .conftest import LAUNCHER, make_profile

QUANT_OPS = ["per_column", "group_scale", "group_scale_zero"]
Edit = Callable[[str], str]


@pytest.fixture
def run(
    fetched: tuple[Sources, ReleaseFacts], generated: GeneratedTree
) -> Callable[..., Selection]:
    sources, facts = fetched

    def selected(profile: Profile | None = None, tree: GeneratedTree = generated) -> Selection:
        return select(profile or make_profile(), facts, tree, Path(sources.trtllm.folder))

    return selected


Run = Callable[..., Selection]


def edited(generated: GeneratedTree, folder: Path, edit: Edit) -> GeneratedTree:
    """The generated tree with ``edit`` made to every file."""
    for name in generated.files:
        text = (Path(generated.folder) / name).read_text(encoding="utf-8")
        write_text(folder / name, edit(text))
    return replace(generated, folder=str(folder), files=tree_digests(folder))


def gemm(**choice: object) -> Profile:
    return make_profile(gemm=choice)


def test_of_48_instantiations_just_the_12_of_the_profiles_types_are_kept(run: Run) -> None:
    found = run()
    assert len(found.selected) == 12
    assert len(found.dropped) == 36
    for quant_op in QUANT_OPS:
        shapes = [
            (shape_text(k.instantiation.cta), shape_text(k.instantiation.cluster))
            for k in found.selected
            if k.quant_op == quant_op
        ]
        assert shapes == [
            ("64x16x64", "1x1x1"),
            ("64x32x64", "1x1x1"),
            ("128x32x64", "1x1x1"),
            ("128x32x64", "2x1x1"),
        ]
    assert {k.instantiation.act for k in found.selected} == {"half"}
    assert {k.instantiation.weight for k in found.selected} == {"cutlass::uint4b_t"}


def test_each_dropped_instantiation_has_its_reason_and_place(
    run: Run, generated: GeneratedTree
) -> None:
    dropped = run().dropped
    reasons = {entry.reason for entry in dropped}
    assert reasons == {
        "activations are __nv_fp8_e4m3, the profile wants half",
        "activations are __nv_bfloat16, the profile wants half",
        "weights are uint8_t, the profile wants cutlass::uint4b_t",
    }
    for entry in dropped:
        lines = (Path(generated.folder) / entry.origin).read_text().splitlines()
        assert lines[entry.line - 1].startswith(f"template void {LAUNCHER}<")


def test_everything_generated_is_kept_dropped_or_ignored(
    run: Run, generated: GeneratedTree
) -> None:
    found = run()
    text = "".join((Path(generated.folder) / name).read_text() for name in generated.files)
    assert len(found.selected) + len(found.dropped) == len(re.findall(rf"\b{LAUNCHER}\b", text))
    places = {k.instantiation.origin for k in found.selected}
    places |= {entry.origin for entry in (*found.dropped, *found.ignored)}
    assert places == set(generated.files)


def test_the_files_of_grouped_kernels_are_ignored_and_named(run: Run) -> None:
    ignored = run().ignored
    assert ignored
    assert all(entry.name.startswith("gemm_grouped/") for entry in ignored)
    assert all(
        re.search(r"\((INSTANTIATE_|sm80_|sm90_generic_mixed_moe)", entry.reason)
        for entry in ignored
    )


def test_a_filter_by_file_would_be_wrong(run: Run, generated: GeneratedTree) -> None:
    found = run()
    origins = {kernel.instantiation.origin for kernel in found.selected}
    plain = {
        name
        for name in origins
        if not re.search("__nv_fp8|__nv_bfloat16", (Path(generated.folder) / name).read_text())
    }
    by_file = [k for k in found.selected if k.instantiation.origin in plain]
    assert len(by_file) < len(found.selected)
    assert origins & {entry.origin for entry in found.dropped}


def test_names_are_stable_and_fit_c_and_the_command_line(run: Run) -> None:
    found = run().selected
    assert found[0].ident == "gemm_pc_64x16x64_1x1x1"
    assert found[0].tactic == "sm90:64x16x64:1x1x1"
    assert len({k.ident for k in found}) == 12
    assert len({k.tactic for k in found}) == 4
    assert all(re.fullmatch(r"[A-Za-z_]\w*", k.ident, re.ASCII) for k in found)


def test_per_column_and_group_scale_share_a_device_kernel(run: Run) -> None:
    keys = [k.device_kernel_key for k in run().selected]
    assert len(set(keys)) == 8


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        ({"quant_ops": ["group_scale"]}, 4),
        ({"quant_ops": ["group_scale_zero", "per_column"]}, 8),
        ({"tiles": ["64x16x64"]}, 3),
        ({"tiles": ["64x16x64", "128x32x64"]}, 9),
        ({"clusters": ["2x1x1"]}, 3),
        ({"quant_ops": ["per_column"], "tiles": ["128x32x64"], "clusters": ["1x1x1"]}, 1),
    ],
)
def test_the_profile_can_ask_for_less(run: Run, choice: dict[str, object], count: int) -> None:
    found = run(gemm(**choice))
    assert len(found.selected) == count
    assert len(found.selected) + len(found.dropped) == 48
    assert any("is not in the profile" in entry.reason for entry in found.dropped)


def test_kernels_stand_in_the_order_of_the_profile(run: Run) -> None:
    order = ["group_scale_zero", "per_column"]
    found = [k.quant_op for k in run(gemm(quant_ops=order)).selected]
    assert found == ["group_scale_zero"] * 4 + ["per_column"] * 4


@pytest.mark.parametrize(
    ("choice", "message", "named"),
    [
        ({"tiles": ["256x64x64"]}, "256x64x64", ["64x16x64", "64x32x64", "128x32x64"]),
        ({"tiles": ["64x16x64", "256x64x64"]}, "256x64x64", ["64x32x64", "128x32x64"]),
        ({"clusters": ["4x4x1"]}, "4x4x1", ["1x1x1", "2x1x1"]),
        ({"tiles": ["64x16x64"], "clusters": ["2x1x1"]}, "64x16x64", ["128x32x64"]),
    ],
)
def test_a_shape_that_upstream_lacks_is_refused_and_what_it_has_is_named(
    run: Run, choice: dict[str, object], message: str, named: list[str]
) -> None:
    with pytest.raises(SelectError, match=message) as caught:
        run(gemm(**choice))
    assert all(name in caught.value.hint for name in named)


def test_a_release_without_kernels_of_the_profiles_types_is_refused(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    tree = edited(generated, tmp_path, lambda text: text.replace("half,", "float,"))
    with pytest.raises(SelectError, match="none of"):
        run(tree=tree)


def test_files_without_any_instantiation_are_refused(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    with pytest.raises(SelectError):
        run(tree=edited(generated, tmp_path, lambda text: "// nothing\n"))


def test_an_unknown_quant_op_is_dropped_with_its_name(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    def edit(text: str) -> str:
        return text.replace("FINEGRAINED_SCALE_AND_ZEROS", "TWO_BIT_LOOKUP")

    found = run(gemm(quant_ops=["per_column"]), edited(generated, tmp_path, edit))
    unknown = [entry for entry in found.dropped if "is not known" in entry.reason]
    assert len(unknown) == 4
    assert all("TWO_BIT_LOOKUP" in entry.reason for entry in unknown)


def test_a_quant_op_that_upstream_lacks_is_refused(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    def edit(text: str) -> str:
        return text.replace("FINEGRAINED_SCALE_AND_ZEROS", "TWO_BIT_LOOKUP")

    with pytest.raises(SelectError, match="group_scale_zero") as caught:
        run(tree=edited(generated, tmp_path, edit))
    assert "per_column" in caught.value.hint


def test_an_instantiation_given_twice_is_refused_with_both_places(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    tree = edited(generated, folder, lambda text: text)
    origin = run().selected[0].instantiation.origin
    write_text(folder / "gemm" / "90" / "copy.cu", (folder / origin).read_text())
    tree = replace(tree, files=tree_digests(folder))
    with pytest.raises(SelectError, match="two instantiations would both be") as caught:
        run(tree=tree)
    assert "gemm/90/copy.cu:" in caught.value.details


def test_schedules_tell_tactics_of_one_tile_apart(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    """Only a schedule that is not the usual one of a tile is named."""
    folder = tmp_path / "schedules"
    tree = edited(generated, folder, lambda text: text)
    origin = run().selected[0].instantiation.origin
    text = (folder / origin).read_text().replace("KernelTmaWarpSpecializedPingpong", "Kernel{}")
    for name, schedule in (
        ("cooperative", "TmaWarpSpecializedCooperative"),
        ("plain", "TmaWarpSpecialized"),
        ("odd", "Odd<3, a::b>"),
    ):
        write_text(folder / f"gemm/90/{name}.cu", text.replace("Kernel{}", f"Kernel{schedule}"))
    found = run(tree=replace(tree, files=tree_digests(folder))).selected
    tactics = {k.tactic for k in found if k.tactic.startswith("sm90:64x16x64")}
    assert "sm90:64x16x64:1x1x1" in tactics
    assert "sm90:64x16x64:1x1x1:cooperative" in tactics
    assert "sm90:64x16x64:1x1x1:warpspecialized" in tactics
    assert len(tactics) == 4
    assert all(re.fullmatch(r"[a-z_]\w*", k.ident, re.ASCII) for k in found)
    assert len({k.ident for k in found}) == len(found)


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"\0", b"template void " + LAUNCHER.encode()])
def test_a_file_that_cannot_be_read_or_parsed_stops_the_run(
    run: Run, generated: GeneratedTree, tmp_path: Path, junk: bytes
) -> None:
    folder = tmp_path / "junk"
    tree = edited(generated, folder, lambda text: text)
    victim = folder / run().selected[0].instantiation.origin
    victim.write_bytes(victim.read_bytes() + junk)
    with pytest.raises(SelectError):
        run(tree=tree)


def test_the_selection_does_not_depend_on_the_names_of_files(
    run: Run, generated: GeneratedTree, tmp_path: Path
) -> None:
    for number, name in enumerate(sorted(generated.files, reverse=True)):
        write_text(tmp_path / f"{number}.cu", (Path(generated.folder) / name).read_text())
    tree = replace(generated, folder=str(tmp_path), files=tree_digests(tmp_path))
    assert [k.ident for k in run(tree=tree).selected] == [k.ident for k in run().selected]
