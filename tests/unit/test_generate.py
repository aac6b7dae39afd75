"""Stage generate: upstream's script is run, held to its word, and never trusted."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import generate as stage
from pipeline.errors import GenerateError
from pipeline.files import tree_digests
from pipeline.generate import generate
from pipeline.model import Checkout, GeneratedTree, Sources
from pipeline.releases import ReleaseFacts

Fetched = tuple[Sources, ReleaseFacts]
HEAD = "import os, sys, time\nout = sys.argv[sys.argv.index('-o') + 1]\n"
GOOD = "open(os.path.join(out, 'a.cu'), 'w').write('// kernel')\n"


def own(fetched: Fetched, folder: Path, body: str) -> Fetched:
    """Checkouts of two folders, the first with a generator of one's own."""
    sources, facts = fetched
    folder.mkdir()
    (folder / "cutlass" / "python").mkdir(parents=True)
    (folder / "trtllm").mkdir()
    (folder / "trtllm" / "generate.py").write_text(HEAD + body)
    (folder / "trtllm" / "header.h").write_text("")

    def at(checkout: Checkout, name: str) -> Checkout:
        return replace(checkout, folder=str(folder / name))

    places = replace(
        sources, trtllm=at(sources.trtllm, "trtllm"), cutlass=at(sources.cutlass, "cutlass")
    )
    return places, replace(facts, script="generate.py")


def run(found: Fetched, target: Path) -> GeneratedTree:
    return generate(*found, sm=90, target=target)


def test_the_generator_writes_what_the_release_has(generated: GeneratedTree) -> None:
    assert tree_digests(Path(generated.folder)) == generated.files
    assert all(name.endswith(".generated.cu") for name in generated.files)
    assert generated.command[0] == "python"
    assert generated.command[2:] == ["-o", "OUT", "-a", "90"]


def test_nothing_is_written_into_the_checkouts(fetched: Fetched, tmp_path: Path) -> None:
    sources, _ = fetched
    folders = [Path(c.folder) for c in (sources.trtllm, sources.cutlass)]
    before = [tree_digests(folder) for folder in folders]
    run(fetched, tmp_path / "generated")
    assert [tree_digests(folder) for folder in folders] == before


def test_two_runs_write_the_same(
    fetched: Fetched, generated: GeneratedTree, tmp_path: Path
) -> None:
    assert run(fetched, tmp_path / "again").files == generated.files


def test_what_was_there_before_goes(fetched: Fetched, tmp_path: Path) -> None:
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "stale.cu").write_text("")
    found = run(own(fetched, tmp_path / "own", GOOD), tmp_path / "generated")
    assert list(found.files) == ["a.cu"]
    assert not (tmp_path / "generated" / "stale.cu").exists()


@pytest.mark.parametrize(
    ("body", "message", "shown"),
    [
        ("raise SystemExit(3)", "failed", ""),
        ("import module_of_no_name", "failed", "module_of_no_name"),
        ("print('half', file=sys.stderr); sys.exit('broken')", "failed", "broken"),
        ("os.kill(os.getpid(), 9)", "SIGKILL", ""),
        ("syntax error here", "failed", "SyntaxError"),
        (GOOD + "print('3 kernels skipped')", "printed", "3 kernels skipped"),
        (GOOD + "os.write(1, b'\\xff\\xfe')", "printed", ""),
        ("pass", "wrote nothing", ""),
        ("os.mkdir(os.path.join(out, 'empty'))", "wrote nothing", ""),
        (GOOD + "os.symlink('/etc/passwd', os.path.join(out, 'b.cu'))", "not known", "b.cu"),
        (GOOD + "os.symlink('/etc', os.path.join(out, 'etc'))", "not known", "etc"),
        (GOOD + "os.symlink('a.cu', os.path.join(out, 'b.cu'))", "not known", "b.cu"),
        (GOOD + "open(os.path.join(out, 'b.so'), 'w')", "not known", "b.so"),
        (GOOD + "open(os.path.join(out, 'b c.cu'), 'w')", "not known", "b c.cu"),
        (GOOD + "open(os.path.join(out, 'b\\n.cu'), 'w')", "not known", "b"),
        (GOOD + "os.mkfifo(os.path.join(out, 'pipe.cu'))", "not known", "pipe.cu"),
        (GOOD + "open(__file__, 'a').write('#')", "own checkout", ""),
        (GOOD + "open(os.path.dirname(__file__) + '/new.h', 'w')", "own checkout", "new.h"),
        (GOOD + "open(os.path.dirname(__file__) + '/header.h', 'w').write('x')", "own check", ""),
        (GOOD + "os.remove(os.path.dirname(__file__) + '/header.h')", "own checkout", "header.h"),
        (
            GOOD + "open(os.environ['PYTHONPATH'] + '/new.py', 'w')",
            "own checkout",
            "new.py",
        ),
    ],
)
def test_a_generator_that_misbehaves_is_refused_and_the_old_result_stays(
    fetched: Fetched, tmp_path: Path, body: str, message: str, shown: str
) -> None:
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "old.cu").write_text("old")
    with pytest.raises(GenerateError, match=message) as caught:
        run(own(fetched, tmp_path / "own", body), tmp_path / "generated")
    assert shown in caught.value.details
    assert caught.value.hint
    assert [path.name for path in (tmp_path / "generated").iterdir()] == ["old.cu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generated", "own"]


def test_a_generator_that_hangs_is_ended(
    fetched: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(GenerateError, match=r"did not end within 0\.5 s"):
        run(own(fetched, tmp_path / "own", GOOD + "time.sleep(60)"), tmp_path / "generated")
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "generated").exists()


def test_a_remark_on_stderr_is_shown_and_no_failure(fetched: Fetched, tmp_path: Path) -> None:
    shown: list[str] = []
    body = GOOD + "print('deprecated', file=sys.stderr)"
    found = own(fetched, tmp_path / "own", body)
    generate(*found, sm=90, target=tmp_path / "generated", show=shown.append)
    assert shown[-1] == "deprecated"


def test_the_users_environment_does_not_reach_the_generator(
    fetched: Fetched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONSTARTUP", "PYTHONHOME", "SECRET_TOKEN"):
        monkeypatch.setenv(name, str(tmp_path))
    body = (
        "open(os.path.join(out, 'a.cu'), 'w').write('//' + ' '.join(sorted(os.environ)))\n"
        "open('left-in-cwd.txt', 'w')\n"
        "open(os.path.expanduser('~/left-in-home.txt'), 'w')\n"
    )
    run(own(fetched, tmp_path / "own", body), tmp_path / "generated")
    names = (tmp_path / "generated" / "a.cu").read_text()
    assert "SECRET" not in names
    assert "PYTHONHOME" not in names
    assert not Path("left-in-cwd.txt").exists()
    assert not Path(os.path.expanduser("~/left-in-home.txt")).exists()
