"""The simulation of runs with faults, against the closed forms where they hold and by hand where they do not."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from scaling_faults import (
    DAY_S,
    HOUR_S,
    Faults,
    as_good,
    daly_interval_s,
    effective,
    expected_wall_s,
    play,
    search,
    trials,
    usable_nodes,
    young_interval_s,
)
from scaling_simulate import USER_ERROR, main

PLAIN = Faults(work_s=30 * DAY_S, nodes=100, node_mtbf_s=2000 * HOUR_S, stall_s=60, write_s=60, restart_s=300)


def daly_wall_s(faults: Faults, interval_s: float) -> float:
    """Expected wall seconds: M e^(R/M) (e^((tau + C)/M) - 1) T / tau (Daly 2006, section 3); without faults, T and
    its stalls. An interval that is longer than the run is as long as the run."""
    interval_s = min(interval_s, faults.work_s)
    mtbf, period = faults.mtbf_s, interval_s + faults.stall_s
    if math.isinf(mtbf):
        return faults.work_s * period / interval_s
    if (period + faults.restart_s) / mtbf > 500:
        return math.inf
    return mtbf * math.exp(faults.restart_s / mtbf) * math.expm1(period / mtbf) * faults.work_s / interval_s


def mean_wall_s(faults: Faults, interval_s: float, count: int = 100) -> float:
    return statistics.fmean(run.wall_s for run in trials(faults, interval_s, count, seed=0))


@pytest.mark.parametrize("interval_s", [600, 2000, 6000, 20_000])
@pytest.mark.parametrize("nodes", [10, 100, 300])
def test_wall_time_is_daly_s_formula(interval_s: float, nodes: int) -> None:
    """100 runs of 30 days: within 1 %, or three standard errors where faults are few."""
    faults = replace(PLAIN, nodes=nodes)
    walls = [run.wall_s for run in trials(faults, interval_s, 100, seed=0)]
    expected = daly_wall_s(faults, interval_s)
    allowed = max(0.01 * expected, 3 * statistics.stdev(walls) / 10)
    assert statistics.fmean(walls) == pytest.approx(expected, abs=allowed)


def test_every_second_of_every_run_is_accounted_for() -> None:
    for lost in ("spare", "fewer", "wait"):
        faults = replace(PLAIN, when_lost=lost, streams=200, slow_per_node_s=1e-6, slow_length_s=600,
                         slow_factor=1.5, write_s=200)  # fmt: skip
        for run in trials(faults, 2000, 20, seed=1):
            assert run.wall_s == pytest.approx(faults.work_s + sum(run.lost_s.values()))
            assert all(seconds >= -1e-6 for seconds in run.lost_s.values())
            times = [wall for wall, _ in run.course]
            assert times == sorted(times) and run.course[-1] == pytest.approx((run.wall_s, faults.work_s))


def test_writing_beside_training_and_waiting_for_repairs_are_a_longer_restart() -> None:
    """What refuses a run that takes too long: the mean of 100 runs is within three standard errors of it."""
    faults = replace(PLAIN, nodes=400, write_s=900, when_lost="wait", repair_s=1800)
    expected = expected_wall_s(faults, 1500)
    walls = [run.wall_s for run in trials(faults, 1500, 100, seed=0)]
    assert statistics.fmean(walls) == pytest.approx(expected, abs=3 * statistics.stdev(walls) / 10)
    assert expected > 1.15 * daly_wall_s(faults, 1500)
    assert expected_wall_s(PLAIN, 1500) == pytest.approx(daly_wall_s(PLAIN, 1500), rel=1e-3)


@pytest.mark.parametrize("interval_s", [8000, 43_200, 87_264, 172_800])
def test_the_closed_form_holds_for_intervals_that_are_long_against_the_run(interval_s: float) -> None:
    """The last interval has no checkpoint to write."""
    faults = replace(PLAIN, work_s=2 * DAY_S, write_s=7200)
    walls = [run.wall_s for run in trials(faults, interval_s, 1000, seed=0)]
    assert statistics.fmean(walls) == pytest.approx(
        expected_wall_s(faults, interval_s), abs=3 * statistics.stdev(walls) / math.sqrt(1000)
    )


@pytest.mark.parametrize(("repair_h", "per_node"), [(30, None), (12, 4), (60, 4), (200, 4)])
def test_what_refuses_a_run_with_absent_nodes_is_near_what_it_takes(repair_h: float, per_node: int | None) -> None:
    faults = replace(PLAIN, nodes=16, node_mtbf_s=500 * HOUR_S, when_lost="fewer", repair_s=repair_h * HOUR_S)
    faults = faults if per_node is None else replace(faults, streams=64, gpus_per_node=per_node)
    played = statistics.fmean(run.wall_s for run in trials(faults, 1500, 60, seed=0))
    assert expected_wall_s(faults, 1500) == pytest.approx(played, rel=0.2)


def test_the_useful_share_is_that_of_all_runs_together() -> None:
    """The mean of each run's share would be above what the closed form tells."""
    faults = replace(PLAIN, work_s=2 * DAY_S)
    runs = trials(faults, 2 * DAY_S, 400, seed=0)
    walls = [run.wall_s for run in runs]
    assert effective(faults, runs)[0] == pytest.approx(faults.work_s / statistics.fmean(walls))
    # One interval that is the whole run: no stall.
    expected = faults.mtbf_s * math.exp(300 / faults.mtbf_s) * math.expm1(faults.work_s / faults.mtbf_s)
    assert statistics.fmean(walls) == pytest.approx(expected, abs=3 * statistics.stdev(walls) / 20)


def test_without_faults_a_run_takes_its_work_and_its_stalls() -> None:
    run = play(replace(PLAIN, work_s=1000, node_mtbf_s=math.inf), 100, random.Random(0))
    assert run.wall_s == 1000 + 9 * 60 and run.faults == 0, "the last checkpoint is the run's own"


def test_the_best_interval_is_young_s_within_the_flatness_of_the_optimum() -> None:
    best = young_interval_s(PLAIN.stall_s, PLAIN.mtbf_s)
    assert best == pytest.approx(math.sqrt(2 * 60 * 20 * HOUR_S))
    shares = {factor: effective(PLAIN, trials(PLAIN, factor * best, 60, seed=0))[0] for factor in (0.25, 1, 4)}
    assert max(shares, key=lambda factor: shares[factor]) == 1
    assert daly_wall_s(PLAIN, daly_interval_s(60, PLAIN.mtbf_s)) <= daly_wall_s(PLAIN, best)
    assert daly_interval_s(60, PLAIN.mtbf_s) == pytest.approx(best, rel=0.05)
    assert daly_interval_s(100, 40) == 40


def test_more_nodes_fail_more_often_and_want_checkpoints_sooner() -> None:
    more = replace(PLAIN, nodes=400)
    assert more.mtbf_s == PLAIN.mtbf_s / 4
    assert young_interval_s(60, more.mtbf_s) == young_interval_s(60, PLAIN.mtbf_s) / 2
    assert mean_wall_s(more, 2000) > mean_wall_s(PLAIN, 2000)


def test_a_checkpoint_that_is_written_while_training_goes_on_costs_less_but_is_usable_later() -> None:
    blocking, beside = replace(PLAIN, stall_s=300, write_s=300), replace(PLAIN, stall_s=5, write_s=300)
    free = replace(PLAIN, stall_s=5, write_s=5)
    walls = [mean_wall_s(faults, 2000) for faults in (free, beside, blocking)]
    assert walls == sorted(walls) and walls[0] < walls[1]


def test_a_fault_before_a_checkpoint_is_usable_falls_back_to_the_one_before() -> None:
    class Once(random.Random):
        """The first fault after `seconds`, then none."""

        def __init__(self, seconds: float) -> None:
            super().__init__(0)
            self.waits = [seconds]

        def expovariate(self, lambd: float = 1.0) -> float:
            return self.waits.pop() if self.waits else math.inf

    faults = replace(PLAIN, work_s=1000, stall_s=10, write_s=50, restart_s=0)
    # Checkpoints begin after 100 and 210 s; the second can be used at 260.
    for at, kept in ((149, 0), (151, 100), (255, 100), (261, 200)):
        run = play(faults, 100, Once(at))
        assert run.course[2][1] == kept, at
        done = run.course[1][1]
        assert run.lost_s["recomputed"] == done - kept


def test_fewer_nodes_are_those_whose_processes_divide_the_streams() -> None:
    assert usable_nodes(63, 8, 1024) == 32 and usable_nodes(63, 8, None) == 63
    assert usable_nodes(1, 8, 1024) == usable_nodes(0, 8, 1024) == 1


@pytest.mark.parametrize(("nodes", "stall_s"), [(20, 30.0), (100, 60.0), (400, 10.0)])
def test_the_search_finds_daly_s_interval_where_his_formula_holds(nodes: int, stall_s: float) -> None:
    """It starts from the shortest interval and knows no formula. The optimum is flat: within a factor of 1.5, and no
    more than 0.1 % of the time from what the formula's own interval gives."""
    faults = replace(PLAIN, nodes=nodes, stall_s=stall_s, write_s=stall_s)

    def useful(interval_s: float) -> float:
        return effective(faults, trials(faults, interval_s, 100, seed=0))[0]

    tried = search(useful, stall_s, 40_000.0)
    best, daly = max(tried, key=lambda interval: tried[interval]), daly_interval_s(stall_s, faults.mtbf_s)
    assert 1 / 1.5 < best / daly < 1.5
    assert tried[best] >= useful(daly) - 0.001
    low, high = as_good(tried)
    assert low < daly < high and low < best < high


def test_the_search_comes_near_the_top_of_a_smooth_hill_and_passes_over_what_cannot_be_played() -> None:
    calls = []

    def useful(interval: float) -> float | None:
        calls.append(interval)
        return None if interval > 5000 else 0.9 - 0.01 * math.log(interval / 777) ** 2

    tried = search(useful, 3.0, 90_000.0)
    best = max(tried, key=lambda interval: tried[interval])
    assert best == pytest.approx(777, rel=0.05) and len(calls) < 40 and max(tried) < 5000
    low, high = as_good(tried)
    width = math.exp(math.sqrt(0.001 / 0.01))
    assert low == pytest.approx(777 / width, rel=0.1) and high == pytest.approx(777 * width, rel=0.1)
    assert search(lambda interval: None, 1.0, 8.0) == {}
    rising = search(lambda interval: interval / 100, 1.0, 50.0)
    assert max(rising) == 50.0 and as_good(rising)[1] == 50.0


def test_no_interval_is_tried_in_which_the_engine_would_leave_a_checkpoint_out(tmp_path: Path) -> None:
    out = tmp_path / "new/s.json"
    given = f"--nodes 400 --days 1 --node-mtbf-hours 500 --trials 3 --stall 5 --write 600 --json {out}"
    assert main(given.split()) == 0
    told = json.loads(out.read_text())
    assert min(row["interval_s"] for row in told["by_interval"]) == 595
    assert told["best_interval_s"] == 595 and told["at_edge"] == "shortest", "Young says 212 s"


def test_a_lost_node_is_repaired_while_the_others_restart() -> None:
    class Twice(random.Random):
        waits = [math.inf, 1000.0]

        def expovariate(self, lambd: float = 1.0) -> float:
            return self.waits.pop() if self.waits else math.inf

    faults = replace(PLAIN, work_s=5000, stall_s=0, write_s=0, nodes=2, when_lost="fewer", repair_s=900)
    run = play(faults, 100, Twice(0))
    # 300 s restart, 600 s at half the speed until the repair, 300 s to take the node back
    assert run.lost_s["fewer hosts"] == pytest.approx(300) and run.lost_s["restarts"] == 600
    assert run.wall_s == pytest.approx(5000 + 300 + 600)
    Twice.waits = [math.inf, 1000.0]
    slow = replace(faults, slow_per_node_s=1.0, slow_length_s=1e9, slow_factor=2.0)
    both = play(slow, 100, Twice(0)).lost_s
    assert both["fewer hosts"] == pytest.approx(150) and both["stragglers"] == pytest.approx(500 + 300 + 4350)
    Twice.waits = [math.inf, 1000.0]
    written = play(replace(faults, write_s=50), 100, Twice(0))
    assert written.wall_s == pytest.approx(5000 + 100 + 300 + 600 + 50), (
        "the checkpoint with which it takes the node back"
    )
    Twice.waits = [math.inf, 300 + 600 + 20, 1000.0]
    failed = play(replace(faults, write_s=50), 100, Twice(0))
    assert failed.lost_s["recomputed"] == pytest.approx(100 + 100), "a fault while that is being written"
    Twice.waits = [math.inf, 1000.0]
    back = play(replace(faults, repair_s=200), 100, Twice(0))
    assert back.lost_s["fewer hosts"] == 0 and back.lost_s["restarts"] == 300, "it is back before the run is"


def test_several_nodes_are_lost_and_come_back_one_by_one_or_when_more_of_them_are_of_use() -> None:
    class Given(random.Random):
        def __init__(self, *waits: float) -> None:
            self.waits = [*waits, math.inf]

        def expovariate(self, lambd: float = 1.0) -> float:
            return self.waits.pop(0)

    faults = replace(PLAIN, work_s=9000, nodes=4, stall_s=0, write_s=0, when_lost="fewer", repair_s=3000)
    # Faults at 1000 and, 300 s of restart and 700 s with three nodes later, at 2000; back at 4000 and 5000.
    one_by_one = play(faults, 100, Given(1000, 1000))
    assert one_by_one.lost_s["restarts"] == 4 * 300
    assert one_by_one.lost_s["fewer hosts"] == pytest.approx(700 / 4 + 1700 / 2 + 700 / 4)
    # Two streams for each node: three or two nodes are as fast as two, and one that comes back brings nothing.
    by_two = play(replace(faults, streams=8, gpus_per_node=1), 100, Given(1000, 1000))
    assert by_two.lost_s["restarts"] == 3 * 300
    assert by_two.lost_s["fewer hosts"] == pytest.approx((700 + 2700) / 2)
    # The second one is lost while the run restarts, at 1200, and back while it restarts with the first one.
    meanwhile = play(faults, 100, Given(1000, 200))
    assert meanwhile.lost_s["restarts"] == 200 + 300 + 300 and meanwhile.faults == 2
    assert meanwhile.lost_s["fewer hosts"] == pytest.approx((4000 - 1500) / 2)


def test_nodes_that_are_never_repaired_do_not_end_a_short_run() -> None:
    faults = replace(PLAIN, work_s=3 * DAY_S, nodes=64, when_lost="fewer", repair_s=1e9 * HOUR_S)
    assert all(run.lost_s["fewer hosts"] <= 0.1 * DAY_S * run.faults for run in trials(faults, 1500, 20, seed=0))


def test_intervals_at_which_a_run_would_never_end_are_told_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--nodes", "1000", "--node-mtbf-hours", "1000", "--days", "3", "--trials", "3", "--interval", "259200"]
    assert main(given) == USER_ERROR
    assert "a checkpoint every 259200 s: this run is expected to take more than 5 times" in capsys.readouterr().err
    assert main([*given[:-2], "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert (
        "not played, for the run is expected to take more than 5 times its work and a pause: " in told
        and "259,200 s" in told
    )
    assert "-0.0" not in told
    assert "Not played" in (tmp_path / "simulation.html").read_text()


def test_the_closed_form_is_told_only_where_it_holds_and_then_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Daly's own formula would tell 80.4 % of the first one."""
    out = tmp_path / "s.json"
    given = ["--nodes", "1000", "--node-mtbf-hours", "2000", "--stall", "30", "--write", "600", "--restart", "900"]
    given += ["--days", "4", "--trials", "100", "--interval", "900", "--out", str(tmp_path), "--json", str(out)]
    slow = ["--slow-spells-per-node-day", "1", "--slow-minutes", "1"]
    for more, holds in (
        ([], True),
        (["--when-lost", "wait", "--repair-hours", "0.1"], True),
        (["--when-lost", "fewer"], False),
        (slow, False),
    ):
        assert main([*given, *more]) == 0
        told = json.loads(out.read_text())
        if holds:
            error = told["effective_spread"] / math.sqrt(100)
            assert told["effective"] == pytest.approx(told["effective_closed_form"], abs=3 * error)
        assert ("; closed form: " in capsys.readouterr().out) == holds
        page = (tmp_path / "simulation.html").read_text()
        assert (">closed form<" in page) == holds and (">by Daly" in page) == holds


def test_nodes_that_never_fail_need_no_checkpoint_before_the_end(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    assert main(f"--nodes 8 --days 1 --node-mtbf-hours inf --trials 2 --json {out}".split()) == 0
    told = json.loads(out.read_text())
    assert told["effective"] == 1 and told["at_edge"] == "longest" and told["faults"]["node_mtbf_s"] is None


def test_the_program_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--nodes", "64", "--days", "2", "--node-mtbf-hours", "500", "--trials", "5"]
    assert main([*given, "--out", str(tmp_path), "--json", str(tmp_path / "s.json")]) == 0
    told = json.loads((tmp_path / "s.json").read_text())
    assert f"{100 * told['effective']:.2f} %" in capsys.readouterr().out
    page = (tmp_path / "simulation.html").read_text()
    assert f"{100 * told['effective']:.1f} %" in page and "Simulated, not measured" in page and page.count("<svg") == 2


def test_checkpoint_times_come_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [{"kind": "checkpoint", "step": n, "stall_s": s, "write_s": 30.0} for n, s in enumerate((1.0, 2.0, 9.0))]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    out = tmp_path / "s.json"
    assert main(["--nodes", "8", "--days", "1", "--trials", "2", "--run", str(tmp_path), "--json", str(out)]) == 0
    faults = json.loads(out.read_text())["faults"]
    assert (faults["stall_s"], faults["write_s"]) == (2.0, 30.0), "a checkpoint's write_s has its stall in it"
    assert main(["--nodes", "8", "--run", str(tmp_path / "none")]) == USER_ERROR
    assert "there is no events.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--nodes 0", "--nodes 0: must be from 1 to 1,000,000"),
        ("--nodes 8 --days -1", "--days -1"),
        ("--nodes 8 --node-mtbf-hours 0", "--node-mtbf-hours 0"),
        ("--nodes 8 --interval 0", "--interval 0"),
        ("--nodes 8 --stall -1", "--stall -1"),
        ("--nodes 8 --stall 60 --write 10", "--write 10: must be at least --stall 60"),
        ("--nodes 8 --slow-factor 0.5", "--slow-factor 0.5"),
        ("--nodes 8 --days nan", "--days nan: must be from 0.001 to 1,000,000,000"),
        ("--nodes 8 --node-mtbf-hours nan", "--node-mtbf-hours nan"),
        ("--nodes 8 --stall nan", "--stall nan: must be from 0 to 1,000,000,000"),
        ("--nodes 8 --write inf", "--write inf"),
        ("--nodes 8 --slow-factor nan", "--slow-factor nan"),
        ("--nodes 8 --interval inf", "--interval inf"),
        ("--nodes 8 --streams 0", "--streams 0: must be from 1 to 1,000,000,000"),
        ("--nodes 8 --interval 50", "--interval 50: must be at least 55, --write less --stall"),
        ("--nodes 1 --when-lost fewer", "--when-lost fewer: needs 2 nodes or more"),
        ("--nodes 8 --days 1e9", "--days 1e+09: must be 163,696 or fewer with --trials 200"),
        ("--nodes 8 --days 1e308", "--days 1e+308"),
        ("--nodes 1000000000 --when-lost fewer", "--nodes 1000000000: must be"),
        ("--nodes 8 --when-lost fewer --streams 24", "--streams 24: must be a multiple of --nodes 8 times"),
        ("--nodes 8 --json /dev", "--json /dev: must be a file"),
        ("--nodes 64 --when-lost wait --repair-hours 5000", "1.80002e+07 s until training goes on after it"),
        (
            "--nodes 64 --slow-spells-per-node-day 100 --slow-factor 1e6",
            "is expected to take more than 5 times its work",
        ),
        ("--nodes 8 --days 1 --trials 1 --json /proc/x/s.json", "/proc/x: No such file or directory"),
        ("--nodes 8 --days 1 --trials 1 --out /dev/null/x", "/dev/null/x: Not a directory"),
        (
            "--nodes 1000 --node-mtbf-hours 60 --restart 1 --stall 0.1 --write 0.2 --slow-spells-per-node-day 100 "
            "--slow-minutes 600 --slow-factor 50",
            "is expected to take more than 5 times its work",
        ),
        ("--nodes 64 --node-mtbf-hours 1", "is expected to take more than 5 times its work"),
        ("--nodes 8000 --node-mtbf-hours 6300 --trials 100000 --days 100", "--trials 100000: must be 283"),
    ],
)
def test_bad_input_is_named(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given.split()) == USER_ERROR
    assert told in capsys.readouterr().err
