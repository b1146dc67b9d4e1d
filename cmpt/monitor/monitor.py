"""The one place that a run reports to: JSON lines, TensorBoard and the console, on rank 0 alone.

Everything given to the monitor must already be on the host as plain numbers; it never waits for a device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cmpt.batch import Rejection
from cmpt.monitor.console import Console, make_console
from cmpt.monitor.records import REDONE_KINDS, RecordWriter, metrics_row, trim_after, utc_now

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Use as a context manager: the terminal is restored and the files are closed whatever happens inside.

    `start_step` is the number of steps already done: 0 for a new run, the checkpoint's step for a resumed one.
    Records of later steps, left by a killed run, are removed at the start, since those steps are run again. A start
    from 0 removes all records of steps, but no events except those that happen again.
    `active=False` (every rank but 0) makes all methods do nothing.
    """

    def __init__(
        self, run_folder: str | Path, recipe_name: str, total_steps: int, start_step: int, active: bool = True
    ) -> None:
        self._parts: _Parts | None = None
        if active:
            self._parts = _Parts(Path(run_folder), recipe_name, total_steps, start_step)
            self._parts.event("resume" if start_step else "start", start_step, recipe=recipe_name, steps=total_steps)
            if start_step:
                self._parts.console.note(f"resumed from step {start_step:,}")

    def log(self, row: Mapping[str, Any]) -> None:
        """One logged step: the keys of `records.METRIC_KEYS`, of which only `step` is required."""
        if self._parts is None:
            return
        complete = metrics_row(row)
        step = complete["step"]
        if not isinstance(step, int):
            raise ValueError(f"metrics row: got step = {step!r}, expected an integer")
        self._parts.reached(step)
        self._parts.append(self._parts.metrics, complete)
        self._parts.scalars("train", step, complete)
        self._parts.console.update(complete)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Something that happened, e.g. kind "skip" with `cause` and `key`. A "warning" shows its `text` at once."""
        if self._parts is None:
            return
        if kind == "warning" and "text" in fields:
            self._parts.warn(step, **fields)
        else:
            self._parts.event(kind, step, **fields)

    def skips(self, step: int, rejections: Iterable[Rejection]) -> None:
        """What could not be used on the way to this step."""
        for rejection in rejections:
            self.event("skip", step, **asdict(rejection))

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Held-out results by name, recalls and accuracies as fractions."""
        if self._parts is None:
            return
        self._parts.reached(step)
        self._parts.append(self._parts.evaluations, {"step": step, **results})
        self._parts.scalars("eval", step, results)
        self._parts.curves(lambda board: board.flush())
        self._parts.console.evaluation(step, results)

    def note(self, text: str) -> None:
        """A message for the person who watches; it is not recorded."""
        if self._parts is not None:
            self._parts.console.note(text)

    def checkpoint(self, step: int, path: str | Path, **fields: Any) -> None:
        """A checkpoint is complete; `fields` say how large it is and what it cost."""
        if self._parts is None:
            return
        self._parts.event("checkpoint", step, path=str(path), **fields)
        self._parts.console.checkpoint(step, str(path))

    def sync(self) -> None:
        """Bring all records to the disk; may be called in another thread. Raises OSError if a line cannot be written:
        a checkpoint must not become visible before the records of its steps."""
        if self._parts is not None:
            self._parts.sync()

    def listing(self, name: str, lines: Iterable[str]) -> str:
        """Puts a text file `name` into the run folder; its path, or why it is not there, with a warning."""
        if self._parts is None:
            return ""
        return self._parts.put(name, "".join(f"{line}\n" for line in lines).encode())

    def picture(self, name: str, png: bytes) -> None:
        """Puts `pictures/<name>.png` into the run folder, in place of an earlier one, for the report to find."""
        if self._parts is not None:
            self._parts.put(f"pictures/{name}.png", png)

    def close(self, outcome: str | None = None) -> None:
        """May be called more than once; only the first call counts. The outcome is recorded and shown.

        Unless given, it is "finished" after the last step of the run and "stopped" before it.
        """
        if self._parts is not None:
            parts, self._parts = self._parts, None
            parts.close(outcome)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close(f"stopped by {kind.__name__}")


class _Parts:
    """What an active monitor holds."""

    def __init__(self, run_folder: Path, recipe_name: str, total_steps: int, start_step: int) -> None:
        # Here, because the import takes a second and ranks other than 0 have no use for it.
        from torch.utils.tensorboard import SummaryWriter

        run_folder.mkdir(parents=True, exist_ok=True)
        metrics, evaluations, events = (run_folder / f"{n}.jsonl" for n in ("metrics", "evaluations", "events"))
        last_kept = start_step if start_step else -1  # a run that starts again evaluates again before its first step
        trim_after(metrics, last_kept)
        trim_after(evaluations, last_kept)
        trim_after(events, last_kept, REDONE_KINDS)
        self.run_folder = run_folder
        self.step, self.total_steps = start_step, total_steps
        self.metrics, self.evaluations = RecordWriter(metrics), RecordWriter(evaluations)
        self.events = RecordWriter(events)
        self.tensorboard: SummaryWriter | None = SummaryWriter(
            str(run_folder / "tensorboard"), purge_step=last_kept + 1, flush_secs=20
        )
        self.console: Console = make_console(recipe_name, total_steps, start_step)

    def reached(self, step: int) -> None:
        self.step = max(self.step, step)

    def append(self, writer: RecordWriter, record: Mapping[str, Any]) -> None:
        """A line that cannot be written now is written later; the first of them is told."""
        well = writer.fault is None
        writer.append(record)
        if well and writer.fault is not None:
            self.warn(self.step, f"{writer.path.name}: {writer.fault.strerror}; lines are kept and written later")

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self.append(self.events, {"kind": kind, "time": utc_now(), "step": step, **fields})

    def warn(self, step: int, text: str, **fields: Any) -> None:
        self.event("warning", step, text=text, **fields)
        self.console.note(f"step {step:,}: warning: {text}")

    def curves(self, draw: Callable[[SummaryWriter], None]) -> None:
        """TensorBoard's writer does not recover from a full disk: it is given up. All it shows is in the records."""
        if self.tensorboard is not None:
            try:
                draw(self.tensorboard)
            except OSError as fault:
                self.tensorboard = None
                self.warn(self.step, f"no more curves for TensorBoard in this start of the run: {fault}")

    def scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        shown = {key: value for key, value in values.items() if key != "step" and isinstance(value, int | float)}

        def draw(board: SummaryWriter) -> None:
            for key, value in shown.items():
                board.add_scalar(f"{group}/{key}", value, step)

        self.curves(draw)

    def put(self, name: str, content: bytes) -> str:
        """A file of the run folder, whole or not at all; its path, or why it is not there."""
        path = self.run_folder / name
        beside = path.with_name(f".{path.name}.new")
        try:
            path.parent.mkdir(exist_ok=True)
            beside.write_bytes(content)
            os.replace(beside, path)
        except OSError as fault:
            beside.unlink(missing_ok=True)
            self.warn(self.step, f"{path} could not be written: {fault.strerror}")
            return f"({name}: {fault.strerror})"
        return str(path)

    def sync(self) -> None:
        for writer in (self.metrics, self.evaluations, self.events):
            writer.sync()
        self.curves(lambda board: board.flush())

    def close(self, outcome: str | None) -> None:
        outcome = outcome or ("finished" if self.step >= self.total_steps else "stopped")
        self.curves(lambda board: board.close())
        try:
            self.event("end", self.step, outcome=outcome)
        finally:
            self.console.close(outcome)
            records = (self.metrics, self.evaluations, self.events)
            lost = [f"the last {count} lines of {writer.path}" for writer in records if (count := writer.close())]
            if lost:
                print(f"error: could not write {', '.join(lost)}; is the disk full?", file=sys.stderr, flush=True)
