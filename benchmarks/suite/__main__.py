"""``python -m benchmarks.suite``: see :mod:`benchmarks.suite.run`, or ``--help``."""

from __future__ import annotations

import sys

from benchmarks.suite import suites
from benchmarks.suite.errors import BenchError


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        name, rest = suites.split(given)
        return suites.find(name)(rest)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
