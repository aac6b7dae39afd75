"""What can go wrong before or during a run, told in one line."""

from __future__ import annotations


class BenchError(Exception):
    """Base of this package's errors: what happened, and what to do."""


class UsageError(BenchError):
    """Arguments that make no sense."""


class ResultError(BenchError):
    """A file that is no result of this program."""


class Missing(BenchError):  # noqa: N818 - a state, not a fault
    """A contender that cannot take part here; the message says why."""


class Lost(BenchError):  # noqa: N818 - likewise
    """The GPU no longer answers; nothing more can be measured by this process."""
