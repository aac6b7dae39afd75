"""The command line: ``python -m pipeline STAGE``."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from pipeline import produce
from pipeline.console import Reporter
from pipeline.errors import ForgeError
from pipeline.extract import extract as run_extract
from pipeline.git import parse_location, show_commands
from pipeline.process import terminable
from pipeline.regenerate import regenerate as move_to
from pipeline.run import DEFAULT_PROFILE, ROOT, Options, locate_run
from pipeline.toolchain import Mode

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a release of TensorRT-LLM to a library and a wheel of its W4A16 kernels.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _options(
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="Profile: what to extract and build.")
    ] = DEFAULT_PROFILE,
    trtllm: Annotated[
        str | None,
        typer.Option(
            "--trtllm",
            metavar="SRC[@REF]",
            help="TensorRT-LLM: a git URL or a local repository (bare or not), and a tag, branch "
            "or commit. Default: as the profile says.",
        ),
    ] = None,
    cutlass: Annotated[
        str | None,
        typer.Option(
            "--cutlass",
            metavar="SRC[@REF]",
            help="CUTLASS, likewise. Default REF: what the release pins.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the run. Default: artifacts/PROFILE/RELEASE."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Compilers at a time. Default: from cores and memory."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GB", min=0.1, help="Memory that compilers may fill."),
    ] = None,
    toolchain: Annotated[
        str,
        typer.Option(
            "--toolchain",
            metavar="auto|system|pypi",
            help="Whose CUDA compiler: the machine's, the Python package index's, or the first "
            "of these that works.",
        ),
    ] = "auto",
    vendor: Annotated[
        Path,
        typer.Option(
            "--vendor", metavar="DIR", help="Folder of the upstream checkouts and the lock."
        ),
    ] = ROOT / "vendor",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the commands that are run.")
    ] = False,
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


def _stage(function: Callable[..., None]) -> Callable[..., None]:
    """Register ``function(options, reporter, **own)`` as a command with the shared options."""
    shared = inspect.signature(_options).parameters
    own = list(inspect.signature(function).parameters.values())[2:]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        options = _options(**{name: values.pop(name) for name in shared})
        reporter = Reporter(verbose=options.verbose)
        if reporter.show is not None:
            show_commands(reporter.show)
        try:
            function(options, reporter, **values)
        except KeyboardInterrupt:  # typer would turn it into a silent exit
            reporter.say("interrupted; the next run goes on from the last good stage")
            raise typer.Exit(130) from None

    hints = {
        **get_type_hints(_options, include_extras=True),
        **get_type_hints(function, include_extras=True),
    }
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in (*own, *shared.values())
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    del command.__wrapped__
    app.command(name=function.__name__)(command)
    return command


@_stage
def extract(options: Options, reporter: Reporter) -> None:
    """Fetch a release, generate, select and vendor its kernels, and render the bundle."""
    run, resolved = locate_run(options, reporter)
    with run.held():
        run_extract(run, resolved)
    reporter.say(f"extract: the bundle is {run.source}")


@_stage
def build(
    options: Options,
    reporter: Reporter,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the plan of units, and build nothing.")
    ] = False,
) -> None:
    """Compile the bundle, install the library below DIR/dist, and verify it."""
    run, _ = locate_run(options, reporter)
    with run.held():
        if plan:
            print(produce.plan(run))
            return
        produce.build(run)
        produce.verify(run)


@_stage
def verify(options: Options, reporter: Reporter) -> None:
    """Prove the built library complete (part of build; alone: verify it again)."""
    run, _ = locate_run(options, reporter)
    with run.held():
        produce.verify(run)


@_stage
def test(options: Options, reporter: Reporter) -> None:
    """Test the built library: its packing here, and on a GPU each tactic's error and time."""
    run, _ = locate_run(options, reporter)
    with run.held():
        produce.test(run)


@_stage
def wheel(options: Options, reporter: Reporter) -> None:
    """Make the Python wheel, the bundle's tarball and SHA256SUMS from the built library."""
    run, _ = locate_run(options, reporter)
    with run.held():
        produce.wheel(run, produce.verify(run))


@_stage
def regenerate(
    options: Options,
    reporter: Reporter,
    to: Annotated[str, typer.Option("--to", metavar="REF", help="The release to move to.")],
    extract_only: Annotated[
        bool, typer.Option("--extract-only", help="Compare the bundles; build and test nothing.")
    ] = False,
) -> None:
    """Move the lock to another release, make everything anew, and print what changed."""
    print(move_to(options, reporter, to, build=not extract_only), end="")


def main() -> NoReturn:
    """Run a command; an expected failure prints what, why and what to do, and its exit code."""
    reporter = Reporter()
    try:
        with terminable():
            app()
    except ForgeError as error:
        reporter.fail(error)
        sys.exit(error.exit_code)
    sys.exit(0)
