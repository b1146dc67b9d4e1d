"""The links between test hosts are as fast and as slow as they were set."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_hosts import Hosts, hosts_up

PORT = "5201"
SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("ready", flush=True)
    link, _ = server.accept()
    for _ in range(int(sys.argv[3])):
        link.sendall(link.recv(1))
    left = int(sys.argv[4])
    while left:
        left -= len(link.recv(1 << 16))
    link.sendall(b"x")
"""
CLIENT = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], int(sys.argv[2])))
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
trips = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    link.sendall(b"x")
    link.recv(1)
    trips.append(time.perf_counter() - began)
began = time.perf_counter()
link.sendall(bytes(int(sys.argv[4])))
link.recv(1)
print(sorted(trips)[len(trips) // 2], time.perf_counter() - began)
"""


def measure(hosts: Hosts, size_bytes: int) -> tuple[float, float]:
    """(round trip of a byte in seconds, bytes per second from the second host to the first)."""
    more = [hosts.names[0], PORT, "21", str(size_bytes)]
    server = subprocess.Popen(hosts.on_first([sys.executable, "-c", SERVER, *more]), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        client = ["ip", "netns", "exec", hosts.spaces[1], sys.executable, "-c", CLIENT, *more]
        done = subprocess.run(client, capture_output=True, text=True, timeout=60, check=True)
        trip, seconds = map(float, done.stdout.split())
        return trip, size_bytes / seconds
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow  # a busy machine delays and slows any link
@pytest.mark.multiprocess
def test_a_link_has_the_bandwidth_and_delay_that_were_set(tmp_path: Path) -> None:
    folder = tmp_path / "hosts"
    folder.mkdir()
    with hosts_up(folder) as hosts:
        for mbit, delay_ms in ((100, 0), (200, 2), (400, 5), (100, 0)):
            hosts.shape(mbit, delay_ms)
            time.sleep(0.2)  # a bridge learns where its hosts are
            trip, rate = measure(hosts, int(mbit * 1e6 / 8))
            told = f"{mbit} Mbit/s, {delay_ms} ms: {8e-6 * rate:.0f} Mbit/s, round trip {1000 * trip:.2f} ms"
            print(told)
            assert 8e-6 * rate == pytest.approx(mbit, rel=0.15), told
            assert trip == pytest.approx(2 * delay_ms / 1000, rel=0.15, abs=0.001), told
