"""The profile: every key, every wrong value, and YAML written to do harm."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ProfileError
from pipeline.profile import Profile, load_profile

from .conftest import ROOT, raw_profile

CONFIGS = ROOT / "configs"
Raw = dict[str, Any]


def load(folder: Path, text: str) -> Profile:
    path = folder / "profile.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return load_profile(path)


def changed(folder: Path, key: str, value: object) -> Profile:
    """The default profile with ``value`` at the dotted ``key``."""
    values: Any = raw_profile()
    place = values
    *above, last = key.split(".")
    for part in above:
        place = place[part]
    place[last] = value
    return load(folder, yaml.safe_dump(values))


@pytest.mark.parametrize("name", ["w4a16-sm90.yaml", "demo.yaml"])
def test_the_profiles_that_ship_load(name: str) -> None:
    profile = load_profile(CONFIGS / name)
    assert profile.name == Path(name).stem
    assert profile.sm == 90
    assert profile.wants_tile("64x16x64")
    assert profile.wants_cluster("2x1x1")


def test_the_default_profile_asks_for_everything_that_the_design_names() -> None:
    profile = load_profile(CONFIGS / "w4a16-sm90.yaml")
    assert profile.upstream.trtllm.ref == "v1.0.0"
    assert profile.gemm.quant_ops == ("per_column", "group_scale", "group_scale_zero")
    assert profile.gemm.tiles == profile.gemm.clusters == "all"
    assert profile.gemv is not None
    assert (profile.gemv.m.first, profile.gemv.m.last) == (1, 15)
    assert (profile.gemv.groups, profile.gemv.per_column) == ((64, 128), True)
    assert profile.gemv.zeros == profile.gemv.bias == (False, True)
    assert profile.gates.library_bytes == 5_000_000
    assert profile.gates.gemm_sass == ("HGMMA", "UTMALDG")


def test_a_profile_needs_only_a_name_and_sources(tmp_path: Path) -> None:
    values = {key: raw_profile()[key] for key in ("name", "upstream")}
    profile = load(tmp_path, yaml.safe_dump(values))
    assert profile.gemv is None
    assert profile.gemm.tiles == "all"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a.b-c_d+1"),
        ("upstream.trtllm.url", "/some/where"),
        ("upstream.trtllm.ref", "topic/branch"),
        ("upstream.cutlass.ref", "v4.0.0"),
        ("upstream.cutlass.ref", None),
        ("gemm.quant_ops", ["per_column"]),
        ("gemm.tiles", ["128x64x64", "64x16x64"]),
        ("gemm.clusters", ["1x1x1"]),
        ("gemv", None),
        ("gemv.m", {"from": 3, "to": 3}),
        ("gemv.groups", [128]),
        ("gemv.per_column", False),
        ("gemv.zeros", [True]),
        ("gemv.bias", [False]),
        *(("build.compress", v) for v in ("size", "speed", "balance", "default", "none")),
        ("build.static", False),
        ("gates.library_bytes", 1),
        ("gates.spill_bytes", 128),
        ("gates.gemm_sass", []),
    ],
)
def test_each_key_can_be_set(tmp_path: Path, key: str, value: object) -> None:
    found: Any = changed(tmp_path, key, value).model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", 5),
        ("name", None),
        ("name", ["a"]),
        ("upstream", "https://host/repo"),
        ("upstream.trtllm", {"ref": "v1"}),
        ("upstream.trtllm.url", ""),
        ("upstream.trtllm.url", 3),
        ("upstream.trtllm.ref", None),
        ("upstream.trtllm.ref", 1.0),
        ("upstream.trtllm.ref", ""),
        ("upstream.cutlass.ref", ""),
        ("gemm", []),
        ("gemm.quant_ops", []),
        ("gemm.quant_ops", "per_column"),
        ("gemm.quant_ops", ["per_row"]),
        ("gemm.quant_ops", ["per_column", "per_column"]),
        ("gemm.tiles", []),
        ("gemm.tiles", "some"),
        ("gemm.tiles", ["128x64"]),
        ("gemm.tiles", ["128x64x64\n"]),
        ("gemm.tiles", ["0x64x64"]),
        ("gemm.tiles", ["128X64X64"]),
        ("gemm.tiles", [128]),
        ("gemm.tiles", ["64x16x64", "64x16x64"]),
        ("gemm.clusters", ["1x1x1x1"]),
        ("gemm.clusters", [["1x1x1"]]),
        ("gemv.m", {"from": 0, "to": 3}),
        ("gemv.m", {"from": 1, "to": 16}),
        ("gemv.m", {"from": 5, "to": 4}),
        ("gemv.m", {"from": 1}),
        ("gemv.m", [1, 15]),
        ("gemv.groups", [32]),
        ("gemv.groups", [64, 64]),
        ("gemv.groups", 64),
        ("gemv.zeros", ["sometimes"]),
        ("gemv.zeros", [True, True]),
        ("gemv.bias", True),
        ("gemv.per_column", "maybe"),
        ("build.compress", "zip"),
        ("build.static", 2),
        ("gates.library_bytes", 0),
        ("gates.library_bytes", "much"),
        ("gates.library_bytes", 1.5),
        ("gates.spill_bytes", -1),
        ("gates.gemm_sass", "HGMMA"),
        ("gates.gemm_sass", [1]),
    ],
)
def test_a_wrong_value_is_refused_and_its_key_named(
    tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, key, value)
    assert key.split(".")[-1] in caught.value.details
    assert "profile.yaml" in caught.value.what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "sm_80"),
        ("architecture", "sm_100a"),
        ("activation", "bf16"),
        ("activation", "fp8"),
        ("weight", "int8"),
    ],
)
def test_what_is_in_the_schema_but_not_verified_is_refused(
    tmp_path: Path, key: str, value: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, key, value)
    assert f"{key} {value} is not verified yet" in caught.value.details
    assert "verified today" in caught.value.details


@pytest.mark.parametrize(
    ("key", "value"), [("architecture", "sm_90"), ("activation", "fp32"), ("weight", "int2")]
)
def test_what_is_not_in_the_schema_is_refused_with_what_is(
    tmp_path: Path, key: str, value: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, key, value)
    assert "Input should be" in caught.value.details


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("nam", "name"),
        ("gemms", "gemm"),
        ("archtecture", "architecture"),
        ("gemm.quantops", "quant_ops"),
        ("gemm.tile", "tiles"),
        ("gemv.group", "groups"),
        ("gemv.m.form", "from"),
        ("upstream.trtlm", "trtllm"),
        ("upstream.cutlass.reff", "ref"),
        ("build.compres", "compress"),
        ("gates.library_byte", "library_bytes"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path, key: str, nearest: str) -> None:
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, key, 1)
    assert f"{key}: unknown key; did you mean {nearest!r}?" in caught.value.details


def test_an_unknown_key_like_no_other_gets_the_whole_list(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, "gates.zzz", 1)
    known = "gemm_sass, library_bytes, narrow_sass, spill_bytes, wide_sass"
    assert f"known keys: {known}" in caught.value.details


def test_the_python_name_of_an_aliased_key_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="unknown key"):
        changed(tmp_path, "gemv.m", {"first": 1, "last": 2})


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    values = raw_profile(gemm={"tiles": []}, gates={"library_bytes": 0}, odd=1)
    with pytest.raises(ProfileError) as caught:
        load(tmp_path, yaml.safe_dump(values))
    assert all(key in caught.value.details for key in ("gemm.tiles", "library_bytes", "odd"))


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", ".hidden", "../up", "a/b", "/abs", "a\\b", "a b", "a\n", "a\0", "-x", "~"),
        *("é", "a" * 101, "a;b", "$(x)", "a:b", ""),
    ],
)
def test_a_name_that_is_no_plain_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProfileError, match="name"):
        changed(tmp_path, "name", name)


@pytest.mark.parametrize("text", ["--upload-pack=touch x", "-v", "a\0b", "a\nb", "a\rb", "a\x1bb"])
@pytest.mark.parametrize("key", ["upstream.trtllm.url", "upstream.trtllm.ref"])
def test_a_source_that_could_be_an_option_or_fool_a_terminal_is_refused(
    tmp_path: Path, key: str, text: str
) -> None:
    with pytest.raises(ProfileError):
        changed(tmp_path, key, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "just text",
        "name: [",
        "a: b: c",
        "\t- x",
        "--- a\n--- b",
        "%YAML 9.9\n---\n{}",
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system",
        "!unknown {}",
        "name: !!int ''",
        "name: !!float ''",
        "name: !!bool maybe",
        "name: !!timestamp soon",
        "name: 2024-13-45",
        "name: " + "9" * 5000,
        "name: 0b",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "{1: 2}",
        "{null: 2}",
        "{true: 2}",
        "name: *nowhere",
        "name: &a [*a]",
        "&a {name: *a}",
        "&a {*a : *a}",
        "<<: 3",
        "<<: [1, 2]",
        "name: \udcff",
        "name: \x01",
        "[" * 5_000,
        "{a: " * 5_000,
        "- " * 5_000,
    ],
    ids=range(36),
)
def test_yaml_that_holds_no_profile_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match=r"profile\.yaml") as caught:
        load(tmp_path, text)
    assert caught.value.hint
    assert len(str(caught.value)) < 20_000
    assert not (tmp_path / "ran").exists()


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    text = yaml.safe_dump(raw_profile()) + "\n".join(lines) + "\ngates: {gemm_sass: *i}\n"
    with pytest.raises(ProfileError) as caught:
        load(tmp_path, text)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("kind", ["absent", "folder", "loop"])
def test_a_profile_that_cannot_be_opened_is_a_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "profile.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(ProfileError, match=r"profile\.yaml"):
        load_profile(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError):
        load(tmp_path, yaml.safe_dump(raw_profile()) + "gates: {spill_bytes: 9}\n")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = [
    *("name", "upstream", "architecture", "weight", "gemm", "gemv", "build", "gates"),
    *("upstream.trtllm", "upstream.trtllm.ref", "gemm.tiles", "gemm.quant_ops", "gemv.m"),
    *("gemv.groups", "gemv.bias", "gates.library_bytes", "build.compress"),
    *("decode", "decode.narrow", "decode.wide"),
]


@given(st.sampled_from(KEYS), VALUES)
@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_makes_a_profile_or_one_clear_error(
    tmp_path: Path, key: str, value: object
) -> None:
    try:
        found = changed(tmp_path, key, value)
    except ProfileError:
        return
    again = yaml.safe_dump(found.model_dump(mode="json", by_alias=True))
    assert load(tmp_path, again) == found


@given(st.text(max_size=40))
@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_makes_a_profile_or_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.yaml").write_bytes(text.encode(errors="replace"))
    with pytest.raises(ProfileError):
        load_profile(tmp_path / "profile.yaml")


@given(st.sampled_from(["name", "gemm", "upstream", "architecture"]), st.randoms())
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_key_with_one_letter_missing_names_the_right_one(
    tmp_path: Path, key: str, random: Any
) -> None:
    place = random.randrange(len(key))
    wrong = key[:place] + key[place + 1 :]
    with pytest.raises(ProfileError) as caught:
        changed(tmp_path, wrong, 1)
    assert "did you mean" in caught.value.details
    assert difflib.get_close_matches(wrong, list(raw_profile()), n=1)[0] in caught.value.details
