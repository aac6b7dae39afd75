"""Stage wheel on a small library: contents, equal bytes, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install '.[wheel]'")

from pipeline import wheel, wheel_tree
from pipeline.errors import WheelError
from pipeline.files import sha256_file
from pipeline.provenance import Origin
from pipeline.wheel import Wheel, archive, make_wheel
from pipeline.wheel_tree import package_files, render

from .test_cli import Out, run
from .test_provenance import origin

CONFIG_VERSION = "lib/cmake/w4a16/w4a16ConfigVersion.cmake"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that stands in for ``runtime/w4a16``."""
    folder = tmp_path / "package"
    for name, text in {
        "__init__.py": '"""Placeholder."""\n',
        "formats/gptq.py": "",
        "py.typed": "",
        "data/tactics-h200.json": "{}\n",
        "__pycache__/a.cpython-311.pyc": "",
        ".hidden": "",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """An installed library, as the build leaves it."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    target = tmp_path / "install" / "lib" / "libw4a16.so.0.1.0"
    version = tmp_path / "install" / CONFIG_VERSION
    version.parent.mkdir(parents=True)
    version.write_text('set(PACKAGE_VERSION "0.1.0")\n')
    source = tmp_path / "a.cpp"
    source.write_text('extern "C" int w4a16_one() { return 1; }\n')
    options = ("-shared", "-fPIC", "-s", "-Wl,-soname,libw4a16.so.1", "-Wl,--build-id=none")
    subprocess.run(["g++", str(source), *options, "-o", str(target)], check=True)
    return target


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name in ("licenses/TensorRT-LLM.txt", "licenses/CUTLASS.txt", "include/w4a16.h", "z", "a"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    return folder


def origin_of(library: Path) -> Origin:
    found = origin(time=1700000000)
    facts = replace(found.library, sha256=sha256_file(library), soname="libw4a16.so.1")
    return replace(found, library=facts)


def make(package: Path, library: Path, bundle: Path, target: Path) -> Wheel:
    return make_wheel(
        origin_of(library),
        package=package_files(package),
        bundle=bundle,
        library=library,
        scratch=target.with_name("scratch"),
        target=target,
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_wheel_holds_package_library_licences_and_records(
    package: Path, library: Path, bundle: Path, tmp_path: Path
) -> None:
    made = make(package, library, bundle, tmp_path / "wheel")
    assert made.wheel == f"w4a16-0.1.0-py3-none-{made.policy}.whl"
    assert made.policy.startswith("manylinux_2_")
    info = "w4a16-0.1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "wheel" / made.wheel) as opened:
        content = {name: opened.read(name) for name in opened.namelist()}
        times = {entry.date_time for entry in opened.infolist()}
    assert set(content) == {
        "w4a16/__init__.py",
        "w4a16/cmake/w4a16Config.cmake",
        "w4a16/cmake/w4a16ConfigVersion.cmake",
        "w4a16/data/provenance.json",
        "w4a16/data/tactics-h200.json",
        "w4a16/formats/gptq.py",
        "w4a16/include/w4a16.h",
        "w4a16/lib/libw4a16.so",
        "w4a16/py.typed",
        *(f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
        *(
            f"{info}/licenses/{name}"
            for name in ("CUDA-runtime.txt", "CUTLASS.txt", "LICENSE", "NOTICE", "TensorRT-LLM.txt")
        ),
        f"{info}/sboms/w4a16.cdx.json",
    }
    assert times == {(2023, 11, 14, 22, 13, 20)}
    assert content["w4a16/lib/libw4a16.so"] == library.read_bytes()
    assert f"Tag: py3-none-{made.policy}\n".encode() in content[f"{info}/WHEEL"]
    assert b"Root-Is-Purelib: false" in content[f"{info}/WHEEL"]
    provenance = json.loads(content["w4a16/data/provenance.json"])
    assert provenance["policy"] == made.policy
    assert provenance["library"]["sha256"] == sha256_file(library)
    assert b"libw4a16.so.1" in content["w4a16/cmake/w4a16Config.cmake"]
    assert not (tmp_path / "scratch").exists()


def test_the_sums_are_those_of_both_files(
    package: Path, library: Path, bundle: Path, tmp_path: Path
) -> None:
    made = make(package, library, bundle, tmp_path / "wheel")
    lines = (tmp_path / "wheel" / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{made.sha256[name]}  {name}" for name in sorted((made.wheel, made.bundle))]
    for name, digest in made.sha256.items():
        content = (tmp_path / "wheel" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest


def test_the_same_build_gives_the_same_bytes_whatever_the_time_and_place(
    package: Path, library: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(package, library, bundle, tmp_path / "wheel")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(bundle, elsewhere / "source")
    shutil.copytree(library.parent, elsewhere / "lib")
    for path in (*elsewhere.rglob("*"), *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o600)
        os.utime(path, (time.time() + 5e6,) * 2)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setenv("HATCH_BUILD_NO_HOOKS", "true")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    before = os.umask(0o077)
    try:
        make(package, elsewhere / "lib" / library.name, elsewhere / "source", elsewhere / "wheel")
    finally:
        os.umask(before)
    assert bytes_of(elsewhere / "wheel") == bytes_of(tmp_path / "wheel")


def test_a_wheel_made_below_a_repository_that_ignores_it_is_whole(
    package: Path, library: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("lib\n*.so\n/scratch/\n*.json\n")
    made = make(package, library, bundle, tmp_path / "wheel")
    with zipfile.ZipFile(tmp_path / "wheel" / made.wheel) as opened:
        assert "w4a16/lib/libw4a16.so" in opened.namelist()


def test_a_wheel_that_lacks_a_staged_file_is_refused(
    package: Path, library: Path, bundle: Path, tmp_path: Path
) -> None:
    # Hatchling never takes compiled Python files.
    made = make(package, library, bundle, tmp_path / "wheel")
    with pytest.raises(WheelError, match=r"lacks w4a16/a\.pyc"):
        wheel._check_contents(tmp_path / "wheel" / made.wheel, {"w4a16/a.pyc": b""})


def test_a_failure_leaves_the_last_good_wheel(
    package: Path, library: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(package, library, bundle, tmp_path / "wheel")
    before = bytes_of(tmp_path / "wheel")

    def fail(*arguments: object, **options: object) -> str:
        raise WheelError("no policy fits", hint="build elsewhere")

    monkeypatch.setattr(wheel, "policy_of", fail)
    with pytest.raises(WheelError, match="no policy"):
        make(package, library, bundle, tmp_path / "wheel")
    assert bytes_of(tmp_path / "wheel") == before
    assert not (tmp_path / "scratch").exists()
    assert list(tmp_path.glob(".wheel.*")) == []


def test_what_hatchling_says_is_shown(
    package: Path, library: Path, bundle: Path, tmp_path: Path
) -> None:
    strange = replace(origin_of(library), project=replace(origin().project, version="one"))
    with pytest.raises(WheelError, match="Hatchling") as caught:
        make_wheel(
            strange,
            package=package_files(package),
            bundle=bundle,
            library=library,
            scratch=tmp_path / "scratch",
            target=tmp_path / "wheel",
        )
    assert "one" in caught.value.details


def test_the_packages_files_are_taken_and_caches_are_not(package: Path) -> None:
    assert set(package_files(package)) == {
        "w4a16/__init__.py",
        "w4a16/formats/gptq.py",
        "w4a16/py.typed",
        "w4a16/data/tactics-h200.json",
    }


@pytest.mark.parametrize("name", ["notes.txt", "lib/libw4a16.so", "include/a.json"])
def test_a_file_that_a_wheel_does_not_take_is_named(package: Path, name: str) -> None:
    path = package / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(WheelError) as caught:
        package_files(package)
    assert name in caught.value.what


def test_a_missing_package_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match="no Python package"):
        package_files(tmp_path / "nowhere")


def test_a_name_that_a_template_does_not_know_is_an_error() -> None:
    with pytest.raises(WheelError, match=r"NOTICE\.j2 cannot be rendered: 'origin' is undefined"):
        render("NOTICE.j2", {})


def test_an_archive_tells_nothing_of_owners_modes_and_times(bundle: Path) -> None:
    (bundle / "z").chmod(0o600)
    packed = archive(bundle, "w4a16-0.1.0-bundle", 1700000000)
    assert packed[4:8] == bytes(4), "gzip's own time"
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as opened:
        entries = opened.getmembers()
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert names[0] == "w4a16-0.1.0-bundle/a"
    assert {(e.uid, e.gid, e.uname, e.gname, e.mode, e.mtime) for e in entries} == {
        (0, 0, "", "", 0o644, 1700000000)
    }
    os.utime(bundle / "a")
    assert archive(bundle, "w4a16-0.1.0-bundle", 1700000000) == packed


def test_the_stage_without_a_library_says_which_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Out, tmp_path: Path
) -> None:
    assert run(monkeypatch, "wheel", "--out", str(tmp_path / "out")) == 17
    assert "nox -s" in capsys.readouterr().err


def test_the_stage_explains_its_options(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    assert run(monkeypatch, "wheel", "--help") == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--config", "--out", "--toolchain", "-v"))


def test_the_other_stages_need_nothing_of_the_extra() -> None:
    program = (
        "import sys\nfor name in ('cyclonedx', 'hatchling', 'auditwheel'):\n"
        "    sys.modules[name] = None\nimport pipeline.cli\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=wheel_tree._ROOT)
