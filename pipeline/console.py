"""What a user sees: a line a stage, progress while something is long, commands with ``-v``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from pipeline.errors import ForgeError
from pipeline.process import Printer


class Reporter:
    """Writes to stderr, so that stdout is free for what a command is asked to print."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.verbose = verbose

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @property
    def show(self) -> Printer | None:
        """Prints a command or a program's remark; None unless ``-v`` was given."""
        return self._shown if self.verbose else None

    def _shown(self, text: str) -> None:
        self.console.print(text, markup=False, style="dim")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say how long a stage took."""
        begin = time.monotonic()
        yield
        self.say(f"{name}: {time.monotonic() - begin:.1f} s")

    def fail(self, error: ForgeError) -> None:
        self.console.print(f"error: {error.what}", markup=False, style="bold red")
        if error.details:
            self.console.print(error.details.rstrip(), markup=False)
        if error.hint:
            self.console.print(f"What to do: {error.hint}", markup=False)
