"""Compare masking strategies by their held-out results, at equal training time and at equal samples.

    python tools/compare_masking.py --seconds 120 --samples 12800 [RECIPE] [key=value ...]

Ten arms (--arms for some of them, --arm NAME:key=value,key=value for your own) with three seeds each. First the step
time of each is measured, in short runs that take turns, on an otherwise idle machine; from it follow the steps that fit
into --seconds, start and evaluation not counted. Then every arm trains that many steps (equal time), and as many as
--samples needs (equal samples), with every seed and with a schedule of the run's own length. So results depend on the
measured step times alone, not on what else the machine does during the long runs. Runs follow each other, each with all
cores.

It takes arms x seeds x (--seconds, and the time of --samples, and about 20 s for starts and evaluations), and some
minutes for the step times: about two and a half hours for the example on two cores, and 4 GB for the runs.

What was measured is kept in FOLDER: a second start, with the same or with more arms, seeds and lengths, goes on where
the first one ended. FOLDER/results.json has every run's figures, FOLDER/compare_masking.png shows them; the tables are
Markdown, for recipes/README.md. The last one says, without training, how much of what each arm hides is white
background.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout without an install

from cmpt.engine.run_folder import conflict  # noqa: E402
from cmpt.recipe import RecipeError, check_recipe, load_recipe, recipe_fingerprint  # noqa: E402
from cmpt.recipe.schema import Recipe  # noqa: E402
from masking_arms import ARMS, background_shares, overrides_of  # noqa: E402
from masking_results import (  # noqa: E402
    MODES,
    RESULTS,
    Result,
    background_table,
    draw,
    finished,
    load,
    merged,
    read_run,
    save,
    table,
    title,
)

WARM_UP_STEPS = 10  # not timed: the first eight of cluster masking settle its threshold, which costs more
BACKGROUND_IMAGES = 256
START_SECONDS = 20  # of a run: imports, dry run, evaluation, report
ANY_STEPS = 10  # where only the other settings of an arm matter


class StudyError(RuntimeError):
    """Something that the user can mend, or a run that failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        study = Study(options)
        if not options.report_only:
            study.run()
        study.report()
    except RecipeError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(REPOSITORY / "recipes/quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME:key=value,...", help="one of your own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, metavar="S", help="equal time: training time of every run")
    parser.add_argument("--samples", type=int, metavar="N", help="equal samples: pairs that every run sees")
    parser.add_argument(
        "--text-tokens", type=int, default=6, metavar="N", help="of ...+frequency, begin and end included (default: 6)"
    )
    parser.add_argument("--measure-steps", type=int, default=20, help="length of a speed run (default: %(default)s)")
    parser.add_argument("--measure-repeats", type=int, default=3, help="speed runs per arm (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_masking"))
    parser.add_argument("--report-only", action="store_true", help="tables and picture of what there is, no runs")
    options = parser.parse_intermixed_args(arguments)
    if not (options.seconds or options.samples or options.report_only):
        parser.error("give --seconds, --samples, or both")
    if min(options.seconds or 1, options.samples or 1, options.measure_repeats) <= 0:
        parser.error("--seconds, --samples and --measure-repeats must be above 0")
    if options.measure_steps <= WARM_UP_STEPS:
        parser.error(f"--measure-steps must be above {WARM_UP_STEPS}, which are not timed")
    return options


class Study:
    """All runs of one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder.absolute()
        own = dict(own_arm(given) for given in options.arm)
        known = {**ARMS, **own}
        self.names: list[str] = list(options.arms) if options.arms else list(ARMS)
        self.names += [name for name in own if name not in self.names]
        if unknown := [name for name in self.names if name not in known]:
            raise StudyError(f"--arms {unknown[0]}: expected one of {', '.join(known)}")
        if len({slug(name) for name in self.names}) < len(self.names):
            raise StudyError("--arms: two of them would have the same folder; every name may be there once")
        self.arms = {name: known[name] for name in self.names}
        self.base: Recipe = load_recipe(options.recipe, options.overrides).recipe
        self.batch = self.base.engine.batch_size
        if options.samples and options.samples < self.batch:
            raise StudyError(f"--samples {options.samples}: must be at least a batch, {self.batch}")
        self.recipes: dict[str, Recipe] = {}
        for name in self.names:
            loaded = load_recipe(options.recipe, [*options.overrides, *self.overrides(name, ANY_STEPS)])
            if faults := check_recipe(loaded.recipe, origins=loaded.origins):
                raise StudyError(f"arm {name}: {faults[0]}")
            self.recipes[name] = loaded.recipe

    def overrides(self, name: str, steps: int) -> list[str]:
        return overrides_of(self.arms[name], name, steps, self.options.text_tokens, self.base)

    def run(self) -> None:
        """What is not there yet: step times first, then the runs, all arms of a seed before the next seed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = self.measure()
        planned: list[tuple[str, float, str, int, int]] = []
        for seed in self.options.seeds:
            for arm in self.names:
                if self.options.seconds:
                    steps = max(1, round(self.options.seconds / seconds[arm]))
                    planned.append(("time", self.options.seconds, arm, seed, steps))
                if self.options.samples:
                    planned.append(("samples", self.options.samples, arm, seed, self.options.samples // self.batch))
        missing = {
            (name, seed, steps): steps * seconds[name] + START_SECONDS
            for _, _, name, seed, steps in planned
            if not finished(self.folder / run_name(name, steps, seed), steps)
        }
        print(f"{len(missing)} runs to make, about {sum(missing.values()) / 3600:.1f} h", flush=True)
        for mode, amount, arm, seed, steps in planned:
            run = self.train(run_name(arm, steps, seed), arm, seed, steps, ["evaluation.every=null"])
            result = Result(mode, amount, arm, seed, steps, *read_run(run))
            save(merged(load(self.folder / "results.json"), result), self.folder / "results.json")
            told = ", ".join(f"{RESULTS[key]} {100 * result.figures[key]:.1f}" for key in result.chance)
            print(f"equal {mode}, {arm}, seed {seed}, {steps} steps: {told}", flush=True)

    def measure(self) -> dict[str, float]:
        """Median seconds of a step by arm; what an earlier start measured is taken from there."""
        kept = self.step_times()
        for repeat in range(self.options.measure_repeats):
            for arm in self.names:  # in turns: a machine that slows down does so for all
                fingerprint = recipe_fingerprint(self.recipes[arm])
                times = kept.setdefault(arm, {"recipe": fingerprint, "seconds": []})
                if times["recipe"] != fingerprint:
                    raise StudyError(f"{self.folder} has step times of {arm} in another recipe; choose a new --folder")
                if len(times["seconds"]) > repeat:
                    continue
                more = ["run.log_every=1 steps", "data.heldout=[]", "run.overwrite=true"]
                run = self.train(f"speed-{slug(arm)}-{repeat}", arm, 0, self.options.measure_steps, more)
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                times["seconds"].append([row["step_s"] for row in rows[WARM_UP_STEPS:]])
                (self.folder / "step_seconds.json").write_text(json.dumps(kept, indent=1) + "\n")
                shutil.rmtree(run / "checkpoints", ignore_errors=True)  # nobody wants weights of 20 steps
        for arm in self.names:
            medians = [statistics.median(repeat) for repeat in kept[arm]["seconds"]]
            spread = f"{min(medians):.3f} to {max(medians):.3f} over its runs"
            print(f"{arm}: {step_seconds(kept)[arm]:.3f} s a step ({spread})", flush=True)
        return step_seconds(kept)

    def step_times(self) -> dict[str, dict[str, Any]]:
        """By arm: the fingerprint of its recipe, and the seconds of every step of every speed run."""
        kept = self.folder / "step_seconds.json"
        found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}
        return found

    def train(self, name: str, arm: str, seed: int, steps: int, more: Sequence[str]) -> Path:
        """One run to its end, unless it has come there; what a run of the same name began goes on.

        Raises StudyError if it fails, or if the folder holds a run of another recipe.
        """
        overrides = [
            *self.options.overrides,
            f"run.folder={self.folder}",
            f"run.name={name}",
            f"run.seed={seed}",
            "run.checkpoint_every=100000 steps",
            *self.overrides(arm, steps),
            *more,
        ]
        if fault := conflict(load_recipe(self.options.recipe, overrides).recipe):
            raise StudyError(fault)
        if not finished(self.folder / name, steps):
            command = [sys.executable, str(REPOSITORY / "cmpt/train.py"), self.options.recipe, *overrides]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                told = "\n".join(done.stderr.splitlines()[-8:])
                raise StudyError(f"{name} ended with {done.returncode}:\n{told}")
        return self.folder / name

    def report(self) -> None:
        """Tables on stdout, and the picture; of each mode the given amount, or else the one that was run last."""
        results = load(self.folder / "results.json")
        if not results:
            raise StudyError(f"{self.folder / 'results.json'}: no results; run without --report-only first")
        if self.options.arms:
            results = [result for result in results if result.arm in self.names]
        comparisons = []
        for mode, given in zip(MODES, (self.options.seconds, self.options.samples), strict=True):
            of_mode = [result for result in results if result.mode == mode]
            amount = given or (of_mode[-1].amount if of_mode else None)
            if chosen := [result for result in of_mode if result.amount == amount]:
                comparisons.append(chosen)
        if not comparisons:
            raise StudyError(f"{self.folder / 'results.json'}: no results of these arms and amounts")
        seconds = step_seconds(self.step_times())
        for chosen in comparisons:
            print(f"\n{title(chosen)}\n\n{table(chosen, seconds)}")
        picture = self.folder / "compare_masking.png"
        draw(comparisons, seconds, picture)
        shares = background_shares(self.recipes, BACKGROUND_IMAGES)
        print(
            f"\nWhite background, first {BACKGROUND_IMAGES} training images\n\n{background_table(shares)}\n\n{picture}"
        )


def own_arm(given: str) -> tuple[str, list[str]]:
    """Name and overrides of NAME:key=value,key=value; a comma inside of a value stays."""
    name, colon, settings = given.partition(":")
    if not (name and colon and "=" in settings):
        raise StudyError(f"--arm {given}: expected NAME:key=value,key=value")
    if name in ARMS:
        raise StudyError(f"--arm {name}: there is one of this name; choose another")
    return name, re.split(r",(?=[a-z_.]+=)", settings)


def step_seconds(times: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The median over all timed steps, by arm."""
    return {arm: statistics.median(sum(found["seconds"], [])) for arm, found in times.items() if found["seconds"]}


def run_name(arm: str, steps: int, seed: int) -> str:
    """Its length is part of it, so both modes share a run where they come to as many steps, and no others collide."""
    return f"{slug(arm)}-{steps}steps-seed{seed}"


def slug(arm: str) -> str:
    """The arm's name as part of a folder name."""
    return re.sub(r"[^\w-]", "_", arm)


if __name__ == "__main__":
    sys.exit(main())
