"""Git: sources of every kind, and nothing of the user's or of a hostile tree has an effect."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PathError, SourceError
from pipeline.files import remove_tree, tree_digests
from pipeline.git import Location, Repository, locate, parse_location
from tests.upstream import Upstream, write_upstream

from .conftest import KERNELS, ROOT, commit_all, git

COMMON = "cpp/tensorrt_llm/common"
PATHS = ("LICENSE", COMMON, KERNELS)
#: Makes git take the platform's line ends and run a filter, where it heeds it.
HOSTILE_CONFIG = """\
[core]
	autocrlf = true
	eol = crlf
	hooksPath = {hooks}
	attributesFile = {attributes}
	fsmonitor = {hooks}/post-checkout
[filter "lfs"]
	smudge = {hooks}/post-checkout
	process = {hooks}/post-checkout
	required = true
[filter "evil"]
	smudge = {hooks}/post-checkout
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with a tag, a branch, a submodule and a nested tree."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name in ("used/a.h", "used/deep/b.h", "other/c.h", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    pin = "1234567890" * 4
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{pin},3rdparty/cutlass")
    git(folder, "add", "used", "other", "LICENSE")
    git(folder, "commit", "--quiet", "-m", "one")
    git(folder, "tag", "v1")
    git(folder, "branch", "topic/with-slash")
    return folder


def store(tmp_path: Path, location: Location | str, name: str = "store") -> Repository:
    where = location if isinstance(location, Location) else locate(location, None)
    return Repository(tmp_path / name, where).open()


def checked_out(
    found: Repository, commit: str, target: Path, paths: Iterable[str] = ("used", "LICENSE")
) -> list[str]:
    target.mkdir()
    found.check_out(commit, tuple(paths), target)
    return sorted(tree_digests(target))


@pytest.mark.parametrize(
    ("text", "url", "ref"),
    [
        ("https://host/team/repo.git", "https://host/team/repo.git", None),
        ("https://host/team/repo.git@v1.0.0", "https://host/team/repo.git", "v1.0.0"),
        ("https://host/team/repo@topic/x", "https://host/team/repo", "topic/x"),
        ("https://user@host/repo.git", "https://user@host/repo.git", None),
        ("https://user:word@host:8080/repo.git", "https://user:word@host:8080/repo.git", None),
        ("https://user@host/repo.git@v1", "https://user@host/repo.git", "v1"),
        ("ssh://git@host/repo.git", "ssh://git@host/repo.git", None),
        ("ssh://git@host:22/repo.git@v1", "ssh://git@host:22/repo.git", "v1"),
        ("git@host:team/repo.git", "git@host:team/repo.git", None),
        ("git@host:team/repo.git@v1.0.0", "git@host:team/repo.git", "v1.0.0"),
        ("git@host:team/repo.git@topic/x", "git@host:team/repo.git", "topic/x"),
    ],
)
def test_a_remote_source_is_split_into_url_and_ref(text: str, url: str, ref: str | None) -> None:
    assert parse_location(text) == Location(url=url, ref=ref, local=False)


def test_a_local_source_is_split_into_path_and_ref(tmp_path: Path) -> None:
    plain, odd = tmp_path / "repo", tmp_path / "re@po"
    plain.mkdir()
    odd.mkdir()
    for text, path, ref in (
        (str(plain), plain, None),
        (f"{plain}@v1", plain, "v1"),
        (f"{plain}@topic/x", plain, "topic/x"),
        (str(odd), odd, None),
        (f"{odd}@v1", odd, "v1"),
        (f"file://{plain}", plain, None),
        (f"file://{plain}@v1", plain, "v1"),
        (f"file://{odd}", odd, None),
        (f"file://{odd}@v1", odd, "v1"),
    ):
        assert parse_location(text) == Location(url=str(path), ref=ref, local=True), text


@pytest.mark.parametrize(
    "text",
    [
        *("", "@", "@v1", "nowhere", "nowhere@v1", "ext::sh -c id", "~nobody-of-that-name/repo"),
        *("a\0b", "x" * 5000, "file://", "-"),
    ],
)
def test_a_source_that_is_nowhere_is_a_clear_error(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError):
        Repository(tmp_path / "store", parse_location(text)).open()


@given(st.text(st.sampled_from("ab@:/.~-\0 "), max_size=14))
@settings(deadline=None, max_examples=200)
def test_any_source_is_a_location_or_a_clear_error(text: str) -> None:
    try:
        found = parse_location(text)
    except SourceError:
        return
    assert found.local or text.startswith(found.url)
    assert found.ref != ""


def test_a_shown_location_can_be_given_again(repository: Path) -> None:
    found = parse_location(f"{repository}@v1")
    assert parse_location(found.shown) == found


@pytest.mark.parametrize("kind", ["work tree", "git folder", "bare", "worktree", "mirror"])
def test_every_kind_of_local_repository_serves(repository: Path, tmp_path: Path, kind: str) -> None:
    source = repository
    if kind == "git folder":
        source = repository / ".git"
    elif kind in ("bare", "mirror"):
        source = tmp_path / "copy.git"
        git(tmp_path, "clone", "--quiet", f"--{kind}", str(repository), str(source))
    elif kind == "worktree":
        source = tmp_path / "tree"
        git(repository, "worktree", "add", "--quiet", str(source), "topic/with-slash")
    found = store(tmp_path, str(source))
    commit = found.commit_of("v1")
    assert commit == git(repository, "rev-parse", "v1^{commit}")
    expected = ["LICENSE", "used/a.h", "used/deep/b.h"]
    assert checked_out(found, commit, tmp_path / "out") == expected


def test_a_submodule_serves_as_a_repository(repository: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    git(parent, "init", "--quiet")
    add = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
    git(parent, *add, str(repository), "sub")
    assert (parent / "sub" / ".git").is_file()
    found = store(tmp_path, str(parent / "sub"))
    assert found.commit_of("v1") == git(repository, "rev-parse", "v1")


def test_tags_branches_and_commits_are_refs(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "-a", "annotated", "-m", "a tag object")
    commit = git(repository, "rev-parse", "HEAD")
    found = store(tmp_path, str(repository))
    for ref in ("v1", "annotated", "main", "topic/with-slash", commit, commit[:10], "HEAD"):
        assert found.commit_of(ref) == commit, ref


def test_a_branch_known_only_from_a_remote_is_a_ref(repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    assert store(tmp_path, str(clone)).commit_of("topic/with-slash")


@pytest.mark.parametrize("ref", ["v2", "f" * 40, "", "--all", "-v", "v1^{tree}", "a b", "v1\nv1"])
def test_an_unknown_ref_is_a_clear_error(repository: Path, tmp_path: Path, ref: str) -> None:
    with pytest.raises(SourceError) as caught:
        store(tmp_path, str(repository)).commit_of(ref)
    assert caught.value.hint


def test_a_folder_that_is_no_repository_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(SourceError, match="is not a git repository"):
        store(tmp_path, str(tmp_path / "plain"))


def test_a_file_and_a_pin_are_read_without_a_checkout(repository: Path, tmp_path: Path) -> None:
    found = store(tmp_path, str(repository))
    commit = found.commit_of("v1")
    assert found.read(commit, "used/deep/b.h") == "used/deep/b.h"
    assert found.read(commit, "used/none.h") is None
    assert found.gitlink(commit, "3rdparty/cutlass") == "1234567890" * 4
    assert found.gitlink(commit, "used") is None
    assert found.gitlink(commit, "none") is None


def missing(repository: Path, target: Path, *paths: str) -> Path:
    """A bare copy of ``repository`` that lacks the blobs of ``paths``."""
    git(target.parent, "clone", "--quiet", "--bare", "--no-hardlinks", str(repository), str(target))
    for pack in (target / "objects" / "pack").glob("*.pack"):
        moved = target / pack.name
        pack.rename(moved)
        with moved.open("rb") as stream:
            subprocess.run(["git", "unpack-objects", "-q"], cwd=target, stdin=stream, check=True)
    for path in paths:
        blob = git(repository, "rev-parse", f"v1:{path}")
        (target / "objects" / blob[:2] / blob[2:]).unlink()
    return target


def test_blobs_that_lack_elsewhere_do_no_harm(repository: Path, tmp_path: Path) -> None:
    found = store(tmp_path, str(missing(repository, tmp_path / "part.git", "other/c.h")))
    names = checked_out(found, found.commit_of("v1"), tmp_path / "out")
    assert names == ["LICENSE", "used/a.h", "used/deep/b.h"]


def test_blobs_that_the_run_needs_and_lacks_are_a_clear_error(
    repository: Path, tmp_path: Path
) -> None:
    found = store(tmp_path, str(missing(repository, tmp_path / "part.git", "used/deep/b.h")))
    with pytest.raises(SourceError, match="lacks files of"):
        checked_out(found, found.commit_of("v1"), tmp_path / "out")


def test_a_remote_repository_comes_partially_and_without_history(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "used" / "a.h").write_text("newer\n")
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    commit = commit_all(repository)
    remote = Location(url=f"file://{repository}", ref="main", local=False)
    found = store(tmp_path, remote)
    assert found.commit_of("main") == commit
    assert found.commit_of(commit) == commit
    names = checked_out(found, commit, tmp_path / "out")
    assert names == ["LICENSE", "used/a.h", "used/deep/b.h"]
    assert (tmp_path / "out" / "used" / "a.h").read_text() == "newer\n"
    environment = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}
    have = subprocess.run(
        ["git", "cat-file", "--batch-check", "--batch-all-objects"],
        cwd=found.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert git(repository, "rev-parse", "HEAD:other/c.h") not in have
    assert git(repository, "rev-parse", "v1") not in have


def test_a_ref_that_a_remote_lacks_is_a_clear_error(repository: Path, tmp_path: Path) -> None:
    found = store(tmp_path, Location(url=f"file://{repository}", ref=None, local=False))
    for ref in ("v9", "f" * 40):
        with pytest.raises(SourceError, match="has no tag, branch or commit"):
            found.commit_of(ref)


def test_a_remote_that_cannot_be_reached_is_told_from_one_that_lacks_a_ref(tmp_path: Path) -> None:
    found = store(tmp_path, Location(url=f"file://{tmp_path}/nowhere", ref=None, local=False))
    with pytest.raises(SourceError, match="cannot fetch from") as caught:
        found.commit_of("v1")
    assert "local repository" in caught.value.hint


def test_a_remote_helper_is_never_run(tmp_path: Path) -> None:
    remote = parse_location(f"ext::touch% {tmp_path}/ran% x://@v1")
    assert not remote.local
    found = Repository(tmp_path / "store", remote)
    with pytest.raises(SourceError):
        found.open().commit_of("v1")
    assert not (tmp_path / "ran").exists()


def test_a_store_serves_again_and_follows_a_moved_tag(repository: Path, tmp_path: Path) -> None:
    first = store(tmp_path, str(repository)).commit_of("v1")
    (repository / "used" / "a.h").write_text("moved\n")
    second = commit_all(repository)
    git(repository, "tag", "--force", "v1")
    found = store(tmp_path, str(repository))
    assert found.commit_of("v1") == second != first
    checked_out(found, second, tmp_path / "out")
    assert (tmp_path / "out" / "used" / "a.h").read_text() == "moved\n"


@pytest.mark.parametrize("damage", ["HEAD", "objects", "config"])
def test_a_damaged_store_is_made_anew(repository: Path, tmp_path: Path, damage: str) -> None:
    """Git must not go on to a repository above it, such as this project's own."""
    git(tmp_path, "init", "--quiet")
    before = (tmp_path / ".git" / "config").read_bytes()
    location = Location(url=f"file://{repository}", ref=None, local=False)
    folder = store(tmp_path, location).folder
    if damage == "objects":
        remove_tree(folder / damage)
    else:
        (folder / damage).write_text("\0 damaged [\n")
    found = store(tmp_path, location)
    assert found.commit_of("v1") == git(repository, "rev-parse", "v1")
    assert (tmp_path / ".git" / "config").read_bytes() == before


@pytest.fixture
def hostile_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose git configuration, hooks and attributes would change what is checked out."""
    home, hooks = tmp_path / "home", tmp_path / "home" / "hooks"
    hooks.mkdir(parents=True)
    for name in ("post-checkout", "reference-transaction", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat\n")
        (hooks / name).chmod(0o755)
    attributes = home / ".config" / "git" / "attributes"
    attributes.parent.mkdir(parents=True)
    attributes.write_text("* text eol=crlf filter=evil ident\n")
    text = HOSTILE_CONFIG.format(hooks=hooks, attributes=attributes)
    (home / ".gitconfig").write_text(text)
    (home / ".config" / "git" / "config").write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    return home


def test_the_users_git_configuration_has_no_effect(
    hostile_home: Path, repository: Path, tmp_path: Path
) -> None:
    found = store(tmp_path, str(repository))
    checked_out(found, found.commit_of("v1"), tmp_path / "out")
    assert (tmp_path / "out" / "used" / "a.h").read_bytes() == b"used/a.h\n"
    assert not (tmp_path / "ran").exists()


def test_the_source_repositorys_own_hooks_and_filters_are_not_run(
    repository: Path, tmp_path: Path
) -> None:
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    (repository / ".gitattributes").write_text("* filter=evil\n")
    commit = commit_all(repository)
    git(repository, "config", "filter.evil.smudge", f"touch {tmp_path}/ran; cat")
    git(repository, "config", "filter.evil.required", "true")
    (tmp_path / "ran").unlink(missing_ok=True)
    checked_out(store(tmp_path, str(repository)), commit, tmp_path / "out")
    assert (tmp_path / "out" / "used" / "a.h").read_text() == "used/a.h\n"
    assert not (tmp_path / "ran").exists()


def test_large_files_stay_pointers(mini: Upstream, tmp_path: Path, hostile_home: Path) -> None:
    folder = "cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention"
    found = store(tmp_path, str(mini.trtllm))
    (name,) = checked_out(found, found.commit_of(mini.ref), tmp_path / "out", [folder])
    assert (tmp_path / "out" / name).read_text().startswith("version https://git-lfs")
    assert not (tmp_path / "ran").exists()


def test_git_variables_of_a_surrounding_hook_have_no_effect(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the tests run in a pre-commit hook: git then points to the repository of the hook."""
    victim = tmp_path / "victim"
    victim.mkdir()
    git(victim, "init", "--quiet")
    commit_all(victim, "mine")
    before = tree_digests(victim)
    monkeypatch.setenv("GIT_DIR", str(victim / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(victim))
    monkeypatch.setenv("GIT_INDEX_FILE", str(victim / ".git" / "index"))
    for location in (
        locate(str(repository), None),
        Location(url=f"file://{repository}", ref=None, local=False),
    ):
        name = "local" if location.local else "remote"
        found = store(tmp_path, location, name)
        names = checked_out(found, found.commit_of("v1"), tmp_path / f"out-{name}")
        assert names == ["LICENSE", "used/a.h", "used/deep/b.h"]
    assert tree_digests(victim) == before


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("leak.h", "/etc/passwd"),
        ("leak.h", "../../../../../../../../../../etc/passwd"),
        ("folder", "/etc"),
        ("chain", "chain2"),
        ("loop", "loop"),
        ("ping", "pong"),
    ],
)
def test_a_link_that_leads_outside_is_refused_and_leaves_nothing(
    tmp_path: Path, link: str, target: str
) -> None:
    links = {
        f"{COMMON}/{link}": target,
        f"{COMMON}/chain2": "../../../..",
        f"{COMMON}/pong": "ping" if link == "ping" else "logger.h",
    }
    source = write_upstream(tmp_path / "upstream", symlinks=links)
    found = store(tmp_path, str(source.trtllm))
    with pytest.raises(PathError):
        checked_out(found, found.commit_of(source.ref), tmp_path / "out", PATHS)
    assert not (tmp_path / "out").exists()


def test_a_link_that_stays_inside_is_kept(tmp_path: Path) -> None:
    source = write_upstream(tmp_path / "upstream", symlinks={f"{COMMON}/same.h": "envUtils.h"})
    found = store(tmp_path, str(source.trtllm))
    checked_out(found, found.commit_of(source.ref), tmp_path / "out", PATHS)
    same = tmp_path / "out" / COMMON / "same.h"
    assert same.read_text() == (tmp_path / "out" / COMMON / "envUtils.h").read_text()


def test_a_machine_without_git_is_told_so(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from pipeline.errors import SourceError\n"
        "from pipeline.git import Location, Repository\n"
        "location = Location(url='https://host/x', ref=None, local=False)\n"
        "try:\n"
        f"    Repository(Path({str(tmp_path / 'store')!r}), location).open()\n"
        "except SourceError as error:\n"
        "    print(error.what)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "git is not installed\n", done.stderr
