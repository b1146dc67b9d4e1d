"""The bytes of a shard from wherever its URL points: one child process per try, watched and ended from here.

http and https URLs are curl's, s3 the aws program's, gs gsutil's, "pipe:COMMAND" a shell's. webdataset's `Pipe` starts
them and its GOPEN_REWRITE is honoured; its `gopen` is not used: it knows no s3 (release 1.0.2), has curl try 30 times
before it says anything of a status 503, and lets nobody have the child's own session and its error messages. Plain
paths are read by cat: a read that hangs on a network file system can only be given up from outside.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress

from cmpt.data.validate import DataError
from cmpt.recipe.paths import is_local, resolve_path

_COMMANDS = {
    "http": "curl --fail --silent --show-error --location --globoff URL",
    "https": "curl --fail --silent --show-error --location --globoff URL",
    "s3": "aws s3 cp --only-show-errors URL -",
    "gs": "gsutil cat URL",
}
_CHUNK_BYTES = 2**20  # also the largest pipe that Linux gives without privileges
_TAIL_BYTES = 500  # of what the child says on its standard error
_LOOK_S = 0.1  # how often a fetch looks whether it was ended
_DEATH_S = 5.0  # a killed process that takes longer hangs in the kernel


class FetchError(DataError):
    """A shard cannot be had: names the URL, the number of attempts and the last cause."""


class HostError(DataError):
    """This host cannot fetch or keep shards, whichever they are: no room, no program, no folder."""


class AttemptError(Exception):
    """One try to fetch a shard failed; the next one may not."""


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """Raises `DataError` for "pipe:" URLs that are not allowed."""
    if url[:5].lower() == "pipe:" and not allow_pipe:
        raise DataError(f"{url}: hands a command to a shell: needs data.allow_pipe=true")


def receive(url: str, *, timeout_s: float, allow_pipe: bool, ended: threading.Event) -> Generator[bytes, None, None]:
    """The bytes at a URL or path, in chunks of at most 1 MiB.

    Close the generator to give up: no process that it started is left then. Raises `AttemptError` where the child fails
    or brings no byte for `timeout_s`, and soon after `ended` is set; `FetchError` where trying again cannot help.
    """
    child = _Child(*_command(url, allow_pipe), timeout_s, ended)
    try:
        yield from child.chunks()
        child.check_exit()
    finally:
        child.end()


def _command(url: str, allow_pipe: bool) -> tuple[list[str], str]:
    """The command line that brings a URL, and what errors call it."""
    from webdataset import utils  # imports torch: seconds, which a run without remote shards need not wait
    from webdataset.gopen import rewrite_url

    try:
        target = str(rewrite_url(url))
    except ValueError as error:
        raise FetchError(f"{url}: {error}") from error
    scheme, _, rest = target.partition(":")
    scheme = scheme.lower()
    if is_local(target):
        words, kind = ["cat", "--", os.path.abspath(resolve_path(target))], "paths"
    elif scheme == "pipe":
        refuse_pipe(target, allow_pipe)  # again, for it may come from GOPEN_REWRITE
        if utils.enforce_security:
            raise FetchError(f"{url}: WDS_SECURE in the environment forbids pipes")
        words, kind = ["/bin/sh", "-c", rest], "pipe: URLs"
    elif scheme in _COMMANDS:
        words = [f"{scheme}:{rest}" if word == "URL" else word for word in _COMMANDS[scheme].split()]
        kind = f"{scheme}: URLs"
    else:
        known = ", ".join(f"{name}:" for name in _COMMANDS)
        raise FetchError(f"{url}: must be a path or begin with one of {known} pipe:")
    if shutil.which(words[0]) is None:
        raise HostError(f"{url}: {kind} need the program `{words[0]}`, which is not installed")
    return words, "the command" if scheme == "pipe" else words[0]


class _Child:
    """A process whose standard output is a shard."""

    def __init__(self, words: list[str], name: str, timeout_s: float, ended: threading.Event) -> None:
        from webdataset.gopen import Pipe

        self._name, self._timeout_s, self._ended = name, timeout_s, ended
        try:
            # A session of its own: whatever a shell starts is in its process group, and ends with it.
            self._pipe = Pipe(
                words,
                mode="rb",
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise AttemptError(f"{name} cannot be started: {error}") from error
        self._process: subprocess.Popen[bytes] = self._pipe.proc
        assert self._process.stdout is not None and self._process.stderr is not None
        self._out, self._error = self._process.stdout.fileno(), self._process.stderr.fileno()
        with suppress(OSError):  # many pipes of one user may be refused
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
        os.set_blocking(self._out, False)
        os.set_blocking(self._error, False)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(self._error, select.POLLIN)
        self._said = b""
        self._heard_s = time.monotonic()

    def chunks(self) -> Iterator[bytes]:
        """What comes on standard output, to its end."""
        while (chunk := self._next(_LOOK_S)) != b"":
            if chunk is None:
                self._check_patience("brought no byte")
            else:
                yield chunk
                self._heard_s = time.monotonic()  # after the caller had its time with the chunk
        self._poll.unregister(self._out)
        self._heard_s = time.monotonic()

    def _next(self, patience_s: float) -> bytes | None:
        """A chunk, b"" at the end, or None after `patience_s` at most; what was said on standard error is kept."""
        ready = dict(self._poll.poll(patience_s * 1000))
        if self._error in ready:
            said = _read(self._error)
            self._said = (self._said + (said or b""))[-_TAIL_BYTES:]
            if said == b"":
                self._poll.unregister(self._error)
        return _read(self._out) if self._out in ready else None

    def _check_patience(self, what: str) -> None:
        if self._ended.is_set():
            raise AttemptError("the fetch was ended")
        if time.monotonic() - self._heard_s > self._timeout_s:
            raise AttemptError(f"{self._name} {what} for {self._timeout_s:g} s{self._quotation()}")

    def check_exit(self) -> None:
        """Waits until the process ends by itself, which must be with status 0."""
        # Not reaped yet: until `end` has killed the group, its number must not go to another process.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (outcome := os.waitid(os.P_PID, self._process.pid, look)) is None:
            self._next(0.005)
            self._check_patience("did not end")
        self._next(0)
        if outcome.si_code != os.CLD_EXITED:
            raise AttemptError(f"{self._name} was killed by signal {outcome.si_status}{self._quotation()}")
        if outcome.si_status:
            raise AttemptError(f"{self._name} ended with exit status {outcome.si_status}{self._quotation()}")

    def _quotation(self) -> str:
        said = " ".join(self._said.decode("utf-8", "replace").split())
        return f": {said}" if said else ""

    def end(self) -> None:
        """Kills what is left of the process and its group, and closes the pipes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        with suppress(subprocess.TimeoutExpired):  # the subprocess module reaps it later
            self._process.wait(_DEATH_S)


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, _CHUNK_BYTES)
    except BlockingIOError:
        return None
