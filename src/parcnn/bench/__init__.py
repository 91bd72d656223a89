"""Measurements: each benchmark gives rows, and from rows alone tables and graphs are made (`parcnn.report`)."""
