from __future__ import annotations

from typing import Any

import pytest

from cmpt.monitor.judge import Judge, Verdict, describe

SILENCE_S = 20.0


class Run:
    """Ranks of one host that report once a second."""

    def __init__(self, world: int) -> None:
        self.judge, self.now, self.beats = Judge(world, SILENCE_S), 0.0, 0
        self.reports: dict[int, dict[str, Any]] = {}
        for rank in range(world):
            self.reports[rank] = {"rank": rank, "host": "a", "address": "", "pid": 7, "state": "S", "beats": 0}
            self.mark(rank, 5, 1)

    def mark(self, rank: int, step: int, within: int, limit_s: float = SILENCE_S, patient: bool = False) -> None:
        report = self.reports[rank]
        number = report.get("number", 0) + 1
        more = {"number": number, "step": step, "within": within, "place": f"place {within}"}
        self.reports[rank] = report | more | {"limit_s": limit_s, "patient": patient}

    def go(self, seconds: int, frozen: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> Verdict | None:
        """The first verdict within so many seconds."""
        for _ in range(seconds):
            self.now += 1
            self.beats += 1
            for rank, report in self.reports.items():
                if rank not in frozen:
                    report["beats"] = self.beats
                if rank not in silent:
                    self.judge.hear(dict(report), self.now)
            verdict = self.judge.verdict(self.now)
            if verdict is not None:
                return verdict
        return None


def named(verdict: Verdict | None) -> tuple[str, list[int]]:
    assert verdict is not None
    return verdict.kind, [culprit["rank"] for culprit in verdict.culprits]


def test_the_rank_that_got_least_far_is_named_and_those_that_wait_are_not() -> None:
    run = Run(4)
    for rank in (0, 1, 3):
        run.mark(rank, 5, 2)
    verdict = run.go(25)
    assert named(verdict) == ("stall", [2])
    assert verdict is not None and verdict.culprits[0]["seconds"] == 21
    assert 'rank 2 on host a (pid 7) has stood still for 21 s at step 5 in "place 1"' in describe(*_only(verdict))


def test_all_are_named_where_all_stand_at_the_same_place() -> None:
    assert named(Run(3).go(25)) == ("stall", [0, 1, 2])


def test_a_frozen_rank_is_named_though_it_got_as_far_as_the_others() -> None:
    run = Run(3)
    run.go(1)
    run.reports[1]["state"] = "T"
    verdict = run.go(25, frozen=(1,))
    assert named(verdict) == ("stall", [1])
    assert describe(*_only(verdict)).endswith("(stopped by a signal)")


def test_waiting_for_a_patient_rank_is_no_stall_and_neither_is_its_return() -> None:
    run = Run(2)
    run.mark(0, 5, 3, limit_s=1800, patient=True)
    run.mark(1, 6, 2)
    assert run.go(300) is None
    run.mark(0, 6, 1)
    assert run.go(1) is None
    run.mark(0, 6, 2)
    assert run.go(10) is None


def test_a_patient_rank_may_hold_the_gil_but_may_not_be_stopped() -> None:
    run = Run(2)
    for rank in (0, 1):
        run.mark(rank, 5, 2, limit_s=1800, patient=True)
    assert run.go(300, frozen=(1,)) is None
    run.reports[1]["state"] = "T"
    assert named(run.go(25, frozen=(1,))) == ("stall", [1])


def test_a_job_that_is_stopped_as_a_whole_is_left_in_peace_and_so_is_its_return() -> None:
    run = Run(2)
    for report in run.reports.values():
        report["state"] = "T"
    assert run.go(300, frozen=(0, 1)) is None
    run.reports[0]["state"] = "S"
    assert run.go(1, frozen=(1,)) is None
    run.reports[1]["state"] = "S"
    assert run.go(15) is None


def test_a_host_that_no_longer_answers_is_named_before_the_ranks_that_wait_for_it() -> None:
    run = Run(3)
    run.go(1)
    verdict = run.go(30, silent=(2,))
    assert named(verdict) == ("lost_host", [2])
    assert "does not answer" in describe(*_only(verdict))


def test_a_rank_that_is_gone_is_named_before_the_error_that_follows_from_it() -> None:
    run = Run(2)
    run.go(1)
    run.judge.failed(0, "RuntimeError: connection reset", run.now)
    run.judge.gone(1, run.now + 0.5)
    assert named(run.go(5)) == ("lost_rank", [1])


def test_an_error_of_one_rank_is_named_and_the_end_of_all_of_them_is_not_awaited() -> None:
    run = Run(2)
    run.go(1)
    run.judge.failed(1, "ValueError: no", run.now)
    verdict = run.go(5)
    assert named(verdict) == ("failed", [1]) and describe(*_only(verdict)).endswith("ValueError: no")


def test_nobody_is_blamed_where_all_ranks_are_killed_together() -> None:
    run = Run(2)
    run.go(1)
    for rank in (0, 1):
        run.judge.gone(rank, run.now)
    assert run.go(100) is None


@pytest.mark.parametrize("state", ["D", "R"])
def test_a_single_rank_may_freeze_but_its_main_thread_must_get_on(state: str) -> None:
    run = Run(1)
    run.reports[0]["state"] = state
    run.mark(0, 5, 2, limit_s=100)
    assert run.go(95, frozen=(0,)) is None
    assert named(run.go(10, frozen=(0,))) == ("stall", [0])


def _only(verdict: Verdict | None) -> tuple[str, dict[str, Any]]:
    assert verdict is not None
    (culprit,) = verdict.culprits
    return verdict.kind, culprit
