"""`python -m cmpt.recipe RECIPE [key=value ...]`: every value with its origin, then what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cmpt.recipe.check import check_recipe
from cmpt.recipe.load import LoadedRecipe, load_recipe
from cmpt.recipe.typed import RecipeError, flat, plain, show


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cmpt.recipe",
        description="Print the resolved recipe, each value with its origin, and every fault on stderr. "
        "Exit status: 0 if it can run, 1 if not.",
    )
    parser.add_argument("recipe", help="a YAML file, for example recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example engine.batch_size=512")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes that will run it (default 1)")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size < 1:
        parser.error("--world-size must be at least 1")
    try:
        loaded = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        faults = error.faults
    else:
        print(table(loaded), flush=True)
        faults = check_recipe(loaded.recipe, options.world_size, loaded.origins)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


def table(loaded: LoadedRecipe) -> str:
    """One line per value: dotted key, value, origin; a blank line between sections."""
    rows = [(key, show(value, limit=None), loaded.origins[key]) for key, value in flat(plain(loaded.recipe)).items()]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    lines: list[str] = []
    section = rows[0][0].partition(".")[0]
    for key, value, origin in rows:
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append("")
        lines.append(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
