"""The guardian of one rank, in a process of its own: it sees when the rank stands still, and ends it.

cmpt/monitor/watchdog.py starts it, as a child of the rank, with one JSON line on its standard input. The guardian of
rank 0 is the hub: all others report to it over TCP twice a second, and it judges (cmpt/monitor/judge.py). After a
verdict each guardian lets its rank dump its Python stack, the hub reports, and then each kills its rank. A guardian
that loses the hub ends its rank by itself. Standard library only, so that it starts in milliseconds and stays small.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Run as a script without site-packages. At the end of the path, so that nothing of the project hides a library.
if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from cmpt.monitor.heartbeat import WatchedRank
from cmpt.monitor.judge import SETTLE_S, Judge, Verdict, describe
from cmpt.monitor.links import Lines, Link, Message, finish, listening_socket

TICK_S = 0.5
CONNECT_S = 20.0
GRACE_S = 10.0
"""After an error on one rank: the others mostly raise the same, and may end by themselves."""
_STACKS_S, _REPORT_S = 4.0, 8.0  # how long the hub waits for stacks; how long the others wait for its report
_WRITE_S = 3.0  # for what a dead file system or a full pipe may hold forever
_DETAILED = 8  # culprits that are reported with their stacks


class Guardian:
    """What all guardians do. `said` is what the rank said at its end: "" for goodbye, or the line of an error."""

    def __init__(self, settings: Message, rank: WatchedRank) -> None:
        self.rank, self.number, self.silence_s = rank, settings["rank"], settings["silence_s"]
        self._speaks, self._folder = settings["local_rank"] == 0, Path(settings["run_folder"])
        self._selector = selectors.DefaultSelector()
        self._heard = Lines()
        self.said: str | None = None
        self.verdict: Verdict | None = None
        self.now, self._woke = 0.0, time.monotonic()
        self.watch_for(0, self._listen)

    def watch_for(self, file: int | socket.socket, action: Callable[[], None]) -> None:
        self._selector.register(file, selectors.EVENT_READ, action)

    def forget(self, file: int | socket.socket) -> None:
        self._selector.unregister(file)

    def _listen(self) -> None:
        data = os.read(0, 1 << 16)
        if not data:
            self.forget(0)  # the rank has closed it, or is gone
        for message in self._heard.feed(data):
            self.said = message["end"]

    def serve(self, seconds: float, done: Callable[[], bool]) -> None:
        """Takes in what arrives until something is done, or the time is over."""
        limit = time.monotonic() + seconds
        while not done() and (left := limit - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                key.data()

    def tick(self) -> None:
        """A pause, cut short by news. `now` grows by two ticks at most: longer means that this process was held up."""
        before = self._news()
        self.serve(TICK_S, lambda: self._news() != before)
        woke = time.monotonic()
        self.now += min(woke - self._woke, 2 * TICK_S)
        self._woke = woke

    def _news(self) -> tuple[object, ...]:
        return self.said, self.verdict, self.rank.gone()

    def end_after_grace(self, verdict: Verdict) -> None:
        """Another rank failed. Whoever is still there after the grace waits for it in vain."""
        limit = time.monotonic() + GRACE_S
        while self.said is None and not self.rank.gone() and time.monotonic() < limit:
            self.tick()
        if self.said is None and not self.rank.gone():
            self.keep_stack(self.rank.stack())
            deputy = self.number == 1 and verdict.culprits[0]["rank"] == 0
            if self._speaks or deputy:
                self.tell(verdict, {}, events=self.number == 0)
            self.end_rank()

    def end_rank(self) -> None:
        if not self.rank.kill():
            say(f"watchdog: rank {self.number} (pid {self.rank.pid}) is still there 5 s after SIGKILL\n")

    def tell(self, verdict: Verdict, stacks: dict[int, list[str]], events: bool) -> str:
        """Says on standard error, and with `events` in events.jsonl, what is wrong. Returns what it said."""
        lines: list[str] = []
        records: list[Message] = []
        for culprit in verdict.culprits[:_DETAILED]:
            stack = stacks.get(culprit["rank"], [])
            lines += [describe(verdict.kind, culprit), *stack]
            record = {"kind": verdict.kind, "time": _utc_now(), "step": culprit["step"]}
            records.append(record | {key: culprit[key] for key in ("rank", "host", "address", "pid", "place")})
            records[-1] |= {key: culprit[key] for key in ("seconds", "state", "error") if key in culprit}
            records[-1]["stack"] = stack
        if len(verdict.culprits) > _DETAILED:
            others = ", ".join(str(culprit["rank"]) for culprit in verdict.culprits[_DETAILED:])
            lines.append(f"watchdog: the same holds for ranks {others}")
        lines.append(f"watchdog: the run ends here; stacks of the other ranks are in {self._folder / 'watchdog'}")
        text = "\n".join(lines) + "\n"
        say(text)
        if events:
            within(_WRITE_S, lambda: append_events(self._folder / "events.jsonl", records))
        return text

    def keep_stack(self, stack: list[str]) -> None:
        """Every rank's stack goes into the run folder, where there is one."""
        if not stack:
            return

        def write() -> None:
            try:
                if self._folder.is_dir():
                    folder = self._folder / "watchdog"
                    folder.mkdir(exist_ok=True)
                    (folder / f"rank_{self.number:05d}.txt").write_text("\n".join(stack) + "\n", encoding="utf-8")
            except OSError as error:
                say(f"watchdog: rank {self.number}: cannot write its stack: {error}\n")

        within(_WRITE_S, write)


class Hub(Guardian):
    """The guardian of rank 0, to which all others report."""

    def __init__(self, settings: Message, rank: WatchedRank) -> None:
        super().__init__(settings, rank)
        self._judge = Judge(settings["world"], self.silence_s)
        self._token, self._links, self._stacks = settings["token"], list[Link](), dict[int, list[str]]()
        self.port = 0
        rank.reached_from(settings["address"] if settings["world"] > 1 else "")
        if settings["world"] > 1:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection for each rank
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self._server = listening_socket()
            self.port = self._server.getsockname()[1]
            self.watch_for(self._server, self._accept)

    def run(self) -> None:
        while True:
            self.tick()
            report = self.rank.report()
            self._judge.hear(report, self.now)
            if self.said == "":
                self._send_all({"bye": True})
                return finish(self._links)
            if self.said:
                self._judge.failed(0, self.said, self.now)
            elif self.rank.gone():
                self._judge.gone(0, self.now)
                if self._judge.all_gone():
                    return
            verdict = self._judge.verdict(self.now)
            if verdict is not None:
                return self._carry_out(verdict)
            self._send_all({"hub": report})
            for link in self._links:
                if link.rank is None and time.monotonic() - link.since > CONNECT_S:
                    link.open = False
            self._drop_closed()

    def _carry_out(self, verdict: Verdict) -> None:
        self._send_all({"verdict": verdict})
        if verdict.kind == "failed":
            finish(self._links)
            return self.end_after_grace(verdict)
        self._stacks[0] = [] if self.said else self.rank.stack()
        self.keep_stack(self._stacks[0])
        expected = {culprit["rank"] for culprit in verdict.culprits[:_DETAILED]} if verdict.kind == "stall" else set()
        self.serve(_STACKS_S, lambda: expected <= self._stacks.keys())
        found = {rank: self._stacks.get(rank, ["no stack came from its host"]) for rank in expected}
        self._send_all({"end": self.tell(verdict, found, events=True)})
        if not self.said:  # else it ends by itself, with its own message
            self.end_rank()
        finish(self._links)

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        link = Link(connection)
        self._links.append(link)
        self.watch_for(connection, lambda: self._serve(link))

    def _serve(self, link: Link) -> None:
        for message in link.receive():
            if link.rank is None:
                if message.get("token") != self._token:
                    link.open = False
                    break
                link.rank = int(message["report"]["rank"])
                link.send({"hub": self.rank.report()})
            self._take(link.rank, message)
        if not link.open:
            self._drop_closed()

    def _take(self, rank: int, message: Message) -> None:
        if "report" in message:
            self._judge.hear(message["report"], self.now)
        if "stack" in message:
            self._stacks[rank] = message["stack"]
        if message.get("gone"):
            self._judge.gone(rank, self.now)
        if "end" in message:
            if message["end"]:
                self._judge.failed(rank, message["end"], self.now)
            else:
                self._judge.left(rank)

    def _send_all(self, message: Message) -> None:
        for link in self._links:
            if link.rank is not None:
                link.send(message)

    def _drop_closed(self) -> None:
        for link in [link for link in self._links if not link.open]:
            if link.rank is not None:
                self._judge.closed(link.rank, self.now)
            self._links.remove(link)
            self.forget(link.socket)
            link.socket.close()


class Member(Guardian):
    """The guardian of any other rank."""

    def __init__(self, settings: Message, rank: WatchedRank) -> None:
        """Raises OSError where the hub cannot be reached or does not answer."""
        super().__init__(settings, rank)
        connection = socket.create_connection(tuple(settings["hub"]), timeout=CONNECT_S)
        rank.reached_from(connection.getsockname()[0])
        self._link = Link(connection)
        self._link.send({"token": settings["token"], "report": rank.report()})
        answer = self._link.receive(within_s=CONNECT_S)
        if not answer:
            raise ConnectionError("no answer from the guardian of rank 0")
        self._hub = answer[0]["hub"]
        self._heard_at, self._closed_at = 0.0, float("inf")
        self._hub_left, self._end = False, ""
        self.watch_for(connection, self._serve)

    def run(self) -> None:
        while True:
            self.tick()
            if not self._link.open:
                self._closed_at = min(self._closed_at, self.now)
            report = self.rank.report()
            if self.said is not None or self.rank.gone():
                ending = {"gone": True} if self.said is None else {"end": self.said}
                self._link.send({"report": report, **ending})
                return finish([self._link])
            if self.verdict is not None:
                return self._carry_out(self.verdict)
            if self._hub_left:  # the run is over, and only the rank's goodbye is due
                finish([self._link])
                continue
            if self.now - self._closed_at >= SETTLE_S or self.now - self._heard_at > self.silence_s:
                return self._without_hub()
            self._link.send({"report": report})

    def _serve(self) -> None:
        for message in self._link.receive():
            self._heard_at, self._hub = self.now, message.get("hub", self._hub)
            self._hub_left = self._hub_left or bool(message.get("bye"))
            if "verdict" in message:
                self.verdict = Verdict(*message["verdict"])
            self._end = message.get("end", self._end)
        if not self._link.open:
            self.forget(self._link.socket)

    def _carry_out(self, verdict: Verdict) -> None:
        if verdict.kind == "failed":
            finish([self._link])
            return self.end_after_grace(verdict)
        stack = self.rank.stack()
        self._link.send({"stack": stack})
        self.keep_stack(stack)
        self.serve(_REPORT_S, lambda: bool(self._end) or not self._link.open)
        if self._speaks and self._end:
            say(self._end)
        elif self._speaks:
            self.tell(verdict, {self.number: stack}, events=True)
        self.end_rank()

    def _without_hub(self) -> None:
        state = "does not answer" if self._link.open else "the connection broke"
        lost = self._hub | {"seconds": round(self.now - self._heard_at, 1), "state": state}
        self.keep_stack(self.rank.stack())
        if self._speaks:
            self.tell(Verdict("lost_host", [lost]), {}, events=True)
        self.end_rank()


def append_events(path: Path, records: Sequence[Message]) -> None:
    """Each line in one write, as cmpt/monitor/records.py does it; nothing where there is no run folder here."""
    if not path.parent.is_dir():
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for record in records:
            os.write(file, json.dumps(record, ensure_ascii=False).encode() + b"\n")
        os.close(file)
    except OSError as error:
        say(f"watchdog: cannot write {path}: {error}\n")


def say(text: str) -> None:
    """To standard error, in one write where the pipe takes it."""
    within(_WRITE_S, lambda: print(text, end="", file=sys.stderr, flush=True))


def within(seconds: float, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _utc_now() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"


def main() -> None:
    # Launchers and schedulers send these to every process that they find; the rank decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(_first_line())
    rank = WatchedRank(settings)
    guardian: Hub | Member
    try:
        guardian = Member(settings, rank) if settings["hub"] else Hub(settings, rank)
        answer: Message = {"port": guardian.port if isinstance(guardian, Hub) else 0}
    except OSError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if "error" not in answer:
        guardian.run()
    os._exit(0)  # a thread that a dead file system holds would keep this process


def _first_line() -> bytes:
    """Byte by byte, since what follows the line belongs to the guardian's own reading."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("the rank ended before it said what to watch")
        line += byte
    return line


if __name__ == "__main__":
    main()
