"""The benchmark's command line: what is refused before anything is loaded, and the suites."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import host_time
from benchmarks.suite import report, run, suites
from benchmarks.suite.__main__ import main
from benchmarks.suite.errors import Missing, UsageError
from benchmarks.suite.floor import build
from benchmarks.suite.results import Result

from .bench_results import result

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--case", "nonsense"], "is no case"),
        (["--latency", "4096x4096:g100:m1"], "no multiple"),
        (["--short", "--case", "4096x4096:g128:m1"], "exclude each other"),
        (["--latency", "4096x4096:g128:m1", "--short"], "one case alone"),
        (["--with", "marlin"], "is no peer: expected one of cublas"),
        (["--without", "x"], "is no peer"),
        (["--limit", "-3"], "--limit -3.0: expected seconds above 0"),
        (["--limit", "nan"], "expected seconds above 0"),
        (["--peer-limit", "0"], "--peer-limit 0.0"),
        (["--samples", "3", "--latency", "4096x4096:g128:m1"], "at least 10"),
        (["--suite", "none"], "--suite none: expected linear"),
        (["--suite"], "needs a name"),
        (["--compare", "/nowhere/old.json"], "cannot be read"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_before_any_work(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_help_needs_neither_a_gpu_nor_a_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "--compare" in done.stdout


def test_the_suite_is_taken_out_of_the_arguments_wherever_it_stands() -> None:
    assert suites.split(["--short", "--suite", "x", "--out", "d"]) == (
        "x",
        ["--short", "--out", "d"],
    )
    assert suites.split(["--suite=x", "--short"]) == ("x", ["--short"])
    assert suites.split(["--short"]) == ("linear", ["--short"])
    assert suites.find("linear") is run.main


def test_another_suite_gets_the_arguments_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []

    def other(arguments: Sequence[str]) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setattr(run, "other_suite", other, raising=False)
    monkeypatch.setitem(suites.SUITES, "other", "benchmarks.suite.run:other_suite")
    assert main(["--suite", "other", "--fast"]) == 3
    assert seen == [["--fast"]]


def test_a_run_asks_for_the_cases_that_were_named() -> None:
    assert len(run.chosen(run.parse([]))) == 672
    assert len(run.chosen(run.parse(["--short"]))) == 124
    named = run.chosen(run.parse(["--case", "4096x4096:g128:m1"]))
    assert [job.case.name for job in named] == ["4096x4096:g128:m1"]


def test_peers_that_do_not_take_part_are_named_with_the_reason() -> None:
    found, said = run.taking_part(run.parse(["--no-peers"]))
    assert found == []
    assert set(said.values()) == {"left out: not asked for"}
    found, said = run.taking_part(run.parse(["--short", "--without", "cublas"]))
    assert said["cublas"] == "left out: not asked for"
    assert said["gemlite"] == "left out of --short: its tuning is slow; --with gemlite"
    assert said["tensorrt_llm"].startswith("missing: tensorrt_llm cannot be imported")
    assert not {"cublas", "gemlite", "tensorrt_llm"} & {peer.name for peer in found}


def test_a_peer_whose_compiler_lost_its_executable_bit_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "humming" / "_native" / "x86_64" / "nvrtc_compile"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o644)
    for module in ("__init__.py", "layer.py"):
        (tmp_path / "humming" / module).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found, said = run.taking_part(run.parse(["--without", "cublas", "--without", "tinygemm"]))
        assert "humming" not in {peer.name for peer in found}
        assert f"chmod +x {program}, or pip install humming-kernels" in said["humming"]
        program.chmod(0o755)
        _, said = run.taking_part(run.parse([]))
        assert said["humming"] == "unknown version"
    finally:
        for module in [name for name in sys.modules if name.partition(".")[0] == "humming"]:
            del sys.modules[module]


def test_without_a_compiler_there_is_no_floor_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Missing, match="no nvcc"):
        build(folder=tmp_path)
    with pytest.raises(Missing, match="was not compiled"):
        build(str(tmp_path / "nvcc"), tmp_path)


def test_what_was_compiled_once_is_taken_again(tmp_path: Path) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        '#!/bin/sh\necho run >>"$0.log"\nwhile [ "$1" != -o ]; do shift; done\n: >"$2"\n'
    )
    compiler.chmod(0o755)
    first = build(str(compiler), tmp_path / "kept")
    assert build(str(compiler), tmp_path / "kept") == first
    assert (tmp_path / "nvcc.log").read_text() == "run\n"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [first.name]


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho unsupported gpu >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(Missing, match="unsupported gpu"):
        build(str(compiler), tmp_path / "kept")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = report.write_json(result(), tmp_path)
    report.write_json(result(), tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_limits_must_be_sensible() -> None:
    with pytest.raises(UsageError):
        run.parse(["--limit", "0"])


GOOD = result()
FAILED = replace(GOOD.cases[0].lines[1], status="failed", note="CUDA error 719", burst=None)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (GOOD, 0),
        (replace(GOOD, cases=()), 1),
        (replace(GOOD, left_out=(f"4096x4096:g128:m1: {run.LOST}",)), 1),
        (replace(GOOD, cases=(replace(GOOD.cases[0], lines=(FAILED,)),)), 1),
        (replace(GOOD, cases=(replace(GOOD.cases[0], lines=GOOD.cases[0].lines[2:]),)), 0),
    ],
    ids=["measured", "nothing measured", "GPU lost", "tactic failed", "peer failed"],
)
def test_the_exit_code_says_whether_all_tactics_ran(
    found: Result, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run", lambda *given: found)
    assert main(["--short", "--no-plots", "--out", str(tmp_path)]) == code
    assert (tmp_path / "report.md").is_file()


def test_a_run_is_compared_with_what_its_folder_held_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = report.write_json(replace(GOOD, made={"date": "2024-02-03"}), tmp_path)
    monkeypatch.setattr(run, "run", lambda *given: GOOD)
    arguments = ["--short", "--no-plots", "--out", str(tmp_path), "--compare", str(old)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "compared with 2024-02-03: new over old" in said
    assert "nothing differs beyond its noise" in said
    assert said.splitlines()[-1].startswith("16 cases in")


def test_host_time_says_in_one_line_why_it_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host_time.main([str(tmp_path / "none.so")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "none.so" in said
    assert said.count("\n") == 1
