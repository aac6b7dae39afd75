"""Conversions that pack on the GPU make the same bytes as on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from w4a16.convert import convert
from w4a16.converted import open_converted
from w4a16.errors import ArgumentError, DeviceError

from tests.runtime.killed import digest
from tests.runtime.models import CONFIGS, model

SHARD_BYTES = 150_000


@pytest.fixture(autouse=True)
def _strict() -> Any:
    """No warning at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("format", [*CONFIGS])
def test_a_gpu_makes_the_bytes_of_the_cpu(
    tmp_path: Path, format: str, symmetric: bool, act_order: bool
) -> None:
    if format != "gptq" and (symmetric or act_order):
        pytest.skip("their configurations here are of asymmetric weights in order")
    made = model(tmp_path / "model", format=format, symmetric=symmetric, act_order=act_order)
    on_cpu = convert(made.path, tmp_path / "cpu", device="cpu", shard_bytes=SHARD_BYTES)
    on_gpu = convert(made.path, tmp_path / "gpu", device="cuda:0", shard_bytes=SHARD_BYTES)
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:0")
    assert digest(tmp_path / "cpu") == digest(tmp_path / "gpu")
    with open_converted(tmp_path / "gpu") as converted:
        converted.verify()


def test_the_gpu_is_taken_unless_something_else_is_asked_for(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    assert convert(made.path, tmp_path / "out").device.startswith("cuda:")


def test_a_gpu_that_is_not_there_is_an_error_before_any_work(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    with pytest.raises((DeviceError, ArgumentError)):
        convert(made.path, tmp_path / "out", device="cuda:99")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
