"""The error family: one class and one exit code for each kind of failure a user can meet.

A message says what happened, why, and what to do next. The command line prints it without a
traceback and exits with the class's code; 1 is left for faults of this program itself.
"""

from __future__ import annotations


class ForgeError(Exception):
    """Base of every expected failure.

    ``what`` is one line; ``hint`` says what to do next; ``details`` holds text to show in full
    (a compiler's output, the instantiation that could not be parsed).
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str = "", details: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        parts = [self.what]
        if self.details:
            parts.append(self.details.rstrip())
        if self.hint:
            parts.append(f"What to do: {self.hint}")
        return "\n".join(parts)


class ProfileError(ForgeError):
    """The profile or releases file does not say something that can be built."""

    exit_code = 3


class SourceError(ForgeError):
    """An upstream repository cannot be reached, or lacks the ref, commit or path asked for."""

    exit_code = 4


class LockError(ForgeError):
    """Upstream is not what the lock says it was."""

    exit_code = 5


class ReleaseError(ForgeError):
    """The release is reached but cannot be extracted (no generator, no CUTLASS pin, …)."""

    exit_code = 6


class GenerateError(ForgeError):
    """Upstream's generator failed or wrote something unforeseen."""

    exit_code = 7


class SelectError(ForgeError):
    """An instantiation could not be parsed, or the selection is empty or ambiguous."""

    exit_code = 8


class ToolchainError(ForgeError):
    """No compiler that works, or one that is too old."""

    exit_code = 9


class VendorError(ForgeError):
    """The include closure of the kept instantiations could not be gathered."""

    exit_code = 10


class ResourceError(ForgeError):
    """Too little memory or disk for the smallest unit of work."""

    exit_code = 11


class BuildError(ForgeError):
    """A unit did not compile, or the library did not link."""

    exit_code = 12


class VerifyError(ForgeError):
    """The built library is not what the manifest says, or passes a gate of the profile."""

    exit_code = 13


class PathError(ForgeError):
    """A path of an upstream tree or a profile leads outside the folders of the run."""

    exit_code = 14


class BusyError(ForgeError):
    """Another run holds the folder."""

    exit_code = 15


class LibraryTestError(ForgeError):
    """A test of the built library failed."""

    exit_code = 16


class MissingStageError(ForgeError):
    """A stage was asked for whose predecessor has left no result."""

    exit_code = 17


class WheelError(ForgeError):
    """The wheel cannot be made of what was built."""

    exit_code = 18
