"""``report.md`` and ``report.json``: what was built, what it cost, and what was proved of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import LibraryTestError
from pipeline.files import read_json, write_json, write_text

Json = Mapping[str, Any]

_TEST_COLUMNS = (
    ("tactic", "tactic"),
    ("quant_op", "quant op"),
    ("group", "group"),
    ("m", "M"),
    ("n", "N"),
    ("k", "K"),
    ("bias", "bias"),
)


def write_report(
    run_dir: Path,
    *,
    manifest: Json,
    plan: Json | None = None,
    build: Json | None = None,
    verification: Json | None = None,
) -> None:
    """Write both files into ``run_dir``.

    The arguments are the stages' results as :func:`pipeline.model.to_json` gives them; a stage
    that has not run is left out. ``run_dir/test.json``, if there, adds correctness and timing.
    Equal arguments give equal files.
    """
    report = gather(
        manifest=manifest,
        plan=plan,
        build=build,
        verification=verification,
        test=read_test(run_dir / "test.json"),
    )
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.md", render(report))


def read_test(path: Path) -> Json | None:
    """The results of the test session; None if it has not run."""
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = read_json(path)
        rows = results["rows"]
        if not isinstance(rows, list) or not all("ok" in row and "tactic" in row for row in rows):
            raise ValueError("rows without 'tactic' and 'ok'")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LibraryTestError(
            f"{path} cannot be read: {error}", hint="run the test session again, or delete the file"
        ) from error
    return results


def gather(
    *,
    manifest: Json,
    plan: Json | None,
    build: Json | None,
    verification: Json | None,
    test: Json | None,
) -> dict[str, Any]:
    """Everything that the report says, as data."""
    report: dict[str, Any] = {
        "pipeline": manifest.get("pipeline", ""),
        "release": manifest.get("release", ""),
        "profile": manifest.get("profile", {}).get("name", ""),
        "sources": {
            name: {key: source.get(key, "") for key in ("url", "ref", "commit")}
            for name, source in sorted(manifest.get("sources", {}).items())
            if isinstance(source, Mapping)
        },
        "selection": selection_counts(manifest),
        "bundle": manifest.get("bundle", {}),
    }
    if build is not None:
        report["build"] = {
            key: build[key]
            for key in ("compiler", "cmake", "flags", "jobs", "seconds", "peak_bytes")
        }
        report["units"] = unit_rows(plan, build)
    if verification is not None:
        report["verification"] = {
            "ok": all(check["ok"] for check in verification["checks"]),
            **{
                key: verification[key]
                for key in ("library", "library_bytes", "needed", "exported", "checks")
            },
        }
        report["kernels"] = list(verification["kernels"])
    if test is not None:
        report["test"] = dict(test)
    return report


def selection_counts(manifest: Json) -> dict[str, Any]:
    selected = manifest.get("selected", [])
    gemv = manifest.get("gemv", {})
    families = gemv.get("selected", [])
    decode = manifest.get("decode", {}).get("selected", [])
    return {
        "gemm": len(selected),
        "gemm_by_quant_op": _counted(entry["quant_op"] for entry in selected),
        "tactics": len({entry["tactic"] for entry in selected}),
        "dropped": len(manifest.get("dropped", [])),
        "dropped_by_reason": _counted(entry["reason"] for entry in manifest.get("dropped", [])),
        "ignored_files": len(manifest.get("ignored", [])),
        "gemv_families": len(families),
        "gemv_kernels": sum(len(family["kernels"]) for family in families),
        "gemv_reason": gemv.get("reason", ""),
        "decode_tactics": len(decode),
        "decode_kernels": sum(len(tactic["kernels"]) for tactic in decode),
        "vendored_files": len(manifest.get("vendored", [])),
    }


def unit_rows(plan: Json | None, build: Json) -> list[dict[str, Any]]:
    """Each unit with what was foreseen and what was measured."""
    foreseen = {unit["name"]: unit for unit in plan["units"]} if plan is not None else {}
    rows = []
    for unit in build["units"]:
        guess = foreseen.get(unit["name"], {})
        rows.append(
            {
                "name": unit["name"],
                "members": len(unit["members"]),
                "seconds": unit["seconds"],
                "seconds_predicted": guess.get("seconds"),
                "peak_bytes": unit["peak_bytes"],
                "peak_bytes_predicted": guess.get("peak_bytes"),
            }
        )
    return rows


# --- Markdown ------------------------------------------------------------------------------------


def render(report: Json) -> str:
    """The report as Markdown."""
    parts = [f"# W4A16 kernels of TensorRT-LLM {report['release']}: report", "", *_sources(report)]
    parts += ["", "## Selection", "", *_selection(report["selection"])]
    if "build" in report:
        parts += ["", "## Build", "", *_build(report)]
    if "verification" in report:
        parts += ["", "## Checks", "", *_checks(report["verification"])]
        parts += ["", "## Kernels", "", *_kernels(report["kernels"])]
    if "test" in report:
        parts += ["", "## Correctness", "", *_correctness(report["test"])]
        parts += ["", "## Timing", "", *_timing(report["test"])]
    return "\n".join(parts).rstrip() + "\n"


def _sources(report: Json) -> list[str]:
    rows = [
        (name, source["url"], source["ref"], source["commit"] or "unknown")
        for name, source in report["sources"].items()
    ]
    return [
        f"Pipeline {report['pipeline']}, profile `{report['profile']}`, "
        f"bundle `{report['bundle'].get('digest', '')[:16]}`.",
        "",
        *table(("source", "from", "ref", "commit"), rows),
    ]


def _selection(counts: Json) -> list[str]:
    rows = [
        ("GEMM instantiations kept", counts["gemm"]),
        *((f"… {op}", count) for op, count in counts["gemm_by_quant_op"].items()),
        ("GEMM tactics", counts["tactics"]),
        ("instantiations dropped", counts["dropped"]),
        *((f"… {reason}", count) for reason, count in counts["dropped_by_reason"].items()),
        ("files ignored", counts["ignored_files"]),
        ("GEMV families", counts["gemv_families"]),
        ("GEMV kernels", counts["gemv_kernels"]),
        ("decode tactics", counts["decode_tactics"]),
        ("decode kernels", counts["decode_kernels"]),
        ("files vendored", counts["vendored_files"]),
    ]
    lines = table(("what", "count"), rows)
    if counts["gemv_reason"]:
        lines += ["", f"No GEMV: {counts['gemv_reason']}"]
    return lines


def _build(report: Json) -> list[str]:
    build = report["build"]
    rows = [
        (
            unit["name"],
            unit["members"],
            _number(unit["seconds"], 1),
            _number(unit["seconds_predicted"], 0),
            _gigabytes(unit["peak_bytes"]),
            _gigabytes(unit["peak_bytes_predicted"]),
        )
        for unit in report["units"]
    ]
    head = ("unit", "sources", "s", "s foreseen", "GB", "GB foreseen")
    return [
        f"- compiler: {build['compiler']}",
        f"- CMake {build['cmake']}, {build['jobs']} jobs",
        f"- flags: `{' '.join(build['flags'])}`",
        f"- the last run took {build['seconds']} s; the compilers held at most "
        f"{_gigabytes(build['peak_bytes'])} GB together",
        "",
        *table(head, rows),
    ]


def _checks(verification: Json) -> list[str]:
    rows = [
        ("ok" if check["ok"] else "**FAILED**", check["name"], check["detail"])
        for check in verification["checks"]
    ]
    return [
        f"`{verification['library']}`: {verification['library_bytes']} bytes stripped; needs "
        f"{', '.join(verification['needed']) or 'nothing'}; exports "
        f"{len(verification['exported'])} symbols.",
        "",
        *table(("", "check", "found"), rows),
    ]


def _kernels(kernels: Sequence[Json]) -> list[str]:
    rows = [
        (
            kernel["kernel"],
            kernel["registers"],
            kernel["spill_bytes"],
            kernel["shared_bytes"],
            kernel["code_bytes"],
            ", ".join(f"{name} {count}" for name, count in sorted(kernel["opcodes"].items())),
        )
        for kernel in kernels
    ]
    total = sum(kernel["code_bytes"] for kernel in kernels)
    return [
        f"{len(kernels)} device kernels, {total} bytes of code before compression. Spills are "
        "bytes of local memory a thread; shared memory is the static part, a launch may ask for "
        "more.",
        "",
        *table(("kernel", "registers", "spills", "shared", "code", "opcodes"), rows),
    ]


def _correctness(test: Json) -> list[str]:
    rows = test["rows"]
    failed = [row for row in rows if not row["ok"]]
    lines = [
        f"{test.get('device', 'unknown device')}, driver {test.get('driver', 'unknown')}: "
        f"{len(rows) - len(failed)} of {len(rows)} cases within their limit.",
        "",
    ]
    worst: dict[tuple[Any, ...], tuple[float, Json]] = {}
    for row in rows:
        if row.get("rel_err") is None or not row.get("limit"):
            continue
        key = (row["tactic"], row.get("quant_op", ""), _group(row.get("group")))
        ratio = row["rel_err"] / row["limit"]
        if key not in worst or ratio > worst[key][0]:
            worst[key] = ratio, row
    head = ("tactic", "quant op", "group", "cases", "worst error", "its limit", "at M×N×K", "")
    counts = Counter(
        (row["tactic"], row.get("quant_op", ""), _group(row.get("group"))) for row in rows
    )
    bad = {(row["tactic"], row.get("quant_op", ""), _group(row.get("group"))) for row in failed}
    body = [
        (
            *key,
            counts[key],
            f"{row['rel_err']:.3e}",
            f"{row['limit']:.3e}",
            f"{row.get('m')}×{row.get('n')}×{row.get('k')}",
            "**FAILED**" if key in bad else "ok",
        )
        for key, (_, row) in sorted(worst.items(), key=lambda item: tuple(map(str, item[0])))
    ]
    lines += table(head, body)
    if failed:
        lines += [
            "",
            "Failed cases:",
            "",
            *_rows(failed, (("rel_err", "error"), ("limit", "limit"))),
        ]
    return lines


def _timing(test: Json) -> list[str]:
    timed = [row for row in test["rows"] if row.get("us") is not None]
    if not timed:
        return ["Nothing was timed."]
    columns = (("us", "µs"), ("tflops", "TFLOP/s"), ("gbps", "GB/s"))
    return ["Medians.", "", *_rows(timed, columns)]


def _rows(rows: Sequence[Json], more: Sequence[tuple[str, str]]) -> list[str]:
    columns = [*_TEST_COLUMNS, *more]

    def cell(row: Json, key: str) -> object:
        value = row.get(key)
        if key == "group":
            return _group(value)
        if key == "bias":
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:.3e}" if key in ("rel_err", "limit") else f"{value:.1f}"
        return "" if value is None else value

    return table(
        [title for _, title in columns], [[cell(row, key) for key, _ in columns] for row in rows]
    )


def _group(value: object) -> str:
    return "per column" if value in (0, None, "") else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; a column of numbers is set to the right."""
    body = [[_escaped(cell) for cell in row] for row in rows]
    right = [
        bool(body) and all(_is_number(row[index]) for row in body) for index in range(len(head))
    ]
    widths = [
        max(3, len(title), *(len(row[index]) for row in body)) if body else max(3, len(title))
        for index, title in enumerate(head)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - 1) + ":" if flush else "-" * width
        for width, flush in zip(widths, right, strict=True)
    ]
    return [line(list(head)), line(rule), *map(line, body)]


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == ""
    return True


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
