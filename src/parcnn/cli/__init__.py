"""The command line: parcnn train, eval, predict, plan, info, bench."""

from parcnn.cli.app import app, main

__all__ = ["app", "main"]
