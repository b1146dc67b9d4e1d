"""Tables and the picture of tools/compare_masking.py, from what its runs left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Result:
    """One run."""

    mode: str  # "time" or "samples"
    arm: str
    seed: int
    steps: int
    figures: dict[str, float]  # of RESULTS and COSTS, and "chance_r10"

    @property
    def recall(self) -> float:
        """R@10 of both directions together, in percent."""
        return 50 * (self.figures["image_to_text_r10"] + self.figures["text_to_image_r10"])


def read_run(folder: Path) -> dict[str, float]:
    """The last evaluation of a finished run, and the means over its steps of what they cost."""
    evaluation = _rows(folder / "evaluations.jsonl")[-1]
    found = {key: float(evaluation[key]) for key in RESULTS}
    found["chance_r10"] = 10 / evaluation["pairs"]
    rows = _rows(folder / "metrics.jsonl")
    steps = [row["step"] - before for before, row in zip([0, *(row["step"] for row in rows)], rows, strict=False)]
    for key in COSTS:
        found[key] = sum(n * row[key] for n, row in zip(steps, rows, strict=True)) / sum(steps)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_arm(results: Sequence[Result], mode: str) -> dict[str, list[Result]]:
    """The runs of a mode by arm, the best mean recall first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.mode == mode:
            found.setdefault(result.arm, []).append(result)
    return dict(sorted(found.items(), key=lambda item: -statistics.mean(r.recall for r in item[1])))


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(results: Sequence[Result], mode: str, step_seconds: dict[str, float]) -> str:
    """Markdown: what an arm costs, and its results in percent, mean over seeds ± standard deviation."""
    heads = ["s/step", "steps", "hidden", "image tokens", "text tokens", "GFLOP per pair", *RESULTS.values()]
    lines = ["| | " + " | ".join(heads) + " |", "|-|" + "-:|" * len(heads)]
    for arm, runs in by_arm(results, mode).items():

        def mean(key: str, runs: list[Result] = runs) -> float:
            return statistics.mean(run.figures[key] for run in runs)

        cells = [
            f"{step_seconds[arm]:.2f}",
            f"{runs[0].steps}",
            f"{100 * mean('mask_ratio'):.0f} %",
            f"{mean('image_tokens_per_sample'):.0f}",
            f"{mean('text_tokens_per_sample'):.1f}",
            f"{mean('flops_per_sample') / 1e9:.2f}",
            *(_spread([100 * run.figures[key] for run in runs]) for key in RESULTS),
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def background_table(shares: dict[str, Background]) -> str:
    """Markdown: of all patches, and of those that are hidden, how many are white background."""
    lines = ["| | of all patches | of the hidden ones |", "|-|-:|-:|"]
    for arm, share in shares.items():
        hidden = f"{100 * share.of_hidden:.0f} %" if share.of_hidden is not None else "nothing is hidden"
        lines.append(f"| {arm} | {100 * share.of_all:.0f} % | {hidden} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], titles: dict[str, str], path: Path) -> None:
    """Every seed as a dot, the mean as a bar, one panel for each mode; arms by their result, tokens beside."""
    modes = [mode for mode in titles if by_arm(results, mode)]
    most = max(len(by_arm(results, mode)) for mode in modes)
    figure = Figure(figsize=(5.4 * len(modes), 1.3 + 0.42 * most), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        arms = by_arm(results, mode)
        for y, (_, runs) in enumerate(arms.items()):
            values = [run.recall for run in runs]
            axes.barh(y, statistics.mean(values), height=0.62, color=COLOURS[0], alpha=0.25)
            axes.plot(values, [y] * len(values), "o", color=COLOURS[0], markersize=5, alpha=0.8, linewidth=0)
        tokens = {arm: statistics.mean(run.figures["image_tokens_per_sample"] for run in arms[arm]) for arm in arms}
        words = {arm: statistics.mean(run.figures["text_tokens_per_sample"] for run in arms[arm]) for arm in arms}
        labels = [f"{arm}\n{tokens[arm]:.0f} + {words[arm]:.0f} tokens, {arms[arm][0].steps} steps" for arm in arms]
        axes.set_yticks(range(len(arms)), labels, fontsize=7.5, color=INK)
        axes.invert_yaxis()
        axes.axvline(100 * results[0].figures["chance_r10"], color=MUTED, linewidth=1, linestyle="--")
        axes.set_xlim(left=0)
        axes.set_title(titles[mode], fontsize=10, color=INK, loc="left")
        axes.set_xlabel("R@10 in percent, mean of both directions; dots are seeds, dashed is chance", fontsize=7.5)
        axes.xaxis.label.set_color(MUTED)
        axes.tick_params(axis="x", colors=MUTED, labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.savefig(path)


def save(results: Sequence[Result], path: Path) -> None:
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


def load(path: Path, complain: Callable[[str], None]) -> list[Result]:
    """What `save` wrote; `complain` is told where there is nothing."""
    if not path.is_file():
        complain(f"{path}: no such file; run without --report-only first")
    return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
