"""Plots of a result: time against M for each shape, fraction of the floor, ratio to the best peer.

matplotlib is loaded when something is drawn, and draws into files only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import tables
from benchmarks.suite.errors import Missing
from benchmarks.suite.results import CaseResult, Mode, Result
from benchmarks.suite.tables import Pick


def figures_or(command: str) -> Any:
    """matplotlib's Figure; raises :class:`Missing` with the command that draws elsewhere."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Missing(
            f"matplotlib cannot be imported ({error}); on a machine that has it: {command}"
        ) from None
    return Figure


def draw(result: Result, folder: Path) -> list[Path]:
    """The files drawn; raises :class:`Missing` without matplotlib."""
    figure_type = figures_or(f"python -m benchmarks.suite.report {folder / 'result.json'}")
    kinds = tables.quantisations(result)
    if not kinds:
        return []
    group, zeros = (128, False) if (128, False) in kinds else kinds[0]
    rows = tables.with_rows(result, group, zeros)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "time.png": _times(figure_type, result, group, zeros),
        "floor.png": _fractions(figure_type, result, rows),
        "ratio.png": _ratios(figure_type, result, rows),
    }
    written = []
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)
    return written


def _contenders(result: Result) -> list[tuple[str, Pick, str]]:
    """Names, who they are, and the styles of their lines."""
    return [
        ("best, with dependent launch", tables.ours, "C0-o"),
        ("best, plain", tables.ours_plain, "C0--s"),
        ("auto", tables.auto, "C1-^"),
        ("upstream", tables.upstream, "C2-v"),
        *(
            (name, tables.peer(name), f"C{3 + i}-x")
            for i, name in enumerate(tables.peers_of(result))
        ),
    ]


def _mode(cases: Sequence[CaseResult]) -> Mode:
    """Sustained where it was measured for all of them."""
    return "sustained" if all(tables.ours(case, "sustained") for case in cases) else "burst"


def _times(new: Any, result: Result, group: int, zeros: bool) -> Any:
    weights = {
        weight: cases
        for weight, cases in tables.by_weight(result).items()
        if (weight.group, weight.zeros) == (group, zeros)
    }
    columns = min(3, len(weights))
    lines = -(-len(weights) // columns)
    figure = new(figsize=(5.2 * columns, 4.2 * lines), layout="constrained")
    figure.suptitle(f"{_device(result)}: microseconds of a launch, burst")
    grid = figure.subplots(lines, columns, squeeze=False)
    flat = [axes for row in grid for axes in row]
    for axes, (weight, cases) in zip(flat, weights.items(), strict=False):
        rows = [case.case.m for case in cases]
        floor = [result.floor(case.case, "burst") or math.nan for case in cases]
        axes.plot(rows, floor, "k:", label="floor")
        for name, pick, style in _contenders(result):
            us = [tables.microseconds(case, "burst", pick) for case in cases]
            if not all(map(math.isnan, us)):
                axes.plot(rows, us, style, label=name, markersize=4, linewidth=1)
        _rows_axis(axes, rows)
        axes.set_yscale("log")
        axes.set_title(f"{weight.n} x {weight.k}, {weight.quantisation}", fontsize=9)
        axes.set_ylabel("us")
        axes.grid(True, which="both", alpha=0.2)
    for axes in flat[len(weights) :]:
        axes.set_visible(False)
    flat[0].legend(fontsize=7)
    return figure


def _fractions(new: Any, result: Result, rows: dict[int, list[CaseResult]]) -> Any:
    figure = new(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, pick, style in _contenders(result):
        means = [
            tables.mean(tables.of_floor(result, case, _mode(cases), pick) for case in cases).value
            for cases in rows.values()
        ]
        if not all(map(math.isnan, means)):
            axes.plot(list(rows), means, style, label=name, markersize=5, linewidth=1.2)
    axes.axhline(1.0, color="k", linestyle=":", linewidth=1)
    axes.set_ylabel("fraction of the floor, geometric mean over shapes")
    axes.set_ylim(0, 1.1)
    return _finished(figure, axes, result, list(rows))


def _ratios(new: Any, result: Result, rows: dict[int, list[CaseResult]]) -> Any:
    figure = new(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, pick, style in _contenders(result)[:3]:
        points: list[tuple[int, float, float, float]] = []
        for m, cases in rows.items():
            mode = _mode(cases)
            found = [tables.against(case, mode, pick, tables.best_peer) for case in cases]
            there = [ratio for ratio in found if not math.isnan(ratio)]
            if there:
                points.append((m, tables.mean(there).value, min(there), max(there)))
        if points:
            ms = [point[0] for point in points]
            axes.plot(ms, [p[1] for p in points], style, label=name, markersize=5, linewidth=1.2)
            axes.fill_between(
                ms, [p[2] for p in points], [p[3] for p in points], color=style[:2], alpha=0.1
            )
    axes.axhline(1.0, color="k", linestyle=":", linewidth=1)
    axes.set_ylabel("times faster than the best peer (band: all shapes)")
    return _finished(figure, axes, result, list(rows))


def _rows_axis(axes: Any, rows: Sequence[int]) -> None:
    """M, by powers of two, with those M that were measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), labels=[str(m) for m in rows], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("M")


def _finished(figure: Any, axes: Any, result: Result, rows: Sequence[int]) -> Any:
    axes.set_title(f"{_device(result)} (sustained where measured, otherwise burst)", fontsize=10)
    _rows_axis(axes, rows)
    axes.grid(True, which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def _device(result: Result) -> str:
    return str(result.environment.get("device", "a GPU"))
