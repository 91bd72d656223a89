"""The commands put together, and how an error is shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import parcnn
from parcnn.cli import bench, evaluate, info, plan, train, tune
from parcnn.cli.console import console, show_error
from parcnn.errors import ParcnnError


class Commands(TyperGroup):
    """Shows parcnn's own errors as what they say, without a traceback; exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ParcnnError as error:
            show_error(error)
            raise typer.Exit(1) from error


# Faults of the program itself keep Python's own traceback.
app = typer.Typer(
    cls=Commands,
    name="parcnn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("predict")(evaluate.predict)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("info")(info.info)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"parcnn {parcnn.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convolutional networks trained by CUDA C++ kernels, or by NumPy on the CPU."""


def main() -> None:
    """Run the command line."""
    app()
