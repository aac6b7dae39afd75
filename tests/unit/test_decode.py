"""Decode tactics: what a profile may ask for, their names, and the units that make them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import decode
from pipeline.decode import DecodeTactic
from pipeline.errors import ProfileError
from pipeline.plan import members_of
from pipeline.profile import Profile, load_profile
from pipeline.releases import ReleaseFacts
from pipeline.render import TEMPLATES

from .conftest import ROOT, raw_profile

FULL = ROOT / "configs" / "w4a16-sm90.yaml"
NARROW = DecodeTactic(kind="narrow", rows=224, tokens=8, ctas_per_sm=1, row_groups=2)
WIDE = DecodeTactic(kind="wide", rows=128, tokens=32, ctas_per_sm=2, sets=2, buffers=4, cluster=2)
STREAM = DecodeTactic(kind="wide", rows=192, tokens=32, ctas_per_sm=1, streams=True)


def profile_with(folder: Path, section: object) -> Profile:
    values: Any = {**raw_profile(), "decode": section}
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_profile(path)


def facts(layout: str) -> ReleaseFacts:
    made: Any = SimpleNamespace(launcher=SimpleNamespace(sm90_layout=layout))
    return made  # type: ignore[no-any-return]


def unit(tactic: DecodeTactic) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("decode_unit.cu.j2").render(tactic=tactic)


def test_a_name_says_all_that_tells_a_tactic_apart() -> None:
    assert NARROW.name == "decode:224x8:g2"
    assert WIDE.name == "decode:128x32:s2:o2:c2:n4"
    assert WIDE.ident == "decode_128x32_s2_o2_c2_n4"
    plain = DecodeTactic(kind="narrow", rows=64, tokens=16, ctas_per_sm=1)
    assert plain.name == "decode:64x16"
    # The same rows and tokens by the other kind of kernel.
    assert replace(plain, kind="wide").name == "decode:64x16:s1"
    assert replace(plain, kind="wide", stage_k=128, streams=True).name == (
        "decode:64x16:s1:k128:stream"
    )


def test_every_tactic_of_the_profiles_that_ship_has_a_name_and_an_identifier_of_its_own() -> None:
    for path in (FULL, ROOT / "configs" / "demo.yaml"):
        tactics = decode.select(load_profile(path), facts("permuted")).selected
        kernels = [kernel.ident for tactic in tactics for kernel in tactic.kernels]
        assert tactics
        assert len({tactic.name for tactic in tactics}) == len(tactics)
        assert len(set(kernels)) == len(kernels)
        for tactic in tactics:
            assert re.fullmatch(r"decode:\d+x\d+(:[sgowcnk]\d+)*(:stream)?", tactic.name)
            assert tactic.ident.isidentifier()


def test_the_rule_of_auto_names_tactics_of_the_profile_and_has_one_for_any_shape() -> None:
    text = (TEMPLATES / "bundle/src/decode_rules.h").read_text(encoding="utf-8")
    rules = re.findall(r'^    \{(\d+), "(decode:[^"]+)", ([^}]+)\},$', text, re.MULTILINE)
    made = {tactic.name for tactic in decode.select(load_profile(FULL), facts("permuted")).selected}
    assert rules
    assert {name for _, name, _ in rules} <= made
    bands = [int(m) for m, _, _ in rules]
    assert bands == sorted(bands)
    for band in set(bands):
        (*_, (_, _, last)) = (rule for rule in rules if int(rule[0]) == band)
        assert last == "0", f"no line of M <= {band} is for any N and K"


@pytest.mark.parametrize("zeros", [False, True])
def test_each_group_size_has_the_kernel_that_takes_it(zeros: bool) -> None:
    for group in (32, 64, 128):
        found = NARROW.kernel_for(group, zeros)
        assert found is not None
        assert (found.group, found.zeros) == (group, zeros)
    assert WIDE.kernel_for(32, zeros) is None
    small, large = WIDE.kernel_for(64, zeros), WIDE.kernel_for(128, zeros)
    assert small is not None
    assert large is not None
    assert not small.folded
    assert large.folded == (not zeros)
    most = replace(WIDE, tokens=64).kernel_for(128, zeros)
    assert most == replace(WIDE, tokens=64).kernel_for(64, zeros)


@pytest.mark.parametrize("tactic", [NARROW, WIDE, STREAM], ids=lambda tactic: tactic.name)
def test_a_unit_instantiates_each_kernel_of_its_tactic_once_and_no_other(
    tactic: DecodeTactic,
) -> None:
    text = unit(tactic)
    kernel_kind = "streaming" if tactic.streams else tactic.kind
    assert f'#include "decode/{kernel_kind}.h"' in text
    shapes = re.findall(r"^struct (\w+) : (\w+)<([^>]+)> \{\};$", text, re.MULTILINE)
    assert [name for name, _, _ in shapes] == [kernel.ident for kernel in tactic.kernels]
    assert {shape for _, shape, _ in shapes} == {f"{tactic.kind.capitalize()}Shape"}
    used = set(re.findall(rf"{kernel_kind}_kernel<(\w+)>", text))
    assert used == {kernel.ident for kernel in tactic.kernels}
    assert f"const Kernels {tactic.ident} = {{" in text


def test_a_shape_has_the_parameters_of_its_configuration() -> None:
    assert "decode_224x8_g2_g64_z : NarrowShape<2, 7, 1, 8, 0, 64, true, 1>" in unit(NARROW)
    text = unit(WIDE)
    assert "_g64_z : WideShape<2, 2, 32, 256, 0, true, false, 4, 2, false>" in text
    assert "_g128 : WideShape<2, 2, 32, 256, 0, false, true, 4, 2, false>" in text
    assert "_g64_z : WideShape<3, 1, 32, 256, 0, true, false, 2, 1, true>" in unit(STREAM)
    short = replace(NARROW, warps=6), replace(WIDE, stage_k=128)
    assert [tactic.name for tactic in short] == ["decode:224x8:g2:w6", f"{WIDE.name}:k128"]
    assert "_g64_z : NarrowShape<2, 7, 1, 6, 0, 64, true, 1>" in unit(short[0])
    assert "_g64_z : WideShape<2, 2, 32, 128, 0, true, false, 4, 2, false>" in unit(short[1])


def test_a_tactic_that_normalises_has_kernels_of_both_kinds_for_the_same_problems() -> None:
    both = replace(NARROW, normalizes=True)
    assert (both.name, both.ident) == (NARROW.name, NARROW.ident)
    own = [kernel for kernel in both.kernels if kernel.normalizes]
    assert tuple(kernel for kernel in both.kernels if not kernel.normalizes) == NARROW.kernels
    assert [kernel.ident for kernel in own] == [f"{kernel.ident}_norm" for kernel in NARROW.kernels]
    for kernel in own:
        assert both.kernel_for(kernel.group, kernel.zeros, normalizes=True) == kernel
        assert NARROW.kernel_for(kernel.group, kernel.zeros, normalizes=True) is None
    text = unit(both)
    assert '#include "decode/normalizing.h"' in text
    assert "_g64_z_norm : NormalizingShape<2, 7, 1, 8, 64, true, 1>" in text
    used = re.findall(r"normalizing_kernel_of<(\w+), normalizing_kernel<\1>>", text)
    assert used == [kernel.ident for kernel in own]
    assert "ormalizing" not in unit(NARROW)


def test_a_release_with_another_packed_layout_or_a_profile_without_a_section_has_none() -> None:
    profile = load_profile(FULL)
    found = decode.select(profile, facts("signed"))
    assert found.selected == ()
    assert "layout is signed" in found.reason
    assert decode.select(profile, facts("permuted")).reason == ""
    none = decode.select(profile.model_copy(update={"decode": None}), facts("permuted"))
    assert none.selected == ()
    assert none.reason == "the profile asks for no decode kernels"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "name at least one configuration"),
        ({"narrow": [{"rows": 64}]}, "decode.narrow.0.tokens"),
        ({"narrow": [{"rows": 72, "tokens": 8}]}, "not a multiple of 16"),
        ({"narrow": [{"rows": 80, "tokens": 8, "row_groups": 2}]}, "not a multiple of 32"),
        ({"narrow": [{"rows": 64, "tokens": 8, "row_groups": 2, "warps": 6}]}, "multiple of 4"),
        ({"narrow": [{"rows": 64, "tokens": 8, "row_groups": 4, "warps": 6}]}, "multiple of 8"),
        ({"narrow": [{"rows": 272, "tokens": 8}]}, "decode.narrow.0.rows"),
        ({"narrow": [{"rows": 64, "tokens": 12}]}, "decode.narrow.0.tokens"),
        ({"narrow": [{"rows": 64, "tokens": 8, "cta_per_sm": 2}]}, "did you mean 'ctas_per_sm'?"),
        ({"narrow": [{"rows": 64, "tokens": 8}] * 2}, "given twice"),
        (
            {"narrow": [{"rows": 64, "tokens": 8}, {"rows": 64, "tokens": 8, "normalizes": True}]},
            "given twice",
        ),
        ({"narrow": [{"rows": 208, "tokens": 8, "ctas_per_sm": 2}]}, "needs 4 stages, and shared"),
        ({"narrow": [{"rows": 64, "tokens": 16, "normalizes": True}]}, "8 tokens and 8 warps"),
        ({"wide": [{"rows": 96, "tokens": 32}]}, "decode.wide.0.rows"),
        ({"wide": [{"rows": 256, "tokens": 32, "sets": 2}]}, "8 warpgroups"),
        ({"wide": [{"rows": 64, "tokens": 64, "sets": 4}]}, "needs 8 stages, and shared memory"),
        ({"wide": [{"rows": 256, "tokens": 128, "ctas_per_sm": 2}]}, "shared memory holds 1:"),
        ({"wide": [{"rows": 64, "tokens": 32, "cluster": 3}]}, "decode.wide.0.cluster"),
        (
            {"wide": [{"rows": 64, "tokens": 32, "sets": 2, "streams": True}]},
            "one set and no cluster",
        ),
        (
            {"wide": [{"rows": 64, "tokens": 32, "cluster": 2, "streams": True}]},
            "one set and no cluster",
        ),
        ({"wide": [{"rows": 64, "tokens": 32, "streams": True}]}, "128 rows, or ctas_per_sm: 2"),
        ({"wider": []}, "did you mean 'wide'?"),
    ],
)
def test_a_wrong_section_is_one_error_that_names_the_key(
    tmp_path: Path, section: object, said: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        profile_with(tmp_path, section)
    assert said in caught.value.details


def test_each_tactic_is_planned_as_a_unit_with_its_kernels() -> None:
    selection: Any = SimpleNamespace(
        selected=(),
        gemv=SimpleNamespace(selected=()),
        decode=SimpleNamespace(selected=(NARROW, WIDE)),
    )
    files = [f"src/decode/{NARROW.ident}.cu", f"src/decode/{WIDE.ident}.cu", "src/a/b.cu"]
    found = {(member.kind, member.kernels) for member in members_of(selection, files)}
    assert found == {("decode", 6), ("decode", 3), ("cuda", 1)}
