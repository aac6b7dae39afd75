"""``w4a16 bench``, with a GPU that is not there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from w4a16 import bench as module
from w4a16 import tables, tactics, timing
from w4a16.bench import bench, weight_bytes
from w4a16.errors import ArgumentError, UnsupportedError
from w4a16.library import QuantOp
from w4a16.tables import Case

from .tactics_fakes import TACTICS, FakeLibrary, FakeTimer


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeLibrary()
    for place in (tactics, module, import_module("w4a16.tune")):
        monkeypatch.setattr(place, "LIBRARY", fake)
    monkeypatch.setattr(tactics, "library_digest", lambda: "abc")
    monkeypatch.setattr(tables, "_DATA", tmp_path)
    monkeypatch.setattr(timing, "Timer", lambda device: FakeTimer(device, library=fake))
    monkeypatch.setattr(timing, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "refuse_capture", lambda: None)
    monkeypatch.setenv("W4A16_CACHE", "off")
    tactics.forget()


def test_every_tactic_that_can_run_has_a_row_and_the_fastest_is_first() -> None:
    result = bench(8, 4096, 4096)
    assert {row.tactic for row in result.rows} == {tactic.name for tactic in TACTICS}
    assert [row.us for row in result.rows] == sorted(row.us for row in result.rows)
    assert result.rows[0].of_best == 1.0
    assert result.taken == result.auto == TACTICS[0].name
    assert result.source == "library's rule"
    assert {row.tactic for row in bench(64, 4096, 4096).rows} == {
        tactic.name for tactic in TACTICS if tactic.kind == "gemm"
    }


def test_rates_are_of_the_product_and_of_the_weights() -> None:
    row = bench(16, 4096, 4096).rows[0]
    assert row.tflops == pytest.approx(2 * 16 * 4096 * 4096 / row.us / 1e6)
    assert row.gbps == pytest.approx((4096 * 2048 + 32 * 4096 * 2) / row.us / 1e3)
    assert weight_bytes(Case(QuantOp.PER_COLUMN, 0, 8, 64)) == 8 * 32 + 16
    assert weight_bytes(Case(QuantOp.GROUP_SCALE_ZERO, 64, 8, 128)) == 8 * 64 + 2 * 8 * 4


def test_a_tactic_that_is_never_taken_says_so() -> None:
    rows = {row.tactic: row for row in bench(1, 4096, 8192, zeros=True).rows}
    assert "never taken" in rows["gemv"].note
    assert rows[TACTICS[0].name].note == ""


def test_one_tactic_or_some_can_be_asked_for() -> None:
    assert [row.tactic for row in bench(1, 4096, 4096, tactic="gemv").rows] == ["gemv"]
    assert len(bench(1, 4096, 4096, tactic=[0, "gemv", "auto"]).rows) == 2
    with pytest.raises(UnsupportedError, match="too many rows"):
        bench(64, 4096, 4096, tactic="gemv")
    with pytest.raises(ArgumentError, match="sm90:64x16x64"):
        bench(64, 4096, 4096, tactic="none")


def test_a_shape_that_no_kernel_takes_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        bench(1, 4095, 4096)


def test_latencies_are_there_if_asked_for() -> None:
    assert bench(1, 4096, 4096).rows[0].latency_us is None
    row = bench(1, 4096, 4096, latency=True).rows[0]
    assert (row.call_us, row.latency_us) == (3.0, 20.0)


def run(*arguments: str) -> Any:
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    app = typer.Typer()
    app.callback()(lambda: None)
    module.register(app)
    return testing.CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_prints_a_table() -> None:
    result = run("1", "4096", "4096", "--latency", "--bias")
    assert result.exit_code == 0, result.output
    for text in ("M = 1, N = 4096, K = 4096", "gemv", "TFLOP/s", "taken (library's rule)", "bias"):
        assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("0", "4096", "4096"), "M is 0: expected 1 or more"),
        (("1", "4", "4096"), "multiple of 8"),
        (("1", "4096", "60"), "multiple of 8 and K of 64"),
        (("1", "4096", "4096", "--group", "-5"), "--group is -5: expected 0 or more"),
        (("1", "4096", "4096", "--device", "-1"), "--device is -1: expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_the_packages_own_errors(
    arguments: tuple[str, ...], reason: str
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ArgumentError), result.output
    assert reason in str(result.exception)


def test_the_command_prints_json() -> None:
    content = json.loads(run("1", "4096", "4096", "--zeros", "--json").stdout)
    assert content["quant_op"] == "group_scale_zero"
    assert content["rows"][0]["us"] > 0
    only = json.loads(run("1", "4096", "4096", "--tactic", "gemv", "--json").stdout)
    assert [row["tactic"] for row in only["rows"]] == ["gemv"]
