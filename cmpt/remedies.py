"""What is done where a step was not taken: a refused batch, unequal weights. The recipe's section `guard` decides."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cmpt.batch import ImageTextBatch
from cmpt.data.loader import batch_digest
from cmpt.dist.process_group import gather_objects
from cmpt.engine.build import Trained
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.manifest import CheckpointError
from cmpt.engine.step import StepResult
from cmpt.monitor.guard import LossGuard, TrainingDivergedError
from cmpt.monitor.monitor import Monitor
from cmpt.recipe.schema import Recipe


@dataclass(frozen=True)
class Remedies:
    """What is done where a step was not taken: as the recipe says. Every rank calls it, between two steps."""

    recipe: Recipe
    state: TrainState
    trained: Trained
    checkpoints: Checkpoints
    guard: LossGuard
    monitor: Monitor

    def refused(self, fault: str, batch: ImageTextBatch, result: StepResult) -> None:
        """The guard refused a batch: name it, then do what guard.action says."""
        digest = batch_digest(digest for part in gather_objects(batch.stream_digests) for digest in part)
        keys = [key for part in gather_objects(batch.keys) for key in part]
        listing = self.monitor.listing(f"refused/step_{self.state.step:08d}.txt", keys)
        norm = result.gradient_norms["total"]
        named = {"loss": result.loss, "grad_norm": norm, "batch_digest": digest, "keys": listing}
        left_out = f"batch {digest} was left out, its samples are listed in {listing}"
        advice = "guard.action=skip or rewind goes on without it"
        self._act("refused", fault, self.recipe.guard.action, left_out, advice, named)

    def unequal_weights(self, fault: str) -> None:
        """The ranks have unequal weights: do what guard.unequal_weights says. Its batch counts as a refused one."""
        self.guard.refused += 1
        fault = f"the ranks have unequal weights: {fault}"
        advice = "guard.unequal_weights=rewind goes on from the last checkpoint"
        self._act("unequal_weights", fault, self.recipe.guard.unequal_weights, "no step was taken", advice, {})

    def _act(self, kind: str, fault: str, action: str, left_out: str, advice: str, named: dict[str, Any]) -> None:
        step, back_to = self.state.step, None
        if self.guard.exhausted:
            action, fault = "stop", f"{fault}, after {self.guard.refused - 1} refused batches"
            advice = "a higher guard.limit allows more"
        if action == "rewind":
            rewound = self.checkpoints.rewind(self.trained)
            for unsound in self.checkpoints.faults:
                self.monitor.event("warning", step, text=unsound)
            if rewound is None:
                action, fault = "stop", f"{fault}, and there is no checkpoint to rewind to"
                advice = "a smaller run.checkpoint_every makes one earlier"
            else:
                back_to = rewound.step
                self.guard.rewind(rewound.guard)
        self.monitor.event(kind, step, cause=fault, action=action, back_to=back_to, **named)
        if action == "stop":
            with suppress(CheckpointError):  # training's end is the news
                self.checkpoints.finish()
            raise TrainingDivergedError(f"step {step}: {fault}; {left_out}; {advice}")
        then = f"; went on from the weights of step {back_to:,}" if action == "rewind" else ""
        self.monitor.note(f"step {step:,}: warning: {fault}; {left_out}{then}")
