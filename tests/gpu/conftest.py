"""What the GPU tests share: the library, the device or why to skip, the table of errors."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from . import expected as expectations
from .library import ApiError, Library, LibraryNotFoundError, find_library, find_manifest


@dataclass
class Table:
    """A row for every comparison of a tactic with torch."""

    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Session:
    library: Library | None
    without_library: str
    without_gpu: str
    device: str = "none"
    driver: str = "none"
    seed: int | None = None
    table: Table = field(default_factory=Table)


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("w4a16")
    group.addoption("--full", action="store_true", help="more shapes, bias both on and off")
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="fail instead of skipping where there is no library or no GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = _look()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return _header(config.stash[SESSION])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bad arguments last: one that slipped through would leave the device in an error state."""
    items.sort(key=lambda item: "test_bad_input" in item.nodeid)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    rows = session.table.rows
    if not rows:
        return
    terminalreporter.section("W4A16 accuracy")
    for line in _header(session) + _summary(rows):
        terminalreporter.write_line(line)
    target = os.environ.get("W4A16_TEST_JSON")
    if target:
        _write_table(Path(target), session)
        terminalreporter.write_line(f"{len(rows)} rows written to {target}")


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Library:
    session = request.config.stash[SESSION]
    if session.library is None:
        _leave(request, session.without_library)
        raise AssertionError
    return session.library


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest, library: Library) -> Iterator[None]:
    """A device that the library runs on; torch's own products sum in FP32 throughout."""
    session = request.config.stash[SESSION]
    if session.without_gpu:
        _leave(request, session.without_gpu)
    from .reference import torch

    # By default torch may add partial sums in FP16, which would make it an easier peer.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    yield
    torch.cuda.synchronize()


@pytest.fixture(scope="session")
def expected(library: Library) -> expectations.Expected:
    return expectations.expected_of(library, find_manifest(library.path))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[SESSION].table


def _look() -> Session:
    try:
        library = Library(find_library())
    except (LibraryNotFoundError, ApiError, OSError, AttributeError) as error:
        return Session(library=None, without_library=str(error), without_gpu=str(error))
    session = Session(library=library, without_library="", without_gpu="")
    try:
        from . import reference
    except pytest.skip.Exception as error:
        session.without_gpu = str(error)
        return session
    session.seed = reference.SEED
    try:
        device = library.check_device()
    except ApiError as error:
        session.without_gpu = f"w4a16_check_device: {error.status.name}: {error.message}"
        return session
    session.device = device.name.decode("utf-8", "replace")
    cuda = f"CUDA {device.driver_version // 1000}.{device.driver_version % 1000 // 10}"
    session.driver = f"{_driver_version()} ({cuda})"
    if not reference.torch.cuda.is_available():
        session.without_gpu = "this torch sees no CUDA device"
    return session


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "driver of unknown version"
    return (answer.stdout.split("\n", 1)[0]).strip()


def _leave(request: pytest.FixtureRequest, reason: str) -> None:
    if request.config.getoption("--require-gpu", default=False):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _library_text(session: Session) -> str:
    if session.library is None:
        return f"none ({session.without_library})"
    build = session.library.build()
    return (
        f"{session.library.path} version {build['version']}, {build['profile']},"
        f" {build['release']}, {build['tactic_count']} tactics"
    )


def _header(session: Session) -> list[str]:
    device = session.without_gpu or f"{session.device}, driver {session.driver}"
    seed = "none" if session.seed is None else f"{session.seed} (W4A16_SEED={session.seed} repeats)"
    return [
        f"w4a16 library: {_library_text(session)}",
        f"w4a16 device: {device}",
        f"w4a16 seed: {seed}",
    ]


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    worst: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    chosen: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        best = worst[row["tactic"]].get(row["quant_op"])
        if best is None or not row["ratio"] <= best["ratio"]:
            worst[row["tactic"]][row["quant_op"]] = row
        if "took" in row:
            chosen[row["took"]].add(row["m"])
    lines = [
        f"{len(rows)} comparisons, {sum(not row['ok'] for row in rows)} outside their limit;"
        " worst error over torch's FP16 matmul:"
    ]
    for tactic in sorted(worst):
        parts = [
            f"{op} {row['ratio']:.3f} (limit {row['limit']:g}, M={row['m']} N={row['n']}"
            f" K={row['k']} g={row['group']})"
            for op, row in sorted(worst[tactic].items())
        ]
        lines.append(f"  {tactic:<24} " + "; ".join(parts))
    for took in sorted(chosen):
        lines.append(f"  auto took {took} at M = {', '.join(map(str, sorted(chosen[took])))}")
    return lines


def _write_table(path: Path, session: Session) -> None:
    head = {
        "device": session.device,
        "driver": session.driver,
        "library": _library_text(session),
        "seed": session.seed,
    }
    # One row a line; NaN (nothing was written to the output) is no JSON, so it becomes null.
    rows = ",\n".join(json.dumps(_finite(row)) for row in session.table.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and value - value != 0 else value
        for key, value in row.items()
    }
