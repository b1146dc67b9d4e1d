"""A program of the tests: reads training data as the ranks of a run do, one real process each.

    python rank_processes.py WORLD_SIZE STEPS STATE_FILE OUTPUT_FOLDER

Every rank appends one JSON line per step to OUTPUT_FOLDER/RANK: digests, keys and its loader state. STATE_FILE holds
the merged state to start from, or is not there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cmpt.data.loader import Loader
from cmpt.data.shards import Ranks, open_sources
from cmpt.data.streams import LoaderState
from cmpt.data.tokenizer import open_tokenizer
from cmpt.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
OVERRIDES = [
    "data.train=[{urls: ['pkg:data/clipart/train-{0000..0003}.tar'], weight: 3},"
    " {urls: ['pkg:data/clipart/train-{0004..0007}.tar'], weight: 2}]",
    "data.streams=8",
    "data.workers=1",
    "engine.batch_size=64",
    "image.size=16",
]


def read(rank: int, world_size: int, steps: int, state_file: Path, output: Path) -> None:
    """The steps up to number `steps` for one rank."""
    recipe = load_recipe(RECIPE, [*OVERRIDES, f"data.cache_folder={output.parent}/cache"]).recipe
    loader = Loader(
        recipe.data,
        recipe.image,
        shards=open_sources(recipe.data, Ranks()),
        tokenizer=open_tokenizer(recipe.tokenizer, recipe.model.context_length),
        context_length=recipe.model.context_length,
        seed=recipe.run.seed,
        batch_size=recipe.engine.batch_size,
        rank=rank,
        world_size=world_size,
    )
    known = state_file.is_file()
    state = LoaderState.from_json(json.loads(state_file.read_text())) if known else loader.initial_state()
    with (output / str(rank)).open("a", buffering=1) as file:
        batches = loader.batches(state)
        while state.step < steps:
            batch, state = next(batches)
            digests = [digest.hex() for digest in batch.stream_digests]
            file.write(json.dumps({"digests": digests, "keys": batch.keys, "state": state.to_json()}) + "\n")
        batches.close()


def main() -> None:
    world_size, steps = int(sys.argv[1]), int(sys.argv[2])
    state_file, output = Path(sys.argv[3]), Path(sys.argv[4])
    children = []
    for rank in range(world_size):  # forked before there are threads: all of this was imported once
        child = os.fork()
        if child == 0:
            read(rank, world_size, steps, state_file, output)
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(1)


if __name__ == "__main__":
    main()
