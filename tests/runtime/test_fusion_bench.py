"""What the benchmark of the fused call makes of its samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fusion
from benchmarks.fusion import ALONE, FUSED, NORM_THEN_OURS, PLAIN_ALONE, Result, Row, times_of
from benchmarks.suite.__main__ import main as suite


def row(m: int, contender: str, us: float | None, note: str = "") -> Row:
    return Row(
        hidden=4096,
        widths=(4096, 1024, 1024),
        m=m,
        contender=contender,
        error=None if us is None else 3e-4,
        times=None if us is None else times_of([us]),
        note=note,
    )


ROWS = [
    row(1, FUSED, 8.5),
    row(1, NORM_THEN_OURS, 10.0),
    row(1, ALONE, 7.75),
    row(1, PLAIN_ALONE, 15.5),
    row(16, FUSED, 12.0),
    row(16, NORM_THEN_OURS, 11.0),
    row(16, ALONE, 10.75),
    row(1024, FUSED, 251.0),
    row(1024, fusion.COMPILED, None, "RuntimeError: no compiler"),
]


def test_times_are_the_samples_order_statistics() -> None:
    found = times_of(list(range(101)))
    assert (found.avg, found.min, found.max) == (50, 0, 100)
    assert (found.p50, found.p90, found.p95, found.p99) == (50, 90, 95, 99)
    assert found.std == pytest.approx(29.15, abs=0.01)


def test_each_goal_is_said_to_hold_or_not() -> None:
    said = [line for line in fusion.verdicts(ROWS) if line]
    holds = {line.split(": ", 1)[1]: line.startswith("Holds") for line in said}
    assert holds == {
        "under 250 us to M = 1024: worst 251.0 us, M = 1024": False,
        "M = 1 under 9 us: 8.50 us": True,
        "at most 1 us above the product alone to M = 1: +0.75 us at M = 1": True,
        "at most 1.5 us above the product alone to M = 16: +1.25 us at M = 16": True,
        "never slower than (a): worst 1.091 of its time, M = 16": False,
        "gptq:plain within 1.6 of the packed product at M = 1: 2.00": False,
    }


def test_the_page_is_made_from_what_was_stored(tmp_path: Path) -> None:
    result = Result(device="a GPU", rows=ROWS, left_out=["widths (8,) M = 2: 600 s were over"])
    stored = tmp_path / "stored.json"
    stored.write_text(result.as_json(), encoding="utf-8")
    assert Result.from_json(result.as_json()) == result
    assert fusion.main(["--out", str(tmp_path / "out"), "--report", str(stored)]) == 0
    page = (tmp_path / "out" / "fusion.md").read_text(encoding="utf-8")
    assert page == fusion.markdown(result)
    assert "RuntimeError: no compiler" in page
    assert "600 s were over" in page
    assert "| 1 | 8.50 | 10.00 (1.18) |" in page


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema is 0"):
        Result.from_json('{"schema": 0}')


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert suite(["--suite", "fusion", "--out", str(tmp_path / "out")]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_times_are_drawn_against_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fusion.draw(Result(rows=ROWS), tmp_path / "fusion.png")
    assert (tmp_path / "fusion.png").read_bytes().startswith(b"\x89PNG")
