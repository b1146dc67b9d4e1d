"""Keep a run going: restart it from its last sound checkpoint when it fails, with the hosts that still answer.

    python tools/supervise.py -- deepspeed --hostfile hostfile cmpt/train.py recipes/vitl14_laion.yaml
    python tools/supervise.py -- deepspeed cmpt/train.py RECIPE         (or torchrun ..., or python cmpt/train.py ...)

What stands after the two dashes is started as it is; with a hostfile, on those of its hosts that answer to ssh, as many
of them as have slots that divide data.streams. Lost hosts are asked again, and when they are back the run is ended with
a checkpoint and started with them. What happens is said here and recorded in the run's events.jsonl, kind "supervisor".

How a start ends, and what follows:
  the recipe is done, or run.stop_after is reached       exit code 0
  exit code 2 of the first start before a checkpoint     not restarted: it would fail again; exit code 2
    (bad recipe or data, refused resume, ...)
  Ctrl-C or SIGTERM here, or a file RUN/stop             the run writes a checkpoint; exit code 128 + signal
  anything else                                          restarted; after N restarts without a newer checkpoint,
                                                         given up with the run's exit code
A second Ctrl-C kills the run without a checkpoint. torchrun turns every failure of its processes into exit code 1, so
under it a fault of the first kind is tried N times.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cmpt.engine.manifest import newest_sound
from cmpt.monitor.records import REDONE_KINDS, RecordWriter, read_records, utc_now
from cmpt.recipe import RecipeError, load_recipe
from hosts import Launch, Slots, choose, parse_hostfile, parse_launch, silent_hosts, ssh_command, with_alive_options

USER_ERROR = 2
TROUBLE = frozenset({"stall", "lost_host", "lost_rank", "failed"})
"""Events after which the run's own guardians end it."""
_POLL_S = 0.5
_EVENTS_EVERY_S = 2.0
_OVERLAP_BYTES = 4096
_TROUBLE_LIMIT_S = 45.0
_LONGEST_WAIT_S = 600.0
_KILL_GRACE_S = 10.0


class Run:
    """The folder of the run that a recipe describes: how far it is, and what its events say.

    Nothing is written while a start is under way, and nothing before train.py has made the folder its own: what
    happens until then is kept and written afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop_file = folder / "stop"
        self._events = folder / "events.jsonl"
        self._unwritten: list[dict[str, Any]] = []
        self._before = 0
        self._looked_at_bytes = 0

    def checkpoint_step(self) -> int:
        """Step of the newest sound checkpoint; 0 without one."""
        newest, _ = newest_sound(self.folder / "checkpoints")
        return int(newest.name[5:]) if newest else 0

    def record(self, event: str, step: int, **fields: Any) -> None:
        self._unwritten.append({"kind": "supervisor", "time": utc_now(), "step": step, "event": event, **fields})

    def write(self) -> None:
        if (self.folder / "recipe.yaml").exists():
            writer = RecordWriter(self._events)
            for record in self._unwritten:
                writer.append(record)
            if lost := writer.close():
                print(f"supervise: {lost} events are not in {self._events}: {writer.fault}", file=sys.stderr)
            self._unwritten.clear()

    def begin(self) -> None:
        """A start follows: events from here on are its own."""
        self.stop_file.unlink(missing_ok=True)
        self._before, self._looked_at_bytes = len(self._lasting()), 0

    def events(self) -> list[dict[str, Any]]:
        """Those of this start. A resume removes events that happen again, so they do not count as events here."""
        return self._lasting()[self._before :]

    def trouble(self) -> dict[str, Any] | None:
        """The first event of this start after which it must end soon. Reads what is new since the last look, and more
        only if that has such an event; a file that cannot be read now is looked at again next time."""
        try:
            with self._events.open("rb") as file:
                file.seek(max(0, self._looked_at_bytes - _OVERLAP_BYTES))
                new = file.read()
                self._looked_at_bytes = file.tell()
            if any(f'"{kind}"'.encode() in new for kind in TROUBLE):
                return next((event for event in self.events() if event["kind"] in TROUBLE), None)
        except (OSError, ValueError):
            self._looked_at_bytes = 0
        return None

    def ended_well(self) -> bool:
        """train.py said that it came to its end. An exit code of 0 is not enough: DeepSpeed's launcher also gives it
        when the process that looks after the ranks was killed."""
        return any(event["kind"] == "end" and event["outcome"] in ("finished", "stopped") for event in self.events())

    def _lasting(self) -> list[dict[str, Any]]:
        return [event for event in read_records(self._events) if event["kind"] not in REDONE_KINDS]


class Supervisor:
    """Starts the run, watches it, starts it again. `launch` is what stands on the command line, `listed` its hosts."""

    def __init__(self, options: argparse.Namespace, launch: Launch, run: Run, streams: int) -> None:
        self.options, self.launch, self.run, self.streams = options, launch, run, streams
        self.listed: Slots = parse_hostfile(launch.hostfile.read_text()) if launch.hostfile else {}
        self.environment = dict(os.environ)
        self.ssh: list[str] = []
        if self.listed:
            self.environment = with_alive_options(self.environment)
            asked = shlex.split(options.ssh) if options.ssh else None
            self.ssh = asked or ssh_command(self.environment, launch.option("--ssh_port"))
        self.signals: list[int] = []

    def supervise(self) -> int:
        """Until the run is done, stopped or given up. Returns the exit code."""
        restart, fruitless = 0, 0
        step = self.run.checkpoint_step()
        with tempfile.TemporaryDirectory(prefix="supervise-") as folder:
            while True:
                hosts = self.available_hosts(step)
                if self.signals:
                    return 128 + self.signals[0]
                code, ended_by = self.start(hosts, Path(folder), restart, step)
                before, step = step, self.run.checkpoint_step()
                lost = sorted(set(hosts) & set(self.silent(list(hosts)))) if code else []
                self.say("exit", step, code=code, ended_by=ended_by, progress_steps=step - before, hosts_lost=lost)
                if ended_by == "signal":
                    return 128 + self.signals[0]
                if ended_by == "stop file":
                    return 128 + signal.SIGTERM
                if code == 0 and self.run.ended_well():
                    self.say("finished", step)
                    return 0
                if code == USER_ERROR and restart == 0 and step == before:
                    self.say("giving up", step, why="exit code 2: not to be mended by another start")
                    return USER_ERROR
                restart += 1
                fruitless = 0 if step > before else fruitless
                if ended_by == "rejoin":
                    continue
                if fruitless >= self.options.restarts:
                    self.say("giving up", step, why=f"{fruitless} restarts in a row made no checkpoint")
                    return code if code > 0 else 1
                self.pause(self.options.wait * 2**fruitless)
                fruitless += 1

    def available_hosts(self, step: int) -> Slots:
        """The hosts for the next start; waits for as long as no usable set of them answers. {} without a hostfile."""
        wait = self.options.wait
        while self.listed and not self.signals:
            silent = self.silent(list(self.listed))
            hosts = choose(self.listed, self.listed.keys() - silent.keys(), self.streams)
            if hosts:
                return hosts
            why = "; ".join(f"{name}: {said}" for name, said in silent.items()) or "all hosts answer"
            slots = ", ".join(f"{name} slots={count}" for name, count in self.listed.items() if name not in silent)
            why += f"; no set of {slots} divides data.streams = {self.streams}" if slots else ""
            self.say("waiting for hosts", step, why=why)
            self.pause(wait)
            wait = max(1.0, wait * 2)
        return {}

    def start(self, hosts: Slots, folder: Path, restart: int, step: int) -> tuple[int, str | None]:
        """One start to its end: its exit code (128 + signal if one ended the launcher), and what we ended it for."""
        launch = self.launch.on(hosts, self.listed, folder / "hostfile") if hosts else self.launch
        left_out = [name for name in self.listed if name not in hosts]
        self.say("start", step, restart=restart, hosts=list(hosts), hosts_left_out=left_out, command=launch.command())
        self.run.begin()
        # A session of its own: Ctrl-C of the terminal must reach this process alone.
        process = subprocess.Popen(launch.command(), env=self.environment, start_new_session=True)
        try:
            ended_by = self.watch(process, hosts)
        finally:
            self.kill(process)
            self.run.stop_file.unlink(missing_ok=True)
        code = process.returncode
        return (128 - code if code < 0 else code), ended_by

    def watch(self, process: subprocess.Popen[bytes], hosts: Slots) -> str | None:
        """Wait for the end of the start; ask it to stop, or kill it, where there is a reason, which is returned."""
        reason: str | None = None
        trouble_since: float | None = None
        look_at = time.monotonic()
        rejoin_at = look_at + self.options.rejoin_every
        while process.poll() is None:
            now = time.monotonic()
            if len(self.signals) > 1:
                return "signal"
            if self.signals:
                reason = "signal"
            elif reason is None and self.run.stop_file.exists():
                reason = "stop file"
            elif reason is None and self.options.rejoin_every and len(hosts) < len(self.listed) and now >= rejoin_at:
                rejoin_at = now + self.options.rejoin_every
                reason = "rejoin" if self.more_hosts_than(hosts) else None
            if reason:
                self.ask_to_stop()
            if now >= look_at:
                look_at = now + _EVENTS_EVERY_S
                if trouble_since is None and (event := self.run.trouble()):
                    trouble_since = now
                    self.say("trouble", self.run.checkpoint_step(), event_seen=event)
                elif trouble_since is not None and now - trouble_since > _TROUBLE_LIMIT_S:
                    return reason or "hang"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
        # A file that was laid there in the last moment, or one that ended the run between two looks.
        return reason or ("stop file" if self.run.stop_file.exists() else None)

    def ask_to_stop(self) -> None:
        """Rank 0 looks for this file after every step, and then all ranks write a checkpoint and end.

        No signal does this over several hosts: given SIGINT or SIGTERM, DeepSpeed's launcher ends pdsh first, which
        breaks the pipes of all ranks, then gives them 30 s, and returns while they still write.
        The file is made again as long as the run goes on, for a run that is only starting removes it.
        """
        if (self.run.folder / "recipe.yaml").exists():
            self.run.stop_file.touch()

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End the launcher and everything of it on this host; on others, what its own handler of SIGTERM reaches."""
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def more_hosts_than(self, hosts: Slots) -> bool:
        """Whether hosts that were left out answer again and make a larger run possible."""
        others = [name for name in self.listed if name not in hosts]
        back = set(others) - set(self.silent(others))
        larger = choose(self.listed, {*hosts, *back}, self.streams)
        return sum(larger.values()) > sum(hosts.values())

    def silent(self, names: list[str]) -> dict[str, str]:
        return silent_hosts(names, self.ssh) if self.listed else {}

    def pause(self, seconds: float) -> None:
        """Wait, at most ten minutes; a signal ends it."""
        limit = time.monotonic() + min(seconds, _LONGEST_WAIT_S)
        while not self.signals and time.monotonic() < limit:
            time.sleep(min(_POLL_S, max(0.0, limit - time.monotonic())))

    def say(self, event: str, step: int, **fields: Any) -> None:
        """Record it, now or when the start is over, and tell the console all of it that means something."""
        self.run.record(event, step, **fields)
        if event != "trouble":
            self.run.write()
        shown = {key: value for key, value in fields.items() if value not in (None, [], "") and key != "command"}
        text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
        print(f"supervise: {event} at step {step:,}" + (f": {text}" if text else ""), file=sys.stderr, flush=True)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/supervise.py",
        usage="python tools/supervise.py [options] -- deepspeed [--hostfile H] cmpt/train.py RECIPE [key=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="in a row without a newer checkpoint (default 3)"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=10,
        metavar="SECONDS",
        help="before a restart; twice as long after each one without progress, at most ten minutes (default 10)",
    )
    parser.add_argument(
        "--rejoin-every",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how often hosts that were left out are asked again; 0: never (default 300)",
    )
    parser.add_argument(
        "--ssh",
        metavar="COMMAND",
        help='how to ask a host whether it answers (default: "ssh" with the arguments in PDSH_SSH_ARGS_APPEND)',
    )
    parser.add_argument("command", nargs="+", help="what to start, after --")
    options = parser.parse_args(arguments)
    for name in ("restarts", "wait", "rejoin_every"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name):g}, must be at least 0")
    try:
        launch = parse_launch(options.command)
        words = [argument for argument in launch.arguments if not argument.startswith("-")]
        if not words:
            raise ValueError(f"command: {launch.script} needs a recipe")
        recipe = load_recipe(words[0], words[1:]).recipe
        if recipe.run.overwrite:
            raise ValueError("run.overwrite = true: every restart would start over; delete the old run folder instead")
        run = Run(Path(recipe.run.folder).expanduser() / recipe.run.name)
        supervisor = Supervisor(options, launch, run, recipe.data.streams)
    except (ValueError, OSError, RecipeError) as error:
        for fault in error.faults if isinstance(error, RecipeError) else [error]:
            print(f"error: {fault}", file=sys.stderr)
        return USER_ERROR
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.on_signal)
    return supervisor.supervise()


if __name__ == "__main__":
    sys.exit(main())
