"""Compare masking strategies by their held-out results, at equal training time and at equal samples.

    python tools/compare_masking.py --seconds 120 --samples 12800 [RECIPE] [key=value ...]

Ten arms (--arms, --arm NAME:key=value,key=value for one of your own) with three seeds each. First the step time of
each arm is measured, in short runs that take turns, on an otherwise idle machine; from it follow the steps that fit
into --seconds. Then every arm trains that many steps (equal time), and as many as --samples needs (equal samples), with
every seed and with a schedule of the run's own length. So results depend on the measured step times alone, not on what
else the machine does during the long runs. It takes seeds x arms x (--seconds, and the time of the samples, and 15 s
for starts and evaluation): about two and a half hours for the example on two cores.

What was measured is kept in FOLDER: a second start goes on where the first one ended. FOLDER/results.json has every
run's figures, FOLDER/compare_masking.png shows them; the tables are Markdown, for recipes/README.md. The last one says
how much of what each arm hides is white background, without training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout without an install

from cmpt.recipe import RecipeError, check_recipe, load_recipe  # noqa: E402
from cmpt.recipe.schema import Recipe  # noqa: E402
from masking_arms import ARMS, background_share, overrides_of  # noqa: E402
from masking_results import RESULTS, Result, background_table, draw, load, read_run, save, table  # noqa: E402

WARM_UP_STEPS = 4
BACKGROUND_IMAGES = 256


class StudyError(RuntimeError):
    """Something that the user can mend; one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME:key=value,key=value", help="one of your own"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, metavar="S", help="equal time: training time of every run")
    parser.add_argument("--samples", type=int, metavar="N", help="equal samples: pairs that every run sees")
    parser.add_argument("--measure-steps", type=int, default=14, help="length of a speed run (default: %(default)s)")
    parser.add_argument("--measure-repeats", type=int, default=2, help="speed runs per arm (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_masking"))
    parser.add_argument("--report-only", action="store_true", help="tables and picture of what there is, no runs")
    options = parser.parse_intermixed_args(arguments)
    if not (options.seconds or options.samples or options.report_only):
        parser.error("give --seconds, --samples, or both")
    try:
        study = Study(options)
        if not options.report_only:
            study.run()
        study.report()
    except (StudyError, RecipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    return 0


class Study:
    """All runs of one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = REPOSITORY / options.folder
        own = dict(given.partition(":")[::2] for given in options.arm)
        self.own = {name: overrides.split(",") for name, overrides in own.items()}
        self.arms: list[str] = [*(options.arms or ARMS), *self.own]
        if unknown := [arm for arm in self.arms if arm not in (*ARMS, *self.own)]:
            raise StudyError(f"--arms {unknown[0]}: expected one of {', '.join(ARMS)}")
        self.recipe: Recipe = load_recipe(options.recipe, options.overrides).recipe
        for arm in self.arms:
            loaded = load_recipe(options.recipe, [*options.overrides, *self.overrides(arm, 10)])
            if faults := check_recipe(loaded.recipe, origins=loaded.origins):
                raise StudyError(f"arm {arm}: {faults[0]}")

    def overrides(self, arm: str, steps: int) -> list[str]:
        return overrides_of(arm, self.own, steps, self.recipe)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = self.measured()
        batch = self.recipe.engine.batch_size
        results = []
        for seed in self.options.seeds:
            for arm in self.arms:
                for mode, steps in (
                    ("time", round((self.options.seconds or 0) / seconds[arm])),
                    ("samples", (self.options.samples or 0) // batch),
                ):
                    if not steps:
                        continue
                    run = self.train(f"{slug(arm)}-{steps}-seed{seed}", arm, seed, steps, ["evaluation.every=null"])
                    results.append(Result(mode, arm, seed, steps, read_run(run)))
                    told = ", ".join(f"{head} {100 * results[-1].figures[key]:.1f}" for key, head in RESULTS.items())
                    print(f"equal {mode}, {arm}, seed {seed}, {steps} steps: {told}", flush=True)
                    save(results, self.folder / "results.json")

    def measured(self) -> dict[str, float]:
        """Median seconds of a step by arm; what an earlier start measured is taken from there."""
        kept = self.folder / "step_seconds.json"
        times: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
        missing = [arm for arm in self.arms if arm not in times]
        measured: dict[str, list[float]] = {arm: [] for arm in missing}
        for repeat in range(self.options.measure_repeats):
            for arm in missing:  # in turns: a machine that slows down does so for all
                more = ["run.log_every=1 steps", "data.heldout=[]", "run.overwrite=true"]
                run = self.train(f"speed-{slug(arm)}-{repeat}", arm, 0, self.options.measure_steps, more)
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                measured[arm] += [row["step_s"] for row in rows[WARM_UP_STEPS:]]
        kept.write_text(json.dumps(times | measured, indent=1) + "\n")
        for arm in missing:
            low, high = min(measured[arm]), max(measured[arm])
            print(f"{arm}: {statistics.median(measured[arm]):.3f} s a step ({low:.3f} to {high:.3f})", flush=True)
        return self.step_seconds()

    def step_seconds(self) -> dict[str, float]:
        kept = self.folder / "step_seconds.json"
        if not kept.is_file():
            raise StudyError(f"{kept}: no such file; run without --report-only first")
        return {arm: statistics.median(seconds) for arm, seconds in json.loads(kept.read_text()).items()}

    def train(self, name: str, arm: str, seed: int, steps: int, more: Sequence[str]) -> Path:
        """One run to its end; one that a run of the same name began goes on. Raises StudyError if it fails."""
        command = [
            sys.executable,
            "cmpt/train.py",
            self.options.recipe,
            *self.options.overrides,
            f"run.folder={self.folder}",
            f"run.name={name}",
            f"run.seed={seed}",
            "run.checkpoint_every=100000 steps",
            *self.overrides(arm, steps),
            *more,
        ]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            told = "\n".join(done.stderr.splitlines()[-8:])
            raise StudyError(f"{name} ended with {done.returncode}:\n{told}")
        return self.folder / name

    def report(self) -> None:
        def complain(text: str) -> None:
            raise StudyError(text)

        results = load(self.folder / "results.json", complain)
        seconds, titles = self.step_seconds(), {}
        for mode in ("time", "samples"):
            if runs := [result for result in results if result.mode == mode]:
                amount = f"{statistics.median(r.steps * seconds[r.arm] for r in runs):.0f} s of training"
                pairs = f"{runs[0].steps * self.recipe.engine.batch_size:,} pairs"
                titles[mode] = f"Equal time: {amount}" if mode == "time" else f"Equal samples: {pairs}"
                print(f"\n{titles[mode]}\n\n{table(results, mode, seconds)}")
        print(f"\nChance is {100 * results[0].figures['chance_r10']:.0f} % for R@10.")
        draw(results, titles, self.folder / "compare_masking.png")
        shares = {
            arm: background_share(
                self.options.recipe, [*self.options.overrides, *self.overrides(arm, 10)], BACKGROUND_IMAGES
            )
            for arm in self.arms
            if arm not in ("none", "small images") and "embedding" not in arm  # these need a model, or hide nothing
        }
        print(f"\nWhite background\n\n{background_table(shares)}\n\n{self.folder / 'compare_masking.png'}")


def slug(arm: str) -> str:
    """The arm's name as part of a folder name."""
    return "".join(letter if letter.isalnum() else "_" for letter in arm)


if __name__ == "__main__":
    sys.exit(main())
