"""An HTTP server on loopback that serves a folder and, for the n-th request of a path, does it badly."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

_CHUNK_BYTES = 8192
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends a reset instead of an end


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer."""

    status: int = 200
    sends: int | None = None  # bytes of the body; None: all
    states: Literal["whole", "sent", "nothing"] = "whole"  # the Content-Length: the truth, that of `sends`, absent
    then: Literal["close", "reset", "stall"] = "close"
    body: bytes | None = None  # instead of the file's


class FlakyServer:
    """Serves until `close`. `faults[path]` are the first answers of that path; those that follow are good."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()  # of each path
        self.bytes_per_s: float | None = None
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: FlakyServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        owner, name = self.server.owner, self.path.lstrip("/")
        with owner.lock:
            number = owner.requests[name]
            owner.requests[name] += 1
        faults = owner.faults.get(name, [])
        fault = faults[number] if number < len(faults) else Fault()
        if fault.status != 200 or not (owner.folder / name).is_file():
            self.send_error(fault.status if fault.status != 200 else 404)
            return
        body = (owner.folder / name).read_bytes() if fault.body is None else fault.body
        sent = body if fault.sends is None else body[: fault.sends]
        self.send_response(200)
        if fault.states != "nothing":
            self.send_header("Content-Length", str(len(body if fault.states == "whole" else sent)))
        self.end_headers()
        try:
            self._send(sent)
        except OSError:  # the client was killed
            return
        if fault.then == "stall":
            owner.closing.wait()
        elif fault.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.connection.close()

    def _send(self, body: bytes) -> None:
        for start in range(0, len(body), _CHUNK_BYTES):
            chunk = body[start : start + _CHUNK_BYTES]
            self.wfile.write(chunk)
            if self.server.owner.bytes_per_s is not None:
                time.sleep(len(chunk) / self.server.owner.bytes_per_s)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the tests count requests themselves."""
