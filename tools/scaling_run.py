"""Starts the points of a study through DeepSpeed's launcher, one after the other, and keeps what they gave.

In the study's folder: `points.jsonl`, a line for every start that ended; `recipes/` and `logs/` by start; `runs/`, the
run folders without their checkpoints; `collectives-NxM.json` of bench_collectives.py on N hosts of M processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmpt.monitor.records import RecordWriter, read_records
from cmpt.recipe import to_yaml
from hosts import Launch, silent_hosts, ssh_command, with_alive_options
from scaling_read import TimingsError, measured, read_timings
from scaling_study import Point, Study, point_recipe, run_name

REPOSITORY = Path(__file__).resolve().parents[1]
POINTS = "points.jsonl"
_INTERRUPT_GRACE_S = 45.0
_NOT_A_CAUSE = ("[INFO]", "[WARNING]", "Traceback", "  File", "    ", "warnings.warn")


class StudyError(ValueError):
    """The study cannot go on; the message says what to mend."""


class Runner:
    def __init__(self, study: Study) -> None:
        self.study, self.folder = study, study.path.absolute()
        self.environment = {**os.environ, **{key: str(value) for key, value in study.environment.items()}}
        self._records = self.folder / POINTS
        self._given = Launch(("deepspeed",), tuple(study.launcher), "", ())

    def records(self) -> list[dict[str, Any]]:
        """Of every start that ended, the last one of each (point, repeat); a torn last line is no record.

        Raises StudyError where another line is none.
        """
        try:
            found = read_records(self._records)
        except ValueError as error:
            raise StudyError(str(error)) from error
        return list({(record["point"], record["repeat"]): record for record in found}.values())

    def missing(self, points: Sequence[Point], again: bool) -> list[tuple[Point, int]]:
        """Starts that are still to be made: all points once, then all of them again. `again`: failed ones too.

        Raises StudyError where the folder has a record of the same name that was measured otherwise.
        """
        known = {(record["point"], record["repeat"]): record for record in self.records()}
        todo = []
        for repeat in range(self.study.repeats):
            for point in points:
                record = known.get((point.name, repeat))
                if record is not None and record["fingerprint"] != self.fingerprint(point):
                    told = f"{self._records}: {point.name} was measured with other settings"
                    raise StudyError(f"{told}; choose another name for the study, or delete its folder")
                if record is None or (again and record["status"] == "failed"):
                    todo.append((point, repeat))
        return todo

    def fingerprint(self, point: Point) -> str:
        """Of everything that decides what a start of the point measures."""
        recipe = point_recipe(self.study, point).recipe
        recipe.run.folder = ""  # a study may be moved
        told = json.dumps([to_yaml(recipe), point.hosts, self.study.environment])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def check_hosts(self, names: Sequence[str]) -> None:
        """Raises StudyError where one of them does not answer to ssh."""
        silent = silent_hosts(names, ssh_command(self.environment, self._given.option("--ssh_port")))
        if silent:
            raise StudyError("\n".join(f"host {name} does not answer: {why}" for name, why in silent.items()))

    def measure(self, point: Point, repeat: int) -> dict[str, Any]:
        """One start to its end; its record, which is kept at once. A start that fails has a record with the cause."""
        name, began = run_name(point, repeat), time.monotonic()
        run = self.folder / "runs" / name
        recipe = self._file("recipes", f"{name}.yaml")
        recipe.write_text(to_yaml(point_recipe(self.study, point, repeat).recipe))
        log = self._file("logs", f"{name}.log")
        record: dict[str, Any] = {
            "point": point.name,
            "repeat": repeat,
            "fingerprint": self.fingerprint(point),
            "scaling": point.scaling,
            "nodes": point.nodes,
            "ranks_per_node": point.ranks_per_node,
            "world_size": point.world_size,
            "batch_size": point.batch_size,
            "settings": dict(point.settings),
            "hosts": [host for host, _ in point.hosts if host],
        }
        code = self.launch(point, [str(REPOSITORY / "cmpt/train.py"), str(recipe)], log)
        first = self.study.warmup_steps + 1
        try:
            if code:
                raise TimingsError(cause_of(code, log.read_text(errors="replace")))
            steps = read_timings(run, point.world_size, first, first + self.study.measured_steps - 1)
            record |= {"status": "done", **measured(steps, point.batch_size), **self._environment_of(run)}
        except TimingsError as error:
            record |= {"status": "failed", "cause": str(error), "log": str(log)}
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # nobody wants weights of so few steps
        record["seconds"] = time.monotonic() - began
        self._keep(record)
        return record

    def _keep(self, record: Mapping[str, Any]) -> None:
        writer = RecordWriter(self._records)
        try:
            writer.append(record)
            writer.sync()
        except OSError as error:
            raise StudyError(f"{self._records}: cannot be written: {error.strerror}") from error
        finally:
            writer.close()

    def collectives(self, point: Point) -> Path:
        """The benchmark of collectives on the hosts of the point; made where it is not there. Raises StudyError."""
        out = self.collectives_file(point)
        log = self._file("logs", f"{out.stem}.log")
        if not out.is_file():
            seconds = str(self.study.collectives_seconds)
            script = [str(REPOSITORY / "tools/bench_collectives.py"), "--seconds", seconds, "--out", str(out)]
            code = self.launch(point, script, log)
            if code or not out.is_file():
                cause = cause_of(code, log.read_text(errors="replace"))
                raise StudyError(f"the benchmark of collectives failed: {cause} (see {log})")
        return out

    def collectives_file(self, point: Point) -> Path:
        """Where the benchmark of collectives on the hosts of the point is kept."""
        return self.folder / f"collectives-{point.nodes}x{point.ranks_per_node}.json"

    def launch(self, point: Point, script: Sequence[str], log: Path) -> int:
        """Run a script on the point's processes through `deepspeed`. Returns the exit code; 124: it took too long.

        An interrupt goes to the launcher, which ends its processes on all hosts, and then on to the caller.
        """
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.launcher(point), *script],
                env=self._launch_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(self.study.timeout_minutes * 60)
            except subprocess.TimeoutExpired:
                output.write(f"error: not done after {self.study.timeout_minutes:g} minutes (timeout_minutes)\n")
                return 124
            finally:
                end(process)

    def launcher(self, point: Point) -> list[str]:
        """The command line of `deepspeed` up to the script."""
        beside = Path(sys.executable).with_name("deepspeed")
        deepspeed = str(beside) if beside.is_file() else shutil.which("deepspeed")
        if deepspeed is None:
            raise StudyError(f"there is no `deepspeed` beside {sys.executable} or on PATH")
        if self.study.hostfile is None:
            where = ["--num_accelerators", str(point.world_size)]
        else:  # through pdsh also with a single host, so that every start goes the same way
            where = ["--hostfile", str(Path(self.study.hostfile).absolute()), "--include", point.include]
            where.append("--force_multi")
        if self._given.option("--master_port") is None:
            where += ["--master_port", str(_free_port())]
        return [deepspeed, *where, *self.study.launcher]

    def _launch_environment(self) -> dict[str, str]:
        """With a hostfile: what the hosts are to get is in a file, as the launcher wants it."""
        if self.study.hostfile is None:
            return self.environment
        lines = [line for file in _environment_files(self.environment) for line in file.read_text().splitlines()]
        lines += [f"{key}={value}" for key, value in self.study.environment.items()]
        combined = self._file(".", "deepspeed_env")
        combined.write_text("".join(f"{line}\n" for line in lines if "=" in line))
        return with_alive_options({**self.environment, "DS_ENV_FILE": str(combined)})

    def _file(self, folder: str, name: str) -> Path:
        path = self.folder / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _environment_of(self, run: Path) -> dict[str, Any]:
        path = run / "environment.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TimingsError(f"{path}: {error}") from error
        gpus = found["host"]["gpus"]
        device = gpus[0] if gpus else found["host"]["cpu"]
        threads = found["threads_per_process"]
        return {"revision": found["revision"], "device": device, "gpu": bool(gpus), "threads": threads}


def cause_of(code: int, log: str) -> str:
    """Why a start failed, in a line or a few: what it said as an error, else the last that it said."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = dict.fromkeys(line[line.index("error: ") + 7 :] for line in lines if "error: " in line)
    if errors:
        return "; ".join(list(errors)[:3])
    told = [line for line in lines if not any(part in line for part in _NOT_A_CAUSE)]
    raised = [line for line in told if "Error" in line]
    return (raised or told or [f"exit code {code}"])[-1][:300]


def _environment_files(environment: dict[str, str]) -> Iterator[Path]:
    """Those that the launcher would read, in its order."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in dict.fromkeys([Path.home(), Path.cwd()]):
        if (folder / name).is_file():
            yield folder / name
        if Path(name).is_absolute():
            return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """The launcher and all it has started here; an interrupt first, on which it ends what it has started elsewhere."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_INTERRUPT_GRACE_S)
    finally:  # a second interrupt too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
