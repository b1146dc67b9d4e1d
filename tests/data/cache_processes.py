"""A program of the tests: forks processes that use one cache folder, since starting Python takes seconds.

Reads JSON lines: {"folder": F, "limit_bytes": N, "urls": [...], "threads": N, "output": FILE} forks a process that
holds the URLs one after the other in each thread, in orders of their own, and then writes the digest of each to FILE;
the answer is its number. {"wait": PID} answers with the exit status of that process.
"""

from __future__ import annotations

import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import webdataset.gopen  # noqa: F401  # before forking: takes seconds

from cmpt.data.cache import ShardCache, file_digest


def hold_all(folder: str, limit_bytes: int, urls: list[str], threads: int, output: str) -> None:
    cache = ShardCache(
        Path(folder), limit_bytes, workers=2, attempts=20, timeout_s=5, allow_pipe=False, waits=lambda attempt: 0.01
    )
    digests: dict[str, set[str]] = {url: set() for url in urls}

    def run(seed: int) -> None:
        for url in random.Random(seed).sample(urls, len(urls)):
            with cache.hold(url) as held:
                digests[url].add(file_digest(held.path))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [1000 * os.getpid() + thread for thread in range(threads)]))
    Path(output).write_text(json.dumps({url: sorted(found) for url, found in digests.items()}))


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                hold_all(**job)
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()
