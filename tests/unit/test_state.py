"""What a stage leaves: skipped when nothing changed, made again when anything did."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import state
from pipeline.files import write_text
from pipeline.model import GeneratedTree
from pipeline.state import Stages


@dataclass(frozen=True, kw_only=True)
class Cake:
    layers: tuple[int, ...]
    name: str


class Kitchen:
    """Stage *bake*, which counts how often it is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self.said: list[str] = []

    def make(self) -> Cake:
        self.made += 1
        write_text(self.folder / "out" / "cake.txt", "cake")
        write_text(self.folder / "recipe.txt", "flour")
        return Cake(layers=(1, 2), name="cake")

    def bake(self, outputs: tuple[str, ...] = ("out", "recipe.txt"), **inputs: Any) -> Cake:
        return Stages(self.folder, self.said.append).run(
            "bake",
            Cake,
            self.make,
            inputs=inputs or {"flour": 1},
            outputs=tuple(self.folder / name for name in outputs),
        )

    @property
    def stamp(self) -> Path:
        return self.folder / ".state" / "bake.json"


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


def test_a_stage_whose_inputs_did_not_change_is_skipped_and_says_so(kitchen: Kitchen) -> None:
    first = kitchen.bake()
    assert kitchen.said == []
    assert kitchen.bake() == first == Cake(layers=(1, 2), name="cake")
    assert kitchen.made == 1
    assert kitchen.said == ["bake: unchanged, skipped"]


def test_a_stage_is_made_again_when_an_input_changes(kitchen: Kitchen) -> None:
    kitchen.bake(flour=1, cake=Cake(layers=(), name="a"))
    kitchen.bake(flour=2, cake=Cake(layers=(), name="a"))
    kitchen.bake(flour=2, cake=Cake(layers=(3,), name="a"))
    kitchen.bake(flour=2, cake=Cake(layers=(3,), name="a"), sugar=None)
    assert kitchen.made == 4


def test_the_order_of_inputs_does_not_matter(kitchen: Kitchen) -> None:
    kitchen.bake(flour=1, sugar={"a": 1, "b": 2})
    kitchen.bake(sugar={"b": 2, "a": 1}, flour=1)
    assert kitchen.made == 1


@pytest.mark.parametrize("damage", ["change", "remove", "add", "remove folder", "file", "rename"])
def test_a_damaged_output_is_noticed_and_remade(kitchen: Kitchen, damage: str) -> None:
    kitchen.bake()
    cake, recipe = kitchen.folder / "out" / "cake.txt", kitchen.folder / "recipe.txt"
    if damage == "change":
        cake.write_text("cakf")
    elif damage == "remove":
        cake.unlink()
    elif damage == "add":
        (cake.parent / "fly").write_text("")
    elif damage == "remove folder":
        cake.unlink()
        cake.parent.rmdir()
    elif damage == "file":
        recipe.write_text("")
    else:
        cake.rename(cake.with_name("pie.txt"))
    kitchen.bake()
    assert kitchen.made == 2
    assert "missing or damaged" in kitchen.said[0]
    assert cake.read_text() == "cake"


def test_other_outputs_than_before_are_noticed(kitchen: Kitchen) -> None:
    kitchen.bake(outputs=("out",))
    kitchen.bake(outputs=("out", "recipe.txt"))
    assert kitchen.made == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '{"stage": "bake"}', "\udcff\udcfe", "[" * 100_000, "{}" * 3],
    ids=range(8),
)
def test_a_damaged_stamp_is_no_stamp(kitchen: Kitchen, text: str) -> None:
    kitchen.bake()
    kitchen.stamp.write_bytes(text.encode(errors="surrogateescape"))
    assert Stages(kitchen.folder, print).last("bake", Cake) is None
    assert kitchen.bake().name == "cake"
    assert kitchen.made == 2


def test_a_changed_result_in_the_stamp_is_noticed(kitchen: Kitchen) -> None:
    kitchen.bake()
    kitchen.stamp.write_text(kitchen.stamp.read_text().replace('"cake"', '"pie"'))
    assert Stages(kitchen.folder, print).last("bake", Cake) is None
    assert kitchen.bake().name == "cake"


def test_a_result_of_an_older_shape_is_made_again(kitchen: Kitchen) -> None:
    kitchen.bake()
    stamp = state.Stamp.model_validate(json.loads(kitchen.stamp.read_text()))
    older = stamp.model_copy(update={"result": {"name": "cake"}})
    sealed = older.model_copy(update={"digest": state._digest_of(older)})
    kitchen.stamp.write_text(json.dumps(sealed.model_dump()))
    assert Stages(kitchen.folder, print).last("bake", Cake) is None
    assert kitchen.bake().layers == (1, 2)
    assert kitchen.made == 2


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_stage_that_fails_leaves_no_stamp(
    kitchen: Kitchen, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Cake:
        raise fault

    kitchen.bake()
    make = kitchen.make
    monkeypatch.setattr(kitchen, "make", fail)
    with pytest.raises(fault):
        kitchen.bake(flour=2)
    assert not kitchen.stamp.exists()
    monkeypatch.setattr(kitchen, "make", make)
    kitchen.bake(flour=1)
    assert kitchen.made == 2


_KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.state import Stages

def die():
    (Path(sys.argv[1]) / "out" / "cake.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
outputs = (folder / "out", folder / "recipe.txt")
Stages(folder, print).run("bake", dict, die, inputs={"flour": 2}, outputs=outputs)
"""


def test_a_stage_killed_while_it_is_made_is_made_again(kitchen: Kitchen) -> None:
    kitchen.bake()
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(kitchen.folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not kitchen.stamp.exists()
    kitchen.bake(flour=1)
    assert kitchen.made == 2
    assert (kitchen.folder / "out" / "cake.txt").read_text() == "cake"


def test_the_last_result_is_known_whatever_it_was_made_from(kitchen: Kitchen) -> None:
    stages = Stages(kitchen.folder, print)
    assert stages.last("bake", Cake) is None
    cake = kitchen.bake(flour=9)
    assert stages.last("bake", Cake) == cake


def test_results_of_the_pipeline_survive_the_way_to_disk(
    tmp_path: Path, generated: GeneratedTree
) -> None:
    stages = Stages(tmp_path, print)
    made = stages.run("generate", GeneratedTree, lambda: generated, inputs={})
    found = stages.run("generate", GeneratedTree, lambda: replace(generated, files={}), inputs={})
    assert made == found == generated


@pytest.mark.parametrize("path", ["pipeline/a.py", "templates/x/b.j2", "kernels/c.cuh"])
def test_a_change_of_the_pipeline_itself_changes_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(state, "_ROOT", tmp_path)
    for name in ("pipeline/a.py", "templates/x/b.j2", "kernels/c.cuh"):
        write_text(tmp_path / name, "one")
    before = state.code_digest()
    write_text(tmp_path / "pipeline" / "__pycache__" / "a.pyc", "two")
    assert state.code_digest() == before
    write_text(tmp_path / path, "two")
    assert state.code_digest() != before
