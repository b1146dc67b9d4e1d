"""The page of a study: right figures, nothing loaded from elsewhere, and a page also where there is nothing to draw."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from small_studies import study

from scaling_fit import samples_of
from scaling_page import write_page
from scaling_report import Report, build, text, write_csv, write_json
from scaling_run import Runner
from scaling_study import Point, Study, point_recipe, study_points
from step_model import COMMUNICATION, Link, Machine, step_terms

MACHINE = Machine(2e11, 1e8, Link(1e-3, 4e8), Link(1e-3, 4e8), fixed_s=0.1, straggler_deviation=0.02)


def record(of: Study, point: Point, **more: Any) -> dict[str, Any]:
    """What the machine above would have measured of a point."""
    sent = dict.fromkeys(COMMUNICATION, 0.0)
    calls = {"features": 2, "gradients": 1, "parameters": 5, "control": 7}
    made: dict[str, Any] = {
        "point": point.name, "repeat": 0, "fingerprint": Runner(of).fingerprint(point), "status": "done",
        "scaling": point.scaling, "nodes": point.nodes, "ranks_per_node": point.ranks_per_node,
        "world_size": point.world_size, "batch_size": point.batch_size, "settings": dict(point.settings), "hosts": [],
        "flops_per_sample": 1e9, "sent_bytes": sent,
        "calls": calls if point.world_size > 1 else dict.fromkeys(calls, 0),
        "peak_memory_bytes": [2**30] * point.world_size, "wire_bytes": 0.0, "device": "a <processor>",
        "revision": "abc",
        "terms_s": {"compute": 1.0, "optimizer": 0.0, **sent, "stragglers": 0.0, "data": 0.0}, "step_s": 1.0,
    }  # fmt: skip
    if point.world_size > 1:
        expected = {1: (15_552, 14_111_236), 3: (15_552, 7_055_660)}
        made["sent_bytes"] = {**sent, "gradients": expected[dict(point.settings)["engine.zero_stage"]][1]}
    return made | more


def report_of(folder: Path, **keys: Any) -> tuple[Report, list[Point]]:
    of = study(folder, strong=[64], **keys)
    points = study_points(of, {})
    records = [record(of, point) for point in points]
    recipes = {p.name: point_recipe(of, p).recipe for p in points}
    for made, sample in zip(records, samples_of(records, recipes, 7_000_000), strict=True):
        terms = step_terms(sample.work, MACHINE)
        terms["compute"] += terms.pop("loss")
        step_s = sum(terms.values())
        made |= {"terms_s": terms, "step_s": step_s, "step_low_s": 0.9 * step_s, "step_high_s": 1.1 * step_s}
    failed = record(of, points[-1], status="failed", cause="no <room> left", log="logs/x.log", repeat=1)
    return build(of, points, [*records, failed], []), points


def test_the_page_holds_the_figures_of_the_study_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    report, points = report_of(tmp_path)
    page = write_page(report, tmp_path / "scaling.html").read_text()
    assert "a &lt;processor&gt;" in page and "no &lt;room&gt; left" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)|https?://|<script""", page)
    for sample in report.samples:
        rate = sample.record["batch_size"] / sample.step_s
        assert re.search(rf"<td>{re.escape(sample.name)}</td>\s*<td[^>]*>{rate:,.1f}</td>", page), sample.name
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 4 + 1 + 1 + 1 + 2
    assert all("<svg" in figure and re.search(r"<figcaption><b>[^<]+</b>", figure) for figure in figures)
    assert "Foretold by the fitted model, not measured." in page and "Only one host was measured" in page
    told = text(report)
    assert "no <room> left" in told and f"({len(points)} points)" in told
    write_csv(report, tmp_path / "points.csv")
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["point"] for row in rows] == [point.name for point in points]
    assert rows[-1]["cause"] == "no <room> left" and float(rows[0]["step_s"]) == report.samples[0].step_s
    write_json(report, tmp_path / "fit.json")
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["failed"] == 1 and len(found["errors"]) == len(points)


def test_counted_bytes_stand_beside_those_of_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    report, _ = report_of(tmp_path)
    assert set(report.bytes) == {s.name for s in report.samples if s.work.world_size > 1}
    for sent in report.bytes.values():
        assert sent.expected["gradients"] == pytest.approx(sent.counted["gradients"], rel=0.01)
        assert sent.apart == 1.0, "no features were counted"


def test_single_processes_alone_foretell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    report, _ = report_of(tmp_path, processes=[1])
    page = write_page(report, tmp_path / "scaling.html").read_text()
    assert "nothing is known of collectives" in page and not report.curves


def test_a_study_in_which_everything_failed_has_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    of = study(tmp_path)
    points = study_points(of, {})
    records = [record(of, point, status="failed", cause="broken", log="l") for point in points]
    report = build(of, points, records, [])
    page = write_page(report, tmp_path / "scaling.html").read_text()
    assert "No point was measured" in page and page.count("broken") == len(points)
