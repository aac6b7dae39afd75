"""Converting checkpoints: the same bytes as packing directly, whole or absent, going on."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner
from w4a16 import packing
from w4a16.conversion import Run
from w4a16.convert import SHARD_BYTES, Step, convert, open_converted, parse_size, register
from w4a16.converted import Converted, is_converted
from w4a16.errors import (
    ArgumentError,
    DeviceError,
    FormatError,
    W4A16Error,
    W4A16Warning,
)
from w4a16.files import OutputError, sha256_file
from w4a16.library import LIBRARY, Device, QuantOp
from w4a16.partial import claimed

from tests.runtime import killed
from tests.runtime.models import CONFIGS, Model, model, save

module: Any = import_module("w4a16.convert")

FORMATS = tuple(CONFIGS)
SMALL: dict[str, Any] = {"device": "cpu", "threads": 1, "shard_bytes": killed.SHARD_BYTES}


@pytest.fixture(autouse=True)
def _strict() -> Any:
    """No warning that the test does not ask for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the safetensors package reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if one is None or other is None:
        return one is other
    return bool(
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def check_converted(made: Model, target: Path, **options: Any) -> Converted:
    """Against :func:`w4a16.pack`, tensor by tensor, and the source, byte by byte."""
    converted = open_converted(target)
    converted.verify()
    assert set(converted.layers) == set(made.layers)
    stored = contents(target)
    for name, members in made.layers.items():
        tensors = {
            last: value.float().numpy() if isinstance(value, torch.Tensor) else value
            for last, value in members.items()
        }
        expected = packing.pack(tensors, config=made.config, device="cpu", **options)
        found = converted.weight(name)
        layer = converted.layers[name]
        for last in ("packed", "scales", "zeros", "columns", "bias"):
            want = getattr(expected, last)
            assert same(getattr(found, last), want), (name, last)
            if want is not None:
                assert same(stored.pop(f"{name}.{last}").numpy(), want)
        assert (found.in_features, found.out_features) == (
            expected.in_features,
            expected.out_features,
        )
        assert (layer.n, layer.k, layer.groups) == (expected.n, expected.k, expected.groups)
        assert (layer.quant_op, layer.group_size) == (expected.quant_op, expected.group_size)
    assert set(stored) == set(made.others) == set(converted.others())
    for name, value in made.others.items():
        assert stored[name].dtype == value.dtype
        assert stored[name].shape == value.shape
        expected_bytes = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(converted.data(name)) == expected_bytes
    return converted


# ---- What is made ----


@pytest.mark.parametrize("shard_bytes", [1, 150_000, SHARD_BYTES])
@pytest.mark.parametrize("format", FORMATS)
def test_the_result_is_what_packing_each_layer_makes_and_the_rest_unchanged(
    tmp_path: Path, format: str, shard_bytes: int
) -> None:
    made = model(tmp_path / "model", format=format)
    result = convert(made.path, tmp_path / "out", device="cpu", shard_bytes=shard_bytes)
    check_converted(made, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == SHARD_BYTES)
    assert (
        result.bytes_written
        == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
        - (tmp_path / "out" / "w4a16.json").stat().st_size
    )
    assert (result.warnings, result.bytes_kept, result.device) == ((), 0, "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_act_order_symmetric_weights_and_bf16_scales_are_packed_likewise(
    tmp_path: Path, format: str
) -> None:
    config: dict[str, Any] = {}
    if format == "compressed-tensors":
        config = json.loads(json.dumps(CONFIGS[format]))
        config["config_groups"]["group_0"]["weights"] |= {"symmetric": True, "actorder": "group"}
    made = model(
        tmp_path / "model",
        format=format,
        act_order=True,
        symmetric=True,
        scales=torch.bfloat16,
        quantization_config=config,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", W4A16Warning)  # scales that FP16 holds only roughly
        convert(made.path, tmp_path / "out", **SMALL)
        converted = check_converted(made, tmp_path / "out")
    for layer in converted.layers.values():
        assert layer.quant_op is QuantOp.GROUP_SCALE
        assert layer.act_order
        assert layer.columns


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_shapes_that_have_to_be_padded_are(
    tmp_path: Path, format: str, group_size: int, act_order: bool
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    unit = 8 if format == "gptq" else 1
    shapes = {
        f"linear{place}": (rng.randint(8, 300 // unit) * unit, rng.randint(1, 100))
        for place in range(6)
    }
    config: dict[str, Any] = {}
    if format == "compressed-tensors":
        config = json.loads(json.dumps(CONFIGS[format]))
        config["config_groups"]["group_0"]["weights"] |= {
            "group_size": group_size,
            "strategy": "group" if group_size > 0 else "channel",
            "actorder": "group" if act_order else None,
        }
    made = model(
        tmp_path / "model",
        format=format,
        shapes=shapes,
        group_size=group_size,
        act_order=act_order,
        seed=seed,
        quantization_config=config,
    )
    convert(made.path, tmp_path / "out", device="cpu", shard_bytes=50_000)
    converted = check_converted(made, tmp_path / "out")
    for name, layer in converted.layers.items():
        assert (layer.in_features, layer.out_features) == shapes[name.rpartition(".")[2]]


def test_other_files_are_copied_and_the_configuration_names_the_new_method(
    tmp_path: Path,
) -> None:
    made = model(tmp_path / "model")
    (made.path / "quantize_config.json").write_text("{}")
    (made.path / "link.txt").symlink_to(made.path / "tokenizer.json")
    os.mkfifo(made.path / "pipe")
    convert(made.path, tmp_path / "out", **SMALL)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (made.path / "tokenizer.json").read_bytes()
    assert (out / "templates" / "chat.jinja").read_text() == "{{ messages }}"
    assert (out / "link.txt").read_bytes() == (made.path / "tokenizer.json").read_bytes()
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    others = {name for name in names if not name.startswith("model")}
    assert others == {
        "config.json",
        "generation_config.json",
        "link.txt",
        "templates/chat.jinja",
        "tokenizer.json",
        "w4a16.json",
    }
    before = json.loads((made.path / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after.pop("quantization_config") == {
        "quant_method": "w4a16",
        "bits": 4,
        "format_version": 1,
        "layout": "sm_90",
        "manifest": "w4a16.json",
    }
    del before["quantization_config"]
    assert after == before
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = contents(out)
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)


def test_the_manifest_tells_files_sources_and_layers(tmp_path: Path) -> None:
    made = model(tmp_path / "model", act_order=True)
    convert(made.path, tmp_path / "out", **SMALL)
    manifest = json.loads((tmp_path / "out" / "w4a16.json").read_text())
    assert manifest["format"] == "w4a16"
    assert (manifest["format_version"], manifest["layout"]) == (1, "sm_90")
    assert manifest["package_version"] == LIBRARY.build.version
    assert manifest["library_digest"] == LIBRARY.build.bundle_digest
    assert manifest["source"]["method"] == "gptq"
    assert manifest["source"]["quantization_config"] == made.config
    for name, record in manifest["source"]["files"].items():
        path = made.path / name
        assert record["sha256"] == sha256_file(path)
        assert record["bytes"] == path.stat().st_size
        assert record["mtime_ns"] == path.stat().st_mtime_ns
    found = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert set(manifest["files"]) == found - {"w4a16.json", "templates"}
    layer = manifest["layers"]["model.layers.0.mlp.down_proj"]
    assert layer.pop("file").startswith("model-0000")
    assert layer == {
        "in_features": 384,
        "out_features": 256,
        "n": 256,
        "k": 384,
        "group_size": 128,
        "quant_op": "group_scale_zero",
        "act_order": True,
        "columns": True,
        "bias": False,
        "zeros": True,
        "warnings": [],
    }


def test_the_same_model_makes_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    convert(made.path, tmp_path / "one", **SMALL)
    convert(made.path, tmp_path / "two", **{**SMALL, "threads": 3})
    assert killed.digest(tmp_path / "one") == killed.digest(tmp_path / "two")


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    steps: list[Step] = []
    result = convert(made.path, tmp_path / "out", progress=steps.append, **SMALL)
    assert (steps[0].bytes_done, steps[0].layers_done) == (0, 0)
    done = [(step.layers_done, step.bytes_done) for step in steps]
    assert done == sorted(done)
    assert done[-1] == (steps[-1].layers, steps[-1].bytes) == (len(made.layers), result.bytes_read)
    assert {step.what for step in steps} == {*made.layers, *made.others, ""}


def test_files_that_are_too_large_to_be_small_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    monkeypatch.setattr(module, "_LARGEST_COPY", 14)
    with pytest.warns(W4A16Warning, match="not copied, being large: tokenizer.json"):
        convert(made.path, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_warnings_are_given_once_with_their_layers_and_kept_in_the_manifest(
    tmp_path: Path,
) -> None:
    made = model(tmp_path / "model", symmetric=True)
    tensors = dict(made.others)
    for place, (name, members) in enumerate(made.layers.items()):
        if place in (1, 5):
            members["scales"][place % 2, place] = np.nan
        members["qzeros"] = np.full_like(members["qzeros"], -0x77777778)  # 8, as v2 has it
        tensors |= {f"{name}.{t}": torch.from_numpy(np.array(v)) for t, v in members.items()}
    for old in made.path.glob("*.safetensors*"):
        old.unlink()
    save(made.path, tensors, 2)
    with pytest.warns(W4A16Warning) as caught:
        result = convert(made.path, tmp_path / "out", **SMALL)
    assert tuple(str(warning.message) for warning in caught) == result.warnings
    nans, versions = sorted(result.warnings, key=lambda text: "gptq_v2" in text)
    assert nans.startswith("2 layers (model.layers.")
    assert "NaN" in nans
    assert versions.startswith(f"{len(made.layers)} layers (model.layers.")
    assert f"and {len(made.layers) - 3} more" in versions
    assert "read as v2" in versions
    layers = result.manifest.layers
    assert sum(any("NaN" in text for text in layer.warnings) for layer in layers.values()) == 2
    with pytest.warns(W4A16Warning):
        convert(made.path, tmp_path / "v1", zero_points="v1", **SMALL)
    assert next(iter(open_converted(tmp_path / "v1").layers.values())).zeros


# ---- Whole or absent; going on ----


def program(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.runtime.killed", *arguments]
    paths = os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_anywhere_and_started_again_it_makes_the_same(
    tmp_path: Path, replaces: bool
) -> None:
    made = model(tmp_path / "model")
    convert(made.path, tmp_path / "expected", **SMALL)
    expected = killed.digest(tmp_path / "expected")
    paths = [str(made.path), str(tmp_path / "out"), "-"]
    if replaces:
        other = model(tmp_path / "other", seed=2)
        convert(other.path, tmp_path / "replaced", **SMALL)
        paths[-1] = str(tmp_path / "replaced")
    (count,) = program(*paths, "0")
    changes = int(count["ends"][0].split()[1])
    seed = random.randrange(2**32)
    print(f"seed {seed}, {changes} changes")
    rng = random.Random(seed)
    # The last changes put the result in its place and clean up.
    moments = {*rng.sample(range(1, changes + 1), 16), *range(changes - 11, changes + 1)}
    series = [str(moment) for moment in sorted(moments)]
    series += ["+".join(str(rng.randint(1, changes)) for _ in range(4)) for _ in range(4)]
    for found in program(*paths, *series):
        assert found["digest"] == expected, found
        assert not found["torn"], found
        assert not found["left"], found
        assert found["ends"][0] == "killed", found
        assert found["ends"][-1].startswith("done"), found


def test_a_run_that_reports_after_its_last_change_is_not_killed(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    paths = [str(made.path), str(tmp_path / "out"), "-"]
    (whole,) = program(*paths, "0")
    changes = int(whole["ends"][0].split()[1])
    last, after = program(*paths, str(changes), str(changes + 1))
    # A trace of the first run is left, and the second one finishes what it had begun.
    assert [end.split()[0] for end in last["ends"]] == ["killed", "done"], last
    # No trace would be left: OUT would be in the way of a second run.
    assert after["ends"] == whole["ends"], after


def test_killed_from_outside_at_random_times_it_goes_on(tmp_path: Path) -> None:
    made = model(tmp_path / "model", blocks=6)
    target = tmp_path / "out"
    convert(made.path, tmp_path / "expected", **SMALL)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    code = (
        "import sys; from w4a16.convert import convert; print('ready', flush=True);"
        f"convert(sys.argv[1], sys.argv[2], **{SMALL!r})"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    kills = 0
    for _ in range(100):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(made.path), str(target)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        if kills < 12:
            time.sleep(rng.uniform(0, 0.06))
            process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if process.returncode == 0:
            break
        assert not target.exists() or is_converted(target)
    print(f"killed {kills} times")
    assert killed.digest(target) == killed.digest(tmp_path / "expected")
    assert not (tmp_path / "out.partial").exists()


def interrupted(made: Model, target: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> int:
    """Lets packing fail at a layer; how many shards are finished."""
    packed = packing.pack
    calls = [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return packed(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", failing)
        with pytest.raises(KeyboardInterrupt):
            convert(made.path, target, **SMALL)
    assert not target.exists()
    return len(list(target.with_name("out.partial").glob("shard-*.json")))


def count_packing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    packed = packing.pack
    calls = [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return packed(*arguments, **options)

    monkeypatch.setattr(packing, "pack", counting)
    return calls


def test_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(tmp_path / "model")
    target = tmp_path / "out"
    assert interrupted(made, target, monkeypatch, after=6) >= 1
    calls = count_packing(monkeypatch)
    result = convert(made.path, target, **SMALL)
    assert calls[0] < len(made.layers)
    assert result.bytes_kept > 0
    check_converted(made, target)
    convert(made.path, tmp_path / "direct", **SMALL)
    assert killed.digest(target) == killed.digest(tmp_path / "direct")


def test_an_interruption_before_anything_is_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    interrupted(made, tmp_path / "out", monkeypatch, after=0)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("harm", ["content", "length", "record", "no record", "absent", "job"])
def test_what_was_harmed_since_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    made = model(tmp_path / "model")
    target = tmp_path / "out"
    interrupted(made, target, monkeypatch, after=6)
    work = tmp_path / "out.partial"
    record = next(work.glob("shard-*.json"))
    shard = work / "out" / json.loads(record.read_text())["file"]
    if harm == "content":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif harm == "length":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "record":
        record.write_text(record.read_text()[:-30])
    elif harm == "no record":
        record.unlink()
    elif harm == "absent":
        shard.unlink()
    else:
        (work / "job.json").write_text("{")
    (work / "out" / "stray.txt").write_text("not of the model")
    convert(made.path, target, **SMALL)
    check_converted(made, target)
    assert not (target / "stray.txt").exists()


def test_a_partial_of_other_inputs_is_started_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    target = tmp_path / "out"
    interrupted(made, target, monkeypatch, after=6)
    with pytest.warns(W4A16Warning, match=r"other inputs or options \(shard_bytes: 150000 then"):
        convert(made.path, target, **{**SMALL, "shard_bytes": 160_000})
    check_converted(made, target)
    shutil.rmtree(target)
    interrupted(made, target, monkeypatch, after=6)
    (made.path / "model-00002-of-00003.safetensors").touch()
    with pytest.warns(W4A16Warning, match=r"\(model-00002-of-00003.safetensors\): started anew"):
        convert(made.path, target, **SMALL)
    check_converted(made, target)


def test_two_conversions_into_the_same_folder_exclude_each_other(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    with claimed(tmp_path / "out") as partial:
        with pytest.raises(ArgumentError, match=rf"another conversion \(process {os.getpid()}\)"):
            convert(made.path, tmp_path / "out", **SMALL)
        partial.discard()
    convert(made.path, tmp_path / "out", **SMALL)
    check_converted(made, tmp_path / "out")


@pytest.mark.parametrize("after", [0, 100, 20_000, 180_000, 300_000, 450_000])
def test_a_full_disk_leaves_no_target_and_a_clear_message_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    made = model(tmp_path / "model")
    target = tmp_path / "out"
    really = os.write
    budget = [after]

    def scarce(descriptor: int, data: Any) -> int:
        if budget[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = really(descriptor, memoryview(data)[: max(1, min(len(data), budget[0]))])
        budget[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", scarce)
        with pytest.raises(OutputError, match=r"cannot write .*: No space left on device") as error:
            convert(made.path, target, **SMALL)
    assert not target.exists()
    work = tmp_path / "out.partial"
    if after < 100_000:
        assert not work.exists()
    else:
        assert f"is kept in {work}: make room and convert again" in str(error.value)
        finished = {json.loads(p.read_text())["file"] for p in work.glob("shard-*.json")}
        assert {path.name for path in (work / "out").iterdir()} <= finished
    convert(made.path, target, **SMALL)
    check_converted(made, target)


def test_a_limit_on_the_size_of_files_is_a_clear_error(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        "from w4a16.convert import convert; convert(sys.argv[1], sys.argv[2], device='cpu')"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert "OutputError: cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OutputError, match=r"out needs 17\.\d\d MB, but 1\.00 MB are free on the disk of"
    ):
        convert(made.path, tmp_path / "out", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_source_that_changes_meanwhile_makes_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    packed = packing.pack

    def changing(*arguments: Any, **options: Any) -> Any:
        (made.path / "model-00003-of-00003.safetensors").touch()
        return packed(*arguments, **options)

    monkeypatch.setattr(packing, "pack", changing)
    with pytest.raises(FormatError, match=r"00003-of-00003.safetensors was changed while it was"):
        convert(made.path, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


# ---- What is in the way ----


@pytest.mark.parametrize("exchange", [True, False])
def test_a_converted_folder_is_replaced_only_if_asked_and_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(import_module("w4a16.partial"), "_exchange", lambda *_: False)
    one, two = model(tmp_path / "one"), model(tmp_path / "two", seed=2)
    out = tmp_path / "out"
    convert(one.path, out, **SMALL)
    with pytest.raises(ArgumentError, match=r"out exists: .*overwrite=True \(--overwrite\)"):
        convert(two.path, out, **SMALL)
    with pytest.raises(ArgumentError, match="exists"):
        convert(one.path, out, **SMALL)
    check_converted(one, out)
    convert(two.path, out, overwrite=True, **SMALL)
    check_converted(two, out)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "out"}


@pytest.mark.parametrize("damage", ["a file of the user's", "a manifest that is none"])
def test_a_folder_with_what_convert_did_not_write_is_never_replaced(
    tmp_path: Path, damage: str
) -> None:
    made = model(tmp_path / "model")
    out = tmp_path / "out"
    if damage == "a manifest that is none":
        out.mkdir()
        (out / "w4a16.json").write_text("{}")
    else:
        convert(made.path, out, **SMALL)
        (out / "notes").mkdir()
        (out / "notes" / "mine.txt").write_text("precious")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(
        ArgumentError, match=r"exists, and (holds notes/mine.txt|what it holds is not known)"
    ):
        convert(made.path, out, overwrite=True, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_failed_replacement_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two", seed=2)
    out = tmp_path / "out"
    convert(one.path, out, **SMALL)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OutputError("no")

    monkeypatch.setattr(Run, "_complete", refuse)
    with pytest.raises(OutputError):
        convert(two.path, out, overwrite=True, **SMALL)
    check_converted(one, out)


def test_a_folder_taken_away_in_a_swap_that_was_killed_is_put_back(tmp_path: Path) -> None:
    made, other = model(tmp_path / "model"), model(tmp_path / "other", seed=2)
    out = tmp_path / "out"
    convert(made.path, out, **SMALL)
    with claimed(out):
        out.rename(tmp_path / "out.partial" / "old")
    with pytest.raises(ArgumentError, match="exists"):
        convert(other.path, out, **SMALL)
    check_converted(made, out)
    convert(other.path, out, overwrite=True, **SMALL)
    check_converted(other, out)
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_folder_is_filled_and_a_foreign_one_is_not_touched(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    convert(made.path, tmp_path / "out", **SMALL)
    check_converted(made, tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(ArgumentError, match="w4a16 convert did not make it"):
        convert(made.path, tmp_path / "home", overwrite=True, **SMALL)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "letters.txt").write_text("dear")
    with pytest.raises(ArgumentError, match=r"new.partial holds 'letters.txt'"):
        convert(made.path, tmp_path / "new", **SMALL)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
    assert (tmp_path / "new.partial" / "letters.txt").read_text() == "dear"


def test_folders_inside_each_other_are_refused(tmp_path: Path) -> None:
    made = model(tmp_path / "a" / "model")
    (tmp_path / "link").symlink_to(made.path)
    for target in (
        made.path,
        made.path / "out",
        made.path / "x" / "y",
        tmp_path / "link",
        tmp_path / "link" / "out",
        tmp_path / "a",
    ):
        with pytest.raises(ArgumentError, match=r"is in the folder of the model|, is in "):
            convert(made.path, target, **SMALL)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("file", "dangling"):
        with pytest.raises(ArgumentError, match="exists and is no folder"):
            convert(made.path, tmp_path / name, **SMALL)
    with pytest.raises(FormatError, match="is no folder"):
        convert(tmp_path / "absent", tmp_path / "out", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link", "file", "dangling"}


def test_a_tensor_with_the_name_of_a_packed_one_is_refused(tmp_path: Path) -> None:
    made = model(tmp_path / "model", shards=1)
    tensors = load_file(made.path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.packed"
    save(made.path, {**tensors, name: torch.zeros(3)}, 1)
    with pytest.raises(FormatError, match=f"{name} is both"):
        convert(made.path, tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": True}, "device is True"),
        ({"device": "cuda:x"}, "device is 'cuda:x'"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"shard_bytes": 1.5}, "shard_bytes is 1.5"),
        ({"threads": -1}, "threads is -1"),
        ({"zero_points": "v3"}, "^zero_points is 'v3'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    made = model(tmp_path / "model")
    with pytest.raises(ArgumentError, match=message):
        convert(made.path, tmp_path / "out", **{"device": "cpu", **options})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_zero_points_are_an_option_of_gptq_only(tmp_path: Path) -> None:
    made = model(tmp_path / "model", format="awq")
    with pytest.raises(ArgumentError, match="only GPTQ has two ways"):
        convert(made.path, tmp_path / "out", zero_points="v2", **SMALL)


def test_an_error_in_a_layer_names_it(tmp_path: Path) -> None:
    made = model(tmp_path / "model", shards=1, act_order=True)
    tensors = load_file(made.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 77
    save(made.path, tensors, 1)
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj: g_idx holds 77"):
        convert(made.path, tmp_path / "out", **SMALL)


def test_a_gpu_that_was_not_asked_for_and_fails_is_left_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(tmp_path / "model")
    packed = packing.pack

    def busy(*arguments: Any, **options: Any) -> Any:
        if options["device"] != "cpu":
            raise DeviceError("out of memory")
        return packed(*arguments, **options)

    monkeypatch.setattr(packing, "pack", busy)
    found = Device(
        device=0, cc_major=9, cc_minor=0, sm_count=132, driver_version=13000, name="", problem=""
    )
    monkeypatch.setattr(type(LIBRARY), "device", lambda *_: found)
    monkeypatch.setattr(type(LIBRARY), "check_device", lambda *_: None)
    with pytest.raises(DeviceError, match=r"model.layers.*: out of memory"):
        convert(made.path, tmp_path / "out", device="cuda:0")
    result = convert(made.path, tmp_path / "out")
    assert result.device == "cpu"
    check_converted(made, tmp_path / "out")


# ---- Reading what was made ----


def edited(target: Path, edit: Any) -> None:
    path = target / "w4a16.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


LAYER = "model.layers.0.mlp.up_proj"
TAMPERED: dict[str, tuple[Any, str]] = {
    "a later version": (lambda m: m.update(format_version=2), "format version 2"),
    "another layout": (lambda m: m.update(layout="sm_80"), "layout 'sm_80'"),
    "another file": (lambda m: m.update(format="x"), "is no manifest"),
    "no layers": (lambda m: m.pop("layers"), "layers is no JSON object"),
    "a layer that is a list": (lambda m: m["layers"].update({LAYER: []}), "no JSON object"),
    "a path": (lambda m: m["layers"][LAYER].update(file="../x"), "without a folder"),
    "an absolute path": (lambda m: m["layers"][LAYER].update(file="/etc/x"), "without a folder"),
    "a negative size": (lambda m: m["layers"][LAYER].update(n=-8), "do not fit together"),
    "sizes that do not fit": (lambda m: m["layers"][LAYER].update(k=100), "do not fit together"),
    "a group that does not divide": (
        lambda m: m["layers"][LAYER].update(group_size=100),
        "do not fit together",
    ),
    "a group of 0 with zeros": (
        lambda m: m["layers"][LAYER].update(group_size=0),
        "do not fit together",
    ),
    "an unknown op": (lambda m: m["layers"][LAYER].update(quant_op="x"), "quant_op is 'x'"),
    "a boolean size": (lambda m: m["layers"][LAYER].update(n=True), "n is True: expected int"),
    "a number for a flag": (lambda m: m["layers"][LAYER].update(bias=1), "bias is 1"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_manifest_that_is_not_right_is_refused(tmp_path: Path, case: str) -> None:
    made = model(tmp_path / "model")
    convert(made.path, tmp_path / "out", **SMALL)
    edit, message = TAMPERED[case]
    edited(tmp_path / "out", edit)
    with pytest.raises(FormatError, match=message):
        open_converted(tmp_path / "out")


def test_tensors_that_are_not_as_the_manifest_says_are_refused(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    out = tmp_path / "out"
    convert(made.path, out, **SMALL)
    with pytest.raises(FormatError, match="has no layer 'x'"):
        open_converted(out).weight("x")
    with pytest.raises(FormatError, match="has no tensor 'x'"):
        open_converted(out).data("x")
    edited(out, lambda m: m["layers"][LAYER].update(n=512))
    with pytest.raises(FormatError, match=rf"{LAYER}.packed is U8 \[384, 128\]: expected U8 \[512"):
        open_converted(out).weight(LAYER)
    file = open_converted(out).layers[LAYER].file
    data = bytearray((out / file).read_bytes())
    data[-1] ^= 1
    (out / file).write_bytes(data)
    with pytest.raises(FormatError, match=f"{file} is not as it was written"):
        open_converted(out).verify()
    (out / file).unlink()
    with pytest.raises(FormatError, match=f"{file} cannot be read"):
        open_converted(out).weight(LAYER)
    with pytest.raises(FormatError, match="made by w4a16 convert: there is nothing to do"):
        convert(out, tmp_path / "again")
    with pytest.raises(FormatError, match=r"has no w4a16.json"):
        open_converted(made.path)


def test_the_command_verify_reads_every_file_and_names_the_one_that_changed(
    tmp_path: Path,
) -> None:
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    made = model(tmp_path / "model")
    out = tmp_path / "out"
    convert(made.path, out, **SMALL)
    app = typer.Typer()
    app.callback()(lambda: None)
    import_module("w4a16.verify").register(app)
    done = testing.CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 0, done.output
    assert f"{len(open_converted(out).manifest.files)} files are as they were" in done.output
    file = out / open_converted(out).layers[LAYER].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = testing.CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 1  # not 2, as for a folder that is none
    assert f"{file.name} is not as it was written" in done.output


def test_weights_stay_valid_after_closing(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    convert(made.path, tmp_path / "out", **SMALL)
    with open_converted(tmp_path / "out") as converted:
        weight = converted.weight(LAYER)
        before = weight.packed.copy()
        converted.release(LAYER)
        converted.release("lm_head.weight")
    np.testing.assert_array_equal(weight.packed, before)


# ---- The command ----


def command(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["convert", *arguments])


def test_the_command_converts_and_reports(tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    result = command(str(made.path), str(tmp_path / "out"), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: {len(made.layers)} layers, " in result.output
    check_converted(made, tmp_path / "out")
    result = command(str(made.path), str(tmp_path / "out"), "--device", "cpu")
    assert isinstance(result.exception, W4A16Error)
    result = command(
        *(str(made.path), str(tmp_path / "out"), "--overwrite", "--json", "--device", "cpu"),
        *("--shard-size", "150 kB", "--threads", "1"),
    )
    report = json.loads(result.output)
    assert report["layers"] == len(made.layers)
    assert report["path"] == str(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("2k", 2000), ("1TB", 10**12)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 GiB", "1e9", "nan"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"--shard-size is .*expected a number of bytes"):
        parse_size(text)
    with pytest.raises(ArgumentError, match="--shard-size is '0': expected 1 byte to 2"):
        parse_size("0")
    with pytest.raises(ArgumentError, match=r"expected 1 byte to 2\*\*63"):
        parse_size("9" * 400)
