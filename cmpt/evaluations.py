"""What a run evaluates, and what it reports of it: its held-out pairs, and the tasks of a suite file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from cmpt.batch import ImageTextBatch
from cmpt.data.heldout import HeldoutSet
from cmpt.data.shards import Ranks
from cmpt.data.tokenizer import Tokenizer
from cmpt.data.validate import DataError
from cmpt.dist.process_group import gather_objects
from cmpt.engine.build import Trained
from cmpt.evals.embed import Encoder
from cmpt.evals.examples import query_examples
from cmpt.evals.heldout import evaluate_heldout
from cmpt.evals.tasks import OpenedTask, open_tasks, run_task
from cmpt.masking.strategies import Masked
from cmpt.monitor.monitor import Monitor
from cmpt.recipe.schema import Recipe
from cmpt.recipe.suite import load_suite

_MASKS_SHOWN = 12


class Evaluations:
    """All that the recipe's section `evaluation` names, opened before the first step. False where that is nothing."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, rank: int, world_size: int, device: torch.device) -> None:
        """Every rank calls it. Raises DataError where a set is not as it should be, or is not there and
        evaluation.tasks names its task, or none of the suite is; FetchError where a held-out shard that was indexed
        cannot be had.
        """
        wanted, data, image = recipe.evaluation, recipe.data, recipe.image
        self.recipe, self.tokenizer = recipe, tokenizer
        self.rank, self.world_size, self.device = rank, world_size, device
        self.heldout: HeldoutSet | None = None
        if data.heldout:
            self.heldout = HeldoutSet(data.heldout, data, image, Ranks(rank, world_size, gather_objects))
        self.tasks: list[OpenedTask] = []
        self.left_out: list[str] = []
        """Why tasks of the suite are not evaluated: their sets are not there."""
        if wanted.suite:
            folder = Path(wanted.suite_folder).expanduser()
            self.tasks, absent = open_tasks(load_suite(wanted.suite), folder, wanted.tasks)
            self.left_out = [f"evaluation.suite: {name} is left out: {why}" for name, why in absent.items()]

    def __bool__(self) -> bool:
        return self.heldout is not None or bool(self.tasks)

    def run(
        self,
        trained: Trained,
        monitor: Monitor,
        step: int,
        batch: ImageTextBatch,
        masked: Masked,
        beat: Callable[[], None],
    ) -> None:
        """Evaluates and reports; every rank calls it. The result `seconds` is how long training has stood still for it.

        `beat` is called on every rank as it gets on. What cannot be evaluated, because an image cannot be read or an
        embedding is not finite, is a warning: training goes on. With two pictures: masks of the batch in hand, and what
        the model finds for some held-out captions.
        """
        began = time.perf_counter()
        results: dict[str, float] = {}
        encoder = self._encoder(trained)
        encoder.beat = beat
        embeddings = None
        if self.heldout is not None:
            try:
                results, embeddings = evaluate_heldout(self.heldout, encoder, self.recipe.evaluation.prompts)
            except DataError as error:
                monitor.event("warning", step, text=f"data.heldout: {error}")
        for opened in self.tasks:
            task_began, name = time.perf_counter(), opened.task.name
            try:
                found = run_task(opened, encoder)
            except DataError as error:
                monitor.event("warning", step, text=f"evaluation.suite: {name}: {error}")
                continue
            found["seconds"] = time.perf_counter() - task_began
            results |= {f"{name}/{key}": value for key, value in found.items()}
        if self.rank == 0:
            from cmpt.monitor.pictures import mask_grid, query_grid  # matplotlib is a fifth of the start's imports

            shown = batch.valid_B.nonzero()[:_MASKS_SHOWN, 0]
            images_NHWC = batch.images_BCHW[shown].permute(0, 2, 3, 1).cpu().numpy()
            keep_NL = masked.keep_BL[shown].cpu().numpy()
            patch_size = images_NHWC.shape[1] // masked.patches.grid[0]
            monitor.picture(
                "masks", mask_grid(images_NHWC, keep_NL, patch_size, f"What the model sees at step {step:,}")
            )
            if self.heldout is not None and embeddings is not None:
                best = query_examples(embeddings, self.heldout)
                monitor.picture("queries", query_grid(best.queries, best.images_NKHWC, best.hits_NK, best.scores_NK))
        monitor.evaluation(step, results | {"seconds": time.perf_counter() - began})

    def _encoder(self, trained: Trained) -> Encoder:
        patch_size, batch_size = self.recipe.model.patch_size, self.recipe.evaluation.batch_size
        assert patch_size is not None
        image, ranks = self.recipe.image, (self.rank, self.world_size, self.device)
        return Encoder(trained.clip, self.tokenizer, image, patch_size, batch_size, *ranks)
