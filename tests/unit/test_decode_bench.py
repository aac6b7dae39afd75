"""What the harness of the decode kernels builds and plans."""

from __future__ import annotations

import re

import pytest

from benchmarks.decode.configurations import Configuration, Wide, all_configurations, table, unit
from benchmarks.decode.plan import SHAPES, Case, full, quick

ALL = dict.fromkeys([*all_configurations(), *(case.configuration for case in quick())])


@pytest.mark.parametrize("configuration", ALL, ids=lambda configuration: configuration.name)
def test_the_stages_of_every_configuration_fit_into_shared_memory(
    configuration: Configuration,
) -> None:
    """As the static assertions of ``ring.h``, ``narrow.h`` and ``wide.h`` want it."""
    c = configuration
    stage_k = c.stage_k if isinstance(c, Wide) else 256
    smallest_group = 64 if isinstance(c, Wide) else c.group
    tile = c.rows * stage_k // 2 + c.tokens * stage_k * 2
    scales = -(-stage_k // smallest_group * c.rows * 2 // 128) * 128 * (2 if c.zeros else 1)
    stages = min(24, (227 if c.ctas_per_sm == 1 else 113) * 1024 // (tile + scales + 24))
    splits = c.sets if isinstance(c, Wide) else 8 // c.row_groups
    assert stages > (2 * c.sets - 1 if isinstance(c, Wide) else 0)
    assert splits * c.tokens * (c.rows + 4) * 4 <= stages * tile


def test_every_configuration_has_a_name_and_a_unit_of_its_own_and_is_in_the_table() -> None:
    names = [configuration.name for configuration in ALL]
    assert len(set(names)) == len(names)
    for configuration in ALL:
        kind = "wide" if configuration.wide else "narrow"
        assert f"using Shape = {configuration.shape};" in unit(configuration)
        assert f"kernel_of<Shape, {kind}_kernel<Shape>>()" in unit(configuration)
    listed = re.findall(r"&(\w+)", table(tuple(ALL)))
    assert listed == names


@pytest.mark.parametrize("plan", [full(all_configurations()), quick()], ids=["full", "quick"])
def test_a_plan_checks_what_it_times_and_times_what_takes_the_problem(plan: list[Case]) -> None:
    checked = {case.configuration for case in plan if case.mode == "check"}
    timed = [case for case in plan if case.mode == "time"]
    assert {case.configuration for case in timed} <= checked
    assert {(case.n, case.k) for case in timed} == set(SHAPES)
    for case in plan:
        c = case.configuration
        assert case.m <= c.tokens
        assert c.zeros == case.zeros
        assert c.takes_group(case.group)
        assert case.k % case.group == 0
        assert len(case.line.split()) == 10
