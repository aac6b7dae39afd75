"""What is made of a result: JSON and back, the report, plots, comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.suite import compare, report, results, tables
from benchmarks.suite.errors import ResultError
from benchmarks.suite.latency import Distribution
from benchmarks.suite.latency import markdown as latency_markdown
from benchmarks.suite.results import CaseResult, Result, Status, Times

from .bench_results import case, line, result, times

RATE = 2 * 8192**3 / 1391.0 * 1e-6


def scaled(given: Result, factor: float, who: str = "decode:64x8") -> Result:
    """With the times of a contender multiplied."""

    def lines(one: CaseResult) -> CaseResult:
        return replace(
            one,
            lines=tuple(
                replace(
                    found,
                    burst=Times(tuple(us * factor for us in found.burst.us)),
                )
                if found.contender == who and found.burst
                else found
                for found in one.lines
            ),
        )

    return replace(given, cases=tuple(lines(one) for one in given.cases))


def test_a_result_survives_json() -> None:
    given = result()
    found = results.loads(results.dumps(given))
    assert results.dumps(found) == results.dumps(given)
    assert found.cases[0].lines[0].label == "decode:64x8 + overlap"
    assert found.cases[0].lines[0].burst is not None
    assert found.cases[0].lines[0].burst.median == pytest.approx(8.0)
    assert found.tflops("burst") == pytest.approx(RATE)


def test_an_error_that_is_not_finite_becomes_null() -> None:
    bad = replace(line("gemv", "upstream", 1, 1), error=float("inf"), status="wrong")
    given = replace(result(), cases=(replace(case(4096, 4096, 1), lines=(bad,)),))
    assert results.loads(results.dumps(given)).cases[0].lines[0].error is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[]", "format"),
        ('{"format": "other"}', "format"),
        ('{"format": "w4a16-bench", "version": 99}', "version 99"),
        ('{"format": "w4a16-bench", "version": 1}', "damaged"),
    ],
)
def test_a_file_that_is_no_result_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ResultError, match=why):
        results.loads(text)


def test_a_result_with_a_time_of_zero_is_damaged() -> None:
    content = json.loads(results.dumps(result()))
    content["cases"][0]["lines"][0]["burst"][0] = 0
    with pytest.raises(ResultError, match="above 0"):
        results.loads(json.dumps(content))


def test_the_floor_of_a_case_follows_the_rate_of_its_mode() -> None:
    given = result()
    small, large = given.cases[0].case, case(8192, 28672, 4096).case
    assert given.floor(small, "burst") == pytest.approx(6.0)
    assert given.floor(large, "burst") == pytest.approx(1e-6 * large.flops / RATE)
    burst, sustained = given.floor(large, "burst"), given.floor(large, "sustained")
    assert burst is not None
    assert sustained is not None
    assert sustained > burst


def test_tables_pick_the_fastest_right_contender_of_each_kind() -> None:
    one = result().cases[0]
    assert tables.microseconds(one, "burst", tables.ours) == pytest.approx(8)
    assert tables.microseconds(one, "burst", tables.ours_plain) == pytest.approx(10)
    assert tables.microseconds(one, "burst", tables.auto) == pytest.approx(8)
    assert tables.microseconds(one, "burst", tables.auto_plain) == pytest.approx(10)
    assert tables.microseconds(one, "burst", tables.upstream) == pytest.approx(20)
    assert tables.microseconds(one, "burst", tables.best_peer) == pytest.approx(16)
    assert tables.against(one, "burst", tables.ours, tables.best_peer) == pytest.approx(2.0)
    wrong = replace(one, lines=tuple(replace(x, status="wrong") for x in one.lines))
    assert tables.ours(wrong, "burst") is None


def test_the_report_shows_fractions_ratios_costs_and_who_failed() -> None:
    text = report.markdown(result())
    assert "# NVIDIA Test: linear" in text
    fractions = "| 1 | 2 | 0.750 | 0.600 | 0.750 | 0.600 | 0.300 | 0.188 | 0.375 | 0.375 |"
    assert fractions in text
    assert "| 1 | 2.00 | 2.00 4096x4096 | 2.00 | 2.00 4096x4096 | 2.50 |" in text
    assert "| group 128, zeros | 1 | +4.0 % | +4.0 % 4096x4096 | +4.0 % |" in text
    assert "sustained: after a long run" in text
    assert "| gemlite | failed | no \\| luck |" in text
    assert "- 57344 x 8192, group 128: M = 1: out of time" in text
    assert "| 64 | 2.00 (2.00) | 2.00 (2.00) |" in text
    assert "`decode:64x8 + overlap`" in text
    assert "missing: not installed" in text
    assert "8.00 (1.0) `decode:64x8 + overlap`" in text


def test_a_shape_that_a_contender_lacks_is_not_hidden_in_its_mean() -> None:
    given = result()
    first = given.cases[0]
    less = tuple(one for one in first.lines if one.contender != "humming")
    cases = (replace(first, lines=less), *given.cases[1:])
    text = report.markdown(replace(given, cases=cases))
    assert "0.375 (1)" in text


def test_what_was_left_out_is_a_line_for_each_weight_and_reason() -> None:
    texts = [f"4096x4096:g64:zeros:m{m}: out of time" for m in (1, 8)]
    texts += ["4096x4096:g64:zeros:m16: CUDA: out: of memory", "nothing that has a name"]
    listed = report.markdown(replace(result(), left_out=tuple(texts))).partition("## Left out")[2]
    assert listed.split("\n- ")[1:] == [
        "4096 x 4096, group 64, zeros: M = 1, 8: out of time",
        "4096 x 4096, group 64, zeros: M = 16: CUDA: out: of memory",
        "nothing that has a name\n",
    ]


def test_who_did_not_take_part_is_told_by_weight_and_not_case_by_case() -> None:
    weights = [(4096, 4096), (8192, 8192), (8192, 4096), (4096, 8192)]
    cases = tuple(case(n, k, m) for n, k in weights for m in (1, 8))
    text = report.markdown(replace(result(), cases=cases))
    assert "4096 x 4096, group 128: M = 1, 8; 8192 x 8192, group 128: M = 1, 8; 8192 x 4096" in text
    assert "; and 1 more |" in text


def test_without_peers_there_is_no_table_against_them() -> None:
    mine = tuple(
        replace(one, lines=tuple(found for found in one.lines if found.role != "peer"))
        for one in result().cases
    )
    text = report.markdown(replace(result(), cases=mine))
    assert "than the best peer" not in text
    assert "best / upstream" in text


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_tactic_that_is_wrong_or_failed_heads_the_report(status: Status) -> None:
    bad = replace(line("gemv", "upstream", 1, 1), status=status, note="relative error 1e+00")
    given = replace(result(), cases=(replace(case(4096, 4096, 1), lines=(bad,)),))
    assert report.wrong(given) == ["4096x4096:g128:m1: gemv: relative error 1e+00"]
    assert "**Wrong or failed:**" in report.markdown(given)


def test_a_result_without_any_case_still_has_a_report() -> None:
    given = replace(result(), cases=(), reads=(), empty=None, rates={})
    assert "left out" in report.markdown(given).lower()


def test_reports_and_plots_are_made_anew_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    source = report.write_json(result(), tmp_path / "there")
    assert report.main([str(source), "--out", str(tmp_path / "here")]) == 0
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"report.md", "time.png", "floor.png", "ratio.png"}
    for name in ("time.png", "floor.png", "ratio.png"):
        assert (tmp_path / "here" / name).read_bytes().startswith(b"\x89PNG")
    assert "ratio.png" in capsys.readouterr().out


def test_without_matplotlib_the_report_is_there_and_the_way_to_the_plots_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    written = report.write(result(), tmp_path)
    assert {path.name for path in written} == {"result.json", "report.md"}
    assert "python -m benchmarks.suite.report" in capsys.readouterr().err


def test_a_missing_file_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_what_changed_beyond_its_noise_is_told_from_what_did_not() -> None:
    old = result()
    text = compare.text(old, scaled(scaled(old, 0.8), 1.01, "humming"))
    assert "best, burst: 0.800 over 16 (16 faster, 0 within noise, 0 slower)" in text
    assert "humming, burst: 1.010 over 16 (0 faster, 16 within noise, 0 slower)" in text
    assert "the machine itself: reading 1.000, FP16 matmul burst 1.000" in text
    assert "| 4096x4096:g128:m1 | best | burst | 8.00 | 6.40 | 0.800 | ± 2.0 % | faster |" in text
    assert "| humming |" not in text


def test_noise_grows_with_the_spread_of_both_runs() -> None:
    assert compare.noise(times(1, 0.0), times(1, 0.0)) == compare.LEAST_NOISE
    wide = compare.noise(times(1, 0.06), times(1, 0.08))
    assert wide == pytest.approx(0.1, rel=0.01)
    old = result()
    wider = replace(
        old,
        cases=tuple(
            replace(
                one,
                lines=tuple(
                    replace(x, burst=times(x.burst.median * 1.05, 0.2)) if x.burst else x
                    for x in one.lines
                ),
            )
            for one in old.cases
        ),
    )
    assert not any(change.beyond for change in compare.changes(old, wider))


def test_another_machine_or_method_is_pointed_out() -> None:
    old = result()
    new = replace(
        old,
        environment={**old.environment, "driver": "9"},
        settings={**old.settings, "replays": 3},
    )
    text = compare.text(old, new)
    assert "MIND: driver was 1.2, is 9" in text
    assert "MIND: measured in another way: replays" in text
    assert "no case in common" in compare.text(old, replace(new, cases=()))


def test_a_distribution_has_its_percentiles() -> None:
    one = Distribution.of("gemv", [float(i) for i in range(1, 102)])
    assert (one.avg, one.min, one.max, one.p50, one.p90, one.p99) == (51, 1, 101, 51, 91, 100)
    assert one.std == pytest.approx(29.3, abs=0.1)
    text = latency_markdown(case(4096, 4096, 1).case, "gemv", [one], ["a note"])
    assert "| `gemv` | 101 | 51.00 | 1.00 | 101.00 |" in text
    assert "- a note" in text
