"""Tuning, with a GPU that is not there: every tactic's true time is known."""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from w4a16 import PackedWeight, cache, driver, tables, tactics, timing
from w4a16.converted import ConvertedLayer, Manifest
from w4a16.errors import ArgumentError, DeviceError, FormatError, UnsupportedError, W4A16Warning
from w4a16.library import QuantOp
from w4a16.tables import BUCKETS, Case
from w4a16.tune import Measured, TuneResult, buckets_of, cases_of, tune, tune_model

from .tactics_fakes import TACTICS, FakeLibrary, FakeTimer, decode, key, true_us

#: ``w4a16.tune`` is a function, and a module of that name.
MODULE: ModuleType = import_module("w4a16.tune")
PLAIN = Case(QuantOp.GROUP_SCALE, 128, 4096, 4096)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLibrary:
    fake = FakeLibrary()
    install(monkeypatch, fake)
    monkeypatch.setattr(tactics, "library_digest", lambda: "abc")
    monkeypatch.setattr(tables, "_DATA", tmp_path / "data")
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "cache"))
    tactics.forget()
    return fake


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeLibrary, **changes: Any) -> None:
    def timer(device: int) -> FakeTimer:
        made = FakeTimer(device, library=fake)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    monkeypatch.setattr(tactics, "LIBRARY", fake)
    monkeypatch.setattr(MODULE, "LIBRARY", fake)
    monkeypatch.setattr(timing, "Timer", timer)
    monkeypatch.setattr(timing, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "refuse_capture", lambda: None)


def weight(n: int, k: int, groups: int, zeros: bool = False) -> PackedWeight:
    scales = np.ones((groups, n), np.float16)
    return PackedWeight(
        packed=np.zeros((n, k // 2), np.uint8),
        scales=scales,
        zeros=scales if zeros else None,
        columns=None,
        bias=None,
        in_features=k,
        out_features=n,
    )


def can_run(tactic: Any, case: Case, m: int) -> bool:
    return tactic.kind == "gemm" or (m <= 15 and case.group_size in (0, 64, 128))


# ---- What it finds ----


@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (1024, 4096), (8192, 28672)])
def test_the_fastest_of_every_bucket_is_found(shape: tuple[int, int]) -> None:
    result = tune(shape)
    assert [row.m for row in result.rows] == list(BUCKETS)
    for row in result.rows:
        truth = {
            t.name: true_us(t, row.case, row.m) for t in TACTICS if can_run(t, row.case, row.m)
        }
        assert truth[row.best] <= 1.03 * min(truth.values()), row.m
        assert list(row.us.values()) == sorted(row.us.values())
        assert row.auto in row.us
        assert row.gain >= 1


def test_all_that_can_run_are_timed_and_the_best_again_properly() -> None:
    row = tune((4096, 4096), 8).rows[0]
    assert set(row.us) == {tactic.name for tactic in TACTICS}
    calls = FakeTimer.made.calls
    assert [(m, quick) for m, _, quick in calls] == [(8, True), (8, False)]
    assert len(calls[0][1]) == len(TACTICS)
    assert MODULE.FINALISTS <= len(calls[1][1]) <= MODULE.FINALISTS + 1
    assert row.finalists == {TACTICS[index].name for index in calls[1][1]}
    assert row.best in row.finalists


def test_a_gemv_that_loses_too_much_is_not_timed() -> None:
    for k, timed in ((4096, True), (8192, False)):
        row = tune((4096, k, 128, True), 1).rows[0]
        assert ("gemv" in row.us) == timed


def test_a_small_tile_that_lost_by_far_is_given_up_as_rows_grow() -> None:
    result = tune((28672, 4096))
    assert "sm90:64x16x64:1x1x1" in result.rows[0].us
    last = next(names for m, names, quick in FakeTimer.made.calls if m == BUCKETS[-1] and quick)
    assert 2 not in last, "128x16"
    assert 0 in last, "what the library's rule takes is always timed"
    assert {4, 5, 6} <= set(last)


@pytest.fixture
def with_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two decode tactics besides."""
    install(monkeypatch, FakeLibrary((*TACTICS, decode(8, 64, 8), decode(9, 64, 16))))


@pytest.mark.usefixtures("with_decode")
def test_decode_tactics_of_few_rows_are_timed_up_to_some_blocks_of_them_and_not_beyond() -> None:
    result = tune((4096, 4096))
    for row in result.rows:
        assert ("decode:64x8" in row.us) == (row.m <= 8 * MODULE.MOST_BLOCKS), row.m
        assert ("decode:64x16" in row.us) == (row.m <= 16 * MODULE.MOST_BLOCKS), row.m
    assert result.rows[0].best == "decode:64x8"
    assert result.rows[-1].best.startswith("sm90:")


def test_decode_tactics_of_many_rows_are_timed_at_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakeLibrary((*TACTICS, decode(8, 64, 128))))
    last = tune((4096, 4096)).rows[-1]
    assert last.m > 128 * MODULE.MOST_BLOCKS
    assert "decode:64x128" in last.us


@pytest.mark.usefixtures("with_decode")
def test_decode_tactics_are_timed_at_any_rows_where_nothing_else_runs() -> None:
    result = tune((4096, 4096, 32), [1, 8192])
    for row in result.rows:
        assert set(row.us) == {"decode:64x8", "decode:64x16"}
    assert result.rows[-1].best == "decode:64x16"


def test_one_short_pass_will_do_if_asked_for() -> None:
    result = tune((4096, 4096), [1, 64], quick=True)
    assert all(quick for _, _, quick in FakeTimer.made.calls)
    assert len(result.rows) == 2


# ---- What it does with it ----


def test_what_was_tuned_is_taken_from_then_on_and_stored() -> None:
    before = tactics.plan(0, 1, 64, 4096, 4096, 128, False)
    result = tune((4096, 4096))
    after = tactics.plan(0, 1, 64, 4096, 4096, 128, False)
    assert TACTICS[before.tactic].name == result.rows[0].auto
    rows = {row.m: row for row in result.rows}
    assert TACTICS[after.tactic].name == rows[64].best
    assert result.stored is not None
    table = cache.read(key()).table
    assert table is not None
    assert table.entries == result.entries()
    assert set(table.made) >= {"date", "version", "compiler"}


def test_without_storing_nothing_changes(tmp_path: Path) -> None:
    result = tune((4096, 4096), 64, store=False)
    assert result.stored is None
    assert not (tmp_path / "cache").exists()
    assert tactics.describe(0).cache == "nothing tuned yet"


def test_times_that_cannot_be_stored_are_a_warning_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(W4A16Warning, match="not stored"):
        result = tune((4096, 4096), 64)
    assert result.stored is None
    assert "cannot be written" in result.note
    assert result.rows


# ---- What is wrong ----


def test_a_tactic_with_wrong_results_never_wins(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tune((4096, 4096), 1, store=False).rows[0].best
    install(monkeypatch, library, broken={good})
    with pytest.warns(W4A16Warning, match=f"{good} is not used.*nonsense"):
        result = tune((4096, 4096), [1, 2, 64])
    assert list(result.broken) == [good]
    assert all(good not in row.us for row in result.rows)
    assert all(good not in row for rows in result.entries().values() for row in rows.values())


def test_if_every_tactic_is_wrong_nothing_is_stored(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, library, broken={tactic.name for tactic in TACTICS})
    with pytest.warns(W4A16Warning):
        result = tune((4096, 4096), [1, 64])
    assert result.rows == ()
    assert result.stored is None
    assert len(result.skipped) == 2


def test_a_broken_rule_of_the_library_does_not_matter(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, library, broken={TACTICS[0].name})
    with pytest.warns(W4A16Warning):
        rows = tune((4096, 4096)).rows
    assert len(rows) == len(BUCKETS)
    assert rows[-1].gain != rows[-1].gain  # NaN: nothing to compare with


def test_rows_that_memory_does_not_hold_are_left_out_with_a_reason(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, library, small=1024)
    result = tune((4096, 4096))
    assert max(row.m for row in result.rows) == 1024
    assert len(result.skipped) == sum(bucket > 1024 for bucket in BUCKETS)
    assert "too little memory" in result.skipped[0]


def test_out_of_time_it_stops_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(MODULE.time, "monotonic", lambda: float(next(clock)))
    result = tune([(4096, 4096), (8192, 8192)], budget=20.0)
    assert 0 < len(result.rows) < len(BUCKETS)
    assert "out of time" in result.skipped[0]
    assert result.stored is not None


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(driver, "is_capturing", lambda: True)
    with pytest.raises(DeviceError, match="captured"):
        tune((4096, 4096))


def test_progress_counts_buckets_up_to_all_of_them() -> None:
    seen: list[tuple[int, int, str]] = []
    tune([(4096, 4096), (8192, 4096)], [1, 64, 300], progress=lambda *at: seen.append(at))
    assert [done for done, _, _ in seen] == list(range(7))
    assert {total for _, total, _ in seen} == {6}
    assert seen[3][2] == "N = 8192, K = 4096, group_scale, group 128, M = 1"


# ---- What is asked for ----


def test_shapes_weights_and_lists_of_them_are_cases() -> None:
    zero = QuantOp.GROUP_SCALE_ZERO
    wanted: list[tuple[Any, Case]] = [
        ((4096, 512), Case(QuantOp.GROUP_SCALE, 128, 4096, 512)),
        ([4096, 512], Case(QuantOp.GROUP_SCALE, 128, 4096, 512)),
        ((4096, 512, 64), Case(QuantOp.GROUP_SCALE, 64, 4096, 512)),
        ((4096, 512, 0), Case(QuantOp.PER_COLUMN, 0, 4096, 512)),
        ((4096, 512, 64, True), Case(zero, 64, 4096, 512)),
        ((4096, 512, 0, True), Case(zero, 512, 4096, 512)),
        (weight(64, 512, 1), Case(QuantOp.PER_COLUMN, 0, 64, 512)),
        (weight(64, 512, 4), Case(QuantOp.GROUP_SCALE, 128, 64, 512)),
        (weight(64, 512, 2, zeros=True), Case(zero, 256, 64, 512)),
        (Case(zero, 64, 8, 64), Case(zero, 64, 8, 64)),
    ]
    for what, case in wanted:
        assert cases_of([what], 128, False) == ([case], None)
    assert cases_of([what for what, _ in wanted], 128, False)[0] == list(
        dict.fromkeys(case for _, case in wanted)
    )
    assert cases_of((8, 64), 64, True)[0] == [Case(zero, 64, 8, 64)]
    assert cases_of({"q": weight(64, 512, 1)}, 128, False)[0][0].n == 64


@pytest.mark.parametrize(
    "what",
    [None, 5, "4096x4096", [], (4096,), [(1, 2, 3, False, 5)], [("4096", 4096)], [(8.0, 64)]],
)
def test_what_is_no_shape_is_an_error_that_says_what_would_be(what: Any) -> None:
    with pytest.raises(ArgumentError, match="expected"):
        tune(what)


def test_a_shape_that_no_kernel_takes_is_an_error_before_anything_starts() -> None:
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        tune([(4096, 4096), (4095, 4096)])


@hypothesis.given(st.lists(st.integers(1, 20000), min_size=1))
def test_rows_stand_for_their_buckets(m: list[int]) -> None:
    assert buckets_of(m) == tuple(sorted({tables.bucket_of(rows) for rows in m}))
    assert buckets_of(m[0]) == (tables.bucket_of(m[0]),)


@pytest.mark.parametrize("m", [0, -1, [], [1, 0], [1.0], True])
def test_rows_that_are_none_are_an_error(m: Any) -> None:
    with pytest.raises(ArgumentError, match="m is"):
        tune((4096, 4096), m)


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_is_above_zero(budget: float) -> None:
    with pytest.raises(ArgumentError, match="budget"):
        tune((4096, 4096), budget=budget)


def test_a_checkpoints_layers_are_its_shapes_the_heaviest_first(tmp_path: Path) -> None:
    layers = {"a": (64, 512), "b": (64, 512), "c": (128, 512), "d": (128, 256)}
    content: dict[str, Any] = {}
    for name, (n, k) in layers.items():
        content[f"{name}.qweight"] = np.zeros((k // 8, n), np.int32)
        content[f"{name}.qzeros"] = np.full((k // 128, n // 8), 0x77777777, np.int32)
        content[f"{name}.scales"] = np.ones((k // 128, n), np.float16)
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file(content, tmp_path / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    for symmetric, op in ((True, QuantOp.GROUP_SCALE), (False, QuantOp.GROUP_SCALE_ZERO)):
        config = {"quantization_config": {**quantization, "sym": symmetric}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert MODULE.model_cases(tmp_path) == [
            Case(op, 128, 64, 512),
            Case(op, 128, 128, 512),
            Case(op, 128, 128, 256),
        ]
    for result in (tune_model(tmp_path, 16, quick=True), tune(tmp_path, 16, quick=True)):
        assert len(result.rows) == 3


def test_a_converted_folders_layers_are_what_its_manifest_says(tmp_path: Path) -> None:
    def layer(op: QuantOp, group: int, n: int, k: int) -> ConvertedLayer:
        return ConvertedLayer(
            file="model.safetensors",
            in_features=k,
            out_features=n - 1,
            n=n,
            k=k,
            group_size=group,
            quant_op=op,
            act_order=False,
            columns=False,
            bias=False,
        )

    manifest = Manifest(
        package_version="1",
        library_digest="x",
        conversion="x",
        layers={
            "a": layer(QuantOp.PER_COLUMN, 0, 64, 512),
            "b": layer(QuantOp.GROUP_SCALE_ZERO, 128, 128, 512),
        },
        files={},
        source_method="gptq",
        source_config={},
        source_files={},
    )
    (tmp_path / "w4a16.json").write_text(json.dumps(manifest.to_json()))
    assert MODULE.model_cases(tmp_path) == [
        Case(QuantOp.GROUP_SCALE_ZERO, 128, 128, 512),
        Case(QuantOp.PER_COLUMN, 0, 64, 512),
    ]


def test_a_folder_without_a_model_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        tune_model(tmp_path)
    with pytest.raises(FormatError):
        tune_model(tmp_path / "none")


# ---- The command ----


def run(*arguments: str) -> Any:
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    app = typer.Typer()
    app.callback()(lambda: None)
    MODULE.register(app)
    return testing.CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=True)


def test_the_command_prints_a_table() -> None:
    result = run("--shape", "4096x14336", "--m", "1,16,300")
    assert result.exit_code == 0, result.output
    for text in ("N = 4096, K = 14336", "320", "3 buckets", "stored in"):
        assert text in result.output


def test_the_command_prints_json_and_stores_nothing_if_told_so(tmp_path: Path) -> None:
    result = run("--shape", "4096x512", "--group", "0", "--m", "1", "--json", "--no-store")
    content = json.loads(result.stdout)
    assert content["rows"][0]["quant_op"] == "per_column"
    assert content["rows"][0]["m"] == 1
    assert content["stored"] is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "either MODEL or"),
        (("model", "--shape", "8x64"), "either MODEL or"),
        (("--shape", "8"), "NxK"),
        (("--shape", "8x64", "--m", "1,x"), "numbers of rows"),
        (("--shape", "4096x4100"), "--group; 0: per column"),
        (("--shape", "8x64", "--group", "-1"), "--group is -1: expected 0 or more"),
        (("--shape", "8x64", "--budget", "0.5"), "--budget is 0.5: expected 1 or more"),
        (("--shape", "8x64", "--device", "-1"), "--device is -1: expected 0 or more"),
    ],
)
def test_the_command_says_what_it_cannot_read(arguments: tuple[str, ...], reason: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ArgumentError)
    assert reason in str(result.exception)


def test_a_result_and_a_row_hold_what_they_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tune((4096, 4096), 1)
    assert isinstance(result, TuneResult)
    assert isinstance(result.rows[0], Measured)
    assert result.gpu == "NVIDIA Fake"
    assert result.skipped == ()
    assert result.seconds >= 0
