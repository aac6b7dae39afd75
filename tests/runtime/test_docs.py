"""Every code block of the README and the pages in ``docs/`` runs as it stands there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.library import find_library
from tests.runtime import models
from tests.runtime.pages import PAGES, ROOT, blocks, name_of, pages_with

LANGUAGES = {"python", "c", "cmake", "console", "text"}  # text: what a program printed
# What is typed once, by hand, on the reader's machine: other tests run what it stands for.
ELSEWHERE = ("pip install ", "compute-sanitizer ", "cmake ", "sha256sum ")


def run(command: list[str | Path], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "docs")]),
        "PYTHONWARNINGS": "error::DeprecationWarning:__main__",
        "W4A16_LIBRARY": str(find_library()),
        "W4A16_CACHE": str(folder / "cache"),
        "LD_LIBRARY_PATH": str(find_library().parent),
    }
    result = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_are_in_a_language_that_is_run_here(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    models.model(tmp_path / "my-model")
    script = tmp_path / "page.py"
    script.write_text("\n".join(block.text for block in blocks(page, "python")), encoding="utf-8")
    run([sys.executable, script], tmp_path)


@pytest.mark.parametrize("page", pages_with("c"), ids=name_of)
def test_the_c_of_a_page_compiles_and_runs(page: Path, tmp_path: Path) -> None:
    library = find_library()
    for block in blocks(page, "c"):
        (tmp_path / "main.c").write_text(block.text, encoding="utf-8")
        command: list[str | Path] = ["cc", "-std=c99", "-Wall", "-Werror", "main.c", "-o", "main"]
        command += [f"-I{library.parent.parent / 'include'}", f"-L{library.parent}", "-lw4a16"]
        if "cuda_runtime_api.h" in block.text:
            cudart = runtime_of(library)
            command += [f"-I{headers_of(cudart)}", cudart, "-ldl", "-lrt", "-lpthread"]
        run(command, tmp_path)
        run([tmp_path / "main"], tmp_path)


@pytest.mark.parametrize("page", pages_with("console"), ids=name_of)
def test_the_commands_of_a_page_exist_and_those_of_the_package_run(
    page: Path, tmp_path: Path
) -> None:
    models.model(tmp_path / "my-model")
    for block in blocks(page, "console"):
        for command in block.commands:
            if command.startswith("w4a16 "):
                run_command(shlex.split(command)[1:], tmp_path)
            elif re.match(r"nox\b", command):
                check_nox(command)
            elif command.startswith(("pytest ", "python -m pipeline")):
                check_paths(command)
            else:
                assert command.startswith(ELSEWHERE), f"{name_of(page)}: nothing runs {command!r}"


def run_command(arguments: list[str], folder: Path) -> None:
    """Runs it; without a GPU, what needs one must say so in a line."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "runtime"),
        "W4A16_LIBRARY": str(find_library()),
        "W4A16_CACHE": str(folder / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-m", "w4a16", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in result.stderr, result.stderr
    if arguments[0] in ("tune", "bench", "check", "doctor") and result.returncode != 0:
        said = result.stdout + result.stderr
        assert re.search(r"GPU|CUDA|device|driver", said), said
    else:
        assert result.returncode == 0, result.stdout + result.stderr


def check_nox(command: str) -> None:
    sessions = {
        node.name
        for node in ast.walk(ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    words = shlex.split(command)
    if "-s" in words:
        words = words[words.index("-s") + 1 :]
        wanted = words[: words.index("--")] if "--" in words else words
        assert set(wanted) <= sessions, command


def check_paths(command: str) -> None:
    for word in shlex.split(command):
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), command


def runtime_of(library: Path) -> Path:
    """The static CUDA runtime that the library was built with."""
    cache = library.parents[3] / "build" / "CMakeCache.txt"
    if not cache.is_file():
        pytest.skip(f"{cache} is not there to say which CUDA toolkit built the library")
    found = re.search(r"^W4A16_CUDART:\w+=(.+)$", cache.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return Path(found[1])


def headers_of(runtime: Path) -> Path:
    """Beside the library: ``lib64`` and ``include``, or below ``targets/x86_64-linux``."""
    places = [parent / "include" for parent in runtime.resolve().parents[:4]]
    return next(place for place in places if (place / "cuda_runtime_api.h").is_file())


def test_the_reference_is_what_the_docstrings_say(tmp_path: Path) -> None:
    said = run(
        [sys.executable, "-c", "import reference; print(reference.page(), end='')"], tmp_path
    )
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == said, (
        "docs/api.md is old: python docs/reference.py"
    )
