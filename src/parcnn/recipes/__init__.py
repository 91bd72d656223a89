"""Recipes: everything that a training run depends on, in a TOML file; some come with the package."""

from parcnn.recipes.recipe import Recipe, make_optimizer, make_schedule, read, shipped

__all__ = ["Recipe", "make_optimizer", "make_schedule", "read", "shipped"]
