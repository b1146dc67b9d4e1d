"""Recipes: schema, loading, checks. Nothing here imports torch."""

from cmpt.recipe.check import check_model, check_recipe
from cmpt.recipe.durations import Duration, parse_duration
from cmpt.recipe.load import LoadedRecipe, differences, load_recipe, recipe_fingerprint, to_yaml
from cmpt.recipe.paths import is_local, resolve_path
from cmpt.recipe.phases import ResolvedPhase, phases
from cmpt.recipe.typed import Absent, RecipeError

__all__ = [
    "Absent",
    "Duration",
    "LoadedRecipe",
    "RecipeError",
    "ResolvedPhase",
    "check_model",
    "check_recipe",
    "differences",
    "is_local",
    "load_recipe",
    "parse_duration",
    "phases",
    "recipe_fingerprint",
    "resolve_path",
    "to_yaml",
]
