"""Planning of translation units: pure arithmetic, so property-based."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ResourceError
from pipeline.files import dump_json
from pipeline.model import to_json
from pipeline.plan import (
    COSTS,
    GB,
    Kind,
    Member,
    Plan,
    costs_for,
    describe_plan,
    memory_limit,
    plan_from_json,
    plan_units,
    render_unity_plan,
    schedule_length,
)


def gemm_members(shapes: int) -> list[Member]:
    return [
        Member(
            path=f"src/gemm/gemm_{op}_{index:03}.cu",
            kind="gemm",
            share=f"{index:03}:{'zero' if op == 'gsz' else 'scale'}",
        )
        for index in range(shapes)
        for op in ("pc", "gs", "gsz")
    ]


def all_members(shapes: int = 21, families: int = 10, others: int = 6) -> list[Member]:
    gemv = [
        Member(path=f"src/gemv/gemv_{n:02}.cu", kind="gemv", kernels=15) for n in range(families)
    ]
    rest = [Member(path=f"src/other_{n}.cpp", kind="cxx") for n in range(others)]
    return [*gemm_members(shapes), *gemv, *rest]


members_strategy = st.builds(
    all_members,
    shapes=st.integers(0, 24),
    families=st.integers(0, 10),
    others=st.integers(0, 5),
)
machines = st.tuples(st.integers(1, 64), st.integers(5 * GB, 200 * GB))


@settings(deadline=None, max_examples=60)
@given(members=members_strategy, machine=machines, shuffle=st.randoms())
def test_every_plan_holds_its_promises(
    members: list[Member], machine: tuple[int, int], shuffle: object
) -> None:
    cores, memory = machine
    plan = plan_units(members, cores=cores, memory_bytes=memory)
    placed = [path for unit in plan.units for path in unit.members]
    assert sorted(placed) == sorted(member.path for member in members)
    assert 1 <= plan.jobs <= cores
    greediest = sorted((unit.peak_bytes for unit in plan.units), reverse=True)[: plan.jobs]
    assert sum(greediest) == plan.peak_bytes <= memory
    home = {path: unit.name for unit in plan.units for path in unit.members}
    for member in members:
        partners = {home[other.path] for other in members if member.share == other.share != ""}
        assert partners <= {home[member.path]}
    assert len({unit.name for unit in plan.units}) == len(plan.units)
    assert plan == plan_units(list(reversed(members)), cores=cores, memory_bytes=memory)


@settings(deadline=None, max_examples=40)
@given(machine=machines, later=machines)
def test_a_plan_is_kept_while_its_sources_are_the_same_unless_the_machine_is_another(
    machine: tuple[int, int], later: tuple[int, int]
) -> None:
    members = all_members()
    first = plan_units(members, cores=machine[0], memory_bytes=machine[1])
    again = plan_units(members, cores=later[0], memory_bytes=later[1], previous=first)
    fresh = plan_units(members, cores=later[0], memory_bytes=later[1])
    if again.units != fresh.units:
        assert render_unity_plan(again) == render_unity_plan(first)
    assert again.peak_bytes <= later[1]
    assert again.seconds <= 1.5 * fresh.seconds


def test_a_plan_is_kept_when_less_memory_is_free_but_enough() -> None:
    members = all_members()
    first = plan_units(members, cores=2, memory_bytes=19 * GB)
    less = plan_units(members, cores=2, memory_bytes=first.peak_bytes, previous=first)
    assert render_unity_plan(less) == render_unity_plan(first)


def test_a_new_kernel_leaves_the_other_units_alone() -> None:
    members = all_members(shapes=20)
    first = plan_units(members, cores=2, memory_bytes=19 * GB)
    more = plan_units(all_members(shapes=21), cores=2, memory_bytes=19 * GB, previous=first)
    before = {unit.name: unit.members for unit in first.units}
    after = {unit.name: unit.members for unit in more.units}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_a_removed_kernel_changes_its_own_unit_only() -> None:
    members = all_members()
    first = plan_units(members, cores=2, memory_bytes=19 * GB)
    fewer = [member for member in members if member.share != "003:zero"]
    second = plan_units(fewer, cores=2, memory_bytes=19 * GB, previous=first)
    changed = set(first.units) ^ set(second.units)
    assert {unit.name for unit in changed} == {
        unit.name for unit in first.units if "src/gemm/gemm_gsz_003.cu" in unit.members
    }


def test_two_cores_and_24_gb_build_everything_in_under_eight_minutes_and_20_gb() -> None:
    limit = memory_limit(23_700_000_000, 25_300_000_000, None)
    plan = plan_units(all_members(), cores=2, memory_bytes=limit)
    assert plan.jobs == 2
    assert plan.peak_bytes < 20 * GB
    assert plan.seconds < 480


def test_units_get_smaller_where_their_fixed_cost_is_small() -> None:
    cheap = replace(COSTS, gemm=replace(COSTS.gemm, fixed_seconds=2))
    few, many = (
        plan_units(all_members(), cores=2, memory_bytes=19 * GB, costs=costs).units
        for costs in (COSTS, cheap)
    )
    assert max(unit.seconds for unit in many) < max(unit.seconds for unit in few) / 2


def test_memory_for_less_than_one_unit_is_refused_with_the_figures() -> None:
    with pytest.raises(ResourceError, match=r"takes 4\.6 GB.*4\.0 GB may be used") as caught:
        plan_units(gemm_members(3), cores=8, memory_bytes=4 * GB)
    assert "--memory" in caught.value.hint


def test_memory_for_one_unit_builds_one_unit_at_a_time() -> None:
    plan = plan_units(gemm_members(4), cores=8, memory_bytes=5 * GB)
    assert plan.jobs == 1
    assert all(unit.peak_bytes <= 5 * GB for unit in plan.units)


def test_the_jobs_asked_for_are_an_upper_limit() -> None:
    assert plan_units(all_members(), cores=8, memory_bytes=200 * GB, jobs=3).jobs == 3
    assert plan_units(all_members(), cores=2, memory_bytes=200 * GB, jobs=16).jobs == 2


def test_the_memory_asked_for_is_an_upper_limit() -> None:
    assert memory_limit(100 * GB, 100 * GB, 10 * GB) == 10 * GB
    assert memory_limit(10 * GB, 100 * GB, 50 * GB) == int(10 * GB * COSTS.available_share)


def test_a_plan_survives_json() -> None:
    plan = plan_units(all_members(), cores=2, memory_bytes=19 * GB)
    assert plan_from_json(json.loads(dump_json(to_json(plan)))) == plan


@pytest.mark.parametrize("data", [None, [], {}, {"units": [{}]}, {"units": []}, "plan", 3])
def test_what_is_no_plan_is_none(data: object) -> None:
    assert plan_from_json(data) is None


def test_the_cmake_file_names_each_grouped_source_once_and_its_target() -> None:
    plan = plan_units(all_members(), cores=2, memory_bytes=19 * GB)
    text = render_unity_plan(plan)
    for unit in plan.units:
        for path in unit.members:
            assert text.count(f'"{path}"') == (1 if len(unit.members) > 1 else 0)
    assert "set_target_properties(w4a16_gemm PROPERTIES UNITY_BUILD ON" in text
    assert "UNITY_GROUP gemv_00" in text


def test_a_plan_without_groups_sets_no_target_property() -> None:
    members = [Member(path="a.cpp", kind="cxx"), Member(path="one.cu", kind="gemv")]
    assert "set_" not in render_unity_plan(plan_units(members, cores=1, memory_bytes=9 * GB))


def test_the_description_lists_units_and_totals() -> None:
    text = describe_plan(plan_units(all_members(), cores=2, memory_bytes=19 * GB))
    assert "gemm_00" in text
    assert "2 at a time" in text.splitlines()[-1]


@pytest.mark.parametrize("kind", ["gemm", "gemv", "decode", "cuda", "cxx"])
def test_every_kind_has_costs(kind: Kind) -> None:
    assert COSTS.of(kind).fixed_seconds >= 0


def test_a_schedule_is_as_long_as_its_longest_worker() -> None:
    assert schedule_length([3, 2, 2], 2) == 4
    assert schedule_length([], 2) == 0


def test_a_bundle_with_few_headers_is_not_held_to_the_memory_of_a_large_one() -> None:
    small = costs_for(["third_party/cutlass/cutlass.h", "src/gemm/a.cu"])
    plan = plan_units(gemm_members(4), cores=2, memory_bytes=2 * GB, costs=small)
    assert plan.jobs == 2
    assert costs_for(f"third_party/{n}.h" for n in range(480)) == COSTS


def test_files_of_one_name_in_two_folders_stay_two_units() -> None:
    both = [Member(path=f"{folder}/device.cpp", kind="cxx") for folder in ("src", "third_party")]
    first = plan_units(both[:1], cores=2, memory_bytes=GB)
    for previous in (None, first, plan_units(both, cores=2, memory_bytes=GB)):
        plan = plan_units(both, cores=2, memory_bytes=GB, previous=previous)
        assert len({unit.name for unit in plan.units}) == 2


def test_no_sources_make_an_empty_plan() -> None:
    plan = plan_units([], cores=2, memory_bytes=GB)
    assert isinstance(plan, Plan)
    assert plan.units == ()
