"""The program ``w4a16``.

Exit codes: 0, 1 where something that was checked is not right, 2 for bad input, 3 where this
machine cannot do it (no GPU, no driver, no library). ``W4A16_DEBUG=1`` shows where an error comes
from.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, NoReturn, TextIO

import typer

from w4a16.errors import ArgumentError, DeviceError, W4A16Error, W4A16Warning

_MODULES = ("info", "doctor", "check", "bench", "tune", "convert", "verify")


def build() -> typer.Typer:
    """The commands; those that cannot be imported here say why when they are called."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(help="FP16 activations × INT4 weights on NVIDIA Hopper.")
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_version, help="Show the version."),
        ] = False,
    ) -> None:
        pass

    for name in _MODULES:
        try:
            import_module(f"w4a16.{name}").register(app)
        except ImportError as error:
            _refuse(app, name, error)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from w4a16 import info

        library, error = info.loaded_library()
        build = f"library {library.build.version}" if library else f"no library: {error}"
        print(f"w4a16 {info.version()} ({build})")
        raise typer.Exit


def _refuse(app: typer.Typer, name: str, error: ImportError) -> None:
    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

    @app.command(name, context_settings=anything, help="Not available here: see w4a16 doctor.")
    def command() -> None:
        raise error


def main() -> NoReturn:
    """Runs the program."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of an encoding that lacks some of our characters
            stream.reconfigure(errors="replace")
    try:
        build()()
    except (W4A16Error, ImportError, OSError) as error:
        if os.environ.get("W4A16_DEBUG") == "1":
            raise
        print(f"w4a16: error: {_line(error)}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    raise SystemExit(0)


def exit_code(error: Exception) -> int:
    """Of a run that an error ended."""
    if isinstance(error, DeviceError | ImportError):
        return 3
    if isinstance(error, ArgumentError | OSError):
        return 2
    return 1


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} (w4a16 doctor says more)" if isinstance(error, ImportError) else text


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, W4A16Warning):
        print(f"w4a16: warning: {message}", file=sys.stderr)
    elif os.environ.get("W4A16_DEBUG") == "1":
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)


if __name__ == "__main__":
    main()
