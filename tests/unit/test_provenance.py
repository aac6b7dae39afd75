"""What is recorded of a wheel's origin, and that it is true and tells nothing of this machine."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from pipeline import provenance
from pipeline.errors import MissingStageError
from pipeline.model import Build, Bundle
from pipeline.provenance import EPOCH, Origin, Project, gather, project_state, public_url

from .conftest import commit_all, git, make_profile

LIBRARY = Path(os.path.realpath("/proc/self/exe"))  # any ELF file
URL = "https://github.com/NVIDIA/TensorRT-LLM"
MIRROR = "/home/somebody/mirror"


def manifest(url: str = f"{URL}.git", *, matches_lock: bool | None = True) -> dict[str, Any]:
    def source(at: str, ref: str, commit: str) -> dict[str, Any]:
        return {"url": at, "ref": ref, "commit": commit, "digests": {"LICENSE": "ab" * 32}}

    return {
        "release": "v1.0.0",
        "sources": {
            "trtllm": source(url, "v1.0.0", "1" * 40),
            "cutlass": source("https://github.com/NVIDIA/cutlass.git", "2" * 40, "2" * 40),
            "matches_lock": matches_lock,
        },
        "selected": [{"tactic": "sm90:64x16x64:1x1x1"}] * 3,
        "gemv": {"selected": [{"kernels": [{"m": 1}, {"m": 2}]}, {"kernels": [{"m": 1}]}]},
        "decode": {"selected": [{"kernels": [{"group": 32}, {"group": 64}]}]},
        "vendored": [
            {
                "path": "third_party/tensorrt_llm/a.h",
                "origin": "trtllm:cpp/a.h",
                "sha256": "aa" * 32,
            },
            {
                "path": "third_party/cutlass/b.h",
                "origin": "cutlass:include/b.h",
                "sha256": "bb" * 32,
            },
        ],
        "build": {"changed_by_hand": []},
    }


def origin(
    values: dict[str, Any] | None = None, *, built_from: str = "digest", **project: Any
) -> Origin:
    state: dict[str, Any] = {"version": "0.1.0", "commit": "3" * 40, "dirty": False, "time": EPOCH}
    return gather(
        Project(**{**state, **project}),
        make_profile(),
        values or manifest(),
        Bundle(folder="source", digest="digest", files={}),
        Build(
            install="dist/install",
            compiler="nvcc 13.0.88 (system), g++ 12.2.0",
            flags=["-O3"],
            cmake="4.0.0",
            jobs=2,
            seconds=376.4,
            peak_bytes=1,
        ),
        library=LIBRARY,
        info={
            "bundle_digest": built_from,
            "architecture": "sm_90a",
            "cuda_runtime_version": 13020,
        },
        device_kernels=5,
        tools={"hatchling": "1.28.0"},
    )


def test_what_the_stages_left_is_gathered() -> None:
    found = origin()
    assert found.release == "v1.0.0"
    assert found.trtllm.url == URL
    assert found.trtllm.files == {"cpp/a.h": "aa" * 32}
    assert found.cutlass.files == {"include/b.h": "bb" * 32}
    assert (found.kernels.gemm, found.kernels.gemv, found.kernels.device) == (3, 3, 5)
    assert found.kernels.decode == 2
    assert found.library.cuda_runtime == "13.2"
    assert found.library.bytes == LIBRARY.stat().st_size
    assert found.profile == "w4a16-sm90"
    assert "upstream" not in found.profile_values


def test_provenance_is_json_that_changes_with_the_policy_only() -> None:
    first = provenance.provenance(origin(), "manylinux_2_34_x86_64")
    assert json.loads(json.dumps(first)) == json.loads(
        json.dumps(provenance.provenance(origin(), "manylinux_2_34_x86_64"))
    )
    second = provenance.provenance(origin(), "manylinux_2_28_x86_64")
    assert {key for key in first if first[key] != second[key]} == {"policy"}
    assert "files" not in first["trtllm"], "they are in the bill of materials"


def test_a_library_of_another_bundle_is_refused() -> None:
    with pytest.raises(MissingStageError, match="another bundle") as caught:
        origin(built_from="older")
    assert "nox -s build" in caught.value.hint


def test_a_locked_mirror_stands_for_the_repository_that_it_mirrors() -> None:
    found = origin(manifest(MIRROR))
    assert found.trtllm.url == URL
    assert found.trtllm.mirrored
    assert not found.cutlass.mirrored
    assert MIRROR not in json.dumps(provenance.provenance(found, "manylinux_2_34_x86_64"))


@pytest.mark.parametrize("matches_lock", [False, None])
def test_an_unlocked_folder_of_this_machine_is_nobodys_repository(
    matches_lock: bool | None,
) -> None:
    found = origin(manifest(MIRROR, matches_lock=matches_lock))
    assert found.trtllm.url is None
    assert not found.trtllm.mirrored


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (f"{URL}.git", URL),
        (f"{URL}/", URL),
        ("git://example.org/a", "git://example.org/a"),
        ("https://token@github.com/NVIDIA/cutlass.git", None),
        ("git@github.com:NVIDIA/cutlass.git", None),
        ("file:///home/somebody/cutlass", None),
        (MIRROR, None),
        ("artifacts/demo/upstream/cutlass", None),
    ],
)
def test_only_a_url_that_means_the_same_everywhere_is_public(url: str, public: str | None) -> None:
    assert public_url(url) == public


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "a.py").write_text("1\n")
    (folder / ".gitignore").write_text("/artifacts\n")
    commit_all(folder)
    return folder


def test_a_clean_checkout_has_the_commit_and_its_time(repository: Path) -> None:
    assert project_state(repository, "0.1.0") == Project(
        version="0.1.0", commit=git(repository, "rev-parse", "HEAD"), dirty=False, time=1700000000
    )


@pytest.mark.parametrize(("name", "dirty"), [("a.py", True), ("b.py", True), ("artifacts", False)])
def test_a_changed_or_new_file_is_dirt_and_an_ignored_one_is_not(
    repository: Path, name: str, dirty: bool
) -> None:
    (repository / name).write_text("2\n")
    assert project_state(repository, "0.1.0").dirty is dirty


def test_a_copy_inside_another_repository_has_no_commit(repository: Path) -> None:
    inner = repository / "artifacts" / "copy"
    inner.mkdir(parents=True)
    assert project_state(inner, "0.1.0") == Project(
        version="0.1.0", commit=None, dirty=None, time=EPOCH
    )


def test_a_folder_in_no_repository_and_one_without_commits_have_no_commit(tmp_path: Path) -> None:
    assert project_state(tmp_path, "0.1.0").commit is None
    git(tmp_path, "init", "--quiet")
    assert project_state(tmp_path, "0.1.0").commit is None


def test_a_commit_older_than_zip_archives_gets_the_first_time_they_know(repository: Path) -> None:
    ident = "T <t@example.invalid> 1000 +0000"
    tree = git(repository, "rev-parse", "HEAD^{tree}")
    text = f"tree {tree}\nauthor {ident}\ncommitter {ident}\n\nold\n"
    commit = git(repository, "hash-object", "-t", "commit", "-w", "--stdin", text=text)
    git(repository, "reset", "--quiet", "--hard", commit)
    found = project_state(repository, "0.1.0")
    assert (found.commit, found.time) == (commit, EPOCH)


def test_a_hooks_repository_is_not_taken_for_this_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert project_state(repository, "0.1.0").commit is not None


def test_no_program_of_the_repositorys_configuration_is_started(
    repository: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(trap.stat().st_mode | stat.S_IXUSR)
    git(repository, "config", "core.fsmonitor", str(trap))
    assert project_state(repository, "0.1.0").commit is not None
    assert not (tmp_path / "sprung").exists()


def test_what_does_not_run_is_no_library_info(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="does not run"):
        provenance.library_info(tmp_path / "w4a16_info")
    with pytest.raises(MissingStageError, match="does not run"):
        provenance.library_info(Path("/bin/echo"))
