"""Which tactic is taken, from where, and what a look-up costs."""

from __future__ import annotations

import threading
import timeit
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from w4a16 import cache, tables, tactics
from w4a16.errors import ArgumentError, UnsupportedError, W4A16Warning
from w4a16.library import LIBRARY, Problem, QuantOp, Tactic
from w4a16.tables import Case, Table

from .tactics_fakes import FakeLibrary, decode, key

PLAIN = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)
ZERO = PLAIN._replace(quant_op=QuantOp.GROUP_SCALE_ZERO)
SMALL, WIDE = "sm90:128x16x64:1x1x1", "sm90:128x256x64:1x1x1"


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeLibrary]:
    """A made-up library, an empty cache, and no shipped table."""
    fake = FakeLibrary()
    monkeypatch.setattr(tactics, "LIBRARY", fake)
    monkeypatch.setattr(tactics, "library_digest", lambda: "abc")
    monkeypatch.setattr(tables, "_DATA", tmp_path / "data")
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "cache"))
    tactics.forget()
    yield fake
    tactics.forget()


def ship(tmp_path: Path, entries: Any, **changes: Any) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    table = Table(key=key(**changes), entries=entries)
    (tmp_path / "data" / "tactics-a.json").write_text(tables.dumps(table))
    tactics.forget()


def tuned(entries: Any) -> Path:
    path = cache.store(key(), entries, {})
    tactics.forget()
    return path


def chosen(
    case: Case, m: int, bias: bool = False, fused: int = 0, library: FakeLibrary | None = None
) -> tuple[str, str]:
    problem = Problem(
        quant_op=case.quant_op, m=m, n=case.n, k=case.k, group_size=case.group_size, has_bias=bias
    )
    choice = tactics.choose(0, problem, fused)
    return (library or FakeLibrary()).tactics[choice.tactic].name, choice.source


def planned(case: Case, m: int, device: int = 0) -> tactics.Plan:
    return tactics.plan(device, case.quant_op, m, case.n, case.k, case.group_size, False)


# ---- The order ----


def with_tactics(library: FakeLibrary, *added: Callable[[int], Tactic]) -> list[str]:
    """Their names, in the library as well now."""
    first = len(library.tactics)
    made = [make(first + i) for i, make in enumerate(added)]
    library.tactics = (*library.tactics, *made)
    library.tactic_index.update({tactic.name: tactic.index for tactic in made})
    return [tactic.name for tactic in made]


def test_a_product_that_is_to_be_split_takes_a_tactic_that_splits_it_unless_that_is_far_slower(
    library: FakeLibrary, tmp_path: Path
) -> None:
    (splitting,) = with_tactics(library, lambda index: decode(index, 64, 64))

    def best(k: int, slowdown: float, fused: int = 3) -> str:
        case = PLAIN._replace(k=k)
        ship(tmp_path, {case: {1024: {WIDE: 10.0, splitting: 10.0 * slowdown}}})
        return chosen(case, 1024, fused=fused, library=library)[0]

    assert best(4096, 1.07) == splitting
    assert best(4096, 1.07, fused=1) == WIDE
    assert best(4096, 1.07, fused=0) == WIDE
    assert best(4096, 1.12) == WIDE
    assert best(16384, 1.07) == WIDE


def test_behind_a_norm_ctas_that_would_pile_up_on_sms_count_as_slower(
    library: FakeLibrary, tmp_path: Path
) -> None:
    def two_an_sm(index: int, rows: int) -> Tactic:
        made = decode(index, rows, 8)
        return replace(made, name=f"{made.name}:o2")

    narrow, wide = with_tactics(library, *(partial(two_an_sm, rows=rows) for rows in (32, 48)))

    def best(n: int, fused: int = 3) -> str:
        case = PLAIN._replace(n=n)
        ship(tmp_path, {case: {1: {narrow: 5.0, wide: 5.2}}})
        return chosen(case, 1, fused=fused, library=library)[0]

    assert best(6144, fused=0) == narrow
    assert best(6144) == wide  # 128 CTAs, not 192
    assert best(4096) == narrow  # 128 CTAs
    assert best(12288) == narrow  # both are more than there are SMs


def test_with_no_table_the_librarys_own_rule_decides(library: FakeLibrary) -> None:
    assert chosen(PLAIN, 64) == (library.tactics[0].name, "library's rule")


def test_a_shipped_table_comes_before_the_rule(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {64: {WIDE: 1.0}}})
    assert chosen(PLAIN, 50) == (WIDE, "measured")


def test_what_was_tuned_here_comes_before_the_shipped_table(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {64: {WIDE: 1.0}, 16: {WIDE: 1.0}}})
    tuned({PLAIN: {64: {SMALL: 2.0}}})
    assert chosen(PLAIN, 64) == (SMALL, "measured")
    assert chosen(PLAIN, 16) == (WIDE, "measured"), "a bucket that was not tuned"


def test_a_shape_that_no_table_has_takes_what_its_neighbours_tell(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {64: {WIDE: 1.0, SMALL: 1.5}}})
    name, source = chosen(PLAIN._replace(n=4608), 64)
    assert name == WIDE
    assert source.startswith("rule: like N = 4096")
    assert chosen(PLAIN._replace(n=64), 64)[1] == "library's rule"


def test_a_shape_that_no_table_has_takes_the_decode_tactic_of_the_librarys_rule(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = len(library.tactics)
    with_tactics(library, lambda index: decode(index, 64, 8))
    monkeypatch.setattr(library, "auto_tactic", lambda problem: ours)
    ship(tmp_path, {PLAIN: {64: {WIDE: 1.0, SMALL: 1.5}}})
    problem = Problem(quant_op=PLAIN.quant_op, m=64, n=4608, k=4096, group_size=128)
    assert tactics.choose(0, problem) == tactics.Choice(ours, "library's rule")
    assert chosen(PLAIN, 64) == (WIDE, "measured")
    name, source = chosen(PLAIN._replace(group_size=64), 64)
    assert (name, source[:5]) == (WIDE, "rule:"), "its shape was measured in another group size"


def test_a_tactic_that_cannot_run_gives_way_to_the_next(tmp_path: Path) -> None:
    """The GEMV has 15 rows at most, and groups of 64 and 128."""
    ship(tmp_path, {PLAIN: {16: {"gemv": 1.0, SMALL: 2.0}}})
    assert chosen(PLAIN, 15)[0] == "gemv"
    assert chosen(PLAIN, 16)[0] == SMALL
    assert chosen(PLAIN._replace(group_size=256), 13)[0] == SMALL


@pytest.mark.parametrize(("k", "taken"), [(4096, "gemv"), (8192, SMALL), (256, SMALL)])
def test_a_gemv_that_loses_too_much_is_not_taken_whatever_a_table_says(
    tmp_path: Path, k: int, taken: str
) -> None:
    case = ZERO._replace(k=k)
    ship(tmp_path, {case: {1: {"gemv": 1.0, SMALL: 2.0}}})
    assert chosen(case, 1)[0] == taken


def test_a_tactic_of_another_library_is_passed_over(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {16: {"future:kernel": 0.5, SMALL: 2.0}}}, library="another")
    assert chosen(PLAIN, 16) == (SMALL, "measured")


def test_rows_beyond_the_last_bucket_belong_to_it(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {tables.BUCKETS[-1]: {WIDE: 1.0}}})
    assert chosen(PLAIN, 10**6) == (WIDE, "measured")


def test_a_group_of_all_inputs_is_per_column_however_it_is_written(tmp_path: Path) -> None:
    ship(tmp_path, {Case(QuantOp.PER_COLUMN, 0, 4096, 4096): {16: {WIDE: 1.0}}})
    for group in (0, 4096):
        plan = tactics.plan(0, QuantOp.PER_COLUMN, 16, 4096, 4096, group, False)
        assert FakeLibrary().tactics[plan.tactic].name == WIDE


# ---- Plans ----


def test_a_plan_has_the_workspace_of_its_tactic_and_rows(library: FakeLibrary) -> None:
    tuned({PLAIN: {64: {SMALL: 1.0}}})
    index = library.tactic_index[SMALL]
    assert planned(PLAIN, 60) == (index, 1000 * index + 60)


def test_no_rows_have_a_plan_too() -> None:
    assert planned(PLAIN, 0).workspace == 0


def test_a_plan_is_made_once(library: FakeLibrary) -> None:
    first = planned(PLAIN, 7)
    asked = library.asked
    assert planned(PLAIN, 7) is first
    assert library.asked == asked


def test_devices_have_plans_of_their_own() -> None:
    assert planned(PLAIN, 7, device=0) is not planned(PLAIN, 7, device=1)


def test_a_problem_that_no_kernel_takes_is_the_librarys_error() -> None:
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        planned(PLAIN._replace(n=100), 1)
    with pytest.raises(ValueError, match="9"):
        tactics.plan(0, 9, 1, 4096, 4096, 128, False)


def test_plans_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tactics, "_MOST_PLANS", 10)
    for m in range(100):
        planned(PLAIN, m)
        assert len(tactics._plans) <= 10
    assert planned(PLAIN, 3).workspace == 3


def test_tuned_times_are_seen_after_forgetting() -> None:
    before = planned(PLAIN, 64)
    cache.store(key(), {PLAIN: {64: {SMALL: 1.0}}}, {})
    assert planned(PLAIN, 64) == before
    tactics.forget()
    assert planned(PLAIN, 64) != before


def test_threads_agree_on_every_plan(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {m: {SMALL: 1.0, WIDE: 1.0 + m} for m in tables.BUCKETS}})
    results: list[list[tactics.Plan]] = []

    def many() -> None:
        results.append([planned(PLAIN, m) for m in range(1, 400)])
        tactics.forget()
        results.append([planned(PLAIN, m) for m in range(1, 400)])

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(plans == results[0] for plans in results)


def test_what_a_look_up_costs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for m in range(5000):
        planned(PLAIN, m)
    look_up = tactics.plan
    runs = timeit.repeat(lambda: look_up(0, 1, 77, 4096, 4096, 128, False), number=20000, repeat=5)
    with capsys.disabled():
        print(f"\nlooking up a known plan: {min(runs) / 20000 * 1e9:.0f} ns")


# ---- Names ----


def test_a_tactic_is_given_by_name_by_index_or_not_at_all(library: FakeLibrary) -> None:
    assert tactics.resolve(None) == tactics.resolve("auto") == tactics.resolve(-1) == -1
    for tactic in library.tactics:
        assert tactics.resolve(tactic.name) == tactics.resolve(tactic.index) == tactic.index


@pytest.mark.parametrize("given", ["gemm", "", 8, -2, 10**30])
def test_an_unknown_tactic_is_an_error_that_lists_the_known_ones(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"tactic is .*sm90:64x16x64.*gemv"):
        tactics.resolve(given)


@pytest.mark.parametrize("given", [1.0, True, b"gemv", ["gemv"]])
def test_a_tactic_of_another_type_is_an_error(given: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a name, an index or None"):
        tactics.resolve(given)


# ---- What it says of itself ----


def test_a_damaged_cache_is_one_warning_and_a_reason_and_no_error(tmp_path: Path) -> None:
    path = tuned({PLAIN: {64: {SMALL: 1.0}}})
    path.write_text("{")
    with pytest.warns(W4A16Warning, match="no JSON") as caught:
        plans = [planned(PLAIN, m) for m in (1, 2, 64)]
    assert len(plans) == 3
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources = tactics.describe(0)
        planned(PLAIN, 65)
    assert sources.cache == "ignored"
    assert "no JSON" in sources.problems[0]
    assert sources.path == path


def test_a_tuned_tactic_that_this_library_lacks_is_named(tmp_path: Path) -> None:
    tuned({PLAIN: {64: {"gone": 1.0, SMALL: 2.0}}})
    with pytest.warns(W4A16Warning, match="no tactic gone"):
        assert chosen(PLAIN, 64) == (SMALL, "measured")


def test_a_warning_turned_into_an_error_comes_once(tmp_path: Path) -> None:
    tuned({PLAIN: {64: {SMALL: 1.0}}}).write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(W4A16Warning):
            planned(PLAIN, 64)
        planned(PLAIN, 64)


def test_it_tells_where_choices_come_from(tmp_path: Path) -> None:
    ship(tmp_path, {PLAIN: {64: {SMALL: 1.0}}})
    tuned({PLAIN: {64: {SMALL: 1.0}}})
    sources = tactics.describe()
    assert sources.gpu == "NVIDIA Fake"
    assert "this model" in sources.shipped
    assert sources.cache == "1 case tuned here"
    assert sources.problems == ()


def test_times_of_another_driver_do_not_count_and_are_mentioned() -> None:
    cache.store(key(driver=12080), {PLAIN: {64: {WIDE: 1.0}}}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(PLAIN, 64)[1] == "library's rule"
        assert "driver 12080 instead of 13000" in tactics.describe(0).cache


def test_the_key_tells_gpus_drivers_and_libraries_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    made = tactics.key_of(FakeLibrary().gpu)
    assert (made.gpu, made.sm, made.sm_count, made.driver) == ("NVIDIA Fake", "9.0", 132, 13000)
    assert made.cuda_runtime == LIBRARY.build.cuda_runtime_version
    assert made.library == tactics.library_digest()
    assert len(made.library) == 32


# ---- The library that is there ----


def test_every_table_of_this_package_gives_tactics_that_the_library_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    by_name = {tactic.name: tactic for tactic in LIBRARY.tactics}
    data = Path(tables.__file__).parent / "data"
    for path in data.glob("tactics-*.json"):
        table, _ = tables.loads(path.read_bytes())
        for case, rows in table.entries.items():
            for m in rows:
                names = tables.rank(table.entries, case, m, 132, by_name).tactics
                assert names or not set(rows[m]) & set(by_name), (case, m)
