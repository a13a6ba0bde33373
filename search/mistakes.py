"""What a user did wrong -> one line on standard error and the exit code of the command."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
UsageError: Any = typer.BadParameter.__base__
"""typer's mistakes in the use of commands and options; where it has them differs by release."""


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command line; a ValueError, too, is the user's mistake."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as error:
        asked = f"{error.ctx.command_path} --help" if error.ctx else "contrasweep --help"
        # some releases of typer pass on how pydantic, which checks the choices, begins
        message = error.format_message().replace("Value error, ", "", 1)
        _tell(f"{_in_one_line(message)}; see {asked}")
    except (ValueError, OSError) as error:
        _tell(mistake_in(error))
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # at once: threads may wait for a bucket or server that hangs
    sys.exit(2)


def mistake_in(error: ValueError | OSError) -> str:
    """What was wrong, in one line; an OSError is of a path that cannot be read or written."""
    if isinstance(error, ValueError) or error.filename is None:
        return _in_one_line(getattr(error, "strerror", None) or str(error))
    return f"{error.filename}: {error.strerror or error}"


def _tell(mistake: str) -> None:
    print(f"contrasweep: {mistake}", file=sys.stderr)


def _in_one_line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
