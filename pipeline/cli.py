"""The command line: ``python -m pipeline STAGE``, the same options for every stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline import flow
from pipeline.console import Reporter
from pipeline.errors import ForgeError
from pipeline.flow import Options
from pipeline.git import parse_location
from pipeline.process import terminable
from pipeline.toolchain import Mode

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode=None,
)

Config = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="Profile: what to extract and build.")
]
TrtLlm = Annotated[
    str | None,
    typer.Option(
        "--trtllm",
        metavar="SRC[@REF]",
        help="TensorRT-LLM: a git URL or a local repository (bare or not), and a tag, branch or "
        "commit. Default: as the profile says.",
    ),
]
Cutlass = Annotated[
    str | None,
    typer.Option(
        "--cutlass",
        metavar="SRC[@REF]",
        help="CUTLASS, likewise. Default REF: what the release pins.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Folder of the run. Default: artifacts/PROFILE/RELEASE."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Compilers at a time. Default: from cores and memory."),
]
Memory = Annotated[
    float | None,
    typer.Option("--memory", metavar="GB", min=1.0, help="Memory that compilers may fill."),
]
Toolchain = Annotated[
    str,
    typer.Option(
        "--toolchain",
        metavar="auto|system|pypi",
        help="Whose CUDA compiler: the machine's, the Python package index's, or the first of "
        "these that works.",
    ),
]
Vendor = Annotated[
    Path,
    typer.Option("--vendor", metavar="DIR", help="Folder of the upstream checkouts and the lock."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the commands that are run.")]


def _options(
    config: Path,
    trtllm: str | None,
    cutlass: str | None,
    out: Path | None,
    jobs: int | None,
    memory: float | None,
    toolchain: str,
    vendor: Path,
    verbose: bool,
) -> Options:
    modes: dict[str, Mode] = {"auto": "auto", "system": "system", "pypi": "pypi"}
    if toolchain not in modes:
        raise typer.BadParameter(
            f"{toolchain!r} is none of auto, system, pypi", param_hint="--toolchain"
        )
    return Options(
        config=config,
        trtllm=None if trtllm is None else parse_location(trtllm),
        cutlass=None if cutlass is None else parse_location(cutlass),
        out=out,
        jobs=jobs,
        memory_gb=memory,
        toolchain=modes[toolchain],
        vendor=vendor.resolve(),
        verbose=verbose,
    )


@app.command()
def extract(
    config: Config = flow.DEFAULT_PROFILE,
    trtllm: TrtLlm = None,
    cutlass: Cutlass = None,
    out: Out = None,
    jobs: Jobs = None,
    memory: Memory = None,
    toolchain: Toolchain = "auto",
    vendor: Vendor = flow.ROOT / "vendor",
    verbose: Verbose = False,
) -> None:
    """Fetch a release, generate, select and vendor its kernels, and render the bundle."""
    options = _options(config, trtllm, cutlass, out, jobs, memory, toolchain, vendor, verbose)
    reporter = Reporter(verbose=verbose)
    run, resolved = flow.locate_run(options, reporter)
    with run.held():
        flow.extract(run, resolved)
    reporter.say(f"extract: the bundle is {run.source}")


@app.command()
def build(
    config: Config = flow.DEFAULT_PROFILE,
    trtllm: TrtLlm = None,
    cutlass: Cutlass = None,
    out: Out = None,
    jobs: Jobs = None,
    memory: Memory = None,
    toolchain: Toolchain = "auto",
    vendor: Vendor = flow.ROOT / "vendor",
    verbose: Verbose = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the plan of units, and build nothing.")
    ] = False,
) -> None:
    """Compile the bundle, install the library below DIR/dist, and verify it."""
    options = _options(config, trtllm, cutlass, out, jobs, memory, toolchain, vendor, verbose)
    reporter = Reporter(verbose=verbose)
    run, _ = flow.locate_run(options, reporter)
    with run.held():
        if plan:
            print(flow.plan(run))
            return
        flow.build(run)
        flow.verify(run)


@app.command()
def verify(
    config: Config = flow.DEFAULT_PROFILE,
    trtllm: TrtLlm = None,
    cutlass: Cutlass = None,
    out: Out = None,
    jobs: Jobs = None,
    memory: Memory = None,
    toolchain: Toolchain = "auto",
    vendor: Vendor = flow.ROOT / "vendor",
    verbose: Verbose = False,
) -> None:
    """Prove the built library complete (part of build; alone: verify it again)."""
    options = _options(config, trtllm, cutlass, out, jobs, memory, toolchain, vendor, verbose)
    reporter = Reporter(verbose=verbose)
    run, _ = flow.locate_run(options, reporter)
    with run.held():
        flow.verify(run)


@app.command()
def test(
    config: Config = flow.DEFAULT_PROFILE,
    trtllm: TrtLlm = None,
    cutlass: Cutlass = None,
    out: Out = None,
    jobs: Jobs = None,
    memory: Memory = None,
    toolchain: Toolchain = "auto",
    vendor: Vendor = flow.ROOT / "vendor",
    verbose: Verbose = False,
) -> None:
    """Test the built library: its packing here, and on a GPU each tactic's error and time."""
    options = _options(config, trtllm, cutlass, out, jobs, memory, toolchain, vendor, verbose)
    reporter = Reporter(verbose=verbose)
    run, _ = flow.locate_run(options, reporter)
    with run.held():
        flow.test(run)


@app.command()
def regenerate(
    to: Annotated[str, typer.Option("--to", metavar="REF", help="The release to move to.")],
    config: Config = flow.DEFAULT_PROFILE,
    trtllm: TrtLlm = None,
    cutlass: Cutlass = None,
    out: Out = None,
    jobs: Jobs = None,
    memory: Memory = None,
    toolchain: Toolchain = "auto",
    vendor: Vendor = flow.ROOT / "vendor",
    verbose: Verbose = False,
) -> None:
    """Move the lock to another release, make everything anew, and print what changed."""
    options = _options(config, trtllm, cutlass, out, jobs, memory, toolchain, vendor, verbose)
    reporter = Reporter(verbose=verbose)
    print(flow.regenerate(options, reporter, to))


def main() -> NoReturn:
    """Run a command; an expected failure prints what, why and what to do, and its exit code."""
    reporter = Reporter()
    try:
        with terminable():
            app()
    except ForgeError as error:
        reporter.fail(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        reporter.say("interrupted; the next run goes on from the last good stage")
        sys.exit(130)
    sys.exit(0)
