"""Kernel families: each a `.cu` file beside its launcher."""
