"""Where the command line writes: results to the standard output, errors beside it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from parcnn.errors import ParcnnError

console = Console()


def say(message: str) -> None:
    """One line, as it is."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def show_error(error: ParcnnError) -> None:
    """What the error says, its first word in red."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
