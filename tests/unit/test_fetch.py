"""Stage fetch on the miniature: what is locked, what moved, what is damaged, what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import fetch, releases
from pipeline.errors import LockError, PathError, ReleaseError, SourceError
from pipeline.files import remove_tree
from pipeline.git import Location, locate, parse_location
from pipeline.lock import Lock, load_lock, lock_of, write_lock
from pipeline.model import Sources
from pipeline.runlock import held
from tests.upstream import Upstream, write_upstream

from .conftest import (
    GENERATOR,
    KERNELS,
    ROOT,
    commit_all,
    fetch_from,
    git,
    make_profile,
    profile_for,
)

COMMON = "cpp/tensorrt_llm/common"
TABLE = releases.load_table()


def given(
    source: Upstream,
    vendor: Path,
    run_dir: Path,
    *,
    trtllm: str | None = None,
    cutlass: str | None = None,
    said: list[str] | None = None,
    allow_moved: bool = False,
) -> Sources:
    """Stage fetch, with sources as the command line gives them."""
    wanted = fetch.wanted_sources(
        make_profile(name="unit"),
        parse_location(trtllm or f"{source.trtllm}@{source.ref}"),
        parse_location(cutlass or str(source.cutlass)),
    )
    resolved = fetch.resolve(wanted, TABLE, vendor)
    say = (said if said is not None else []).append
    found, _ = fetch.fetch(
        resolved, TABLE, vendor=vendor, run_dir=run_dir, allow_moved=allow_moved, say=say
    )
    return found


def move_tag(source: Upstream, path: str, text: str) -> str:
    """Put ``text`` at ``path`` and the release's tag on it."""
    git(source.trtllm, "checkout", "--quiet", source.ref)
    (source.trtllm / path).write_text(text)
    commit = commit_all(source.trtllm)
    git(source.trtllm, "tag", "--force", source.ref)
    return commit


def test_just_the_paths_that_are_used_come_down(
    mini: Upstream, fetched: tuple[Sources, releases.ReleaseFacts]
) -> None:
    sources, facts = fetched
    assert (sources.release, sources.version) == ("v1.0.0", "1.0.0")
    assert sources.cutlass.commit == mini.cutlass_commit
    assert sources.trtllm.commit == git(mini.trtllm, "rev-parse", mini.ref)
    folder = Path(sources.trtllm.folder)
    assert (folder / facts.script).is_file()
    assert not (folder / ".git").exists()
    assert not (folder / "cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention").exists()
    top = {path.name for path in Path(sources.cutlass.folder).iterdir()}
    assert top == {"LICENSE.txt", "include", "python", "tools"}
    assert set(sources.trtllm.digests) <= set(facts.paths)


def test_a_second_fetch_checks_nothing_out(mini: Upstream, tmp_path: Path) -> None:
    first, _ = fetch_from(mini, tmp_path / "vendor")
    marker = Path(first.trtllm.folder, "LICENSE")
    before = marker.stat().st_ino
    second, _ = fetch_from(mini, tmp_path / "vendor")
    assert second == first
    assert marker.stat().st_ino == before


@pytest.mark.parametrize("damage", ["change", "remove", "add", "folder"])
def test_a_damaged_checkout_is_remade(mini: Upstream, tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    first = given(mini, tmp_path / "vendor", tmp_path / "run")
    folder = Path(first.trtllm.folder)
    victim = folder / GENERATOR
    text = victim.read_text()
    if damage == "change":
        victim.write_text(text + "\n# changed\n")
    elif damage == "remove":
        victim.unlink()
    elif damage == "add":
        (victim.parent / "evil.h").write_text("")
    else:
        remove_tree(folder)
    second = given(mini, tmp_path / "vendor", tmp_path / "run", said=said)
    assert second == first
    assert victim.read_text() == text
    assert not (victim.parent / "evil.h").exists()
    assert any("damaged" in line for line in said) == (damage != "folder")
    assert given(mini, tmp_path / "vendor", tmp_path / "run") == first


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\udcff", "null", "[" * 100_000])
def test_a_damaged_record_of_a_checkout_is_remade(
    mini: Upstream, tmp_path: Path, text: str
) -> None:
    first = given(mini, tmp_path / "vendor", tmp_path / "run")
    stamp = Path(first.trtllm.folder + ".json")
    stamp.write_bytes(text.encode(errors="surrogateescape"))
    assert given(mini, tmp_path / "vendor", tmp_path / "run") == first
    assert json.loads(stamp.read_text()) == first.trtllm.digests


def test_a_checkout_that_was_killed_is_recovered(mini: Upstream, tmp_path: Path) -> None:
    first = given(mini, tmp_path / "vendor", tmp_path / "run")
    folder = Path(first.trtllm.folder)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    folder.with_name(f".{folder.name}.new-x").mkdir()
    assert given(mini, tmp_path / "vendor", tmp_path / "run") == first
    hidden = [p.name for p in folder.parent.iterdir() if folder.name in p.name and p.name[0] == "."]
    assert hidden == []


def lock_in(vendor: Path, sources: Sources) -> Lock:
    lock = lock_of(sources)
    write_lock(vendor / fetch.LOCK_NAME, lock)
    return lock


def test_the_locked_release_is_fetched_again(mini: Upstream, tmp_path: Path) -> None:
    vendor = tmp_path / "vendor"
    first, _ = fetch_from(mini, vendor)
    assert first.matches_lock is None
    lock_in(vendor, first)
    second, _ = fetch_from(mini, vendor)
    assert second.matches_lock is True


def test_a_tag_that_moved_since_the_lock_is_refused(tmp_path: Path) -> None:
    source, vendor = write_upstream(tmp_path / "upstream"), tmp_path / "vendor"
    sources, _ = fetch_from(source, vendor)
    lock_in(vendor, sources)
    commit = move_tag(source, f"{COMMON}/logger.h", "// moved\n")
    with pytest.raises(LockError) as caught:
        fetch_from(source, vendor)
    assert commit in caught.value.details
    assert f"{COMMON}: " in caught.value.details
    assert "regenerate" in caught.value.hint


def test_a_tag_that_moved_to_the_same_content_is_refused_too(tmp_path: Path) -> None:
    source, vendor = write_upstream(tmp_path / "upstream"), tmp_path / "vendor"
    sources, _ = fetch_from(source, vendor)
    lock_in(vendor, sources)
    move_tag(source, "unused.txt", "elsewhere in the tree\n")
    with pytest.raises(LockError, match="TensorRT-LLM"):
        fetch_from(source, vendor)


def test_a_tag_that_moved_is_taken_when_regenerate_asks(tmp_path: Path) -> None:
    source, vendor = write_upstream(tmp_path / "upstream"), tmp_path / "vendor"
    sources, _ = fetch_from(source, vendor)
    lock_in(vendor, sources)
    commit = move_tag(source, f"{COMMON}/logger.h", "// moved\n")
    wanted = fetch.wanted_sources(profile_for(source), None, None)
    resolved = fetch.resolve(wanted, TABLE, vendor)
    moved, _ = fetch.fetch(
        resolved, TABLE, vendor=vendor, run_dir=tmp_path, allow_moved=True, say=print
    )
    assert moved.trtllm.commit == commit
    assert moved.matches_lock is False


def test_another_release_than_the_locked_one_is_refused(tmp_path: Path) -> None:
    source, vendor = write_upstream(tmp_path / "upstream"), tmp_path / "vendor"
    sources, _ = fetch_from(source, vendor)
    lock = lock_of(sources)
    write_lock(vendor / fetch.LOCK_NAME, lock.model_copy(update={"release": "v0.9.0"}))
    with pytest.raises(LockError, match=r"holds v0\.9\.0") as caught:
        fetch_from(source, vendor)
    assert f"--to {source.ref}" in caught.value.hint


def test_a_given_source_is_not_held_to_the_lock_in_vendor(
    mini: Upstream, modern: Upstream, tmp_path: Path
) -> None:
    vendor = tmp_path / "vendor"
    locked, _ = fetch_from(modern, vendor)
    lock_in(vendor, locked)
    before = (vendor / fetch.LOCK_NAME).read_bytes()
    assert given(mini, vendor, tmp_path / "run").matches_lock is None
    assert (vendor / fetch.LOCK_NAME).read_bytes() == before


def test_a_given_source_that_moved_since_its_first_run_is_refused(tmp_path: Path) -> None:
    source, vendor, run_dir = (tmp_path / name for name in ("upstream", "vendor", "run"))
    upstream = write_upstream(source)
    first = given(upstream, vendor, run_dir)
    write_lock(run_dir / fetch.LOCK_NAME, lock_of(first))
    assert given(upstream, vendor, run_dir) == first
    move_tag(upstream, f"{COMMON}/logger.h", "// moved\n")
    with pytest.raises(LockError):
        given(upstream, vendor, run_dir)
    assert given(upstream, vendor, tmp_path / "another").trtllm.commit != first.trtllm.commit
    assert given(upstream, vendor, run_dir, allow_moved=True)


def test_another_ref_given_for_the_same_folder_is_taken(mini: Upstream, tmp_path: Path) -> None:
    vendor, run_dir = tmp_path / "vendor", tmp_path / "run"
    write_lock(run_dir / fetch.LOCK_NAME, lock_of(given(mini, vendor, run_dir)))
    found = given(mini, vendor, run_dir, trtllm=f"{mini.trtllm}@{mini.next_ref}")
    assert found.cutlass.commit == mini.next_cutlass_commit


def test_a_mirror_with_the_same_content_and_another_commit_matches_the_lock(
    mini: Upstream, tmp_path: Path
) -> None:
    vendor = tmp_path / "vendor"
    sources, _ = fetch_from(mini, vendor)
    lock_in(vendor, sources)
    mirror = tmp_path / "mirror"
    git(tmp_path, "clone", "--quiet", str(mini.trtllm), str(mirror))
    git(mirror, "checkout", "--quiet", mini.ref)
    (mirror / "README.md").write_text("a mirror, without large files\n")
    commit_all(mirror)
    git(mirror, "tag", "--force", mini.ref)
    found = given(mini, vendor, tmp_path / "run", trtllm=f"{mirror}@{mini.ref}")
    assert found.trtllm.commit != sources.trtllm.commit
    assert found.trtllm.digests == sources.trtllm.digests
    assert found.matches_lock is True


def test_a_mirror_with_other_content_does_not_match_the_lock(tmp_path: Path) -> None:
    source, vendor = write_upstream(tmp_path / "upstream"), tmp_path / "vendor"
    sources, _ = fetch_from(source, vendor)
    lock_in(vendor, sources)
    other = write_upstream(tmp_path / "other", edits={f"{COMMON}/logger.h": "// tampered\n"})
    assert given(other, vendor, tmp_path / "run").matches_lock is False


def test_cutlass_is_taken_as_newer_releases_pin_it(modern: Upstream, tmp_path: Path) -> None:
    found = given(modern, tmp_path / "vendor", tmp_path / "run")
    assert (found.release, found.cutlass.ref) == ("v1.3.0", "v4.0.0")
    assert found.cutlass.commit == modern.cutlass_commit


def test_bare_repositories_give_the_same(mini: Upstream, tmp_path: Path) -> None:
    bare = write_upstream(tmp_path / "bare", bare=True)
    one = given(mini, tmp_path / "vendor", tmp_path / "run")
    two = given(bare, tmp_path / "vendor", tmp_path / "run")
    assert (one.trtllm.commit, one.cutlass.commit) == (two.trtllm.commit, two.cutlass.commit)
    assert one.trtllm.digests == two.trtllm.digests


PIN = "3rdparty/fetch_content.json"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{}",
        '{"dependencies": 3}',
        '{"dependencies": ["cutlass"]}',
        '{"dependencies": [{"name": "cutlass"}]}',
        '{"dependencies": [{"name": "other", "git_tag": "v1"}]}',
        '{"dependencies": [{"name": "cutlass", "git_tag": null}]}',
        '{"dependencies": [{"name": "cutlass", "git_tag": ""}]}',
        "[" * 100_000,
    ],
    ids=range(11),
)
def test_a_release_that_pins_no_cutlass_is_refused(tmp_path: Path, text: str | None) -> None:
    source = write_upstream(tmp_path / "upstream", shape="modern", edits={PIN: text})
    with pytest.raises(ReleaseError):
        given(source, tmp_path / "vendor", tmp_path / "run")


@pytest.mark.parametrize("tag", ["--upload-pack=x", "v99", "../../x", "v1 v2"])
def test_a_pin_that_cutlass_lacks_is_a_clear_error(tmp_path: Path, tag: str) -> None:
    pins = json.dumps({"dependencies": [{"name": "cutlass", "git_tag": tag}]})
    source = write_upstream(tmp_path / "upstream", shape="modern", edits={PIN: pins})
    with pytest.raises(SourceError, match="CUTLASS at"):
        given(source, tmp_path / "vendor", tmp_path / "run")


def empty_cutlass(source: Upstream, tmp_path: Path) -> Path:
    """CUTLASS as a shallow copy has it: one commit, and not the one that is pinned."""
    copy = tmp_path / "one-commit"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{source.cutlass}", str(copy))
    return copy


def test_a_cutlass_without_the_pinned_commit_is_a_clear_error(
    mini: Upstream, tmp_path: Path
) -> None:
    copy = empty_cutlass(mini, tmp_path)
    with pytest.raises(SourceError, match=f"lacks {mini.cutlass_commit}") as caught:
        given(mini, tmp_path / "vendor", tmp_path / "run", cutlass=str(copy))
    assert "v1.0.0 pins" in caught.value.what
    assert "--cutlass" in caught.value.hint


def test_another_cutlass_is_taken_when_asked_for_and_said(mini: Upstream, tmp_path: Path) -> None:
    said: list[str] = []
    vendor, run_dir = tmp_path / "vendor", tmp_path / "run"
    cutlass = f"{mini.cutlass}@{mini.next_cutlass_commit}"
    found = given(mini, vendor, run_dir, cutlass=cutlass, said=said)
    assert found.cutlass.commit == mini.next_cutlass_commit
    assert len(said) == 1
    assert mini.cutlass_commit[:12] in said[0]


def test_another_cutlass_is_taken_where_the_pinned_one_is_missing(
    mini: Upstream, tmp_path: Path
) -> None:
    copy = empty_cutlass(mini, tmp_path)
    found = given(mini, tmp_path / "vendor", tmp_path / "run", cutlass=f"{copy}@HEAD")
    assert found.cutlass.commit == mini.next_cutlass_commit


def test_the_pinned_cutlass_named_by_its_tag_needs_no_note(
    modern: Upstream, tmp_path: Path
) -> None:
    said: list[str] = []
    git(modern.cutlass, "config", "uploadpack.allowFilter", "true")
    wanted = fetch.Wanted(
        trtllm=locate(str(modern.trtllm), modern.ref),
        cutlass=Location(url=f"file://{modern.cutlass}", ref="v4.0.0", local=False),
        given=True,
    )
    resolved = fetch.resolve(wanted, TABLE, tmp_path / "vendor")
    run = tmp_path / "run"
    fetch.fetch(resolved, TABLE, vendor=tmp_path / "vendor", run_dir=run, say=said.append)
    assert said == []


def test_a_release_without_a_generator_is_refused_before_any_checkout(
    mini: Upstream, tmp_path: Path
) -> None:
    wanted = fetch.wanted_sources(
        make_profile(), locate(str(mini.trtllm), mini.old_ref), locate(str(mini.cutlass), None)
    )
    with pytest.raises(ReleaseError, match=r"no generate_kernels\.py"):
        fetch.resolve(wanted, TABLE, tmp_path / "vendor")
    assert not list((tmp_path / "vendor").glob("trtllm-*"))


def test_a_repository_of_something_else_is_refused(mini: Upstream, tmp_path: Path) -> None:
    wanted = fetch.wanted_sources(
        make_profile(), locate(str(mini.cutlass), "v4.0.0"), locate(str(mini.cutlass), None)
    )
    with pytest.raises(ReleaseError, match=r"version\.py"):
        fetch.resolve(wanted, TABLE, tmp_path / "vendor")


def test_a_link_that_leads_outside_stops_the_fetch_and_leaves_no_checkout(tmp_path: Path) -> None:
    source = write_upstream(
        tmp_path / "upstream", cutlass_symlinks={"include/cutlass/leak.h": "/etc/passwd"}
    )
    vendor = tmp_path / "vendor"
    with pytest.raises(PathError, match=r"leak\.h"):
        given(source, vendor, tmp_path / "run")
    assert not list(vendor.glob("cutlass-*"))
    assert not list(vendor.glob(".cutlass-*"))


def test_a_repository_that_lacks_large_files_serves(mini: Upstream, tmp_path: Path) -> None:
    """As a partial clone has it: the blobs of the wanted folders, and not many others."""
    wanted = fetch.wanted_sources(
        make_profile(),
        Location(url=f"file://{mini.trtllm}", ref=mini.ref, local=False),
        locate(str(mini.cutlass), None),
    )
    git(mini.trtllm, "config", "uploadpack.allowFilter", "true")
    vendor = tmp_path / "vendor"
    resolved = fetch.resolve(wanted, TABLE, vendor)
    remote, _ = fetch.fetch(resolved, TABLE, vendor=vendor, run_dir=tmp_path, say=print)
    partial = resolved.trtllm.folder
    commit = remote.trtllm.commit
    local = given(mini, tmp_path / "other", tmp_path / "run", trtllm=f"{partial}@{commit}")
    assert local.trtllm.digests == remote.trtllm.digests


_FETCH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline import fetch, releases
from pipeline.git import locate
from pipeline.profile import load_profile

trtllm, cutlass, vendor, run = sys.argv[1:]
table = releases.load_table()
wanted = fetch.Wanted(
    trtllm=locate(trtllm, "v1.0.0"), cutlass=locate(cutlass, None), given=True
)
resolved = fetch.resolve(wanted, table, Path(vendor))
sources, _ = fetch.fetch(resolved, table, vendor=Path(vendor), run_dir=Path(run), say=print)
print(sources.trtllm.digests, sources.cutlass.digests)
"""


def test_runs_at_once_share_the_checkouts(mini: Upstream, tmp_path: Path) -> None:
    repositories = (str(mini.trtllm), str(mini.cutlass), str(tmp_path / "vendor"))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _FETCH, *repositories, str(tmp_path / f"run{number}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    assert KERNELS in printed.pop()


def test_the_run_folder_may_be_the_folder_of_checkouts(mini: Upstream, tmp_path: Path) -> None:
    """Both are locked, and one run must not wait for itself."""
    done = threading.Event()

    def work() -> None:
        with held(tmp_path / ".lock", what="the run's folder"):
            given(mini, tmp_path, tmp_path)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(timeout=15)


def test_the_lock_that_is_written_can_be_read(mini: Upstream, tmp_path: Path) -> None:
    sources = given(mini, tmp_path / "vendor", tmp_path / "run")
    assert load_lock(tmp_path / fetch.LOCK_NAME) is None
    lock = lock_in(tmp_path, sources)
    assert load_lock(tmp_path / fetch.LOCK_NAME) == lock
