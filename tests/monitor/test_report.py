import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from cmpt.monitor.monitor import Monitor
from cmpt.monitor.pictures import mask_grid
from cmpt.monitor.plots import Curve, Plot, draw
from cmpt.monitor.report import write_report

TITLES = [
    "Results",
    "Pictures",
    "Training",
    "Evaluation curves",
    "What happened",
    "Skipped samples",
    "How it was made",
]
PLOTS = [
    "Loss",
    "Learning rate",
    "Mask ratio and threshold",
    "Samples per second",
    "Tokens per second",
    "Data wait",
    "Gradient norm",
    "Tokens per sample",
    "Logit scale",
    "Image to text",
    "Text to image",
    "Zero-shot classification",
]


class Outline(HTMLParser):
    """What a browser would load, the tags it meets, and whether they nest."""

    VOID = {"meta", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert parsed.open == []
    return parsed


def full_run(folder: Path) -> None:
    with Monitor(folder, "recipes/toy.yaml", 400, 0) as monitor:
        for step in range(10, 401, 10):
            row = {
                "step": step,
                "samples_seen": step * 64,
                "epoch": step / 100,
                "phase": "masked" if step <= 300 else "tuning <&> $x$",
                "loss": float("nan") if step == 50 else 4 * math.exp(-step / 100),
                "lr": 1e-3,
                "logit_scale": 14.3,
                "grad_norm": 1.0,
                "grad_norm_image": 0.5,
                "grad_norm_text": 0.5,
                "mask_ratio": 0.5,
                "mask_threshold": 0.6,
                "image_tokens_per_sample": 72.0,
                "text_tokens_per_sample": 9.0,
                "samples_per_s": 128.0,
                "tokens_per_s": 10_000.0,
                "flops_per_sample": 2e9,
                "mfu": 0.4,
                "data_wait_fraction": 0.01,
                "peak_memory_bytes": 2**30,
                "skipped_samples": 3,
                "step_s": 0.5,
                "batch_digest": "ab",
            }
            monitor.log(row)
            if step % 100 == 0:
                results = {f"image_to_text_r{k}": k * (500 - step) / 6000 for k in (1, 5, 10)}
                results |= {f"text_to_image_r{k}": k * step / 6000 for k in (1, 5, 10)}
                results |= {"image_to_text_median_rank": 4.5, "text_to_image_median_rank": 900 / step}
                results |= {"zero_shot_top1": 0.3, "zero_shot_top5": 0.6, "zero_shot_mean_per_class": 0.25}
                monitor.evaluation(step, {**results, "pairs": 250, "classes": 20, "chance_r10": 0.04, "seconds": 2.0})
        for cause in ("broken_image", "broken_image", "empty_caption"):
            monitor.event("skip", 5, cause=cause, key="a<b>.tar/7")
        monitor.event("model", 0, parameters=1_000_005)
        monitor.event("warning", 50, text="a copy of the checkpoint is missing")
        refused = {"cause": "the loss is nan", "action": "rewind", "back_to": 40, "batch_digest": "abc123"}
        monitor.event("refused", 51, **refused)
        monitor.event("stall", 60, rank=3, host="node<7>", place="data", seconds=21.4, stack=["File x.py in <wait>"])
        monitor.event("supervisor", 60, event="start", restart=1, hosts=["node1", "node2"])
        monitor.checkpoint(50, "step_00000050", bytes=2_000_000, write_s=0.5, stall_s=0.1)
        monitor.picture("masks", mask_grid(np.zeros((4, 32, 32, 3), np.uint8), np.ones((4, 16), bool), 8, "masks"))
        noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
        monitor.picture("queries", mask_grid(noise, np.ones((4, 16), bool), 64, "a large one"))
    (folder / "recipe.yaml").write_text("run:\n  name: <toy>\n")
    host = {"cpu": "Toy CPU", "cores": 8, "gpus": ["Toy GPU", "Toy GPU"]}
    environment = {"revision": "3f9c2d1", "host": host, "world_size": 4}
    (folder / "environment.json").write_text(json.dumps(environment))


def test_report_of_a_full_run_has_everything_and_loads_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    full_run(folder)
    path = write_report(folder)
    page = path.read_text()
    parsed = outline(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES
    assert re.findall(r"<figcaption><b>(.*?)</b><br>", page) == PLOTS
    assert parsed.tags.count("svg") == len(PLOTS) and parsed.tags.count("img") == 2
    for text in (
        "<h1>toy</h1>", "recipes/toy.yaml", "3f9c2d1", "2 x Toy GPU per node; Toy CPU, 8 cores; 4 processes",
        "1,000,005", "25,600, 4.00 epochs, 128 per second",
        "3:20 of training steps, and 0:08 of evaluation", ">Finished</span> at step 400 of 400", "broken image",
        "a&lt;b&gt;.tar/7", "&lt;toy&gt;", "tuning &lt;&amp;&gt; $x$", "at 1 of 40 logged steps",
        "a copy of the checkpoint is missing",
        "the loss is nan; batch abc123 left out, and on from the weights of step 40",
        "rank 3 on node&lt;7&gt; in &quot;data&quot;, for 21 s", "File x.py in &lt;wait&gt;",
        "start: restart 1, hosts node1, node2", "1 checkpoint of 2.0 MB, written at 4 MB/s",
    ):  # fmt: skip
        assert text in page, text
    assert path.stat().st_size < 3_000_000
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert all(address.startswith(("data:image/", "#")) for address in parsed.loads)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_results_show_last_best_and_chance(tmp_path: Path) -> None:
    full_run(tmp_path)
    page = write_report(tmp_path).read_text()
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page)
    cells = [(name, re.findall(r"<td[^>]*>(.*?)</td>", rest)) for name, rest in rows]
    assert cells[2] == ("R@10", ["16.7 %", "66.7 % <small>step 100</small>", "4.0 %"])
    assert cells[3] == ("Median rank", ["4.5", "4.5 <small>step 100</small>", "125.5"])
    assert cells[6] == ("R@10", ["66.7 %", "66.7 % <small>step 400</small>", "4.0 %"])
    assert cells[7] == ("Median rank", ["2.2", "2.2 <small>step 400</small>", "125.5"])
    assert cells[8] == ("Top-1", ["30.0 %", "30.0 % <small>step 100</small>", "5.0 %"])


def test_report_of_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    outline(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES
    for sentence in (
        "Nothing is recorded yet.",
        "This run has not been evaluated yet, or has nothing to be evaluated on.",
        "This run has written no pictures.",
        "fewer than two steps have been logged",
        "fewer than two evaluations",
        "no recipe.yaml and no environment.json",
    ):
        assert sentence in page


def test_report_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Killed in the middle of a line, most values unknown, one evaluation."""
    with Monitor(tmp_path, "toy", 100, 0) as monitor:
        for step in (10, 20, 30):
            monitor.log({"step": step, "loss": 1 / step})
        monitor.evaluation(30, {"image_to_text_r1": 0.5})
    events = (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_bytes(b"".join(events[:-1]))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 40, "lo')
    page = write_report(tmp_path).read_text()
    outline(page)
    assert ">Still running, or killed</span> at step 30 of 100" in page
    assert re.findall(r"<figcaption><b>(.*?)</b><br>", page) == ["Loss"]
    assert "Not recorded in this run: learning rate, mask ratio and threshold" in page
    assert '50.0 %</td><td class="number">50.0 % <small>step 30</small></td><td class="number">unknown' in page


def test_report_is_the_same_for_the_same_records(tmp_path: Path) -> None:
    full_run(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cmpt.monitor.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "report.html")
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: run folder: ")


def test_long_curves_are_thinned_and_gaps_stay() -> None:
    steps = range(1, 100_001)
    values = [None if 40_000 < step < 60_000 else step % 7 + 1 / step for step in steps]
    svg = draw(Plot("loss", [Curve("", steps, values)]))
    assert len(svg) < 100_000
    curves = [path for path in re.findall(r'<path d="([^"]*)"', svg) if path.count("L") > 100]
    assert curves and all(path.count("M") == 2 for path in curves)


def test_plots_take_their_colours_from_the_page() -> None:
    svg = draw(Plot("loss", [Curve("a", [1, 2], [1.0, 2.0])], level=1.5, level_label="chance"))
    assert "var(--curve-1)" in svg and "var(--ink-soft)" in svg and "var(--font)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
