"""Stage build on a tiny C++ project in the shape of a bundle."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.build import build, unit_name
from pipeline.errors import BuildError, ResourceError
from pipeline.files import read_json
from pipeline.model import Build
from pipeline.ninja import Failure, ran_out_of_memory, read_log
from pipeline.plan import GB, Member, Plan, plan_from_json, plan_units
from pipeline.toolchain import Toolchain, _find_cmake, _find_ninja

CMAKE = """\
cmake_minimum_required(VERSION 3.25)
project(toy CXX)
add_library(w4a16_gemm OBJECT src/a.cpp src/b.cpp src/c.cpp src/d.cpp)
set_target_properties(w4a16_gemm PROPERTIES POSITION_INDEPENDENT_CODE ON)
if(W4A16_UNITY_PLAN)
  include(${W4A16_UNITY_PLAN})
endif()
set_source_files_properties(src/d.cpp PROPERTIES COMPILE_DEFINITIONS "TOY=${W4A16_TOY}")
add_library(toy SHARED)
target_link_libraries(toy PRIVATE w4a16_gemm)
install(TARGETS toy LIBRARY DESTINATION lib)
"""


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    cmake, version = _find_cmake(None)
    return Toolchain(
        origin="system",
        nvcc=Path("/bin/true"),
        version=(13, 0, 0),
        root=Path("/usr"),
        include=Path("/usr/include"),
        lib=Path("/usr/lib"),
        cudart_static=Path("/usr/lib/libcudart_static.a"),
        host_compiler=Path(compiler),
        host_version="g++",
        cuobjdump=None,
        nvdisasm=None,
        cmake=cmake,
        cmake_version=version,
        ninja=_find_ninja(None),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "src").mkdir(parents=True)
    (root / "CMakeLists.txt").write_text(CMAKE)
    for name in "abcd":
        (root / f"src/{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")
    return root


@pytest.fixture
def plan() -> Plan:
    members = [
        Member(path="src/a.cpp", kind="gemm", share="ab"),
        Member(path="src/b.cpp", kind="gemm", share="ab"),
        Member(path="src/c.cpp", kind="cxx"),
        Member(path="src/d.cpp", kind="cxx"),
    ]
    return plan_units(members, cores=2, memory_bytes=20 * GB)


def run_build(bundle: Path, toolchain: Toolchain, plan: Plan, toy: str = "1") -> tuple[Build, str]:
    text = io.StringIO()
    run = bundle.parent
    result = build(
        bundle,
        run / "build",
        run / "dist" / "install",
        toolchain,
        plan,
        console=Console(file=text, width=200),
        definitions={"W4A16_TOY": toy},
        disk_bytes=1,
    )
    return result, text.getvalue()


def test_planned_sources_are_compiled_as_one_unit_and_the_result_is_installed_stripped(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    result, text = run_build(bundle, toolchain, plan)
    assert {unit.name for unit in result.units} == {"gemm_00", "c.cpp", "d.cpp"}
    assert result.install == "dist/install"
    assert (bundle.parent / "dist/install/lib/libtoy.so").is_file()
    assert "[3/3]" in text
    assert "gemm_00" in text
    assert all(unit.seconds > 0 for unit in result.units)


def test_a_build_with_nothing_changed_compiles_and_prints_nothing(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    first, _ = run_build(bundle, toolchain, plan)
    again, text = run_build(bundle, toolchain, plan)
    assert text == ""
    assert again.units == first.units


def test_a_bundle_written_again_with_the_same_content_is_not_compiled_again(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    copy = bundle.parent / "copy"
    shutil.copytree(bundle, copy, copy_function=shutil.copyfile)
    shutil.rmtree(bundle)
    copy.rename(bundle)
    _, text = run_build(bundle, toolchain, plan)
    assert text == ""


def test_only_the_unit_of_a_changed_source_is_compiled_again_even_if_its_time_is_old(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    source = bundle / "src/b.cpp"
    source.write_text("int b() { return 2; }\n")
    os.utime(source, (1, 1))
    _, text = run_build(bundle, toolchain, plan)
    assert "[1/1] gemm_00" in text


def test_a_changed_definition_compiles_only_what_uses_it(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    _, text = run_build(bundle, toolchain, plan, toy="2")
    assert "[1/1] d.cpp" in text


def test_another_compiler_compiles_everything_again(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    _, text = run_build(bundle, replace(toolchain, version=(13, 4, 0)), plan)
    assert "[3/3]" in text


@pytest.mark.parametrize("record", ["sources.json", "toolchain.json", "configured.json"])
def test_a_damaged_record_costs_time_and_nothing_else(
    bundle: Path, toolchain: Toolchain, plan: Plan, record: str
) -> None:
    run_build(bundle, toolchain, plan)
    (bundle.parent / "build" / record).write_text("{")
    result, _ = run_build(bundle, toolchain, plan)
    assert len(result.units) == 3


def test_the_plan_is_kept_beside_the_objects(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    assert plan_from_json(read_json(bundle.parent / "build/plan.json")) == plan


def test_a_failed_unit_shows_its_message_in_full_and_the_others_are_compiled(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    broken = "int c() { return ; }\n" + "".join(f"int x{n} = nowhere{n};\n" for n in range(30))
    (bundle / "src/c.cpp").write_text(broken)
    with pytest.raises(BuildError) as caught:
        run_build(bundle, toolchain, plan)
    assert "c.cpp" in caught.value.what
    assert all(f"nowhere{n}" in caught.value.details for n in range(30))
    assert not (bundle.parent / "dist/install").exists()
    (bundle / "src/c.cpp").write_text("int c() { return 1; }\n")
    _, text = run_build(bundle, toolchain, plan)
    assert "[1/1] c.cpp" in text


def test_a_failed_build_leaves_the_last_good_install_tree(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    run_build(bundle, toolchain, plan)
    (bundle / "src/d.cpp").write_text("nonsense\n")
    with pytest.raises(BuildError):
        run_build(bundle, toolchain, plan)
    assert (bundle.parent / "dist/install/lib/libtoy.so").is_file()


def test_a_bundle_that_cmake_refuses_is_a_build_error_with_its_message(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    (bundle / "CMakeLists.txt").write_text('message(FATAL_ERROR "not today")\n')
    with pytest.raises(BuildError, match="could not configure") as caught:
        run_build(bundle, toolchain, plan)
    assert "not today" in caught.value.details


def test_too_little_disk_is_said_before_anything_is_written(
    bundle: Path, toolchain: Toolchain, plan: Plan
) -> None:
    work = bundle.parent / "build"
    with pytest.raises(ResourceError, match="free in"):
        build(
            bundle,
            work,
            bundle.parent / "install",
            toolchain,
            plan,
            console=Console(file=io.StringIO()),
            disk_bytes=1 << 60,
        )
    assert not work.exists()


SLOW = """\
import sys
from pathlib import Path
from pipeline.ninja import run_ninja
from pipeline.process import terminable
with terminable():
    run_ninja(Path(sys.argv[1]), Path(sys.argv[2]), jobs=2, env={"PATH": sys.argv[3]},
              on_change=lambda watch: None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_compiler_outlives_a_killed_run_and_ninja_goes_on_from_there(
    tmp_path: Path, toolchain: Toolchain, number: signal.Signals
) -> None:
    (tmp_path / "build.ninja").write_text(
        "rule slow\n  command = sleep 1 && touch $out\n"
        "rule stuck\n  command = echo $$$$ > pid && touch $out && sleep 31\n"
        "build quick.o: slow\nbuild never.o: stuck\n"
    )
    command = [
        sys.executable,
        "-c",
        SLOW,
        str(toolchain.ninja),
        str(tmp_path),
        os.environ["PATH"],
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    for _ in range(100):
        if (tmp_path / "quick.o").exists() and (tmp_path / "pid").exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(number)
    process.wait(timeout=20)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "never.o").exists()
    assert "quick.o" in read_log(tmp_path)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (1, "nvcc error   : 'cicc' died due to signal 9 (Kill signal)"),
        (1, "g++: fatal error: Killed signal terminated program cc1plus"),
        (1, "cc1plus: out of memory allocating 65536 bytes"),
        (137, ""),
    ],
)
def test_a_compiler_killed_for_memory_is_recognised(status: int, message: str) -> None:
    failure = Failure(outputs="x.o", status=status, command="nvcc", message=message)
    assert ran_out_of_memory([failure])


def test_an_ordinary_error_is_not_taken_for_want_of_memory() -> None:
    failure = Failure(outputs="x.o", status=1, command="", message="error: no member 'kill'")
    assert not ran_out_of_memory([failure])


def test_objects_are_shown_under_the_names_of_the_plan(plan: Plan) -> None:
    folder = "CMakeFiles/w4a16_gemm.dir"
    assert unit_name(f"{folder}/Unity/unity_gemm_00_cu.cu.o", plan) == "gemm_00"
    assert unit_name(f"{folder}/src/c.cpp.o", plan) == "c.cpp"
    assert unit_name("CMakeFiles/w4a16_info.dir/tools/info.cpp.o", plan) == "info.cpp"
