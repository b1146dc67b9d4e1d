"""The processes that run matrices for the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine.ranks import Matrix, Ranks


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """Runs matrices; the processes of a world size are started once, and anew after a failure."""
    started: dict[int, Ranks] = {}

    def run(world: int, module: str, *arguments: str, timeout: float = 900) -> Any:
        if world not in started or started[world].process.poll() is not None:
            started[world] = Ranks(world, tmp_path_factory.mktemp(f"ranks-{world}"))
        return started[world].run(module, arguments, timeout)

    yield run
    for ranks in started.values():
        ranks.end()
