"""Two hosts on one machine: each has its own network and its own processes, and an sshd that the launcher reaches.

A host is a network namespace and a PID namespace. The second matters for more than looks: DeepSpeed's launcher ends a
run on a host with `pkill -f`, which must not find what else runs on this machine. A third namespace is the switch, so
nothing is added to the machine's own network and two sets of hosts never meet, whatever addresses they use.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

RELAY = Path(__file__).with_name("relay.py")
_QUEUE_MS = 100
_BURST_S = 0.002
"""Of the link, which pass at once: with more of it small messages would not feel the bandwidth."""
PROGRAMS = ("ip", "unshare", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
_UP_LIMIT_S = 30.0


class Hosts:
    """`names` are the addresses in the hostfile, `spaces` the network namespaces; commands started with `launch` run on
    the network of the first.

    The folder holds ssh_config, keys, the hostfile and the environment file for DS_ENV_FILE.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        self.names = [f"10.77.0.{number}" for number in range(1, count + 1)]
        self.hostfile = folder / "hostfile"
        self.ssh_config = folder / "ssh_config"
        self.spaces = [f"cmpt-{os.getpid()}-{number}" for number in range(1, count + 1)]
        self._switch = f"cmpt-{os.getpid()}-switch"
        self._inits: dict[int, subprocess.Popen[bytes]] = {}
        self._relay: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Raises OSError or CalledProcessError where the machine does not allow namespaces."""
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        for key in ("id", "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for number, (space, address) in enumerate(zip(self.spaces, self.names, strict=True)):
            _run("ip", "netns", "add", space)
            peer = ("peer", "name", "eth0", "netns", space)
            _run("ip", "-n", self._switch, "link", "add", f"port{number}", "type", "veth", *peer)
            _run("ip", "-n", self._switch, "link", "set", f"port{number}", "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            self.link(number, "up")
            self.boot(number)
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))
        # The launcher hands over nothing else; a line of it becomes `export NAME=VALUE` on every host. Without PATH the
        # hosts would build DeepSpeed's operators with another ninja, and so again and again, in turn with this machine.
        lines = ["DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1", f"PATH={_path()}"]
        (self.folder / "environment").write_text("".join(f"{line}\n" for line in lines))
        self.ssh_config.write_text(
            f"Host 10.77.0.*\n  IdentityFile {self.folder}/id\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )

    def down(self) -> None:
        for number in list(self._inits):
            self.kill(number)
        self._end_relay()
        for space in (*self.spaces, self._switch):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def boot(self, number: int) -> None:
        """Start the host's sshd, as the first process of a new PID namespace, and wait until it listens."""
        options = [f"AuthorizedKeysFile={self.folder}/id.pub", "StrictModes=no", "UsePAM=no", "PidFile=none"]
        options.append(f"ListenAddress={self.names[number]}")
        sshd = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", f"{self.folder}/host"]
        namespace = ["ip", "netns", "exec", self.spaces[number], "unshare", "--pid", "--fork", "--kill-child"]
        named = ["--mount-proc", "--uts", "sh", "-c", f'hostname host{number + 1} && exec "$@"', "sh"]
        command = [*namespace, *named, *sshd, *(part for option in options for part in ("-o", option))]
        with (self.folder / f"sshd{number}.log").open("wb") as log:
            self._inits[number] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        limit = time.monotonic() + _UP_LIMIT_S
        listens = ["ip", "netns", "exec", self.spaces[number], "ss", "-Hltn", f"src {self.names[number]}"]
        while not subprocess.run(listens, capture_output=True, check=True).stdout:
            if time.monotonic() > limit or self._inits[number].poll() is not None:
                raise OSError(f"host {number}: no sshd: {(self.folder / f'sshd{number}.log').read_text()}")
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        """SIGKILL to everything on the host, its sshd included; its network stack still answers, with resets."""
        init = self._inits.pop(number)
        init.kill()  # takes sshd along (--kill-child), and the end of a PID namespace's first process all others
        init.wait()

    def link(self, number: int, state: str) -> None:
        """`state` "down": the host vanishes without a word; "up": it is back on the network."""
        _run("ip", "-n", self.spaces[number], "link", "set", "eth0", state)

    def shape(self, mbit: float, delay_ms: float = 0.0) -> None:
        """From now on two hosts talk over a link of this bandwidth in each direction, and this delay one way.

        Bandwidth: a token bucket on each host's interface. Delay: netem in the switch, or, where the kernel has none, a
        second bridge for the second host and a process (relay.py) that moves frames between the two bridges in time.
        """
        assert len(self.names) == 2, "a link joins two hosts"
        burst_bytes = int(mbit * 1e6 / 8 * _BURST_S)
        for space in self.spaces:
            rate = ["rate", f"{mbit}mbit", "burst", str(burst_bytes), "latency", f"{_QUEUE_MS}ms"]
            _run("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate)
        self._end_relay()
        switch = ("ip", "netns", "exec", self._switch)
        for port in ("port0", "port1"):
            subprocess.run([*switch, "tc", "qdisc", "del", "dev", port, "root"], capture_output=True, check=False)
        if not delay_ms:
            return
        netem = ["netem", "delay", f"{delay_ms}ms", "limit", "100000"]
        has_netem = subprocess.run([*switch, "tc", "qdisc", "add", "dev", "port0", "root", *netem], capture_output=True)
        if has_netem.returncode == 0:
            _run(*switch, "tc", "qdisc", "add", "dev", "port1", "root", *netem)
            return
        self._relay = subprocess.Popen(
            [*switch, sys.executable, str(RELAY), "tap0", "tap1", str(delay_ms)], stdout=subprocess.PIPE
        )
        assert self._relay.stdout is not None and self._relay.stdout.readline() == b"ready\n"
        _run("ip", "-n", self._switch, "link", "add", "br1", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br1", "up")
        for device, bridge in (("tap0", "br0"), ("tap1", "br1"), ("port1", "br1")):
            _run("ip", "-n", self._switch, "link", "set", device, "master", bridge, "up")

    def _end_relay(self) -> None:
        """The hosts are on one bridge again; the relay's devices go with it."""
        if self._relay is None:
            return
        self._relay.kill()
        self._relay.wait()
        self._relay = None
        _run("ip", "-n", self._switch, "link", "set", "port1", "master", "br0", "up")
        subprocess.run(["ip", "-n", self._switch, "link", "del", "br1"], capture_output=True, check=False)

    def environment(self) -> dict[str, str]:
        """What a launcher needs: this Python's programs first on PATH, ssh's configuration, what hosts are to get."""
        return {
            "PATH": _path(),
            "PDSH_SSH_ARGS_APPEND": f"-F {self.ssh_config}",
            "DS_ENV_FILE": str(self.folder / "environment"),
            "DS_ACCELERATOR": "cpu",
        }

    def on_first(self, command: list[str]) -> list[str]:
        """The command as it runs on the first host's network (but outside its PID namespace)."""
        return ["ip", "netns", "exec", self.spaces[0], *command]

    def launcher(self, *options: str) -> list[str]:
        """`deepspeed` over all hosts. Its own check uses plain ssh, which knows nothing of our keys."""
        return [
            "deepspeed",
            "--no_ssh_check",
            "--hostfile",
            str(self.hostfile),
            "--master_addr",
            self.names[0],
            *options,
        ]


@contextmanager
def hosts_up(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """Hosts that are always taken down again; skips the test, with the reason, where they cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)} (Debian: openssh-server, pdsh, iproute2)")
    probe = f"cmpt-{os.getpid()}-probe"
    refused = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if refused.returncode:
        pytest.skip(f"this machine allows no network namespaces: {refused.stderr.strip()}")
    _run("ip", "netns", "del", probe)
    hosts = Hosts(folder, count)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


def end_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a command that was started in a session of its own, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _run(*command: str | os.PathLike[str]) -> None:
    subprocess.run([os.fspath(part) for part in command], check=True, capture_output=True, text=True)
