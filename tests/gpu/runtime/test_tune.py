"""Tuning on the GPU: what is stored is used, here and by other processes, and by no other GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from w4a16 import cache, driver, tables, tactics
from w4a16.bench import bench
from w4a16.errors import DeviceError, W4A16Warning
from w4a16.library import LIBRARY, Problem, QuantOp
from w4a16.tables import BUCKETS
from w4a16.tune import TuneResult, tune

from ..reference import torch

SHAPE = (1024, 2048)
ROWS = (1, 16, 64, 300)

# What another process takes for SHAPE and each of ROWS, and whence.
OTHER = f"""
import json, warnings
warnings.simplefilter("always")
from w4a16 import tactics
from w4a16.library import LIBRARY, Problem, QuantOp
n, k = {SHAPE}
taken = {{}}
with warnings.catch_warnings(record=True) as caught:
    for m in {ROWS}:
        choice = tactics.choose(0, Problem(
            quant_op=QuantOp.GROUP_SCALE, m=m, n=n, k=k, group_size=128))
        taken[m] = [LIBRARY.tactics[choice.tactic].name, choice.source]
sources = tactics.describe(0)
print(json.dumps({{"taken": taken, "cache": sources.cache, "problems": sources.problems,
    "warnings": [str(w.message) for w in caught]}}))
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "cache"))
    tactics.forget()
    yield tmp_path / "cache"
    tactics.forget()


def tuned(**options: Any) -> TuneResult:
    return tune(SHAPE, ROWS, **options)


def other_process() -> Any:
    root = Path(tactics.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", OTHER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_tuned_is_taken_here_and_by_another_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tuned()
    assert result.broken == {}
    assert result.skipped == ()
    assert [row.m for row in result.rows] == [1, 16, 64, 320]
    assert result.stored is not None
    assert result.stored.is_file()
    best = {str(m): row.best for m, row in zip(ROWS, result.rows, strict=True)}
    other = other_process()
    assert other["taken"] == {m: [name, "measured"] for m, name in best.items()}
    assert other["cache"] == "1 case tuned here"
    assert other["warnings"] == []
    for m in ROWS:
        plan = tactics.plan(0, QuantOp.GROUP_SCALE, m, *SHAPE, 128, False)
        assert LIBRARY.tactics[plan.tactic].name == best[str(m)]
    with capsys.disabled():
        print(f"\n{len(result.rows)} buckets in {result.seconds:.1f} s")
        for row in result.rows:
            print(f"M = {row.m}: {row.best} {row.us[row.best]:.2f} us, {row.gain:.2f} of auto")


def test_times_under_another_key_are_ignored_with_a_reason(place: Path) -> None:
    path = tuned().stored
    assert path is not None
    key = tactics.key_of(LIBRARY.device(0))
    changes: list[dict[str, Any]] = [{"driver": 1}, {"library": "x"}, {"cuda_runtime": 1}]
    for change in (*changes, {"sm_count": 1}):
        other = replace(key, **change)
        text = path.read_text().replace(*_key_text(key, other))
        path.unlink()
        key, path = other, cache.path_of(other, place)
        path.write_text(text)
        found = other_process()
        assert all(source != "measured" for _, source in found["taken"].values())
        assert "not used" in found["cache"]
        assert next(iter(change)) in found["cache"]
        assert found["warnings"] == []


def _key_text(old: tables.Key, new: tables.Key) -> tuple[str, str]:
    def text(key: tables.Key) -> str:
        content = tables.dumps(tables.Table(key=key, entries={}))
        return content[content.index('"key"') : content.index('"made"')]

    return text(old), text(new)


def test_a_copied_file_of_another_gpu_is_ignored_with_one_warning() -> None:
    path = tuned().stored
    assert path is not None
    name = json.dumps(LIBRARY.device(0).name)
    path.write_text(path.read_text().replace(name, '"NVIDIA Other"'))
    found = other_process()
    assert all(source != "measured" for _, source in found["taken"].values())
    assert found["cache"] == "ignored"
    assert "measured elsewhere" in found["problems"][0]
    assert len(found["warnings"]) == 1


def test_a_cut_file_is_ignored_with_one_warning_and_tuning_replaces_it() -> None:
    path = tuned().stored
    assert path is not None
    path.write_text(path.read_text()[:-100])
    assert len(other_process()["warnings"]) == 1
    tactics.forget()
    with pytest.warns(W4A16Warning, match="ignored"):
        tactics.describe(0)
    tuned()
    assert other_process()["problems"] == []


def test_without_a_place_to_store_it_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16_CACHE", "off")
    with pytest.warns(W4A16Warning, match="not stored"):
        result = tune(SHAPE, 16)
    assert result.rows
    assert result.stored is None


def test_nothing_is_timed_or_written_while_torch_captures(place: Path) -> None:
    values = torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = values * 2
        with pytest.raises(DeviceError, match="captured"):
            tune(SHAPE, 16)
    graph.replay()
    assert doubled.tolist() == [2.0] * 8, "the capture went on"
    assert not place.exists()


def test_nothing_is_timed_while_the_driver_captures() -> None:
    device = driver.current_device()
    with driver.use_device(device), driver.Stream.create() as stream:
        with driver.capture(stream) as capture, pytest.raises(DeviceError, match="captured"):
            tune(SHAPE, 16)
        capture.graph.close()


def test_a_first_plan_in_a_capture_reads_the_cache_and_breaks_nothing() -> None:
    tuned()
    tactics.forget()
    values = torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = values * 2
        plan = tactics.plan(0, QuantOp.GROUP_SCALE, 64, *SHAPE, 128, False)
    graph.replay()
    assert doubled.tolist() == [2.0] * 8
    problem = Problem(quant_op=QuantOp.GROUP_SCALE, m=64, n=SHAPE[0], k=SHAPE[1], group_size=128)
    assert tactics.choose(0, problem) == (plan.tactic, "measured")


def test_tuning_beside_torch_leaves_its_memory_and_stream_alone() -> None:
    values = torch.arange(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tuned(store=False)
        assert torch.cuda.current_stream() == stream
        total = int(values.sum())
    assert total == (1 << 20) * ((1 << 20) - 1) // 2


def test_out_of_time_it_keeps_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = [(4096, 4096), (28672, 8192), (57344, 8192)]
    result = tune(shapes, budget=3.0)
    assert 0 < len(result.rows) < len(shapes) * len(BUCKETS)
    assert "out of time" in result.skipped[0]
    assert result.seconds < 30
    with capsys.disabled():
        print(f"\n{len(result.rows)} buckets in {result.seconds:.1f} s")


def test_a_whole_shape_takes_some_seconds_and_they_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tune((4096, 4096), store=False)
    assert len(result.rows) == len(BUCKETS)
    assert result.broken == {}
    with capsys.disabled():
        print(f"\n(4096, 4096), all buckets: {result.seconds:.1f} s")


def test_what_bench_measures_is_near_to_what_tuning_stored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = tune((4096, 4096), 16).rows[0]
    result = bench(16, 4096, 4096, latency=True)
    assert result.taken == row.best
    assert result.source == "measured"
    assert all(note.note == "" for note in result.rows)
    again = {found.tactic: found.us for found in result.rows}
    with capsys.disabled():
        print(f"\ntuned {row.best}: {row.us[row.best]:.2f} us, again {again[row.best]:.2f},")
        print(f"best again {result.rows[0].tactic} {result.rows[0].us:.2f}")
