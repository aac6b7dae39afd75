"""Releases: what the table says of each version, and what is detected of those it does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from pipeline.errors import ProfileError, ReleaseError
from pipeline.files import write_text
from pipeline.model import Sources
from pipeline.releases import (
    RELEASES_FILE,
    Known,
    ReleaseFacts,
    entry_for,
    facts_of,
    load_table,
    parse_version,
)
from tests.upstream import Upstream, write_upstream

from .conftest import GEMV, GENERATOR, KERNELS, fetch_from

TABLE = load_table()


@pytest.mark.parametrize("version", ["0.5.0", "0.8.0", "0.8.0.post1", "0.7.1"])
def test_a_release_before_the_generator_is_refused_with_the_first_that_has_one(
    version: str,
) -> None:
    with pytest.raises(ReleaseError, match=r"v0\.9\.0 is the first") as caught:
        entry_for(TABLE, Version(version))
    assert version in caught.value.what
    assert "v0.9.0" in caught.value.hint


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0", "0.11.0", "0.12.0", "0.13.0", "0.14.0"])
def test_the_first_generators_take_no_architecture_and_have_no_hopper_gemv(version: str) -> None:
    entry = entry_for(TABLE, Version(version))
    assert isinstance(entry, Known)
    assert entry.generator.options == ("-o", "{out}")
    assert entry.gemv.layouts == {}
    assert "0.16" in entry.gemv.without


@pytest.mark.parametrize("version", ["0.16.0", "0.20.0", "1.0.0", "1.0.0rc6", "0.17.0.post1"])
def test_later_generators_take_an_architecture_and_have_a_hopper_gemv(version: str) -> None:
    entry = entry_for(TABLE, Version(version))
    assert isinstance(entry, Known)
    assert entry.generator.options == ("-o", "{out}", "-a", "{sm}")
    assert entry.gemv.layouts == {90: "ColumnMajorInterleavedForHopper"}


@pytest.mark.parametrize("version", ["1.1.0", "1.1.0rc1", "1.3.0", "2.0.0", "0.9.0.dev1"])
def test_a_release_that_the_table_does_not_hold_is_looked_at(version: str) -> None:
    assert entry_for(TABLE, Version(version)) is TABLE.unknown


@given(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 9)))
@settings(deadline=None, max_examples=60)
def test_every_version_has_just_one_answer(parts: tuple[int, int, int]) -> None:
    version = Version(".".join(map(str, parts)))
    if version < Version("0.9"):
        with pytest.raises(ReleaseError):
            entry_for(TABLE, version)
    else:
        assert entry_for(TABLE, version).launcher.function


def test_a_known_release_has_the_facts_of_its_entry(
    fetched: tuple[Sources, ReleaseFacts],
) -> None:
    facts = fetched[1]
    assert facts.script == GENERATOR
    assert facts.options == ("-o", "{out}", "-a", "{sm}")
    assert facts.gemv_folder == GEMV
    assert facts.link_sources
    assert facts.layout_check == (f"{KERNELS}/cutlass_preprocessors.cpp",)


def test_an_unknown_newer_release_is_detected(modern: Upstream, tmp_path: Path) -> None:
    _, facts = fetch_from(modern, tmp_path)
    assert facts.name == "detected"
    assert facts.options == ("-o", "{out}", "-a", "{sm}")
    assert facts.gemv_layouts == {90: "ColumnMajorInterleavedForHopper"}
    assert "CUTLASS_ENABLE_GDC_FOR_SM90=1" in facts.launcher.defines


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    write_text(tmp_path / GENERATOR, "parser.add_argument('-o', '--output_dir')")
    write_text(tmp_path / GEMV / "details.h", "struct ColumnMajorInterleaved {};")
    return tmp_path


def test_what_an_unknown_release_lacks_is_seen(unknown: Path) -> None:
    facts = facts_of(TABLE, TABLE.unknown, unknown)
    assert facts.options == ("-o", "{out}")
    assert facts.gemv_layouts == {}
    assert facts.link_sources == facts.layout_check == ()


def test_a_generator_that_moved_is_found(unknown: Path) -> None:
    moved = f"{KERNELS}/codegen/generate_kernels.py"
    (unknown / moved).parent.mkdir(parents=True)
    (unknown / GENERATOR).rename(unknown / moved)
    assert facts_of(TABLE, TABLE.unknown, unknown).script == moved


def test_a_generator_that_is_nowhere_or_in_two_places_is_refused(unknown: Path) -> None:
    moved = f"{KERNELS}/a/generate_kernels.py"
    write_text(unknown / moved, "")
    (unknown / GENERATOR).rename(unknown / KERNELS / "generate_kernels.py")
    with pytest.raises(ReleaseError, match="more than one") as caught:
        facts_of(TABLE, TABLE.unknown, unknown)
    assert moved in caught.value.details
    (unknown / moved).unlink()
    (unknown / KERNELS / "generate_kernels.py").unlink()
    with pytest.raises(ReleaseError, match="has no generate_kernels"):
        facts_of(TABLE, TABLE.unknown, unknown)


def test_a_known_release_without_its_generator_is_refused(tmp_path: Path) -> None:
    source = write_upstream(tmp_path / "upstream", edits={GENERATOR: None})
    with pytest.raises(ReleaseError, match="no generator at"):
        fetch_from(source, tmp_path / "vendor")


def test_a_generator_that_is_no_text_does_no_harm(unknown: Path) -> None:
    (unknown / GENERATOR).write_bytes(b"\xff'--architectures'\xfe")
    assert facts_of(TABLE, TABLE.unknown, unknown).options[-1] == "{sm}"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('__version__ = "1.0.0"', "1.0.0"),
        ("# c\n__version__='0.16.0.dev2024121700'\n", "0.16.0.dev2024121700"),
        ('__version__ = "1.1.0rc2"', "1.1.0rc2"),
    ],
)
def test_the_version_is_read_from_its_file(text: str, version: str) -> None:
    assert str(parse_version(text)) == version


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version = '1.0'",
        '__version__ = ""',
        '__version__ = "latest"',
        '__version__ = "../../x"',
        "__version__ = get()",
        '__version__ = "' + "1" * 5000 + '"',
    ],
    ids=range(7),
)
def test_a_version_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ReleaseError, match="does not say which release"):
        parse_version(text)


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_version_text_is_a_version_or_refused(text: str) -> None:
    try:
        version = parse_version(f'__version__ = "{text}"')
    except ReleaseError:
        return
    assert "/" not in str(version)


@pytest.mark.parametrize("place", ["releases", "unknown"])
@pytest.mark.parametrize("path", ["../x", "/etc", "a\\b", ""])
def test_a_table_with_a_path_that_leads_outside_is_refused(
    tmp_path: Path, place: str, path: str
) -> None:
    values = yaml.safe_load(RELEASES_FILE.read_text(encoding="utf-8"))
    entry = values[place][1] if place == "releases" else values[place]
    entry["link_sources"] = [path]
    write_text(tmp_path / "releases.yaml", yaml.safe_dump(values))
    with pytest.raises(ProfileError, match="outside its folder"):
        load_table(tmp_path / "releases.yaml")
