"""The installed library in other people's projects, and the bundle without the pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.forge import ROOT, Site, contents

Tool = Callable[..., str]

CONSUMER = """\
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES C)
find_package(w4a16 REQUIRED)
add_executable(app main.c)
target_link_libraries(app PRIVATE {target})
"""


def readme_example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```c\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, "README.md has no C example"
    return found[1]


def toolkit_of(site: Site) -> Path:
    """The CUDA toolkit that the site was built with."""
    cache = (site.folder / "build/CMakeCache.txt").read_text(encoding="utf-8")
    found = re.search(r"^CUDAToolkit_ROOT:\w+=(.+)$", cache, re.MULTILINE)
    assert found is not None
    return Path(found[1])


def compiler_of(site: Site) -> Path:
    cache = (site.folder / "build/CMakeCache.txt").read_text(encoding="utf-8")
    found = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    assert found is not None
    return Path(found[1])


@pytest.mark.parametrize("target", ["w4a16::w4a16", "w4a16::w4a16_static"])
def test_the_readmes_first_example_builds_with_find_package_and_runs(
    demo: Site, target: str, tmp_path: Path, cmake: Path, ninja: Path, run_tool: Tool
) -> None:
    (tmp_path / "main.c").write_text(readme_example(), encoding="utf-8")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(target=target), encoding="utf-8")
    run_tool(
        *(cmake, "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_PREFIX_PATH={demo.install}",
        f"-DCUDAToolkit_ROOT={toolkit_of(demo)}",
    )
    run_tool(cmake, "--build", tmp_path / "build")
    printed = run_tool(tmp_path / "build/app")
    assert "packed 8192 bytes, W4A16_OK; 7 tactics" in printed
    assert "auto takes tactic" in printed


def test_the_bundle_builds_and_installs_by_itself_with_its_preset(
    small: Site, tmp_path: Path, cmake: Path, ninja: Path, run_tool: Tool
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in contents(small.source):
        target = bundle / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((small.source / name).read_bytes())
    run_tool(
        *(cmake, "--preset", "release", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        f"-DCMAKE_CUDA_COMPILER={compiler_of(small)}",
        cwd=bundle,
    )
    run_tool(cmake, "--build", "--preset", "release", cwd=bundle)
    installed = tmp_path / "installed"
    run_tool(cmake, "--install", bundle / "build/release", "--prefix", installed, cwd=bundle)
    text = run_tool(installed / "bin/w4a16_info")
    assert "sm90:64x32x64:1x1x1" in text
    assert (installed / "lib/libw4a16.a").is_file()
    assert (installed / "lib/libw4a16.so").exists()
