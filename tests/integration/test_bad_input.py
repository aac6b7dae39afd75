"""Every bad input gets one clear message and its own exit code, and nothing is written or lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.forge import Json, Result, Site, contents, git, write_profile

Fresh = Callable[..., Site]


def refused(site: Site, code: int, *texts: str, stage: str = "extract", more: Any = ()) -> Result:
    """The stage fails with ``code`` and ``texts``, and everything in DIR is as it was."""
    before = contents(site.folder, times=True)
    result = site.run(stage, *more, code=code)
    assert result.says("error: ", *texts, "What to do: "), result.shown
    assert result.out == ""
    assert contents(site.folder, times=True) == before
    return result


def writes_nothing(site: Site, code: int, *more: str | Path) -> None:
    """In a folder that is not there yet, the stage leaves none, or just its lock."""
    site.extract(*more, code=code)
    left = contents(site.folder) if site.folder.exists() else {}
    assert left == {}


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trtllm", "texts"),
    [
        (
            "http://127.0.0.1:9/x@v1.0.0",
            ("cannot fetch from http://127.0.0.1:9/x", "--trtllm PATH"),
        ),
        ("file:///nowhere/to/be/found@v1.0.0", ("no repository at", "local repository")),
        ("/nowhere/to/be/found@v1.0.0", ("no repository at /nowhere",)),
        ("/usr@v1.0.0", ("/usr is not a git repository",)),
    ],
)
def test_a_repository_that_cannot_be_reached_is_named_with_the_way_out(
    small: Site, fresh: Fresh, trtllm: str, texts: tuple[str, ...]
) -> None:
    refused(small, 4, *texts, more=("--trtllm", trtllm))
    writes_nothing(fresh(), 4, "--trtllm", trtllm)


def test_an_unknown_ref_is_named(small: Site, fresh: Fresh) -> None:
    source = f"{small.upstream.trtllm}@v7.7.7"
    refused(small, 4, "has no tag, branch or commit 'v7.7.7'", more=("--trtllm", source))
    remote = f"file://{small.upstream.trtllm}@v7.7.7"
    refused(small, 4, "has no tag, branch or commit 'v7.7.7'", more=("--trtllm", remote))
    writes_nothing(fresh(), 4, "--trtllm", source)


def test_a_release_without_a_generator_is_refused_with_the_reason(
    small: Site, fresh: Fresh
) -> None:
    source = f"{small.upstream.trtllm}@{small.upstream.old_ref}"
    texts = ("TensorRT-LLM 0.8.0 cannot be extracted", "no generate_kernels.py", "v0.9.0 or later")
    refused(small, 6, *texts, more=("--trtllm", source))
    writes_nothing(fresh(), 6, "--trtllm", source)


def test_a_repository_that_is_no_tensorrt_llm_is_refused(small: Site) -> None:
    source = f"{small.upstream.cutlass}@main"
    refused(small, 6, "has no tensorrt_llm/version.py", more=("--trtllm", source))


def test_a_cutlass_without_the_pinned_commit_is_refused_and_the_commit_named(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    empty = tmp_path / "cutlass"
    empty.mkdir()
    git(empty, "init", "--quiet")
    git(empty, "commit", "--quiet", "--allow-empty", "-m", "nothing")
    texts = ("lacks", small.upstream.cutlass_commit, "v1.0.0 pins", "--cutlass SRC")
    refused(small, 4, *texts, more=("--cutlass", empty))


def test_a_cutlass_ref_that_does_not_exist_is_refused(small: Site) -> None:
    source = f"{small.upstream.cutlass}@v0.0.1"
    refused(small, 4, "has no tag, branch or commit 'v0.0.1'", more=("--cutlass", source))


# --- the profile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"gemm": {"tile": "all"}}, ("gemm.tile: unknown key", "did you mean 'tiles'?")),
        ({"gatez": {}}, ("gatez: unknown key", "did you mean 'gates'?")),
        ({"build": {"compres": "size"}}, ("build.compres", "did you mean 'compress'?")),
        ({"activation": "bf16"}, ("activation bf16 is not verified", "fp16")),
        ({"weight": "int8"}, ("weight int8 is not verified", "int4")),
        ({"architecture": "sm_89"}, ("architecture sm_89 is not verified", "sm_90a")),
        ({"architecture": "sm_42"}, ("architecture",)),
        ({"gemm": {"tiles": ["64x32"]}}, ("'64x32' is not a shape such as 128x64x64",)),
        ({"name": "../outside"}, ("name", "folder")),
        ({"gates": {"library_bytes": 0}}, ("gates.library_bytes",)),
    ],
)
def test_a_profile_that_says_something_wrong_is_refused_and_the_key_named(
    small: Site,
    small_profile: Json,
    tmp_path: Path,
    changes: dict[str, Any],
    texts: tuple[str, ...],
) -> None:
    config = write_profile(tmp_path / "wrong.yaml", small_profile, **changes)
    refused(small.elsewhere(small.folder, config=config), 3, *texts, str(config))
    nowhere = small.elsewhere(tmp_path / "run", config=config)
    nowhere.extract(code=3)
    assert not nowhere.folder.exists()


@pytest.mark.parametrize(
    "text", ["gemm: [", "- a list", "", "\0", "name: !!python/object:os.system {}"]
)
def test_a_profile_that_is_no_yaml_mapping_is_refused(
    small: Site, tmp_path: Path, text: str
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(text, encoding="utf-8")
    refused(small.elsewhere(small.folder, config=config), 3, str(config))


def test_a_profile_that_does_not_exist_is_named(small: Site, tmp_path: Path) -> None:
    site = small.elsewhere(small.folder, config=tmp_path / "none.yaml")
    refused(site, 3, "none.yaml does not exist", "--config")


def test_a_profile_that_is_no_file_is_named(small: Site, tmp_path: Path) -> None:
    refused(small.elsewhere(small.folder, config=tmp_path), 3, str(tmp_path), "--config")


def test_a_tile_that_upstream_has_not_is_named_beside_those_it_has(
    small: Site, small_profile: Json, tmp_path: Path
) -> None:
    config = write_profile(
        tmp_path / "tile.yaml", small_profile, gemm={"tiles": ["64x32x64", "256x256x64"]}
    )
    before = contents(small.folder, without=(".state", "generated"), times=True)
    result = small.elsewhere(small.folder, config=config).extract(code=8)
    assert result.says("gemm.tiles: upstream has no kernel for 256x256x64", "64x32x64")
    assert contents(small.folder, without=(".state", "generated"), times=True) == before


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        (("--jobs", "0"), ("--jobs",)),
        (("--jobs", "many"), ("--jobs",)),
        (("--memory", "-1"), ("--memory",)),
        (("--toolchain", "cuda"), ("--toolchain", "auto, system, pypi")),
        (("--colour",), ("No such option",)),
        (("surplus",), ("unexpected extra argument",)),
    ],
)
def test_a_misused_option_is_named(
    small: Site, more: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    before = contents(small.folder, times=True)
    assert small.run("build", *more, code=2).says(*texts)
    assert contents(small.folder, times=True) == before


def test_regenerate_asks_for_a_release(small: Site) -> None:
    assert small.run("regenerate", code=2).says("--to")


def test_an_unknown_stage_is_refused(small: Site) -> None:
    assert small.forge.run("extrakt", code=2).says("extrakt")


def test_out_on_a_file_is_refused_and_the_file_stays(fresh: Fresh, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    site = fresh().elsewhere(file)
    result = site.extract(code=11)
    assert result.says("cannot write", str(file), "What to do:")
    assert file.read_text() == "precious"


def test_vendor_on_a_file_is_refused_and_the_file_stays(fresh: Fresh, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    site = fresh()
    result = site.elsewhere(site.folder, vendor=file).extract(code=11)
    assert result.says("cannot write", str(file), "What to do:")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("stage", ["build", "verify"])
def test_a_stage_before_its_predecessor_says_what_to_run_first(fresh: Fresh, stage: str) -> None:
    site = fresh()
    result = site.run(stage, code=17)
    assert result.says("holds no bundle", "What to do: run `nox -s extract` first")
    assert contents(site.folder) == {}


def test_verify_before_build_says_what_to_run_first(fresh: Fresh) -> None:
    site = fresh()
    site.extract()
    before = contents(site.folder, times=True)
    assert site.run("verify", code=17).says("holds no built library", "nox -s build")
    assert contents(site.folder, times=True) == before


def test_test_without_a_library_says_so_and_is_no_failure(fresh: Fresh) -> None:
    assert fresh().run("test").says("test: no library in", "nox -s extract build")


# --- the machine ---------------------------------------------------------------------------------

NO_TOOLKIT = """\
try:
    import pipeline.toolchain
except ImportError:
    pass
else:
    pipeline.toolchain._installed_toolkits = lambda *arguments: iter(())
"""


@pytest.fixture
def bare_machine(demo: Site, tmp_path: Path) -> dict[str, str]:
    """An environment in which no CUDA toolkit is found: not on PATH, not below /usr/local."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("git", "g++", "sh", "cat"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_TOOLKIT, encoding="utf-8")
    return {
        "PATH": str(tools),
        "PYTHONPATH": f"{tmp_path / 'site'}:{demo.forge.project}",
        "CUDACXX": "",
        "CUDA_HOME": "",
        "CUDA_PATH": "",
    }


def test_a_machine_without_a_compiler_is_told_how_to_get_one(
    small: Site, fresh: Fresh, bare_machine: dict[str, str]
) -> None:
    site = fresh()
    result = site.run("extract", "--toolchain", "system", code=9, env=bare_machine)
    assert result.says("error: no CUDA compiler", "install a CUDA toolkit", "--toolchain pypi")
    assert contents(site.folder) == {}
    before = contents(small.folder, times=True)
    small.run("build", "--toolchain", "system", code=9, env=bare_machine)
    assert contents(small.folder, times=True) == before


def test_a_compiler_that_is_too_old_is_named_with_both_versions(
    small: Site, fresh: Fresh, bare_machine: dict[str, str], tmp_path: Path
) -> None:
    nvcc = tmp_path / "tools/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    site = fresh()
    result = site.run("extract", "--toolchain", "system", code=9, env=bare_machine)
    assert result.says("that can be used", f"{nvcc}: too old (found 11.8.89, need 12.8)")
    assert contents(site.folder) == {}


def test_a_compiler_that_does_not_compile_is_shown_with_its_message(
    fresh: Fresh, bare_machine: dict[str, str], tmp_path: Path
) -> None:
    nvcc = tmp_path / "tools/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'error while loading shared libraries'\nexit 127\n")
    nvcc.chmod(0o755)
    site = fresh()
    result = site.run("extract", "--toolchain", "system", code=9, env=bare_machine)
    assert result.says(f"{nvcc}: does not run", "error while loading shared libraries")
    assert contents(site.folder) == {}


def test_too_little_memory_for_one_unit_is_said_before_anything_is_compiled(
    small: Site, fresh: Fresh
) -> None:
    site = fresh()
    site.extract()
    texts = ("alone takes", "0.1 GB may be used here", "--memory")
    refused(site, 11, *texts, stage="build", more=("--memory", "0.1"))
    refused(site, 11, *texts, stage="build", more=("--memory", "0.1", "--plan"))
    assert not (site.folder / "build").exists()


def in_small_file_system(
    kilobytes: int, place: Path, command: list[str], *, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command where ``place`` is a file system of its own, which goes with the command."""
    place.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs "{place}" || exit 99; exec "$@"'
    for options in (["-m"], ["-rm"]):
        done = subprocess.run(
            ["unshare", *options, "sh", "-c", script, "sh", *command],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        refused_here = "unshare" in done.stderr or "mount" in done.stderr
        if not (done.returncode == 99 or (done.returncode == 1 and refused_here)):
            return done
    pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare (util-linux)")
def test_a_full_disk_is_said_with_what_to_do(fresh: Fresh, tmp_path: Path) -> None:
    site = fresh().elsewhere(tmp_path / "disk/run")
    command = [sys.executable, "-m", "pipeline", "extract", *map(str, site.arguments())]
    done = in_small_file_system(200, tmp_path / "disk", command, cwd=site.forge.project)
    assert done.returncode == 11, done.stderr
    assert "cannot write" in done.stderr
    assert "No space left on device" in done.stderr
    assert "What to do: free disk space" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare (util-linux)")
def test_too_little_disk_for_a_build_is_said_before_anything_is_compiled(
    small: Site, tmp_path: Path
) -> None:
    site = small.elsewhere(tmp_path / "disk/run")
    build = [sys.executable, "-m", "pipeline", "build", *map(str, site.arguments())]
    script = 'cp -a "$1" "$2" && rm -r "$2/build" "$2/dist" && shift 2 && "$@"; code=$?; '
    script += f'ls "{site.folder}"; exit $code'
    command = ["sh", "-c", script, "sh", str(small.folder), str(site.folder), *build]
    done = in_small_file_system(64_000, tmp_path / "disk", command, cwd=site.forge.project)
    assert done.returncode == 11, done.stderr
    assert "a build needs 1.5 GB" in done.stderr
    assert "What to do: free disk space" in done.stderr
    assert "build" not in done.stdout.split()
    assert "source" in done.stdout.split()


def test_a_lock_that_is_no_lock_is_refused_and_stays(small: Site) -> None:
    lock = small.folder / "upstream.lock.yaml"
    lock.write_text("release: [", encoding="utf-8")
    refused(small, 5, "upstream.lock.yaml cannot be read")
    values = {"release": "v1.0.0", "surprise": 1}
    lock.write_text(yaml.safe_dump(values), encoding="utf-8")
    refused(small, 5, "upstream.lock.yaml is not valid")
