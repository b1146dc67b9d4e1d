"""When what happens: a run's durations turned into step numbers."""

from __future__ import annotations

from dataclasses import dataclass

from cmpt.engine.schedule import learning_rate
from cmpt.recipe import ResolvedPhase, parse_duration, phases
from cmpt.recipe.schema import Recipe


@dataclass(frozen=True)
class PlannedPhase:
    """One phase and the steps it spans: first (exclusive of what is done before) … last, counted from 1."""

    phase: ResolvedPhase
    first_step: int  # steps done when the phase begins
    last_step: int  # steps done when it ends
    warmup_samples: float
    batch_size: int

    def progress(self, steps_done: int) -> float:
        """Of the step that follows so many: 0 the phase's first, 1 its last."""
        return (steps_done - self.first_step) / max(1, self.last_step - self.first_step - 1)

    def learning_rate(self, step: int) -> float:
        """Of the step that makes `step` steps done."""
        seen = (step - self.first_step) * self.batch_size
        total = (self.last_step - self.first_step) * self.batch_size
        return learning_rate(seen, self.warmup_samples, total, self.phase.optimizer.lr, self.phase.optimizer.min_lr)


class Plan:
    """The whole run in steps; `total_steps` is its end, `stop_step` where this start of it ends."""

    def __init__(self, recipe: Recipe, samples_per_epoch: int) -> None:
        batch_size = recipe.engine.batch_size

        def steps(duration: str) -> int:
            return parse_duration(duration).steps(samples_per_epoch, batch_size)

        self.phases: list[PlannedPhase] = []
        done = 0
        for phase in phases(recipe):
            last = done + phase.duration.steps(samples_per_epoch, batch_size)
            warmup = parse_duration(phase.optimizer.warmup).samples(samples_per_epoch, batch_size)
            self.phases.append(PlannedPhase(phase, done, last, warmup, batch_size))
            done = last
        self.total_steps = done
        self.stop_step = min(done, steps(recipe.run.stop_after)) if recipe.run.stop_after else done
        self._log_every = steps(recipe.run.log_every)
        self._checkpoint_every = steps(recipe.run.checkpoint_every)
        self._compare_every = steps(recipe.guard.weights_every) if recipe.guard.weights_every else None
        self._evaluate_every = steps(recipe.evaluation.every) if recipe.evaluation.every else None

    def logs(self, step: int) -> bool:
        return step == 1 or self._due(self._log_every, step)

    def saves(self, step: int) -> bool:
        return self._due(self._checkpoint_every, step)

    def evaluates(self, step: int) -> bool:
        return self._due(self._evaluate_every, step)

    def compares_weights(self, step: int) -> bool:
        return self._due(self._compare_every, step)

    def _due(self, every: int | None, step: int) -> bool:
        """Everything is due at the end, wherever it is."""
        return step in (self.total_steps, self.stop_step) or (every is not None and step % every == 0)

    def ends(self, step: int) -> bool:
        """Whether this start of the run is over with this step."""
        return step >= self.stop_step

    def remaining(self, step: int) -> list[PlannedPhase]:
        """The phases that still have steps to do; none where this start of the run is over."""
        return [] if self.ends(step) else [planned for planned in self.phases if planned.last_step > step]
