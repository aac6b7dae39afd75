"""The lock: written as it is read, and strict about what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ForgeError, LockError
from pipeline.lock import (
    Lock,
    differences,
    load_lock,
    lock_of,
    matches,
    render_lock,
    require_locked,
    write_lock,
)
from pipeline.model import Checkout, Sources

PATH = Path("vendor/upstream.lock.yaml")


def checkout(name: str, **changes: object) -> Checkout:
    plain = Checkout(
        name=name,
        url=f"https://host/{name}.git",
        ref="v1.0.0",
        commit="a" * 40,
        folder=f"/somewhere/{name}",
        digests={"include": "1" * 64, "src": "2" * 64},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def sources() -> Sources:
    return Sources(
        release="v1.0.0",
        version="1.0.0",
        trtllm=checkout("trtllm"),
        cutlass=checkout("cutlass"),
        matches_lock=None,
    )


def test_a_lock_is_read_as_it_was_written(sources: Sources, tmp_path: Path) -> None:
    lock = lock_of(sources)
    write_lock(tmp_path / "lock.yaml", lock)
    assert load_lock(tmp_path / "lock.yaml") == lock
    assert (tmp_path / "lock.yaml").read_text().startswith("# Which upstream content")
    assert "/somewhere" not in render_lock(lock)


def test_where_no_lock_is_there_is_none(tmp_path: Path) -> None:
    assert load_lock(tmp_path / "lock.yaml") is None


def test_what_is_locked_is_taken(sources: Sources) -> None:
    require_locked(lock_of(sources), sources, path=PATH)
    assert matches(lock_of(sources), sources) is True


@pytest.mark.parametrize("name", ["trtllm", "cutlass"])
@pytest.mark.parametrize(
    ("digests", "shown"),
    [
        ({"include": "1" * 64, "src": "3" * 64}, "src: 3333"),
        ({"include": "1" * 64}, "src: absent"),
        ({"include": "1" * 64, "src": "2" * 64, "new": "4" * 64}, "locked absent"),
        ({}, "include: absent"),
    ],
)
def test_other_content_is_refused_and_shown(
    sources: Sources, name: str, digests: dict[str, str], shown: str
) -> None:
    other = checkout(name, digests=digests)
    cutlass = name == "cutlass"
    found = replace(sources, cutlass=other) if cutlass else replace(sources, trtllm=other)
    with pytest.raises(LockError) as caught:
        require_locked(lock_of(sources), found, path=PATH)
    assert shown in caught.value.details
    assert str(PATH) in caught.value.what
    assert matches(lock_of(sources), found) is False


def test_another_commit_of_the_same_repository_is_refused(sources: Sources) -> None:
    found = replace(sources, trtllm=checkout("trtllm", commit="b" * 40))
    with pytest.raises(LockError, match="TensorRT-LLM"):
        require_locked(lock_of(sources), found, path=PATH)


def test_another_commit_of_a_mirror_is_taken_where_its_content_is_the_same(
    sources: Sources,
) -> None:
    mirror = checkout("trtllm", commit="b" * 40, url="https://mirror/trtllm.git")
    found = replace(sources, trtllm=mirror)
    require_locked(lock_of(sources), found, path=PATH)
    assert matches(lock_of(sources), found) is True


def test_a_commit_that_is_not_known_is_not_compared(sources: Sources) -> None:
    locked = lock_of(sources).trtllm.model_copy(update={"commit": None})
    assert differences(locked, checkout("trtllm", commit="c" * 40), commit=True) == []


def test_another_release_is_neither_right_nor_wrong(sources: Sources) -> None:
    assert matches(lock_of(sources), replace(sources, release="v2")) is None
    assert matches(None, sources) is None


@pytest.mark.parametrize(
    "edit",
    [
        ("release: v1.0.0", "<<<<<<< ours"),
        ("a" * 40, "a" * 39),
        ("a" * 40, "HEAD"),
        ("release:", "releases:"),
        ("\n  digests:", "\n  digest:"),
        ("url:", "url: [1]\n  x:"),
    ],
)
def test_a_lock_that_was_damaged_is_a_clear_error(
    sources: Sources, tmp_path: Path, edit: tuple[str, str]
) -> None:
    text = render_lock(lock_of(sources))
    assert edit[0] in text
    (tmp_path / "lock.yaml").write_text(text.replace(*edit, 1))
    with pytest.raises(ForgeError, match=r"lock\.yaml"):
        load_lock(tmp_path / "lock.yaml")


def test_the_lock_in_vendor_can_be_read() -> None:
    path = Path(__file__).parents[2] / "vendor" / "upstream.lock.yaml"
    lock = load_lock(path)
    assert lock is None or isinstance(lock, Lock)
