"""Measure how a recipe scales, and foretell how it would on more nodes:

    python tools/scaling.py STUDY.yaml [--retry-failed] [--report-only]
    python tools/scaling.py --simulate [--help]

STUDY.yaml names a recipe, numbers of nodes of a hostfile (or of processes on this host), weak or strong scaling, and
what else to vary (recipes/scaling/ has examples, tools/scaling_study.py every key). Each point is a start of
cmpt/train.py through DeepSpeed's launcher; a second call goes on where the first one ended. In the study's folder:

    points.jsonl      a line for every start: where the time of a step went, bytes, memory; failed ones with the cause
    points.csv        a line for every point, of its repeats the middle one
    fit.json          the fitted model, its error on held-out points, efficiency to 1,024 nodes
    scaling.html      all of it, with plots

Exit code 0: every point was measured; 1: some failed or are missing; 2: the study cannot be run as it is.
`--simulate` plays a run of days with faults and finds the best checkpoint interval.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_collectives import CollectivesError
from cmpt.recipe import RecipeError
from scaling_page import write_page
from scaling_report import build
from scaling_run import Runner, StudyError
from scaling_study import Point, load_study, study_hosts, study_points
from scaling_text import text, write_csv, write_json

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--simulate"]:
        import scaling_simulate

        return scaling_simulate.main(given[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("--retry-failed", action="store_true", help="start points again that failed before")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the report anew")
    parser.add_argument("--simulate", action="store_true", help="as the first option: see --simulate --help")
    options = parser.parse_args(given)
    if options.simulate:
        parser.error("--simulate: must be the first option")
    for ended_by in (signal.SIGTERM, signal.SIGHUP):  # else the processes of a point would go on without us
        signal.signal(ended_by, signal.default_int_handler)
    try:
        return run(options)
    except (RecipeError, StudyError, CollectivesError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> int:
    study = load_study(options.study)
    hosts = study_hosts(study)
    points = study_points(study, hosts)
    runner = Runner(study)
    missing = runner.missing(points, options.retry_failed)
    if options.report_only:
        if not runner.records():
            raise StudyError(f"{runner.folder}: nothing was measured yet; all {len(missing)} starts are missing")
        collectives = [path for point in points if (path := runner.collectives_file(point)).is_file()]
    else:
        runner.check_hosts(sorted({host for point, _ in missing for host, _ in point.hosts if host}))
        try:
            runner.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f'folder = "{study.folder}": cannot make {runner.folder}: {error.strerror}') from error
        collectives = benchmark(runner, points)
        measure(runner, missing)
    report = build(study, points, runner.records(), list(dict.fromkeys(collectives)))
    write_csv(report, runner.folder / "points.csv")
    write_json(report, runner.folder / "fit.json")
    page = write_page(report, runner.folder / "scaling.html")
    print(f"\n{text(report)}\n\n{page}")
    return 1 if report.failed or report.missing else 0


def benchmark(runner: Runner, points: Sequence[Point]) -> list[Path]:
    """Collectives on every set of hosts that has more than one process; one that fails is said and left out."""
    found = []
    for hosts in dict.fromkeys(point.hosts for point in points if point.world_size > 1):
        point = next(point for point in points if point.hosts == hosts)
        if not runner.collectives_file(point).is_file():
            say(f"collectives on {point.nodes} x {point.ranks_per_node} processes")
        try:
            found.append(runner.collectives(point))
        except StudyError as error:
            say(f"  {error}")
    return found


def measure(runner: Runner, missing: Sequence[tuple[Point, int]]) -> None:
    """All starts that are missing; one that fails is said and kept, and the next one begins."""
    if not missing:
        say("every point has been measured")
    began = time.monotonic()
    for number, (point, repeat) in enumerate(missing, start=1):
        record = runner.measure(point, repeat)
        left = (time.monotonic() - began) / number * (len(missing) - number)
        told = f"[{number}/{len(missing)}] {point.name}" + (f", repeat {repeat + 1}" if repeat else "")
        if record["status"] == "done":
            waits = 1 - sum(record["terms_s"][term] for term in ("compute", "optimizer")) / record["step_s"]
            told += f": {record['images_per_s']:,.1f} images/s, {record['step_s']:.3f} s a step"
            told += f", {100 * waits:.0f} % of it waiting"
        else:
            told += f": failed: {record['cause']}"
        say(told + (f"; about {left / 60:.0f} min left" if number < len(missing) else ""))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
