"""The benchmark that makes a shipped table, and the one that judges it, without a GPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
from w4a16 import tables, tactics, timing
from w4a16.library import QuantOp
from w4a16.tables import BUCKETS, Case

from benchmarks import shipped_table, table_quality, tuned_quality

from .tactics_fakes import TACTICS, FakeLibrary, FakeTimer


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLibrary()
    for place in (tactics, import_module("w4a16.tune"), shipped_table, table_quality):
        monkeypatch.setattr(place, "LIBRARY", fake)
    monkeypatch.setattr(tuned_quality, "LIBRARY", fake)
    for place in (shipped_table, tuned_quality, timing):
        monkeypatch.setattr(place, "Timer", lambda device: FakeTimer(device, library=fake))
        monkeypatch.setattr(place, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "refuse_capture", lambda: None)
    monkeypatch.setattr(tactics, "library_digest", lambda: "abc")
    monkeypatch.setattr(tuned_quality, "state", lambda: "none")
    monkeypatch.setattr(shipped_table, "conditions", lambda device: {"sm_mhz": 1980})
    monkeypatch.setattr(shipped_table, "state", lambda: "none")


def test_a_table_and_raw_times_are_made_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipped_table.main(["--out", str(tmp_path), "--shapes", "3"]) == 0
    made = tmp_path / "tactics-nvidia-fake.json"
    table, dropped = tables.loads(made.read_bytes())
    assert dropped == []
    assert table.key.gpu == "NVIDIA Fake"
    assert table.made["sm_mhz"] == 1980
    assert Case(QuantOp.GROUP_SCALE_ZERO, 128, 4096, 4096) in table.entries
    assert all(set(rows) == set(BUCKETS) for rows in table.entries.values())
    raw = json.loads(made.with_suffix(".raw.json").read_text())
    assert {row["m"] for row in raw["verify"]} >= {300, 4096}
    capsys.readouterr()
    for arguments in ([], ["--table", str(made)], ["--variants"]):
        assert table_quality.main([str(made.with_suffix(".raw.json")), *arguments]) == 0
    printed = capsys.readouterr().out
    for text in ("auto", "shipped", "rule", "shipped, again", "no waves", "worst of the rule"):
        assert text in printed


def test_what_was_tuned_is_timed_again_and_its_cache_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("W4A16_CACHE", "off")
    out = tmp_path / "times.json"
    assert tuned_quality.main(["--shapes", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "tuned 144 buckets",
        ": stored",
        "between buckets",
        "with zeros",
        "library's rule",
    ):
        assert text in printed
    rows = json.loads(out.read_text())
    assert len(rows) == 4 * (len(tuned_quality.AT_BUCKETS) + len(tuned_quality.BETWEEN))
    assert {row["m"] for row in rows} >= {9, 4096}
    losses = [row["us"][row["chosen"]] / min(row["us"].values()) for row in rows]
    assert sum(loss < 1.02 for loss in losses) > 0.9 * len(losses)
    assert any(row["chosen"] != row["auto"] for row in rows)
    assert tactics.describe(0).cache.startswith("off")


def test_without_time_nothing_is_timed_again_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tuned_quality.main(["--limit", "0.001"]) == 1
    assert "nothing was timed again: raise --limit" in capsys.readouterr().out


def test_at_its_limit_it_stops_with_what_it_has(tmp_path: Path) -> None:
    assert shipped_table.main(["--out", str(tmp_path), "--limit", "0.001"]) == 0
    table, _ = tables.loads((tmp_path / "tactics-nvidia-fake.json").read_bytes())
    assert len(table.entries) <= 1


def test_the_work_names_no_case_twice_and_begins_with_the_anchors() -> None:
    work = shipped_table.work()
    cases = [case for case, _ in work]
    assert len(set(cases)) == len(cases)
    assert [(case.n, case.k) for case in cases[:7]] == list(shipped_table.ANCHORS)
    assert all(case.n % 8 == 0 and case.k % 128 == 0 for case in cases)


def test_a_case_of_another_group_is_left_out_only_where_the_first_stands_in_well() -> None:
    plain = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)
    one, two = TACTICS[2].name, TACTICS[5].name
    entries = {
        plain: {1: {one: 1.0, two: 2.0}},
        plain._replace(group_size=64): {1: {one: 1.01, two: 1.0}},
        plain._replace(group_size=256): {1: {one: 1.5, two: 1.0}},
    }
    kept = shipped_table.without_agreeing(entries, 132)
    assert list(kept) == [plain, plain._replace(group_size=256)]


def test_rows_above_the_limit_are_kept_and_those_below_are_measured_anew() -> None:
    both = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)
    old_only, new_only = both._replace(n=8192), both._replace(n=2048)
    old = {
        both: {8: {"old": 1.0}, 256: {"old": 2.0}, 512: {"old": 3.0}},
        old_only: {8: {"old": 4.0}, 512: {"old": 5.0}},
    }
    new = {both: {8: {"new": 0.5}}, new_only: {8: {"new": 0.6}}}
    assert shipped_table.with_kept(new, old, 256) == {
        both: {8: {"new": 0.5}, 512: {"old": 3.0}},
        old_only: old[old_only],
        new_only: new[new_only],
    }
    assert set(old[both]) == {8, 256, 512}


def test_a_table_keeps_the_shipped_rows_above_the_limit_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(QuantOp.GROUP_SCALE, 128, *shipped_table.ANCHORS[0])
    rows = {m: {"gemv": 12345.0} for m in BUCKETS}
    earlier = tables.Table(key=tactics.key_of(FakeLibrary().device(0)), entries={case: rows})
    monkeypatch.setattr(tables, "shipped", lambda *_: (earlier, "a table"))
    assert shipped_table.main(["--out", str(tmp_path), "--shapes", "1", "--keep-above", "64"]) == 0
    table, _ = tables.loads((tmp_path / "tactics-nvidia-fake.json").read_bytes())
    assert table.made["kept"] == "M > 64, from an earlier run"
    kept = {m for m, times in table.entries[case].items() if times == {"gemv": 12345.0}}
    assert kept == {m for m in BUCKETS if m > 64}
    assert set(table.entries[case]) == set(BUCKETS)


@pytest.mark.parametrize(
    ("limit", "said"), [("64", "no table has rows to keep"), ("0", "is no bucket of M")]
)
def test_rows_that_cannot_be_kept_are_refused_before_anything_is_timed(
    limit: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables, "shipped", lambda *_: (None, "none for this GPU"))
    monkeypatch.setattr(shipped_table, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit):
        shipped_table.main(["--out", str(tmp_path / "out"), "--keep-above", limit])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_where_the_best_is_taken() -> None:
    row = table_quality.Row(
        Case(QuantOp.GROUP_SCALE, 128, 4096, 4096), 1, {"gemv": 4.0, TACTICS[0].name: 8.0}, "gemv"
    )
    assert row.loss("gemv") == 1.0
    assert row.loss(TACTICS[0].name) == 2.0
    assert row.loss("given up before") == 2.0
