"""`python -m parcnn`: the command line."""

from parcnn.cli import main

main()
