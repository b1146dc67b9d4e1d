"""Compare masking strategies at equal training time, on this machine, by their held-out results.

    python tools/compare_masking.py [RECIPE] [key=value ...] [--seconds 150] [--seeds 0 1 2]

First the step time of each strategy is measured, one after the other, in a short run on an otherwise idle machine; from
it follow the steps that fit into `--seconds`. Then every strategy trains that many steps with every seed, each run with
a schedule of its own length. The results therefore depend on the measured step times alone, not on what else the
machine does during the long runs. The step times are kept in FOLDER/step_seconds.json: a second start takes them from
there and goes on where the first one ended. The table is Markdown, for recipes/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 4
RESULTS = {
    "image_to_text_r10": "R@10 image→text",
    "text_to_image_r10": "R@10 text→image",
    "image_to_text_r1": "R@1 image→text",
    "text_to_image_r1": "R@1 text→image",
    "zero_shot_top1": "zero-shot top-1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--strategies", nargs="+", default=["cluster", "random", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="training time of every run (default: %(default)s)"
    )
    parser.add_argument("--measure-steps", type=int, default=20, help="length of the speed runs (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_masking"))
    options = parser.parse_intermixed_args(arguments)

    step_seconds = measured_step_seconds(options)
    found: dict[str, list[dict[str, Any]]] = {}
    steps = {strategy: round(options.seconds / seconds) for strategy, seconds in step_seconds.items()}
    for seed in options.seeds:
        for strategy in options.strategies:
            run = train(options, f"{strategy}-seed{seed}", strategy, seed, steps[strategy], ["evaluation.every=null"])
            last = rows(run / "evaluations.jsonl")[-1]
            found.setdefault(strategy, []).append(last)
            print(f"{strategy}, seed {seed}: " + ", ".join(f"{RESULTS[k]} {100 * last[k]:.1f}" for k in RESULTS))
    print()
    print(table(found, step_seconds, steps))
    return 0


def measured_step_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step by strategy, from short runs, or from what an earlier start measured."""
    kept = REPOSITORY / options.folder / "step_seconds.json"
    measured: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    for strategy in options.strategies:
        if strategy in measured:
            continue
        more = ["run.log_every=1 steps", "data.heldout=[]", "run.overwrite=true"]
        run = train(options, f"speed-{strategy}", strategy, 0, options.measure_steps, more)
        times = [row["step_s"] for row in rows(run / "metrics.jsonl")[WARM_UP_STEPS:]]
        measured[strategy] = statistics.median(times)
        kept.write_text(json.dumps(measured, indent=1) + "\n")
        print(f"{strategy}: {measured[strategy]:.3f} s a step (fastest {min(times):.3f}, slowest {max(times):.3f})")
    return measured


def train(options: argparse.Namespace, name: str, strategy: str, seed: int, steps: int, more: Sequence[str]) -> Path:
    """One run to its end; one that a run of the same name began goes on."""
    run = options.folder / name
    command = [
        sys.executable,
        "cmpt/train.py",
        options.recipe,
        *options.overrides,
        f"run.folder={options.folder}",
        f"run.name={name}",
        f"run.seed={seed}",
        f"run.duration={steps} steps",
        "run.checkpoint_every=100000 steps",
        f"masking.strategy={strategy}",
        *more,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return REPOSITORY / run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(found: dict[str, list[dict[str, Any]]], step_seconds: dict[str, float], steps: dict[str, int]) -> str:
    """Markdown: mean over seeds ± standard deviation, in percent."""
    lines = [
        "| strategy | s/step | steps | " + " | ".join(RESULTS.values()) + " |",
        "|---|---:|---:|" + "---:|" * len(RESULTS),
    ]
    for strategy, results in found.items():
        cells = []
        for key in RESULTS:
            values = [100 * result[key] for result in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {strategy} | {step_seconds[strategy]:.2f} | {steps[strategy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
