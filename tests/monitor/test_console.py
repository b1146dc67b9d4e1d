import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from cmpt.monitor.console import LiveConsole, PlainConsole, clock_time, make_console

ROW = {"loss": 2.5, "mask_ratio": 0.5, "samples_per_s": 1234.0, "data_wait_fraction": 0.003}
RESULTS = {"image_to_text_r10": 0.452, "text_to_image_r10": 0.431, "pairs": 500.0, "chance_r10": 0.02}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_console_says_start_tenths_evaluations_checkpoints_and_end() -> None:
    stream, clock = io.StringIO(), Clock()
    console = PlainConsole(stream, "toy", 1000, 0, clock)
    for step in range(10, 1001, 10):
        clock.now += 10.0
        console.update({"step": step, **ROW})
    console.evaluation(1000, RESULTS)
    console.checkpoint(1000, "checkpoints/step_00001000")
    console.close("finished")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "toy: training from step 0 to 1,000"
    assert [line for line in lines if "(50 %)" in line] == [
        "step 500/1,000 (50 %), loss 2.500, mask 50.0 %, 1,234 images/s, data wait 0.3 %, ETA 8:20"
    ]
    assert len(lines) == 1 + 10 + 3
    assert "R@10 45.2 %" in lines[-3] and "500 pairs" in lines[-3] and "chance R@10 2.0 %" in lines[-3]
    assert lines[-2].endswith("checkpoint checkpoints/step_00001000")
    assert lines[-1] == "finished at step 1,000 of 1,000"
    assert "\x1b" not in stream.getvalue()


def test_a_pipe_gets_the_plain_console() -> None:
    assert isinstance(make_console("toy", 10, 0, io.StringIO()), PlainConsole)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_live_line_fits_the_terminal_and_shows_more_where_there_is_room(width: int) -> None:
    stream, clock = io.StringIO(), Clock()
    rich = RichConsole(file=stream, force_terminal=True, width=width)
    console = LiveConsole(rich, "vitb16_cc12m", 150_000, 0, clock)
    console.evaluation(1000, RESULTS)
    clock.now = 100.0
    console.update({"step": 75_000, **ROW})
    line = console._line(width, ascii_only=False)
    console.close("stopped")
    assert line.cell_len <= width
    assert "75,000/150,000" in line.plain and "50 %" in line.plain
    assert ("ETA 1:40" in line.plain) == (width >= 60)
    assert ("R@10 45.2 | 43.1 %" in line.plain) == (width >= 120)


def test_eta_counts_down_between_updates() -> None:
    stream, clock = io.StringIO(), Clock()
    console = LiveConsole(RichConsole(file=stream, force_terminal=True, width=80), "toy", 100, 0, clock)
    clock.now = 50.0
    console.update({"step": 50, **ROW})
    assert "ETA 0:50" in console._line(80, ascii_only=False).plain
    clock.now = 60.0
    assert "ETA 0:40" in console._line(80, ascii_only=False).plain
    console.close("stopped")


def test_clock_time() -> None:
    assert [clock_time(s) for s in (7, 754, 12_065, 187_200)] == ["0:07", "12:34", "3:21:05", "2 d 4 h"]


RUN = """
import sys, time
from cmpt.monitor.monitor import Monitor
with Monitor(sys.argv[1], "toy", 1000, 120) as monitor:
    for step in range(130, 1001, 10):
        monitor.log({"step": step, "loss": 2.5})
        if step == 200:
            monitor.note("a message")
        if step == 300 and sys.argv[2] == "raise":
            raise RuntimeError("broken")
        if step == 300 and sys.argv[2] == "wait":
            open(sys.argv[1] + "/waiting", "w").close()
            time.sleep(60)
        time.sleep(0.02)
"""


def on_terminal(folder: Path, end: str) -> tuple[str, int]:
    """What a terminal gets from a run that goes to its end, raises, or is interrupted (`wait`)."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), end], stdout=follower, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(follower)
    output, interrupted, deadline = b"", False, time.monotonic() + 50
    while time.monotonic() < deadline:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux reports the end of a pseudo-terminal
            break
        if not chunk:
            break
        output += chunk
        if not interrupted and (folder / "waiting").exists():  # not while it is in a library, which may catch it
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(leader)
    return output.decode(), process.wait(timeout=20)


@pytest.mark.parametrize("end", ["finish", "raise", "wait"])
def test_terminal_gets_one_live_line_and_its_cursor_back(tmp_path: Path, end: str) -> None:
    output, code = on_terminal(tmp_path, end)
    assert (code == 0) == (end == "finish")
    assert output.count("\x1b[?25l") == 1, "the cursor is hidden once"
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "and shown again"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r\n", "\n")
    lines = [line.rsplit("\r", 1)[-1] for line in plain.split("\n")]
    assert "\x1b[1A" not in output, "the live line is never more than one line"
    assert lines.index("resumed from step 120") < lines.index("a message")
    assert sum("/1,000  " in line for line in lines) == 1, "only the last state of the line stays"
    last = {"finish": "finished at step 1,000", "raise": "stopped by RuntimeError at step 300"}
    assert lines[-2] == f"{last.get(end, 'interrupted at step 300')} of 1,000"
