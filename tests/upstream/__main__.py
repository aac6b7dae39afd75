# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.upstream DIR`: write the miniature and say where it is."""

import argparse
import typing
from pathlib import Path

from .writer import Shape, write_upstream


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument(
        "directory", type=Path, help="a folder that does not exist yet, or is empty"
    )
    parser.add_argument("--shape", choices=typing.get_args(Shape), default="classic")
    parser.add_argument("--bare", action="store_true", help="write bare repositories")
    options = parser.parse_args()
    upstream = write_upstream(options.directory, shape=options.shape, bare=options.bare)
    refs = f"{upstream.ref}  (next {upstream.next_ref}, too old {upstream.old_ref})"
    print(f"trtllm   {upstream.trtllm}@{refs}")
    print(f"cutlass  {upstream.cutlass}@{upstream.cutlass_commit}")


main()
