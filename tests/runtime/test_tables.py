"""Tables of measured tactics: format, validation, and what they say of a problem."""

from __future__ import annotations

import contextlib
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from w4a16 import tables
from w4a16.errors import FormatError
from w4a16.library import QuantOp
from w4a16.tables import BUCKETS, Case, Table

from .tactics_fakes import TACTICS, key

BY_NAME = {tactic.name: tactic for tactic in TACTICS}
NAMES = [*BY_NAME, "future:kernel"]
PLAIN = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)

times = st.dictionaries(
    st.sampled_from(NAMES), st.floats(0.01, 1e6, allow_nan=False), min_size=1
).map(tables.fastest)
cases = st.builds(
    lambda op, group, n, k: Case(op, 0 if op is QuantOp.PER_COLUMN else group, 8 * n, 256 * k),
    st.sampled_from(QuantOp),
    st.sampled_from((64, 128, 256)),
    st.integers(1, 8000),
    st.integers(1, 200),
)
entries = st.dictionaries(
    cases, st.dictionaries(st.sampled_from(BUCKETS), times, min_size=1), max_size=6
)


def text_of(**changes: Any) -> bytes:
    content = json.loads(tables.dumps(Table(key=key(), entries={PLAIN: {16: {"gemv": 5.0}}})))
    return json.dumps({**content, **changes}).encode()


def changed_entry(**changes: Any) -> bytes:
    good = {
        "quant_op": "group_scale",
        "group_size": 128,
        "n": 8,
        "k": 128,
        "times": {"1": [[0, 1]]},
    }
    other = {**good, "n": 16}
    return text_of(tactics=["gemv", "other"], entries=[{**good, **changes}, other])


@hypothesis.given(st.integers(0, 20000))
def test_a_bucket_is_the_smallest_that_holds_the_rows(m: int) -> None:
    bucket = tables.bucket_of(m)
    assert bucket == min([b for b in BUCKETS if b >= m], default=BUCKETS[-1])


def test_buckets_ascend_and_no_gap_pads_much() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert BUCKETS[0] == 1
    for low, high in pairwise(BUCKETS):
        assert high <= 2 * low
        if 16 <= high <= 512:  # within a bucket tiles of 64 rows count the same
            assert -(-(low + 1) // 64) == -(-high // 64), (low, high)


@hypothesis.given(entries)
def test_a_table_comes_back_from_its_text(content: Any) -> None:
    table = Table(key=key(), entries=content, made={"date": "today", "mhz": 1980})
    text = tables.dumps(table)
    again, dropped = tables.loads(text.encode())
    assert dropped == []
    assert again.key == table.key
    assert again.made == table.made
    assert again.entries == content
    assert tables.dumps(again) == text


@hypothesis.given(entries, st.data())
def test_damaged_text_is_refused_or_loses_entries_and_nothing_else(
    content: Any, data: st.DataObject
) -> None:
    whole = bytearray(tables.dumps(Table(key=key(), entries=content)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        table, _ = tables.loads(damaged)
    except FormatError:
        return
    for case, rows in table.entries.items():
        assert 0 <= case.group_size <= case.k
        for m, measured in rows.items():
            assert m in BUCKETS
            assert all(math.isfinite(us) and us > 0 for us in measured.values())


finite = st.floats(allow_nan=False, allow_infinity=False)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@hypothesis.given(
    st.sampled_from(("format", "version", "key", "made", "tactics", "entries")), json_values
)
def test_any_json_in_any_place_is_refused_or_read(name: str, value: Any) -> None:
    with contextlib.suppress(FormatError):
        tables.loads(text_of(**{name: value}))


@hypothesis.given(
    st.sampled_from(("quant_op", "group_size", "n", "k", "times")),
    json_values | st.dictionaries(st.sampled_from(("1", "16")), json_values),
)
def test_any_json_in_an_entry_costs_that_entry_alone(name: str, value: Any) -> None:
    table, _ = tables.loads(changed_entry(**{name: value}))
    assert Case(QuantOp.GROUP_SCALE, 128, 16, 128) in table.entries


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100000, "nested too deeply"),
        (b"[]", "format"),
        (text_of(format="x"), "format"),
        (text_of(version=2), "version 2"),
        (text_of(version=True), "version"),
        (text_of(key={}), "gpu"),
        (text_of(key={**json.loads(text_of())["key"], "sm_count": "132"}), "sm_count"),
        (text_of(tactics=["gemv", 5]), "tactics"),
        (text_of(entries={}), "entries"),
        (text_of().replace(b"5.0", b"NaN"), "NaN"),
    ],
)
def test_what_is_no_table_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        tables.loads(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"times": {"1": [[0, 1e300]]}},
        {"times": {"1": [[0, 0]]}},
        {"times": {"1": [[0, -3.0]]}},
        {"times": {"1": [[0, True]]}},
        {"times": {"1": [[2, 1.0]]}},
        {"times": {"1": [[-1, 1.0]]}},
        {"times": {"1": [[0, 1.0], [0, 2.0]]}},
        {"times": {"1": []}},
        {"times": {"9": [[0, 1.0]]}},
        {"times": {"１": [[0, 1.0]]}},
        {"quant_op": "group"},
        {"quant_op": "per_column"},
        {"group_size": 0},
        {"group_size": 256},
        {"n": 0},
        {"n": 2**40},
        {"k": 128.0},
    ],
)
def test_an_entry_that_cannot_be_true_is_dropped_with_a_reason(changes: dict[str, Any]) -> None:
    table, dropped = tables.loads(changed_entry(**changes))
    assert list(table.entries) == [Case(QuantOp.GROUP_SCALE, 128, 16, 128)]
    assert len(dropped) == 1


def test_a_number_too_large_for_a_float_is_no_time() -> None:
    table, dropped = tables.loads(text_of().replace(b"5.0", b"1e999"))
    assert not table.entries
    assert "inf" in dropped[0]


def test_a_case_that_stands_there_twice_counts_once() -> None:
    entry = json.loads(text_of())["entries"][0]
    table, dropped = tables.loads(text_of(entries=[entry, entry]))
    assert list(table.entries) == [PLAIN]
    assert "twice" in dropped[0]


@hypothesis.given(entries, entries, entries)
def test_merging_keeps_the_newer_and_loses_nothing(one: Any, two: Any, three: Any) -> None:
    both = tables.merged(one, two)
    for case in {*one, *two}:
        for m in {*one.get(case, {}), *two.get(case, {})}:
            assert both[case][m] == two.get(case, {}).get(m, one.get(case, {}).get(m))
    assert tables.merged(both, two) == both
    assert tables.merged(both, three) == tables.merged(one, tables.merged(two, three))
    assert tables.merged({}, one) == one


def test_merging_leaves_its_arguments_alone() -> None:
    one: Any = {PLAIN: {1: {"gemv": 1.0}}}
    tables.merged(one, {PLAIN: {2: {"gemv": 2.0}}})
    assert one == {PLAIN: {1: {"gemv": 1.0}}}


@hypothesis.given(times)
def test_a_shortened_row_keeps_the_fastest_of_each_kind(measured: Any) -> None:
    kinds = {name: BY_NAME[name].kind if name in BY_NAME else "new" for name in NAMES}
    kept = tables.shortened(measured, kinds)
    assert next(iter(kept)) == min(measured, key=lambda name: (measured[name], name))
    assert {kinds[name] for name in kept} == {kinds[name] for name in measured}
    assert list(kept.values()) == sorted(kept.values())
    assert kept.items() <= measured.items()


# ---- What a table says ----


def ranked(content: Any, case: Case, m: int) -> tables.Ranked:
    return tables.rank(content, case, m, 132, BY_NAME)


def test_a_measured_case_is_answered_by_its_own_times() -> None:
    content = {PLAIN: {16: {"gemv": 4.0, "sm90:128x16x64:1x1x1": 5.0}}}
    answer = ranked(content, PLAIN, 13)
    assert answer.tactics == (("gemv", 1.0), ("sm90:128x16x64:1x1x1", 1.25))
    assert answer.source == "measured"


def test_tactics_that_the_library_lacks_are_left_out() -> None:
    content = {PLAIN: {16: {"future:kernel": 1.0, "gemv": 4.0}}}
    assert ranked(content, PLAIN, 16).tactics == (("gemv", 1.0),)
    assert ranked({PLAIN: {16: {"future:kernel": 1.0}}}, PLAIN, 16).tactics == ()


def test_another_shape_nearby_is_answered_by_what_was_measured_around_it() -> None:
    near, far = PLAIN._replace(n=4608), PLAIN._replace(n=2048)
    content = {
        near: {1: {"gemv": 4.0, "sm90:128x16x64:1x1x1": 8.0}},
        far: {1: {"sm90:128x16x64:1x1x1": 4.0, "gemv": 5.0}},
    }
    answer = ranked(content, PLAIN, 1)
    assert answer.tactics[0][0] == "gemv"
    assert "N = 4608" in answer.source


def test_a_shape_far_from_all_measured_ones_has_no_answer() -> None:
    content = {PLAIN: {1: {"gemv": 4.0}}}
    assert ranked(content, PLAIN._replace(n=64), 1) == ((), "")
    assert ranked({}, PLAIN, 1) == ((), "")


def test_a_bucket_that_was_not_measured_has_no_answer() -> None:
    assert ranked({PLAIN: {1: {"gemv": 4.0}}}, PLAIN, 64).tactics == ()


def test_weights_with_zeros_and_without_do_not_answer_for_each_other() -> None:
    content = {PLAIN: {1: {"gemv": 4.0}}}
    zero = PLAIN._replace(quant_op=QuantOp.GROUP_SCALE_ZERO)
    column = Case(QuantOp.PER_COLUMN, 0, PLAIN.n, PLAIN.k)
    assert ranked(content, zero, 1).tactics == ()
    assert ranked(content, column, 1).tactics == (("gemv", 1.0),)


def test_the_same_shape_with_another_group_counts_more_than_other_shapes() -> None:
    content = {
        PLAIN: {1: {"gemv": 4.0, "sm90:128x16x64:1x1x1": 4.5}},
        PLAIN._replace(n=5120): {1: {"sm90:128x16x64:1x1x1": 4.0, "gemv": 4.5}},
        PLAIN._replace(k=5120): {1: {"sm90:128x16x64:1x1x1": 4.0, "gemv": 4.5}},
    }
    assert ranked(content, PLAIN._replace(group_size=64), 1).tactics[0][0] == "gemv"


def test_a_ping_pong_tactic_is_not_taken_where_its_last_wave_is_nearly_empty() -> None:
    """64x64 fills 128 of 132 SMs at (8192, 64), and 1.45 waves at (12288, 64)."""
    content = {
        PLAIN._replace(n=8192): {64: {"sm90:64x64x64:1x1x1": 10.0, "sm90:128x64x64:1x1x1": 11.0}}
    }
    assert ranked(content, PLAIN._replace(n=8256), 64).tactics[0][0] == "sm90:64x64x64:1x1x1"
    assert ranked(content, PLAIN._replace(n=12288), 64).tactics[0][0] == "sm90:128x64x64:1x1x1"


@hypothesis.given(entries, cases, st.integers(0, 10000))
def test_any_table_gives_a_sorted_ranking_of_known_tactics(content: Any, case: Any, m: int) -> None:
    names = [name for name, _ in ranked(content, case, m).tactics]
    slowdowns = [slowdown for _, slowdown in ranked(content, case, m).tactics]
    assert len(set(names)) == len(names)
    assert set(names) <= set(BY_NAME)
    assert slowdowns == sorted(slowdowns)
    assert not slowdowns or slowdowns[0] == pytest.approx(1.0)


# ---- Shipped tables ----


def shipped_in(folder: Path, *keys: tables.Key) -> None:
    for number, one in enumerate(keys):
        table = Table(key=one, entries={PLAIN: {1: {"gemv": 1.0 + number}}})
        (folder / f"tactics-{number}.json").write_text(tables.dumps(table))


def test_a_model_takes_its_own_table(tmp_path: Path) -> None:
    shipped_in(tmp_path, key(gpu="A"), key(gpu="B"))
    table, which = tables.shipped("B", "9.0", 132, tmp_path)
    assert table is not None
    assert table.key.gpu == "B"
    assert "this model" in which


def test_a_model_with_as_many_sms_takes_anothers_table(tmp_path: Path) -> None:
    shipped_in(tmp_path, key(gpu="A", sm_count=114), key(gpu="B"))
    table, which = tables.shipped("C", "9.0", 132, tmp_path)
    assert table is not None
    assert table.key.gpu == "B"
    assert "B" in which


@pytest.mark.parametrize(("sm", "sm_count"), [("9.0", 78), ("10.0", 132)])
def test_other_gpus_take_none_and_it_says_what_there_is(
    tmp_path: Path, sm: str, sm_count: int
) -> None:
    shipped_in(tmp_path, key(gpu="A"))
    (tmp_path / "tactics-bad.json").write_text("{}")
    table, which = tables.shipped("A", sm, sm_count, tmp_path)
    assert table is None
    assert "A (132 SMs)" in which
    assert "tactics-bad.json" in which


def test_the_tables_of_this_package_are_whole_and_small() -> None:
    data = Path(tables.__file__).parent / "data"
    for path in data.glob("tactics-*.json"):
        table, dropped = tables.loads(path.read_bytes())
        assert dropped == []
        assert path.name == f"tactics-{tables.slug(table.key.gpu)}.json"
        assert path.stat().st_size < 1 << 20
        assert table.entries
