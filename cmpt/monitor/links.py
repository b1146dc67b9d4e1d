"""JSON lines over TCP, between the guardians of a run (cmpt/monitor/guardian.py). Standard library only."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from typing import Any

_LINE_LIMIT_BYTES = 1 << 20
_PATIENCE_S = 2.0

Message = dict[str, Any]


class Lines:
    """JSON objects, one a line, out of what arrives in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """Raises ValueError for what is not such a line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_LIMIT_BYTES:
            raise ValueError("a line without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not an object")
        return messages


class Link:
    """One end of the connection between a guardian and the hub."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.open, self.since = connection, True, time.monotonic()
        self.rank: int | None = None
        """Whose guardian is at the other end; None until it has shown the token."""
        self._lines = Lines()

    def send(self, message: Message) -> None:
        try:
            if self.open:
                self.socket.settimeout(_PATIENCE_S)
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self, within_s: float = _PATIENCE_S) -> list[Message]:
        try:
            self.socket.settimeout(within_s)
            data = self.socket.recv(1 << 16)
            self.open = self.open and bool(data)
            return self._lines.feed(data)
        except (OSError, ValueError):
            self.open = False
            return []


def finish(links: Iterable[Link]) -> None:
    """Ends connections so that the other side still reads everything: closing with unread input would reset them."""
    waiting, limit = [link for link in links if link.open], time.monotonic() + 2
    for link in waiting:
        try:
            link.socket.shutdown(socket.SHUT_WR)
        except OSError:
            link.open = False
    for link in waiting:
        while link.open and time.monotonic() < limit:
            link.receive(within_s=max(0.01, limit - time.monotonic()))


def listening_socket() -> socket.socket:
    """On a free port of all interfaces; IPv6 and IPv4 where the system has both."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except OSError:  # compiled in, and switched off
            pass
    return socket.create_server(("", 0), backlog=4096)
