"""What a person sees while a run goes on: one live line on a terminal, a few plain lines anywhere else.

Both consoles have the same methods. Fractions come in as fractions and are shown as percent.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from cmpt.monitor.tasks import by_task, fractions

_RATE_WINDOW = 30  # logged steps that the speed for the ETA is measured over
_BAR_CELLS = (8, 30)  # narrowest and widest progress bar


class Console(Protocol):
    def update(self, row: Mapping[str, Any]) -> None: ...

    def evaluation(self, step: int, results: Mapping[str, float]) -> None: ...

    def checkpoint(self, step: int, path: str) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, outcome: str) -> None: ...


def make_console(recipe_name: str, total_steps: int, start_step: int, stream: TextIO | None = None) -> Console:
    """The live line if `stream` (standard output) is a terminal that can move its cursor, else the plain lines."""
    stream = sys.stdout if stream is None else stream
    rich = RichConsole(file=stream, highlight=False)
    if rich.is_terminal and not rich.is_dumb_terminal:
        return LiveConsole(rich, recipe_name, total_steps, start_step)
    return PlainConsole(stream, recipe_name, total_steps, start_step)


class _Pace:
    """Seconds per step over the last logged steps, by the wall clock: evaluations and checkpoints count."""

    def __init__(self, step: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._points: deque[tuple[int, float]] = deque([(step, clock())], maxlen=_RATE_WINDOW)

    def update(self, step: int) -> None:
        self._points.append((step, self._clock()))

    def seconds_left(self, total_steps: int) -> float | None:
        """Counts down between updates; None before the first one."""
        (first, begun), (last, ended) = self._points[0], self._points[-1]
        if last <= first:
            return None
        left = (total_steps - last) * (ended - begun) / (last - first)
        return max(0.0, left - (self._clock() - ended))


class LiveConsole:
    """One line that redraws itself; messages appear above it. The cursor comes back in `close`."""

    def __init__(
        self,
        rich: RichConsole,
        recipe_name: str,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rich = rich
        self._name = recipe_name
        self._total_steps = total_steps
        self._row: Mapping[str, Any] = {}
        self._step = start_step
        self._results: Mapping[str, float] = {}
        self._pace = _Pace(start_step, clock)
        self._live: Live | None = Live(self, console=rich, refresh_per_second=2, transient=False)
        self._live.start()

    def update(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._step = row["step"]
        self._pace.update(self._step)

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        self._results = results
        self._step = max(self._step, step)
        self._rich.print(Text(f"step {step:,}  ", "bold").append(describe_results(results), "not bold"))

    def checkpoint(self, step: int, path: str) -> None:
        """No message: a checkpoint is routine, and the line is for what changes."""
        self._step = max(self._step, step)

    def note(self, text: str) -> None:
        self._rich.print(Text(text))

    def close(self, outcome: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._rich.print(Text(f"{outcome} at step {self._step:,} of {self._total_steps:,}"))

    def __rich_console__(self, rich: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield self._line(options.max_width, ascii_only=options.ascii_only)

    def _line(self, width: int, ascii_only: bool) -> Text:
        """Name, bar and progress always; then as many of the figures as fit, the most telling first."""
        fraction = min(1.0, self._step / self._total_steps) if self._total_steps else 1.0
        progress = Text.assemble(
            f"{self._step:,}/{self._total_steps:,}", "  ", (f"{math.floor(100 * fraction)} %", "bold")
        )
        figures = [Text.assemble((f"{label} ", "dim"), value) for label, value in self._figures()]
        line, room = Text("  ").join([Text(self._name, "bold cyan"), progress]), _BAR_CELLS[0] + 2
        for figure in figures:
            if line.cell_len + 2 + figure.cell_len + room < width:
                line = line + Text("  ") + figure
        bar_cells = min(_BAR_CELLS[1], width - 1 - line.cell_len - 2)
        if bar_cells >= _BAR_CELLS[0]:
            full, empty = ("#", "-") if ascii_only else ("━", "─")
            done = round(bar_cells * fraction)
            bar = Text.assemble("  ", (full * done, "cyan"), (empty * (bar_cells - done), "dim"))
            line = line[: len(self._name)] + bar + line[len(self._name) :]
        line.no_wrap, line.overflow = True, "crop"
        return line

    def _figures(self) -> Iterator[tuple[str, str]]:
        row = self._row
        if (left := self._pace.seconds_left(self._total_steps)) is not None:
            yield "ETA", clock_time(left)
        if "loss" in row:
            yield "loss", number(row["loss"])
        if row.get("mask_ratio") is not None:
            yield "mask", percent(row["mask_ratio"])
        if "image_to_text_r10" in self._results and "text_to_image_r10" in self._results:
            forth, back = self._results["image_to_text_r10"], self._results["text_to_image_r10"]
            yield "R@10", f"{100 * forth:.1f} | {percent(back)}"  # image to text | text to image
        if row.get("samples_per_s") is not None:
            yield "img/s", f"{row['samples_per_s']:,.0f}"
        if row.get("data_wait_fraction") is not None:
            yield "wait", percent(row["data_wait_fraction"])


class PlainConsole:
    """For log files and pipes: the start, evaluations, checkpoints, every tenth of the run, the end."""

    def __init__(
        self,
        stream: TextIO,
        recipe_name: str,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._step = start_step
        self._tenths = self._tenths_done(start_step)
        self._pace = _Pace(start_step, clock)
        self._closed = False
        self.note(f"{recipe_name}: training from step {start_step:,} to {total_steps:,}")

    def _tenths_done(self, step: int) -> int:
        return 10 * step // self._total_steps if self._total_steps else 10

    def update(self, row: Mapping[str, Any]) -> None:
        self._step = row["step"]
        self._pace.update(self._step)
        tenths = self._tenths_done(self._step)
        if tenths == self._tenths:
            return
        self._tenths = tenths
        parts = [f"step {self._step:,}/{self._total_steps:,} ({10 * tenths} %)"]
        parts.append(f"loss {number(row.get('loss'))}")
        if row.get("mask_ratio") is not None:
            parts.append(f"mask {percent(row['mask_ratio'])}")
        if row.get("samples_per_s") is not None:
            parts.append(f"{row['samples_per_s']:,.0f} images/s")
        if row.get("data_wait_fraction") is not None:
            parts.append(f"data wait {percent(row['data_wait_fraction'])}")
        left = self._pace.seconds_left(self._total_steps)
        if left is not None and self._step < self._total_steps:
            parts.append(f"ETA {clock_time(left)}")
        self.note(", ".join(parts))

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        self._step = max(self._step, step)
        self.note(f"step {step:,}: {describe_results(results)}")

    def checkpoint(self, step: int, path: str) -> None:
        self._step = max(self._step, step)
        self.note(f"step {step:,}: checkpoint {path}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self, outcome: str) -> None:
        if not self._closed:
            self._closed = True
            self.note(f"{outcome} at step {self._step:,} of {self._total_steps:,}")


def describe_results(results: Mapping[str, float]) -> str:
    """One line, e.g. "held-out, 500 pairs: image to text R@1/5/10 12.0/33.0/45.2 %, … (chance R@10 2.0 %)"."""
    parts = []
    for key, label in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        ranks = [k for k in (1, 5, 10) if f"{key}_r{k}" in results]
        if ranks:
            values = "/".join(f"{100 * results[f'{key}_r{k}']:.1f}" for k in ranks)
            parts.append(f"{label} R@{'/'.join(map(str, ranks))} {values} %")
    if "zero_shot_top1" in results:
        parts.append(f"zero-shot top-1 {percent(results['zero_shot_top1'])}")
    pairs = f", {int(results['pairs']):,} pairs" if "pairs" in results else ""
    chance = f" (chance R@10 {percent(results['chance_r10'])})" if "chance_r10" in results else ""
    said = [f"held-out{pairs}: {', '.join(parts)}{chance}"] if parts else []
    for task, found in by_task(results).items():
        best = [(label[0].lower() + label[1:], found[measure]) for measure, label in fractions(found)][:1]
        said += [f"{task}: {label} {percent(value)}" for label, value in best]
    return "; ".join(said) or "no results"


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds: 0:07, 12:34, 3:21:05, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole >= 172_800:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
