"""The command line: help that works, and one clear message and exit code for each bad input."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from pipeline import cli, errors
from pipeline.errors import ForgeError
from tests.upstream import Upstream, write_upstream

from .conftest import raw_profile

STAGES = ("extract", "build", "verify", "test", "wheel", "regenerate")
FAMILY = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ForgeError) and kind is not ForgeError
]
Out = pytest.CaptureFixture[str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``python -m pipeline ARGUMENTS`` in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["pipeline", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


def sources(upstream: Upstream, tmp_path: Path, ref: str | None = None) -> list[str]:
    return [
        *("--trtllm", f"{upstream.trtllm}@{ref or upstream.ref}"),
        *("--cutlass", str(upstream.cutlass)),
        *("--out", str(tmp_path / "out"), "--vendor", str(tmp_path / "vendor")),
    ]


def test_each_kind_of_failure_has_an_exit_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in FAMILY]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & {0, 1, 2, 130}
    assert all(kind.__doc__ for kind in FAMILY)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_failure_prints_what_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, kind: type[ForgeError]
) -> None:
    def fail(*arguments: object) -> None:
        raise kind("it broke [bold]", details="line 3: odd", hint="mend it")

    monkeypatch.setattr(cli, "locate_run", fail)
    assert run(monkeypatch, "extract") == kind.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: it broke [bold]\nline 3: odd\nWhat to do: mend it\n"


def test_an_interrupted_run_says_that_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "locate_run", interrupt)
    assert run(monkeypatch, "extract") == 130
    assert "goes on from the last good stage" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, stage: str
) -> None:
    assert run(monkeypatch, stage, "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--trtllm", "--cutlass", "--config", "--out", "--jobs", "--toolchain", "-v"):
        assert option in shown


def test_the_help_names_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in STAGES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("extracts",),
        ("extract", "--no-such-option"),
        ("extract", "--jobs", "0"),
        ("extract", "--jobs", "many"),
        ("extract", "--memory", "-1"),
        ("extract", "--toolchain", "gcc"),
        ("extract", "surplus"),
        ("regenerate",),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_key_of_the_profile_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path
) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(raw_profile(gate={})))
    assert run(monkeypatch, "extract", "--config", str(path)) == 3
    assert "gate: unknown key; did you mean 'gates'?" in capsys.readouterr().err


def test_a_profile_that_is_not_there_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path
) -> None:
    assert run(monkeypatch, "extract", "--config", str(tmp_path / "none.yaml")) == 3
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["/no/such/place", "nowhere@v1", "ext::sh -c id"])
def test_a_source_that_is_nowhere_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "extract", "--trtllm", source) == 4
    assert "there is no repository at" in capsys.readouterr().err


def test_an_unknown_ref_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, mini: Upstream
) -> None:
    assert run(monkeypatch, "extract", *sources(mini, tmp_path, "v7.7.7")) == 4
    assert "has no tag, branch or commit 'v7.7.7'" in capsys.readouterr().err


def test_a_release_without_a_generator_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, mini: Upstream
) -> None:
    assert run(monkeypatch, "extract", *sources(mini, tmp_path, mini.old_ref)) == 6
    assert "v0.9.0 is the first" in capsys.readouterr().err


def test_a_link_that_leads_outside_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path
) -> None:
    links = {"cpp/tensorrt_llm/common/leak.h": "/etc/passwd"}
    upstream = write_upstream(tmp_path / "upstream", symlinks=links)
    assert run(monkeypatch, "extract", *sources(upstream, tmp_path)) == 14
    assert "leak.h is a link that leads outside" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, mini: Upstream
) -> None:
    (tmp_path / "out").write_text("a file in the way")
    assert run(monkeypatch, "extract", *sources(mini, tmp_path)) == 11
    assert "cannot write" in capsys.readouterr().err


def test_the_librarys_test_without_a_library_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path
) -> None:
    """``nox -s test`` must pass on a fresh clone."""
    assert run(monkeypatch, "test", "--out", str(tmp_path / "out")) == 0
    assert "`nox -s extract build` makes one" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["build", "verify"])
def test_a_stage_without_its_predecessors_result_says_which_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path, stage: str
) -> None:
    assert run(monkeypatch, stage, "--out", str(tmp_path / "out")) == 17
    assert "nox -s" in capsys.readouterr().err
