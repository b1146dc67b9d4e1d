"""The page of a study: right figures, nothing loaded from elsewhere, and a page also where there is nothing to draw."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from small_studies import study

from scaling_fit import samples_of
from scaling_page import write_page
from scaling_plots import spread
from scaling_report import Report, build
from scaling_run import Runner
from scaling_study import Point, Study, point_recipe, study_hosts, study_points
from scaling_text import curve_label, text, write_csv, write_json
from step_model import COMMUNICATION, Link, Machine, step_terms

MACHINE = Machine(2e11, 1e8, Link(1e-3, 4e8), Link(1e-3, 4e8), fixed_s=0.1, straggler_deviation=0.02)
FEW: dict[str, Any] = {"sweep": {"engine.zero_stage": [1]}}
FORETOLD = "Foretold by the fitted model, not measured"


@pytest.fixture(scope="module", autouse=True)
def in_the_repository() -> Iterator[None]:
    with contextlib.chdir(REPOSITORY):
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Weak and strong, one and two processes, ZeRO 1 and 3; one start failed."""
    return report_of(tmp_path_factory.mktemp("study"))[0]


@pytest.fixture(scope="module")
def whole_page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(report, tmp_path_factory.mktemp("page"))


def record(of: Study, point: Point, **more: Any) -> dict[str, Any]:
    """What the machine above would have measured of a point."""
    sent = dict.fromkeys(COMMUNICATION, 0.0)
    calls = {"features": 2, "gradients": 1, "parameters": 5, "control": 7}
    made: dict[str, Any] = {
        "point": point.name, "repeat": 0, "fingerprint": Runner(of).fingerprint(point), "status": "done",
        "scaling": point.scaling, "nodes": point.nodes, "ranks_per_node": point.ranks_per_node,
        "world_size": point.world_size, "batch_size": point.batch_size, "settings": dict(point.settings),
        "hosts": [host for host, _ in point.hosts if host], "sent_bytes": sent,
        "flops_per_sample": 1e9 * (1 - dict(point.settings).get("masking.ratio", 0)),
        "calls": calls if point.world_size > 1 else dict.fromkeys(calls, 0),
        "peak_memory_bytes": [2**30] * point.world_size, "wire_bytes": 0.0, "device": "a <processor>",
        "gpu": False, "revision": "abc",
        "terms_s": {"compute": 1.0, "optimizer": 0.0, **sent, "stragglers": 0.0, "data": 0.0}, "step_s": 1.0,
    }  # fmt: skip
    if point.world_size > 1:
        expected = {1: (15_552, 14_111_236), 3: (15_552, 7_055_660)}
        made["sent_bytes"] = {**sent, "gradients": expected[dict(point.settings)["engine.zero_stage"]][1]}
    return made | more


def report_of(folder: Path, **keys: Any) -> tuple[Report, list[Point]]:
    of = study(folder, **{"strong": [64], **keys})
    points = study_points(of, study_hosts(of))
    records = [record(of, point) for point in points]
    recipes = {p.name: point_recipe(of, p).recipe for p in points}
    for made, sample in zip(records, samples_of(records, recipes, dict.fromkeys(recipes, 7_000_000)), strict=True):
        terms = step_terms(sample.work, MACHINE)
        terms["compute"] += terms.pop("loss")
        step_s = sum(terms.values())
        made |= {"terms_s": terms, "step_s": step_s, "step_low_s": 0.9 * step_s, "step_high_s": 1.1 * step_s}
    failed = record(of, points[-1], status="failed", cause="no <room> left", log="logs/x.log", repeat=1)
    return build(of, points, [*records, failed], []), points


def several_nodes(folder: Path) -> Report:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"host-{number:02d} slots=1\n" for number in range(16)))
    return report_of(folder, processes=None, hostfile=str(hostfile), nodes=[1, 2, 16], **FEW)[0]


def page_of(report: Report, folder: Path) -> str:
    return write_page(report, folder / "scaling.html").read_text(encoding="utf-8")


def plain(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))).strip()


def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """Cells by the title of a section and the first cell of a row."""
    found = {}
    for title, body in re.findall(r"<h2>([^<]+)</h2>(.*?)</section>", page, re.DOTALL):
        rows = [[plain(cell) for cell in re.findall(r"<td.*?</td>", row)] for row in re.findall(r"<tr.*?</tr>", body)]
        found[unescape(title)] = {row[0]: row[1:] for row in rows if len(row) > 1}
    return found


def tiles(page: str) -> dict[str, str]:
    """Values of the key figures by what they are."""
    return {unescape(name): value for value, name in re.findall(r"<div><b>([^<]+)</b><span>([^<]+)</span>", page)}


def figures(page: str) -> dict[str, str]:
    """By title, with the caption and the text that is drawn."""
    every = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    return {unescape(re.findall(r"<figcaption><b>([^<]+)</b>", figure)[0]): figure for figure in every}


def test_the_page_holds_the_measured_figures_of_every_point(report: Report, whole_page: str) -> None:
    found = tables(whole_page)
    assert len(found["All points"]) == len(report.samples) == 8
    for sample in report.samples:
        efficiency, error = report.efficiency(sample), report.error(sample)
        assert efficiency is not None and error is not None
        cells = found["All points"][sample.name]
        rate, step_ms, predicted = (float(cells[number].replace(",", "")) for number in (0, 2, 4))
        assert rate == pytest.approx(sample.record["batch_size"] / sample.step_s, abs=0.06)
        assert step_ms == pytest.approx(1000 * sample.step_s, abs=0.06)
        assert predicted == pytest.approx(1000 * sum(report.predicted[sample.name].values()), abs=0.06)
        least, most = (float(value.replace(",", "")) for value in cells[3].split(" to "))
        assert (least, most) == pytest.approx((900 * sample.step_s, 1100 * sample.step_s), abs=0.06)
        assert [cells[1], *cells[5:]] == [f"{100 * efficiency:.1f} %", f"{100 * error:+.1f} %", "1.00"]
        terms = [float(cell.replace(",", "")) for cell in found["Milliseconds of a step by term"][sample.name]]
        assert sum(terms) == pytest.approx(1000 * sample.step_s, abs=0.5)


def test_the_key_figures_are_those_of_the_study(report: Report, whole_page: str) -> None:
    found = tiles(whole_page)
    assert found["points measured"] == "8" and found["start failed, see the end of the page"] == "1"
    best = max(report.efficiency(sample) or 0 for sample in report.samples if sample.work.world_size == 2)
    assert next(value for name, value in found.items() if "at 2 processes" in name) == f"{100 * best:.0f} %"
    bandwidth = next(value for name, value in found.items() if "bandwidth" in name)
    assert bandwidth == "3.20 Gbit/s", "8 bits times the 4e8 bytes a second of the machine that made the records"
    assert next(value for name, value in found.items() if "bytes" in name) == "100.00 %", "no features were counted"


def test_nothing_is_loaded_and_no_text_of_a_study_becomes_markup(whole_page: str) -> None:
    assert "a &lt;processor&gt;" in whole_page and "<processor>" not in whole_page
    assert "no &lt;room&gt; left" in whole_page and "<room>" not in whole_page
    assert not re.findall(r"""(?:src|href)=["'](?!#)|https?://|<script|@import|url\((?!["']?#)""", whole_page)
    names = re.findall(r' id="([^"]+)"', whole_page)
    assert len(names) == len(set(names)), "two plots share a name, and one would be clipped as the other"
    assert set(re.findall(r"""(?:href="|url\()#([\w.-]+)""", whole_page)) <= set(names)


def test_every_plot_has_a_title_and_says_whether_it_was_measured(whole_page: str) -> None:
    found = figures(whole_page)
    assert len(found) == whole_page.count("<figure") == 4 + 1 + 2 + 1 + 2 + 1 + 2 * 4, "titles are unique"
    for title, figure in found.items():
        caption = plain(figure.partition("<br>")[2])
        assert f'<svg role="img" aria-label="{title}"' in figure and len(caption) > 20
    foretold = {title for title, figure in found.items() if "not measured" in figure}
    assert len(foretold) == 1 + 2 * 4 and "Efficiency over nodes" in foretold
    assert not [
        title for title in found.keys() - foretold if "nodes" in title or title.startswith("Share of the step:")
    ]


def test_terms_keep_their_names_and_shares_are_written_into_bars(report: Report, whole_page: str) -> None:
    figure = figures(whole_page)["Share of the step by term"]
    for term in ("compute", "optimizer", "gradients", "parameters", "control", "stragglers", "features (loss gather)"):
        assert term in plain(figure)
    sample = next(s for s in report.samples if s.work.world_size == 2)
    share = 100 * sample.terms_s["compute"] / sample.step_s
    assert f">{share:.0f}</text>" in figure


def test_counted_bytes_stand_beside_those_of_arithmetic(report: Report, whole_page: str) -> None:
    assert set(report.bytes) == {s.name for s in report.samples if s.work.world_size > 1}
    found = tables(whole_page)["Bytes"]
    assert set(found) == set(report.bytes)
    for name, sent in report.bytes.items():
        assert sent.expected["gradients"] == pytest.approx(sent.counted["gradients"], rel=0.01)
        assert sent.apart == 1.0, "no features were counted"
        cell = f"{1e-6 * sent.counted['gradients']:.2f} {1e-6 * sent.expected['gradients']:.2f}"
        assert found[name][1] == cell and found[name][3] == "100.000 %"


def test_several_nodes_are_told_apart_from_what_lies_beyond_them(tmp_path: Path) -> None:
    report = several_nodes(tmp_path)
    page = page_of(report, tmp_path)
    assert "16 hosts (host-00, host-01, host-02, …, host-15), 1, 2, 16 processes" in plain(page)
    assert "16 nodes were measured" in figures(page)["Efficiency over nodes"]
    assert "Only one host was measured" not in page and "Link between nodes" in page
    told = tables(page)["Images per second by nodes"]
    weak = next(curve for curve in report.curves if curve.scaling == "weak")
    assert list(told) == [f"{2**power:,}" for power in range(11)]
    number, share, _ = told["1,024"][0].split()
    assert float(number.replace(",", "")) == pytest.approx(weak.images_per_s(1024), rel=1e-3)
    assert float(share) == pytest.approx(100 * weak.efficiency(1024), abs=0.51)
    assert told["128"][1] == "", "a batch of 64 has no pair for every one of 128 processes"


def test_a_study_of_one_number_of_processes_says_that_it_shows_no_scaling(tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, processes=[2], **FEW)
    page = page_of(report, tmp_path)
    assert "says nothing on scaling" in page and not any("efficiency" in name for name in tiles(page))
    assert "Images per second" in figures(page) and "Peak memory of a rank" in figures(page)
    assert "Only one host was measured" in page


def test_every_setting_of_a_sweep_has_a_curve_of_its_own(tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, sweep={"engine.zero_stage": [1], "masking.ratio": [0.4, 0.6]})
    labels = [f"{scaling}, ZeRO 1, ratio {ratio}" for ratio in (0.4, 0.6) for scaling in ("weak", "strong")]
    assert [curve_label(curve) for curve in report.curves] == labels
    flops = [curve.shape.forward_flops_per_sample for curve in report.curves]
    assert flops[0] == flops[1] == pytest.approx(1.5 * flops[2], rel=0.01)
    page = page_of(report, tmp_path)
    assert all(label in page for label in labels)


def test_models_of_a_sweep_have_sizes_of_their_own(tmp_path: Path) -> None:
    report, points = report_of(tmp_path, sweep={"engine.zero_stage": [1], "model.vision.layers": [1, 2]})
    layers = {point.name: dict(point.settings)["model.vision.layers"] for point in points}
    sent = {layers[name]: of.expected["gradients"] for name, of in report.bytes.items()}
    assert sent[1] < sent[2]
    parameters = [sum(map(sum, curve.shape.sizes)) for curve in report.curves]
    assert len(set(parameters)) == 2 and parameters == sorted(parameters)


def test_the_mfu_is_told_where_the_peak_of_the_device_is_known(report: Report, tmp_path: Path) -> None:
    assert report.mfu is None and "MFU" not in text(report)
    on_gpus = [
        replace(sample, record={**sample.record, "device": "NVIDIA A100-SXM4-80GB"}) for sample in report.samples
    ]
    told = replace(report, samples=on_gpus)
    rates = [1e9 * sample.work.samples / sample.terms_s["compute"] for sample in on_gpus]
    assert told.mfu == pytest.approx(statistics.median(rates) / 312e12)
    assert "MFU while computing" in text(told) and "Compute, MFU" in page_of(told, tmp_path)


def test_single_processes_alone_foretell_nothing(tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, processes=[1], **FEW)
    page = page_of(report, tmp_path)
    assert "nothing is known of collectives" in page and "nothing was sent" in page
    assert not report.curves and FORETOLD not in page


def test_one_measured_point_has_none_to_hold_out(tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, processes=[1], strong=None, **FEW)
    page = page_of(report, tmp_path)
    assert tiles(page)["point measured"] == "1" and "none could be held out" in page


def test_a_study_in_which_everything_failed_has_a_page_that_says_so(tmp_path: Path) -> None:
    of = study(tmp_path)
    points = study_points(of, {})
    records = [record(of, point, status="failed", cause="broken", log="l") for point in points]
    page = page_of(build(of, points, records, []), tmp_path)
    assert "No point was measured" in page and page.count("broken") == len(points)
    assert not figures(page) and tiles(page)["points measured"] == "0"


def test_a_study_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    of = study(tmp_path)
    assert "No point was measured" in page_of(build(of, study_points(of, {}), [], []), tmp_path)


def test_labels_are_moved_apart_in_their_order_and_stay_in_the_plot() -> None:
    heights = [0.0, 0.01, 0.5, 0.5, 0.99, 1.0]
    found = spread(heights, 0.1, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert found[0] >= 0 and found[-1] <= 1 and spread([0.9, 0.2], 0.1, 1.0) == [0.9, 0.2]


def test_console_csv_and_json_hold_the_same_points(report: Report, tmp_path: Path) -> None:
    points = study_points(report.study, {})
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
    assert found["fit"]["between"]["bytes_per_s"] is None, "no link between nodes was measured"
