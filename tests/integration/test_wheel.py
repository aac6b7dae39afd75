"""The wheel of the miniature's library: made twice, then installed in an empty environment.

A minute on top of the miniature's build, most of it pip's; the wheel's dependencies come from the
package index.
"""

from __future__ import annotations

import base64
import csv
import email.parser
import email.policy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install '.[wheel]'")

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

from pipeline import __version__
from tests.integration.forge import ROOT, Json, Site, contents, copy

Tool = Callable[..., str]

INFO = f"w4a16-{__version__}.dist-info"
PACK_AND_UNPACK = """
import json, sys
import numpy as np
import w4a16
assert "torch" not in sys.modules
seed = np.random.SeedSequence().entropy
print("seed", seed)
rng = np.random.default_rng(seed)
q = rng.integers(0, 16, (512, 384), dtype=np.uint8)
scales = rng.uniform(0.01, 1, (512 // 128, 384)).astype(np.float16)
packed = w4a16.pack(q=q, scales=scales, group_size=128)
unpacked = w4a16.unpack(packed)
assert np.array_equal(unpacked.q, q)
print(w4a16.__version__)
print(w4a16.cmake_dir())
"""
CONSUMER = """\
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES C)
find_package(w4a16 {version} REQUIRED)
add_executable(app main.c)
target_link_libraries(app PRIVATE w4a16::w4a16)
set_target_properties(app PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
install(TARGETS app)
install(IMPORTED_RUNTIME_ARTIFACTS w4a16::w4a16)
"""
PROGRAM = """\
#include <stdio.h>
#include <w4a16.h>
int main(void) { return printf("w4a16 %s\\n", w4a16_version()) < 0; }
"""


@pytest.fixture(scope="session")
def _wheel(_demo: Site, workshop: Path) -> Site:
    """A copy of the demo run with a wheel; the build folder is not needed."""
    site = _demo.elsewhere(workshop / "wheel-run")
    shutil.copytree(
        _demo.folder, site.folder, symlinks=True, ignore=shutil.ignore_patterns("build")
    )
    (workshop / "wheel.log").write_text(site.run("wheel").shown)
    site.save()
    return site


@pytest.fixture
def made(_wheel: Site) -> Site:
    """A run with a wheel, to be read only."""
    return _wheel


@pytest.fixture
def made_to_change(made: Site, tmp_path: Path) -> Site:
    site = made.elsewhere(tmp_path / "run")
    copy(made.folder, site.folder)
    return site


@pytest.fixture(scope="session")
def environment(_wheel: Site, workshop: Path) -> Path:
    """An environment with the wheel and what it asks for, and nothing else; its Python."""
    folder = workshop / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    options = ("--quiet", "--disable-pip-version-check", "--no-cache-dir")
    done = subprocess.run(
        [python, "-m", "pip", "install", *options, wheel_of(_wheel)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return python


def wheel_of(site: Site) -> Path:
    (found,) = (site.folder / "wheel").glob("*.whl")
    return found


def files_of(site: Site) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel_of(site)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def metadata_of(site: Site) -> EmailMessage:
    parser = email.parser.BytesParser(policy=email.policy.EmailPolicy(utf8=True))
    return parser.parsebytes(files_of(site)[f"{INFO}/METADATA"])


def clean(environment: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what could lend another environment its packages."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "W4A16", "VIRTUAL"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **(environment or {})}


def test_the_folder_holds_wheel_tarball_and_their_sums(made: Site, run_tool: Tool) -> None:
    names = {path.name for path in (made.folder / "wheel").iterdir()}
    wheel = wheel_of(made).name
    assert names == {wheel, f"w4a16-{__version__}-bundle.tar.gz", "SHA256SUMS"}
    run_tool("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=made.folder / "wheel")
    name, version, _, tags = parse_wheel_filename(wheel)
    assert (name, str(version)) == ("w4a16", __version__)
    (tag,) = tags
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert re.fullmatch(r"manylinux_2_\d+_\w+", tag.platform)
    assert made.manifest["wheel"]["wheel"] == wheel


def test_the_wheel_holds_the_package_and_the_library_as_installed(made: Site) -> None:
    files = files_of(made)
    source = contents(made.forge.project / "runtime" / "w4a16")
    own = {name for name in source if not name.endswith(".pyc")}
    assert {f"w4a16/{name}" for name in own} <= set(files)
    assert files["w4a16/lib/libw4a16.so"] == made.library.read_bytes()
    header = (made.install / "include" / "w4a16.h").read_bytes()
    assert files["w4a16/include/w4a16.h"] == header
    added = {name for name in files if name.startswith("w4a16/")} - {f"w4a16/{n}" for n in own}
    assert added == {
        "w4a16/cmake/w4a16Config.cmake",
        "w4a16/cmake/w4a16ConfigVersion.cmake",
        "w4a16/data/provenance.json",
        "w4a16/include/w4a16.h",
        "w4a16/lib/libw4a16.so",
    }


def test_the_record_lists_every_file_with_its_digest(made: Site) -> None:
    files = files_of(made)
    rows = list(csv.reader(files[f"{INFO}/RECORD"].decode().splitlines()))
    assert {row[0] for row in rows} == set(files)
    for name, digest, size in rows:
        if name == f"{INFO}/RECORD":
            continue
        found = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={found}", str(len(files[name])))


def test_the_metadata_says_what_the_package_needs_and_under_which_licences(made: Site) -> None:
    metadata, files = metadata_of(made), files_of(made)
    assert (metadata["Name"], metadata["Version"]) == ("w4a16", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert "TensorRT-LLM v1.0.0" in metadata["Summary"]
    wanted = {
        Requirement(text).name: Requirement(text) for text in metadata.get_all("Requires-Dist", [])
    }
    assert set(wanted) == {"numpy", "rich", "torch", "typer"}
    assert [n for n, requirement in wanted.items() if requirement.marker] == ["torch"]
    assert metadata["License-Expression"].startswith("Apache-2.0 AND BSD-3-Clause")
    licenses = {f"{INFO}/licenses/{name}" for name in metadata.get_all("License-File", [])}
    assert licenses == {name for name in files if name.startswith(f"{INFO}/licenses/")}
    for name in ("TensorRT-LLM.txt", "CUTLASS.txt"):
        text = (made.source / "licenses" / name).read_bytes()
        assert files[f"{INFO}/licenses/{name}"] == text
    assert files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"w4a16 = w4a16.cli:main" in files[f"{INFO}/entry_points.txt"]


def test_the_records_name_what_was_built(made: Site) -> None:
    files, manifest = files_of(made), made.manifest
    provenance: Json = json.loads(files["w4a16/data/provenance.json"])
    assert provenance["library"]["sha256"] == hashlib.sha256(made.library.read_bytes()).hexdigest()
    assert provenance["bundle_digest"] == manifest["bundle"]["digest"]
    assert provenance["trtllm"]["commit"] == manifest["sources"]["trtllm"]["commit"]
    assert provenance["cutlass"]["commit"] == manifest["sources"]["cutlass"]["commit"]
    assert provenance["kernels"]["gemm"] == 12
    assert provenance["kernels"]["gemv"] == 40
    assert provenance["library"]["compiler"] == manifest["build"]["compiler"]
    assert provenance["policy"] in wheel_of(made).name
    # The tests' copy of this project is in no repository.
    assert provenance["project"]["commit"] is None
    bill = files[f"{INFO}/sboms/w4a16.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    parts = {entry["name"]: entry for entry in json.loads(bill)["components"]}
    vendored = [entry["origin"] for entry in manifest["vendored"]]
    for name, key in (("TensorRT-LLM", "trtllm:"), ("CUTLASS", "cutlass:")):
        listed = {f"{key}{file['name']}" for file in parts[name]["components"]}
        assert listed == {origin for origin in vendored if origin.startswith(key)}


def test_no_path_of_this_machine_is_in_what_is_handed_out(made: Site, workshop: Path) -> None:
    everything = files_of(made)
    with tarfile.open(made.folder / "wheel" / f"w4a16-{__version__}-bundle.tar.gz") as opened:
        for entry in opened:
            stream = opened.extractfile(entry)
            assert stream is not None
            everything[entry.name] = stream.read()
    for folder in (workshop, ROOT):
        assert [n for n, content in everything.items() if str(folder).encode() in content] == []


def test_the_tarball_is_the_bundle(made: Site, tmp_path: Path) -> None:
    name = f"w4a16-{__version__}-bundle"
    with tarfile.open(made.folder / "wheel" / f"{name}.tar.gz") as opened:
        opened.extractall(tmp_path, filter="data")
    assert contents(tmp_path / name) == contents(made.source)


def test_an_unchanged_wheel_is_not_made_again(made_to_change: Site) -> None:
    before = contents(made_to_change.folder / "wheel", times=True)
    assert made_to_change.run("wheel").says("wheel: unchanged, skipped")
    assert contents(made_to_change.folder / "wheel", times=True) == before


@pytest.mark.parametrize("damage", ["wheel", "SHA256SUMS", "everything"])
def test_a_damaged_wheel_is_made_again_with_the_same_bytes(
    made_to_change: Site, damage: str
) -> None:
    folder = made_to_change.folder / "wheel"
    before = contents(folder)
    if damage == "wheel":
        wheel_of(made_to_change).write_bytes(b"damaged")
    elif damage == "SHA256SUMS":
        (folder / damage).unlink()
    else:
        shutil.rmtree(folder)
    assert made_to_change.run("wheel").says("missing or damaged; making it again")
    assert contents(folder) == before


def test_a_killed_stage_leaves_nothing_that_stays(made_to_change: Site) -> None:
    folder = made_to_change.folder / "wheel"
    before = contents(folder)
    folder.rename(folder.with_name(".wheel.old"))
    (folder.parent / ".wheel.new-killed").mkdir()
    (folder.parent / ".state" / "wheel").mkdir()
    (folder.parent / ".state" / "wheel.json").unlink()
    made_to_change.run("wheel")
    assert contents(folder) == before
    assert list(folder.parent.glob(".wheel.*")) == []
    assert not (folder.parent / ".state" / "wheel").exists()


def test_a_bundle_that_changed_since_the_build_is_refused(made_to_change: Site) -> None:
    before = contents(made_to_change.folder / "wheel")
    with (made_to_change.source / "README.md").open("a") as stream:
        stream.write("\n")
    result = made_to_change.run("wheel", code=17)
    assert result.says("built from another bundle", "nox -s build")
    assert contents(made_to_change.folder / "wheel") == before


def test_a_library_that_fails_its_checks_is_refused(made_to_change: Site) -> None:
    made_to_change.library.write_bytes(made_to_change.library.read_bytes()[:-100_000])
    made_to_change.run("wheel", code=13)


def test_a_run_without_a_build_is_refused(made_to_change: Site) -> None:
    shutil.rmtree(made_to_change.folder / "dist")
    assert made_to_change.run("wheel", code=17).says("no built library", "nox -s build")


def test_a_missing_package_of_the_extra_is_named(made_to_change: Site, tmp_path: Path) -> None:
    absent = "raise ModuleNotFoundError('no', name='cyclonedx')\n"
    (tmp_path / "lib" / "cyclonedx").mkdir(parents=True)
    (tmp_path / "lib" / "cyclonedx" / "__init__.py").write_text(absent)
    paths = {"PYTHONPATH": str(tmp_path / "lib")}
    result = made_to_change.run("wheel", code=18, env=paths)
    assert result.says("package cyclonedx is not installed", "nox -s wheel")


def test_the_installed_package_packs_and_unpacks_without_a_gpu(
    environment: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [environment, "-I", "-c", PACK_AND_UNPACK],
        cwd=tmp_path,
        env=clean(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, version, cmake_dir = done.stdout.splitlines()
    assert version == __version__
    assert Path(cmake_dir, "w4a16Config.cmake").is_file()


def test_the_installed_command_prints_what_the_library_is(
    made: Site, environment: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [environment.with_name("w4a16"), "info"],
        cwd=tmp_path,
        env=clean({"COLUMNS": "200"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sources = made.manifest["sources"]
    for text in (__version__, "v1.0.0", sources["cutlass"]["commit"][:12], "sm90:64x32x64:1x1x1"):
        assert text in done.stdout


def test_what_the_index_page_shows_runs(made: Site, environment: Path, tmp_path: Path) -> None:
    text = str(metadata_of(made).get_payload())
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [environment, "-I", "-c", block],
        cwd=tmp_path,
        env=clean(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pip_finds_nothing_missing_or_at_odds(environment: Path, run_tool: Tool) -> None:
    run_tool(environment, "-m", "pip", "check")


def test_a_c_program_finds_the_library_of_the_installed_package(
    environment: Path, tmp_path: Path, cmake: Path, ninja: Path, run_tool: Tool
) -> None:
    program = "import w4a16; print(w4a16.cmake_dir())"
    place = run_tool(environment, "-I", "-c", program, cwd=tmp_path).strip()
    source, build, installed = (tmp_path / name for name in ("source", "build", "installed"))
    source.mkdir()
    (source / "main.c").write_text(PROGRAM)
    (source / "CMakeLists.txt").write_text(CONSUMER.format(version=__version__))
    run_tool(
        *(cmake, "-S", source, "-B", build, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_INSTALL_PREFIX={installed}",
        f"-Dw4a16_DIR={place}",
    )
    run_tool(cmake, "--build", build)
    assert run_tool(build / "app") == f"w4a16 {__version__}\n"
    run_tool(cmake, "--install", build)
    shutil.rmtree(build)
    assert not any(path.is_symlink() for path in installed.rglob("*"))
    assert run_tool(installed / "bin" / "app") == f"w4a16 {__version__}\n"
