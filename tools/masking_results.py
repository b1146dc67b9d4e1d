"""Tables and the picture of tools/compare_masking.py, from what its runs left."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpt.monitor.plots import COLOURS, GRID, INK, MUTED
from masking_arms import Background

RESULTS = {
    "image_to_text_r10": "R@10 image→text",
    "text_to_image_r10": "R@10 text→image",
    "image_to_text_r1": "R@1 image→text",
    "text_to_image_r1": "R@1 text→image",
    "zero_shot_top1": "zero-shot top-1",
}
COSTS = ("mask_ratio", "image_tokens_per_sample", "text_tokens_per_sample", "flops_per_sample")
MODES = ("time", "samples")


@dataclass(frozen=True)
class Result:
    """One run as a part of one comparison."""

    mode: str  # of MODES
    amount: float  # what is equal: seconds of training, or samples
    arm: str
    seed: int
    steps: int
    figures: dict[str, float]  # of RESULTS (zero-shot only where the pairs have categories), COSTS
    chance: dict[str, float]  # by the keys of RESULTS that are in `figures`

    @property
    def recall(self) -> float:
        """R@10 of both directions together, in percent."""
        return 50 * (self.figures["image_to_text_r10"] + self.figures["text_to_image_r10"])


def finished(folder: Path, steps: int) -> bool:
    """Whether a run of so many steps came to its evaluation, the last thing that is read of it."""
    path = folder / "evaluations.jsonl"
    evaluations = _rows(path) if path.is_file() else []
    return bool(evaluations) and evaluations[-1]["step"] == steps


def read_run(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and chance levels of a finished run: its last evaluation, and the means of its costs over steps."""
    evaluation = _rows(folder / "evaluations.jsonl")[-1]
    figures = {key: float(evaluation[key]) for key in RESULTS if key in evaluation}
    choices = {"r10": evaluation["pairs"] / 10, "r1": evaluation["pairs"], "top1": evaluation.get("classes", 1)}
    chance = {key: min(1.0, 1 / choices[key.rpartition("_")[2]]) for key in figures}
    rows = _rows(folder / "metrics.jsonl")
    steps = [row["step"] - before for before, row in zip([0, *(row["step"] for row in rows)], rows, strict=False)]
    for key in COSTS:
        figures[key] = sum(n * row[key] for n, row in zip(steps, rows, strict=True)) / sum(steps)
    return figures, chance


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def merged(before: Sequence[Result], new: Result) -> list[Result]:
    """`before` with `new` at the end, in the place of what was known of the same run."""

    def which(result: Result) -> tuple[str, float, str, int]:
        return result.mode, result.amount, result.arm, result.seed

    return [*(result for result in before if which(result) != which(new)), new]


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by arm, the best mean recall first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.arm, []).append(result)
    return dict(sorted(found.items(), key=lambda item: -statistics.mean(r.recall for r in item[1])))


def mean(runs: Sequence[Result], key: str) -> float:
    return statistics.mean(run.figures[key] for run in runs)


def title(results: Sequence[Result]) -> str:
    """Of the runs of one comparison: what is equal, and how often each was made."""
    amount = results[0].amount
    equal = f"Equal time: {amount:,g} s of training"
    if results[0].mode == "samples":
        equal = f"Equal samples: {amount:,.0f} pairs"
    counts = sorted({len(runs) for runs in by_arm(results).values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{equal}, {seeds} {'seed' if counts == [1] else 'seeds'}"


def table(results: Sequence[Result], step_seconds: Mapping[str, float]) -> str:
    """Markdown of one comparison: what an arm costs, and its results in percent, mean over seeds ± standard
    deviation; the last row is chance."""
    keys = [key for key in RESULTS if all(key in result.figures for result in results)]
    heads = ["s/step", "steps", "hidden", "image tokens", "text tokens", "GFLOP per pair", *map(RESULTS.get, keys)]
    lines = ["| | " + " | ".join(map(str, heads)) + " |", "|-|" + "-:|" * len(heads)]
    for arm, runs in by_arm(results).items():
        cells = [
            f"{step_seconds[arm]:.2f}",
            f"{runs[0].steps}",
            f"{100 * mean(runs, 'mask_ratio'):.0f} %",
            f"{mean(runs, 'image_tokens_per_sample'):.0f}",
            f"{mean(runs, 'text_tokens_per_sample'):.1f}",
            f"{mean(runs, 'flops_per_sample') / 1e9:.2f}",
            *(_spread([100 * run.figures[key] for run in runs]) for key in keys),
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    chances = (f"{100 * results[0].chance[key]:.1f}" for key in keys)
    lines.append("| chance |" + " |" * 6 + " " + " | ".join(chances) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def background_table(shares: Mapping[str, Background]) -> str:
    """Markdown: of all patches, and of those that are hidden, how many are white background."""
    lines = ["| | of all patches | of the hidden ones |", "|-|-:|-:|"]
    for arm, share in shares.items():
        hidden = "by the weights, not known" if share.needs_weights else "nothing is hidden"
        if share.of_hidden is not None:
            hidden = f"{100 * share.of_hidden:.0f} %"
        lines.append(f"| {arm} | {100 * share.of_all:.0f} % | {hidden} |")
    return "\n".join(lines)


def draw(comparisons: Sequence[Sequence[Result]], step_seconds: Mapping[str, float], path: Path) -> None:
    """One panel for each comparison: arms by their result, every seed a dot, the mean a bar; costs beside."""
    most = max(len(by_arm(results)) for results in comparisons)
    figure = Figure(figsize=(5.8 * len(comparisons), 1.35 + 0.44 * most), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(comparisons), squeeze=False, sharex=True)[0]
    for axes, results in zip(panels, comparisons, strict=True):
        _draw_panel(axes, by_arm(results), step_seconds, 100 * results[0].chance["image_to_text_r10"])
        axes.set_title(title(results), fontsize=10.5, color=INK, loc="left", pad=14)
    furthest = max(
        max(result.recall, 100 * result.chance["image_to_text_r10"]) for each in comparisons for result in each
    )
    panels[0].set_xlim(0, 1.13 * furthest)  # leaves room for the figures
    figure.supxlabel(
        "R@10 in percent, mean of both directions. A dot is a seed, a bar and its figure their mean. "
        "Tokens: image + text of a pair.",
        fontsize=8,
        color=MUTED,
    )
    figure.savefig(path)


def _draw_panel(
    axes: Axes, arms: Mapping[str, Sequence[Result]], step_seconds: Mapping[str, float], chance: float
) -> None:
    beside = axes.get_yaxis_transform()  # x in shares of the panel, y an arm
    for y, (arm, runs) in enumerate(arms.items()):
        values = [run.recall for run in runs]
        middle = statistics.mean(values)
        axes.barh(y, middle, height=0.6, color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot([middle, middle], [y - 0.3, y + 0.3], color=COLOURS[0], linewidth=1.8, solid_capstyle="butt")
        axes.plot(
            values,
            [y] * len(values),
            "o",
            color=COLOURS[0],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        highest = (max(*values, middle), y)
        axes.annotate(f"{middle:.1f}", highest, (7, 0), textcoords="offset points", fontsize=8, color=INK, va="center")
        tokens = f"{mean(runs, 'image_tokens_per_sample'):.0f} + {mean(runs, 'text_tokens_per_sample'):.1f} tokens"
        cost = f"{runs[0].steps:,} steps, {runs[0].steps * step_seconds[arm]:,.0f} s"
        axes.text(-0.015, y - 0.16, arm, transform=beside, fontsize=8.5, color=INK, ha="right", va="center")
        axes.text(
            -0.015, y + 0.2, f"{tokens}, {cost}", transform=beside, fontsize=6.8, color=MUTED, ha="right", va="center"
        )
    axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "chance", (chance, 1), (0, 3), ("data", "axes fraction"), "offset points", fontsize=7, color=MUTED, ha="center"
    )
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelcolor=INK, labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(results: Sequence[Result], path: Path) -> None:
    """All or nothing: hours of runs are in this file."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def load(path: Path) -> list[Result]:
    """What `save` wrote; nothing where there is no such file."""
    return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
