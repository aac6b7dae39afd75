"""The tactics that are taken without tuning run, and give right results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from w4a16 import tactics
from w4a16.library import LIBRARY, QuantOp
from w4a16.tables import Case
from w4a16.timing import Timer, current_device

CASES = (
    Case(QuantOp.GROUP_SCALE, 128, 4096, 4096),
    Case(QuantOp.GROUP_SCALE_ZERO, 128, 6144, 4096),
    Case(QuantOp.GROUP_SCALE_ZERO, 64, 4096, 14336),
    Case(QuantOp.GROUP_SCALE, 256, 5000, 4096),
    Case(QuantOp.PER_COLUMN, 0, 4096, 4096),
    Case(QuantOp.GROUP_SCALE, 64, 8, 64),
)


@pytest.fixture(autouse=True)
def _nothing_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path))
    tactics.forget()
    yield
    tactics.forget()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_taken_is_right_for_any_rows(case: Case, bias: bool) -> None:
    device = current_device()
    with Timer(device) as timer:
        timer.prepare(case, bias)
        for m in (1, 2, 3, 7, 13, 16, 33, 100, 300, 1000, 2049):
            plan = tactics.plan(device, case.quant_op, m, case.n, case.k, case.group_size, bias)
            problem = timer.problem(m)
            assert LIBRARY.why_unsupported(plan.tactic, problem) == ""
            assert plan.workspace == LIBRARY.workspace_size(plan.tactic, problem)
            assert timer.wrong(plan.tactic, m) == "", (m, LIBRARY.tactics[plan.tactic].name)


def test_it_says_where_choices_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    sources = tactics.describe()
    assert sources.gpu == LIBRARY.device(-1).name
    assert sources.cache == "nothing tuned yet"
    assert sources.problems == ()
    with capsys.disabled():
        print(f"\n{sources.gpu}: shipped: {sources.shipped}; cache: {sources.cache}")


def test_the_key_of_this_gpu_is_complete() -> None:
    key = tactics.key_of(LIBRARY.device(current_device()))
    assert key.gpu.startswith("NVIDIA")
    assert key.sm == "9.0"
    assert key.sm_count > 0
    assert key.driver >= 12000
    assert key.cuda_runtime >= 12000
