"""The hosts of a supervised run: what the hostfile lists, which of them answer, which set of them to train on.

Torch-free; `supervise.py` beside this is the program.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

Slots = dict[str, int]
"""Processes that each host can run, by the host's name, in the order of the hostfile: rank 0 is on the first."""

SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_CONNECT_LIMIT_S = 10
_CHECK_LIMIT_S = 30.0
_MOST_CHECKS_AT_ONCE = 64
# What chooses among the hosts of the hostfile would have to be undone whenever one of them is lost.
_CHOOSING = ("-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators")


def parse_hostfile(text: str) -> Slots:
    """DeepSpeed's syntax: `NAME slots=N` a line; empty lines and lines that begin with # mean nothing.

    Raises ValueError for any other line, a name that comes twice, no slots, or no host at all.
    """
    hosts: Slots = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", line)
        if not found or int(found[2]) < 1:
            raise ValueError(f"hostfile, line {number}: got {line!r}, expected NAME slots=N with N >= 1")
        if found[1] in hosts:
            raise ValueError(f"hostfile, line {number}: {found[1]} is there twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError("hostfile: it names no host")
    return hosts


def hostfile_text(hosts: Slots) -> str:
    return "".join(f"{name} slots={slots}\n" for name, slots in hosts.items())


def choose(hosts: Slots, answering: Iterable[str], streams: int) -> Slots:
    """Of the hosts that answer, those with the most slots together that still divide `streams`; {} if no set does.

    Among sets with equally many slots, the one that has the earlier hosts of the hostfile.
    """
    usable = [(name, slots) for name, slots in hosts.items() if name in set(answering)]
    # The preferred set for every sum of slots: of two sets, the one whose positions come first.
    sets: dict[int, tuple[int, ...]] = {0: ()}
    for position, (_, slots) in enumerate(usable):
        for total, members in list(sets.items()):
            grown = (*members, position)
            if total + slots <= streams and grown < sets.get(total + slots, (len(usable),)):
                sets[total + slots] = grown
    best = max(total for total in sets if total == 0 or streams % total == 0)
    return dict(usable[position] for position in sets[best])


def ssh_command(environment: dict[str, str], port: str | None = None) -> list[str]:
    """The ssh that asks whether a host answers: with the arguments that pdsh will use, so that both see the same."""
    return ["ssh", *shlex.split(environment.get(SSH_ARGUMENTS, "")), *(("-p", port) if port else ())]


def silent_hosts(names: Sequence[str], ssh: Sequence[str]) -> dict[str, str]:
    """Those hosts on which `ssh HOST true` fails, asked all at once, with what ssh said; within half a minute."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_LIMIT_S}"]

    def ask(name: str) -> str | None:
        command = [*ssh, *options, name, "true"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {_CHECK_LIMIT_S:.0f} s"
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return said[-1] if done.returncode else None

    if not names:
        return {}
    with ThreadPoolExecutor(min(len(names), _MOST_CHECKS_AT_ONCE)) as pool:
        return {name: why for name, why in zip(names, pool.map(ask, names), strict=True) if why is not None}


def with_alive_options(environment: dict[str, str]) -> dict[str, str]:
    """The environment for pdsh, in which ssh gives up on a host that has not answered for 15 s.

    Without that, pdsh waits for a host that lost its power or its network until TCP gives up, which takes hours.
    """
    arguments = environment.get(SSH_ARGUMENTS, "")
    if "serveralive" in arguments.lower():
        return environment
    return {**environment, SSH_ARGUMENTS: f"{arguments} {_ALIVE}".strip()}


@dataclass(frozen=True)
class Launch:
    """A command line that starts a run: `program` with the launcher's `options`, then `script` and what is its own."""

    program: tuple[str, ...]
    options: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]

    @property
    def hostfile(self) -> Path | None:
        """The file that DeepSpeed's launcher is to take its hosts from; None where everything is on this host."""
        if Path(self.program[0]).name != "deepspeed":
            return None
        named = self.option("-H", "--hostfile")
        return Path(named) if named else None

    def option(self, *names: str) -> str | None:
        """The value of an option in either form, `--name value` or `--name=value`; the last one counts."""
        value = None
        for index, part in enumerate(self.options):
            name, equals, rest = part.partition("=")
            if name in names:
                value = rest if equals else "".join(self.options[index + 1 : index + 2])
        return value

    def without(self, *names: str) -> Launch:
        kept: list[str] = []
        parts = iter(self.options)
        for part in parts:
            if part in names:
                next(parts, None)
            elif part.partition("=")[0] not in names:
                kept.append(part)
        return replace(self, options=tuple(kept))

    def on(self, hosts: Slots, listed: Slots, hostfile: Path) -> Launch:
        """The same start on `hosts`, some of those that were `listed`; `hostfile` is written.

        Rank 0 and with it the rendezvous moves if the first host is gone: then --master_addr is the name of the first
        that is left. With a single host left DeepSpeed would start its processes here, wherever that host is, and
        without .deepspeed_env; --force_multi makes it go through pdsh as with many.
        """
        hostfile.write_text(hostfile_text(hosts))
        first, first_listed = next(iter(hosts)), next(iter(listed))
        more = ["--hostfile", str(hostfile)]
        changed = self.without("-H", "--hostfile")
        if self.option("--master_addr") and first != first_listed:
            changed = changed.without("--master_addr")
            more += ["--master_addr", first]
        if len(hosts) == 1 < len(listed) and "--force_multi" not in self.options:
            more.append("--force_multi")
        return replace(changed, options=(*changed.options, *more))

    def command(self) -> list[str]:
        return [*self.program, *self.options, self.script, *self.arguments]


def parse_launch(command: Sequence[str]) -> Launch:
    """Split `deepspeed ... cmpt/train.py ...`, `torchrun ... cmpt/train.py ...` or `python cmpt/train.py ...`.

    Raises ValueError where no train.py is there, or where options pick hosts or slots out of a hostfile.
    """
    scripts = [index for index, part in enumerate(command) if index and os.path.basename(part) == "train.py"]
    if not scripts:
        raise ValueError(f"command: got {shlex.join(command)!r}, expected one that starts cmpt/train.py")
    at = scripts[0]
    launch = Launch((command[0],), tuple(command[1:at]), command[at], tuple(command[at + 1 :]))
    if launch.hostfile:
        given = [part for part in launch.options if part.partition("=")[0] in (*_CHOOSING, "--no_ssh")]
        if given:
            raise ValueError(f"{given[0]}: not under supervise.py; list the hosts and slots to use in a hostfile")
    return launch
