"""Cases of the benchmark: their names, the sets, and what floors and statistics say of numbers."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.suite import cases, stats
from benchmarks.suite.cases import Case, Weight
from benchmarks.suite.errors import UsageError
from benchmarks.suite.results import floor_us
from benchmarks.suite.weights import copies_of, launches_of, rotation_bytes

H200_L2 = 60 << 20
groups = st.sampled_from([0, 32, 64, 128])
weights = st.builds(
    Weight,
    n=st.integers(1, 8192).map(lambda i: 8 * i),
    k=st.integers(1, 512).map(lambda i: 128 * i),
    group=groups,
    zeros=st.booleans(),
)


@given(st.builds(Case, weight=weights, m=st.integers(1, 8192)))
def test_the_name_of_a_case_stands_for_that_case(case: Case) -> None:
    assert cases.parse(case.name) == case


def test_names_are_those_that_are_documented() -> None:
    assert str(Case(Weight(8192, 28672, 128), 16)) == "8192x28672:g128:m16"
    assert str(Case(Weight(4096, 4096, 64, True), 1)) == "4096x4096:g64:zeros:m1"
    assert str(Case(Weight(4096, 4096, 0), 1)) == "4096x4096:column:m1"


@pytest.mark.parametrize(
    "name",
    [
        *("", "4096", "4096x4096", "4096x4096:g128", "4096x4096:g128:m0", "4096x4096:m1:g128"),
        *("4095x4096:g128:m1", "4096x4100:g128:m1", "4096x4096:g100:m1", "4096x4096:g0:m1"),
        *("99999999x4096:g128:m1", "4096x4096:zeros:m1", "٤x64:g64:m1"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected|must be|multiple"):
        cases.parse(name)


def test_the_full_set_has_every_combination_once() -> None:
    jobs = cases.full()
    assert len(jobs) == len({job.case for job in jobs}) == 7 * 16 * 3 * 2
    assert {job.case.weight.group for job in jobs} == {0, 64, 128}
    assert all(job.peers and job.sustained for job in jobs)


def test_the_short_set_covers_every_shape_and_ends_with_what_matters_least() -> None:
    jobs = cases.short()
    main = [job for job in jobs if job.peers]
    assert jobs[: len(main)] == main
    assert {(job.case.weight.n, job.case.weight.k) for job in main} == set(cases.SHAPES)
    assert {job.case.m for job in main} == set(cases.SHORT_ROWS)
    assert {job.case.m for job in main if not job.sustained} == {1, 2, 4, 8, 16}
    rest = {(job.case.weight.group, job.case.weight.zeros) for job in jobs[len(main) :]}
    assert rest == {(128, True), (64, False)}
    assert {job.case for job in jobs} <= {job.case for job in cases.full()}


def test_named_cases_keep_those_of_a_weight_together() -> None:
    names = ["4096x4096:g128:m8", "8192x28672:g64:m1", "4096x4096:g128:m1", "4096x4096:g128:m8"]
    found = [job.case.name for job in cases.named(names)]
    assert found == ["4096x4096:g128:m1", "4096x4096:g128:m8", "8192x28672:g64:m1"]


def test_a_launch_must_read_values_scales_and_zeros() -> None:
    assert Weight(4096, 4096, 128).bytes == 4096 * 4096 // 2 + 32 * 4096 * 2
    assert Weight(4096, 4096, 128, True).bytes == 4096 * 4096 // 2 + 32 * 4096 * 4
    assert Weight(4096, 4096, 0).bytes == 4096 * 4096 // 2 + 4096 * 2


@given(weights, st.sampled_from(cases.ROWS))
def test_a_graph_reads_three_times_what_the_l2_holds_before_anything_again(
    weight: Weight, m: int
) -> None:
    launches = launches_of(weight.bytes, H200_L2, m)
    copies = copies_of(weight.bytes, rotation_bytes(H200_L2))
    assert 10 <= launches <= 40
    assert 2 <= copies <= 40
    if weight.bytes > 5 << 20:  # smaller ones would need more than 40 launches
        assert launches * weight.bytes >= 3 * H200_L2
        assert (copies - 1) * weight.bytes >= 3 * H200_L2 or copies == launches == 40


def test_the_floor_is_the_larger_of_reading_and_multiplying() -> None:
    assert floor_us(10.0, 1e9, 800.0) == 10.0
    assert floor_us(10.0, 1.6e10, 800.0) == pytest.approx(20.0)
    assert floor_us(10.0, 1e15, None) == 10.0
    assert floor_us(None, 1e9, 800.0) is None


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=50))
def test_quantiles_agree_with_the_median_and_the_ends(values: list[float]) -> None:
    assert stats.quantile(values, 0.5) == pytest.approx(statistics.median(values))
    assert stats.quantile(values, 0) == min(values)
    assert stats.quantile(values, 1) == max(values)
    assert 0 <= stats.iqr(values) <= max(values) - min(values)


def test_geometric_means_multiply() -> None:
    assert stats.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert math.isnan(stats.geometric_mean([]))
    assert stats.deviation([3.0]) == 0.0
    with pytest.raises(ValueError, match="no values"):
        stats.quantile([], 0.5)
