"""Compares the files of a converted folder with the digests that were taken when it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w4a16.converted import open_converted
from w4a16.errors import FormatError

if TYPE_CHECKING:
    import typer


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 verify``."""
    import typer

    folder = typer.Argument(metavar="OUT_DIR", help="Folder that w4a16 convert made.")

    @app.command("verify")
    def command(out_dir: str = folder) -> None:
        """Read every file of a converted folder, and compare it with its digest.

        Exits with 1 if one differs.
        """
        with open_converted(out_dir) as converted:
            files = converted.manifest.files
            try:
                converted.verify()
            except FormatError as error:
                typer.echo(f"w4a16: error: {error}", err=True)
                raise typer.Exit(1) from None
        typer.echo(f"{out_dir}: {len(files)} files are as they were written")
