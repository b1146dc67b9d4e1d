"""Which curves the report shows, with their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmpt.monitor.page import plot_figure, section
from cmpt.monitor.plots import Curve, Plot, draw
from cmpt.monitor.tasks import by_task, fractions, sizes

Records = Sequence[Mapping[str, Any]]

_MOST_CURVES = 3  # of a task: so many labels fit above a plot
DIRECTIONS = (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))


def training_curves(metrics: Records) -> str:
    """The section with everything that is logged step by step."""
    if len(metrics) < 2:
        return section("Training", note="There are no curves yet: fewer than two steps have been logged.")
    steps = [row["step"] for row in metrics]

    def curve(key: str, label: str = "", smooth: bool = False) -> Curve:
        return Curve(label, steps, [row.get(key) for row in metrics], smooth)

    phases = {row["step"]: str(row["phase"]) for row in reversed(metrics) if row.get("phase")}
    firsts = {name: step for step, name in phases.items()}
    marks = {step: name for name, step in firsts.items()} if len(firsts) > 1 else None
    ratios = [row["mask_ratio"] for row in metrics if row.get("mask_ratio")]
    mean_ratio = f"Mean share {sum(ratios) / len(ratios):.3f} while masking; " if ratios else ""
    bad = sum("not_finite" in row for row in metrics)
    gaps = f" Values that are not finite, at {bad} of {len(metrics):,} logged steps, leave gaps." if bad else ""
    norms = [curve("grad_norm", "all", True), curve("grad_norm_image", "image", True)]
    norms.append(curve("grad_norm_text", "text", True))
    values = [v for c in norms for v in c.y if v]
    plots = [
        (Plot("loss", [curve("loss", "", True)], wide=True, marks=marks), "Loss", "Contrastive loss by step." + gaps),
        (Plot("lr", [curve("lr")], from_zero=True), "Learning rate", "Warm-up, then cosine."),
        (
            Plot("mask", [curve("mask_ratio", "hidden share", True), curve("mask_threshold", "threshold")]),
            "Mask ratio and threshold",
            f"{mean_ratio}the threshold holds it.",
        ),
        (Plot("samples", [curve("samples_per_s", "", True)], from_zero=True), "Samples per second", "All ranks."),
        (
            Plot("tokens", [curve("tokens_per_s", "", True)], from_zero=True),
            "Tokens per second",
            "Image and text tokens, all ranks; none is padding.",
        ),
        (
            Plot("wait", [curve("data_wait_fraction", "", True)], percent=True, from_zero=True),
            "Data wait",
            "Share of the time that a step waits for its batch.",
        ),
        (
            Plot("norms", norms, log=bool(values) and max(values) > 30 * min(values)),
            "Gradient norm",
            "Of all parameters and of each tower.",
        ),
        (
            Plot(
                "sizes",
                [curve("image_tokens_per_sample", "image"), curve("text_tokens_per_sample", "text")],
                from_zero=True,
            ),
            "Tokens per sample",
            "What is left of an image after masking, and of a caption.",
        ),
        (Plot("scale", [curve("logit_scale")]), "Logit scale", "The learned sharpness of the softmax over the batch."),
    ]
    drawn = [plot_figure(draw(plot), title, text, plot.wide) for plot, title, text in plots if plot.has_values()]
    missing = [title.lower() for plot, title, _ in plots if not plot.has_values()]
    note = f"Not recorded in this run: {', '.join(missing)}." if missing else ""
    return section("Training", f'<div class="plots">{"".join(drawn)}</div>', note=note)


def heldout_curves(evaluations: Records) -> str:
    """The section with the results of all evaluations of the run: held-out pairs, then the tasks of a suite."""
    steps = [row.get("step", 0) for row in evaluations]
    pairs = evaluations[-1].get("pairs") if evaluations else None
    drawn = []
    for key, label in DIRECTIONS:
        curves = [Curve(f"R@{k}", steps, [row.get(f"{key}_r{k}") for row in evaluations]) for k in (10, 5, 1)]
        level = min(1.0, 10 / pairs) if pairs else None
        plot = Plot(key, curves, percent=True, from_zero=True, level=level, level_label="chance R@10" if level else "")
        if plot.has_values():
            drawn.append(plot_figure(draw(plot), label, "Recall on the held-out pairs by step."))
    curves = [
        Curve(name, steps, [row.get(key) for row in evaluations])
        for key, name in (("zero_shot_top5", "top-5"), ("zero_shot_top1", "top-1"))
    ]
    plot = Plot("zero-shot", curves, percent=True, from_zero=True)
    if plot.has_values():
        drawn.append(plot_figure(draw(plot), "Zero-shot classification", "Accuracy on the held-out pairs by step."))
    for task, found in by_task(evaluations[-1] if evaluations else {}).items():
        shown = [pair for pair in fractions(found) if pair[0].endswith("_r1")] or [*fractions(found)][:_MOST_CURVES]
        curves = [Curve(label, steps, [row.get(f"{task}/{key}") for row in evaluations]) for key, label in shown]
        plot = Plot(f"task-{task}", curves, percent=True, from_zero=True)
        if plot.has_values():
            drawn.append(plot_figure(draw(plot), task, sizes(found)))
    if not drawn:
        return section("Evaluation curves", note="There are no curves yet: fewer than two evaluations.")
    return section("Evaluation curves", f'<div class="plots">{"".join(drawn)}</div>')
