"""Every fault of a source, and the programs that shards come from, as the cache meets them."""

from __future__ import annotations

import gc
import os
import re

import pytest
from data.caching import ATTEMPTS, children, command_lines, make_shard, own_files, until
from data.flaky_server import Fault

from cmpt.data.cache import FetchError, file_digest
from cmpt.data.opener import HostError
from cmpt.data.validate import DataError

FAULTS = {
    "status 500": Fault(status=500),
    "status 404": Fault(status=404),
    "connection closed in the body": Fault(sends=9000),
    "connection reset in the body": Fault(sends=9000, then="reset"),
    "stalled in the body": Fault(sends=9000, then="stall"),
    "stalled before the body": Fault(sends=0, then="stall"),
    "cut, and its length is that of the cut": Fault(sends=9000, states="sent"),
    "cut at a block, without a length": Fault(sends=9216, states="nothing"),
    "no byte": Fault(sends=0, states="sent"),
    "an error page with status 200": Fault(body=b"<html>busy</html>" * 100),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("stated", [False, True], ids=["nothing stated", "size and digest stated"])
def test_a_fault_that_passes_leaves_the_same_bytes(server, make_cache, folder, fault, stated) -> None:
    whole = make_shard(server.folder / "s.tar", 1)
    faults = [fault] * (2 if stated else 1)  # what is cut twice alike counts as cut at its source, if nothing is stated
    server.faults["s.tar"] = faults
    known = (len(whole), file_digest(server.folder / "s.tar")) if stated else ()
    with make_cache(timeout_s=0.7 if fault.then == "stall" else 5).hold(server.url("s.tar"), *known) as held:
        assert (held.path.read_bytes(), held.size) == (whole, len(whole))
    assert server.requests["s.tar"] == len(faults) + 1
    assert own_files(folder) == [held.path]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(status=500), r"curl ended with exit status 22: curl: \(22\) .* 500"),
        (Fault(status=404), r"curl ended with exit status 22: curl: \(22\) .* 404"),
        (Fault(sends=9000), r"curl ended with exit status 18: curl: \(18\)"),
        (Fault(sends=9000, then="stall"), r"curl brought no byte for 0\.5 s"),
    ],
    ids=["500", "404", "closed", "stalled"],
)
def test_a_fault_that_stays_is_one_clear_error(server, make_cache, folder, fault, cause) -> None:
    make_shard(server.folder / "s.tar", 1)
    server.faults["s.tar"] = [fault] * 100
    with pytest.raises(FetchError) as caught:
        make_cache(timeout_s=0.5 if fault.then == "stall" else 5).hold(server.url("s.tar"))
    start = re.escape(f"{server.url('s.tar')}: cannot be fetched, attempts: {ATTEMPTS}, the last one: ")
    assert re.fullmatch(start + cause + ".*", str(caught.value)), str(caught.value)
    assert server.requests["s.tar"] == ATTEMPTS
    assert own_files(folder) == []


def test_a_server_that_is_not_there_is_an_error(server, make_cache) -> None:
    server.close()
    with pytest.raises(FetchError, match=r"s\.tar: cannot be fetched, attempts: 4, .* exit status 7: curl: \(7\)"):
        make_cache().hold(server.url("s.tar"))


def test_a_shard_cut_at_its_source_is_taken_as_it_is(server, make_cache) -> None:
    whole = make_shard(server.folder / "s.tar", 1)
    (server.folder / "s.tar").write_bytes(whole[:10_001])
    assert make_cache().hold(server.url("s.tar")).path.read_bytes() == whole[:10_001]
    assert server.requests["s.tar"] == 2
    (server.folder / "empty.tar").write_bytes(b"")
    assert make_cache().hold(server.url("empty.tar")).size == 0


def test_another_shard_than_was_indexed_is_refused(server, make_cache, folder) -> None:
    size, cache = len(make_shard(server.folder / "s.tar", 1)), make_cache()
    for stated, said in ((size + 512, f"{size} bytes"), (size - 512, f"more than {size - 512} bytes")):
        message = f"another one than was indexed: {said}, the index says {stated} bytes"
        with pytest.raises(FetchError, match=message):
            cache.hold(server.url("s.tar"), stated)
    digest = file_digest(server.folder / "s.tar")
    with pytest.raises(
        FetchError, match=f"indexed: {size} bytes with digest {digest}, the index says digest {'0' * 32}"
    ):
        cache.hold(server.url("s.tar"), size, "0" * 32)
    assert own_files(folder) == []


def test_a_stalled_command_is_killed_with_all_that_it_started(make_cache, tmp_path) -> None:
    make_shard(tmp_path / "s.tar", 1)
    cache = make_cache(timeout_s=1, attempts=1, allow_pipe=True)
    lasting = f"sleep 4242.{os.getpid()}"
    command = f"pipe:echo a reason >&2; head -c 9000 {tmp_path}/s.tar; {lasting} & {lasting}"
    with pytest.raises(FetchError, match=r"attempts: 1, .* the command brought no byte for 1 s: a reason$"):
        cache.hold(command)
    with pytest.raises(FetchError, match=r"the command did not end for 1 s"):
        cache.hold(f"pipe:exec 1>&-; {lasting}")
    cache.hold(f"pipe:cat {tmp_path}/s.tar; {lasting} >&2 &")  # ended well, and left something behind
    until(lambda: not any(lasting in line for line in command_lines()))  # the kernel ends killed ones in its own time


def test_pipes_need_to_be_allowed(make_cache, tmp_path, monkeypatch) -> None:
    whole = make_shard(tmp_path / "s.tar", 1)
    url = f"pipe:cat {tmp_path}/s.tar | cat"
    with pytest.raises(DataError, match=r"^pipe:cat .* needs data\.allow_pipe=true"):
        make_cache().hold(url)
    assert make_cache(allow_pipe=True).hold(url).path.read_bytes() == whole
    with pytest.raises(FetchError, match=r"the command ended with exit status 3: oh no$"):
        make_cache(allow_pipe=True).hold("pipe:echo oh no >&2; exit 3")
    with pytest.raises(FetchError, match=r"the command was killed by signal 9$"):
        make_cache(allow_pipe=True).hold("pipe:kill -9 $$")
    monkeypatch.setenv("GOPEN_REWRITE", f"http://there/=pipe:cat {tmp_path}/")
    with pytest.raises(DataError, match=r"needs data\.allow_pipe=true"):
        make_cache().hold("http://there/s.tar")
    assert make_cache(allow_pipe=True).hold("http://there/s.tar").path.read_bytes() == whole
    monkeypatch.delenv("GOPEN_REWRITE")
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(FetchError, match="WDS_SECURE in the environment forbids pipes"):
        make_cache(allow_pipe=True).hold("pipe:true")


def test_object_stores_are_read_by_their_programs(make_cache, tmp_path, monkeypatch) -> None:
    whole = make_shard(tmp_path / "bucket" / "s.tar", 1)
    for name in ("aws", "gsutil"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$0" "$@" >> {tmp_path}/calls\nexec cat {tmp_path}/bucket/s.tar\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for url in ("s3://bucket/s.tar", "gs://bucket/s.tar"):
        assert make_cache().hold(url).path.read_bytes() == whole
    assert (tmp_path / "calls").read_text().replace(f"{tmp_path}/bin/", "").splitlines() == [
        "aws s3 cp --only-show-errors s3://bucket/s.tar -",
        "gsutil cat gs://bucket/s.tar",
    ]


@pytest.mark.parametrize(("scheme", "program"), [("s3", "aws"), ("gs", "gsutil"), ("https", "curl")])
def test_a_missing_program_is_named_at_once(make_cache, tmp_path, monkeypatch, scheme, program) -> None:
    cache = make_cache(waits=lambda attempt: pytest.fail("waited, though trying again cannot help"))
    monkeypatch.setenv("PATH", str(tmp_path))
    message = f"^{scheme}://b/s.tar: {scheme}: URLs need the program `{program}`, which is not installed$"
    with pytest.raises(HostError, match=message):
        cache.hold(f"{scheme}://b/s.tar")
    with pytest.raises(FetchError, match=r"^ftp://b/s\.tar: must be a path or begin with one of http:, https:, s3:"):
        cache.hold("ftp://b/s.tar")


def test_paths_are_copied(make_cache, tmp_path) -> None:
    whole = make_shard(tmp_path / "in" / "s.tar", 1)
    held = make_cache().hold(str(tmp_path / "in" / "s.tar"), len(whole))
    (tmp_path / "in" / "s.tar").unlink()
    assert held.path.read_bytes() == whole
    with pytest.raises(FetchError, match=r"/no\.tar: cannot be fetched, .* cat: .*: No such file or directory"):
        make_cache().hold(str(tmp_path / "no.tar"))


def test_descriptors_and_processes_do_not_add_up(make_cache, tmp_path) -> None:
    cache = make_cache(limit_bytes=100_000, allow_pipe=True, attempts=2)
    make_shard(tmp_path / "s.tar", 1)
    processes = children()
    cache.hold(str(tmp_path / "s.tar")).close()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        if number % 5 == 0:
            with pytest.raises(FetchError):
                cache.hold(f"pipe:head -c 999 {tmp_path}/s.tar; exit {number + 1}")
        else:
            cache.hold(f"pipe:cat {tmp_path}/s.tar #{number}")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert children() == processes  # nor as zombies
