"""What a library says it can do is what its manifest promises. Needs no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

from .expected import FULL_PROFILE, Expected, decode_of, full
from .library import AUTO, Library, QuantOp, Status, find_manifest, problem

ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 300, 4096)
SHAPES = ((8, 64), (296, 192), (4104, 4096), (8192, 28672))


def full_release(library: Library) -> dict[str, Any]:
    build = library.build()
    if build["profile"] != FULL_PROFILE:
        pytest.skip(f"this library is of profile {build['profile']}, not {FULL_PROFILE}")
    return build


def test_the_library_names_exactly_the_expected_tactics(
    library: Library, expected: Expected
) -> None:
    names = [tactic.name for tactic in library.tactics]
    assert len(set(names)) == len(names)
    assert set(names) == expected.names, f"expected by {expected.source}"
    assert library.build()["tactic_count"] == len(names)


def test_each_tactic_has_exactly_the_expected_quant_ops(
    library: Library, expected: Expected
) -> None:
    wanted = dict(expected.gemm)
    wanted.update(dict.fromkeys(expected.decode, frozenset(QuantOp)))
    if expected.gemv:
        wanted["gemv"] = frozenset(op for op, _, _ in expected.gemv)
    assert {tactic.name: tactic.quant_ops for tactic in library.tactics} == wanted


def test_the_default_profile_holds_21_tactics_for_each_of_3_quant_ops(library: Library) -> None:
    build = full_release(library)
    wanted = full(gemv=not build["gemv_reason"], decode=decode_of(library))
    found = {t.name: t.quant_ops for t in library.tactics if t.kind == "gemm"}
    assert len(wanted.gemm) == 21
    assert found == wanted.gemm


def test_the_manifest_of_the_default_profile_lists_all_it_should(
    library: Library, expected: Expected
) -> None:
    build = full_release(library)
    if find_manifest(library.path) is None:
        pytest.skip("no manifest.json above the library")
    wanted = full(gemv=not build["gemv_reason"], decode=decode_of(library))
    assert expected.gemm == wanted.gemm
    assert expected.gemv == wanted.gemv


def test_support_is_exactly_as_expected_for_every_tactic_and_problem(
    library: Library, expected: Expected
) -> None:
    wrong: list[str] = []
    for n, k in SHAPES:
        for op in QuantOp:
            groups = (0, k) if op is QuantOp.PER_COLUMN else (32, 64, 96, 128, 256, k)
            for group in groups:
                if group and k % group:
                    continue
                for m in ROWS:
                    for bias in (False, True):
                        given = problem(op, m, n, k, group, bias)
                        for tactic in library.tactics:
                            status = library.status_of_supports(tactic.index, given)
                            must = expected.supports(tactic.name, given)
                            if status is not (Status.OK if must else Status.ERROR_UNSUPPORTED):
                                wrong.append(
                                    f"{tactic.name} {op.label} M={m} N={n} K={k} g={group}"
                                    f" bias={bias}: {status.name}"
                                )
    assert not wrong, f"{len(wrong)} wrong, {expected.source}:\n" + "\n".join(wrong[:20])


def test_auto_takes_a_tactic_that_supports_the_problem_wherever_one_does(
    library: Library,
) -> None:
    for n, k in SHAPES:
        for op in QuantOp:
            for group in (0,) if op is QuantOp.PER_COLUMN else (32, 64, 128, 256):
                if group and k % group:
                    continue
                for m in ROWS:
                    given = problem(op, m, n, k, group)
                    some = any(
                        library.status_of_supports(t.index, given) is Status.OK
                        for t in library.tactics
                    )
                    status = library.status_of_supports(AUTO, given)
                    assert (status is Status.OK) == some
                    if some:
                        taken = library.auto_tactic(given)
                        assert library.status_of_supports(taken.index, given) is Status.OK


def test_auto_leaves_the_gemv_alone_where_its_fp16_sums_lose_too_much(
    library: Library, expected: Expected
) -> None:
    if not any(QuantOp.GROUP_SCALE_ZERO in ops for ops in expected.gemm.values()):
        pytest.skip("this library has no GEMM with zeros to take instead")
    for n, k in ((4096, 4160), (4096, 8192), (8192, 28672), (8, 8192)):
        for m in range(1, 17):
            given = problem(QuantOp.GROUP_SCALE_ZERO, m, n, k, 64)
            assert library.auto_tactic(given).name != "gemv", f"M={m} N={n} K={k}"


def test_every_status_has_the_name_that_the_header_gives_it(library: Library) -> None:
    for status in Status:
        assert library.raw("status_name", int(status)) == f"W4A16_{status.name}".encode()
    for value in (-1, max(Status) + 1, 2**31 - 1):
        assert library.raw("status_name", value) == b"unknown status"


def test_tactics_are_found_by_their_own_names(library: Library) -> None:
    assert library.find_tactic("auto") == AUTO
    for tactic in library.tactics:
        assert library.find_tactic(tactic.name) == tactic.index
        assert library.tactic(tactic.index) == tactic


def test_tactic_descriptions_agree_with_their_names(library: Library) -> None:
    for tactic in library.tactics:
        if tactic.is_gemv:
            assert tactic.name == "gemv"
            assert tactic.schedule == "cuda-core"
            assert 1 <= tactic.m_min <= tactic.m_max
            assert tactic.group_multiple == 0
            assert not tactic.uses_workspace
            continue
        if tactic.is_decode:
            _, tile, *marks = tactic.name.split(":")
            assert "x".join(map(str, tactic.tile[:2])) == tile
            clusters = [int(mark[1:]) for mark in marks if mark.startswith("c")]
            assert tactic.cluster == (1, 1, *(clusters or [1]))
            wide = any(mark.startswith("s") for mark in marks)
            assert tactic.schedule == ("wgmma" if wide else "mma")
            assert tactic.groups == ((64, 128, 256) if wide else (32, 64, 128, 256))
            assert tactic.group_multiple == 0
            assert (tactic.m_min, tactic.m_max) == (1, 65535 * tactic.tile[1])
            assert tactic.uses_workspace == ("stream" in marks)
            continue
        assert tactic.kind == "gemm"
        _, tile, cluster = tactic.name.split(":")
        assert "x".join(map(str, tactic.tile)) == tile
        assert "x".join(map(str, tactic.cluster)) == cluster
        assert tactic.schedule in {"cooperative", "pingpong"}
        assert tactic.group_multiple > 0


def test_version_and_build_information_are_filled_in(library: Library) -> None:
    build = library.build()
    assert build["version"] == library.version
    assert build["api_version"] == library.raw("api_version") >= 1
    assert all(part.isdigit() for part in library.version.split(".")[:2])
    assert str(build["architecture"]).startswith("sm_")
    assert build["cuda_runtime_version"] >= 12000
    for name in ("profile", "release", "trtllm_commit", "cutlass_commit", "compiler", "compress"):
        assert build[name], name


def test_nothing_is_printed_when_a_call_fails(
    library: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    for tactic in (*(t.index for t in library.tactics), AUTO):
        library.status_of_supports(tactic, problem(QuantOp.GROUP_SCALE, 1, 8, 64, 32))
        library.status_of_supports(tactic, problem(QuantOp.GROUP_SCALE, 1, 8, 65, 32))
    os.write(1, b"")
    assert capfd.readouterr() == ("", "")
