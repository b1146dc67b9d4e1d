"""The benchmark of the loader: a tiny run has every row, both sides see every image, bad arguments get one line."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from data.making import jpeg

import bench_loader
from bench_photographs import captions_of, images_of, write_shards
from cmpt.data.decode import DecodedBatch, Encoded
from cmpt.data.validate import examine_image

IMAGES, BATCH = 16, 8
ARGUMENTS = ["--images", str(IMAGES), "--batch-size", str(BATCH), "--rounds", "1"]


@pytest.fixture(autouse=True)
def few_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "_CAPTIONS", 40)


def test_a_tiny_run_has_every_row_and_both_sides_see_every_image(open_clip, tmp_path, monkeypatch, capsys) -> None:
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("the extra test is not installed")
    seen: list[list[bench_loader.Ids]] = []
    check = bench_loader.check_captions

    def checked(ours: list[bench_loader.Ids], theirs: list[bench_loader.Ids]) -> None:
        seen.extend((ours, theirs))
        check(ours, theirs)

    monkeypatch.setattr(bench_loader, "check_captions", checked)
    cores = os.sched_getaffinity(0)
    assert bench_loader.main([*ARGUMENTS, "--folder", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    assert os.sched_getaffinity(0) == cores

    tokenizer = bench_loader.our_tokenizer()
    everything = sorted(tuple(tokenizer.encode(caption)) for caption in captions_of(IMAGES))
    assert [sorted(side) for side in seen] == [everything, everything]

    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("| ")}
    for title in (
        "cmpt, the whole loader",
        "open_clip 3.3.0, the whole pipeline",
        "raw: simplejpeg, crop, torch's resize",
        "cmpt / open_clip",
        "cmpt / raw",
        "read and check",
        "decode",
        "crop and resize",
        "tokenize and pack",
        "order, threads and the rest",
        "cmpt's tokenizer (clip_bpe)",
        "open_clip's SimpleTokenizer",
    ):
        assert any(digit in rows[title][0] for digit in "123456789"), title
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == IMAGES
    assert all(len(rounds) == 1 and rounds[0]["processor"] > 0 for rounds in found["rounds"].values())


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([(1,), (1,)], [(1,), (1,)], "cmpt gave a caption twice"),
        ([(1,), (2,)], [(1,), (3,)], "the sides gave different captions"),
        ([(1,), (2,)], [(1,), (2,), (2,)], "the sides gave different captions"),
    ],
)
def test_a_side_that_misses_an_image_is_found(ours, theirs, message) -> None:
    with pytest.raises(AssertionError, match=message):
        bench_loader.check_captions(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--images", "100", "--batch-size", "64"], "--images must be a multiple of --batch-size 64, got 100"),
        (["--workers", "100000"], "the cores of this process, got 100000"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_loader.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert bench_loader.main([*ARGUMENTS, "--folder", str(tmp_path / "file" / "folder")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


def test_shards_are_always_the_same_and_no_two_images_alike(tmp_path) -> None:
    pytest.importorskip("skimage")
    first, second = (Path(write_shards(tmp_path / name, 3)).parent for name in ("first", "second"))
    assert (first / "00000.tar").read_bytes() == (second / "00000.tar").read_bytes()
    images = list(images_of(20))
    assert len(set(images)) == 20
    headers = [examine_image(image, 10**6) for image in images]
    assert {(header.width, header.height) for header in headers} == {(512, 384)}
    captions = captions_of(500)
    assert len(set(captions)) == 500
    assert 0.05 < np.mean([not caption.isascii() or "&" in caption for caption in captions]) < 0.35


def test_dali_gets_every_batch_once_a_round(monkeypatch, capsys) -> None:
    begun: list[list[Encoded]] = []
    under_way: list[int] = []

    class Decoder:
        def __init__(self, *_: object, in_flight: int) -> None:
            self.in_flight = in_flight

        def begin(self, encoded: Sequence[Encoded], pool: Executor) -> Callable[[], DecodedBatch]:
            begun.append(list(encoded))
            under_way.append(len(begun))
            assert len(under_way) <= self.in_flight

            def finish() -> DecodedBatch:
                under_way.pop(0)
                return DecodedBatch(torch.zeros(len(encoded), 3, 224, 224, dtype=torch.uint8), {})

            return finish

        def close(self) -> None:
            assert not under_way

    dali = ModuleType("nvidia.dali")
    dali.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "nvidia", ModuleType("nvidia"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", dali)
    monkeypatch.setattr("cmpt.data.dali.DaliDecoder", Decoder)
    monkeypatch.setattr("cmpt.data.dali.dali_installed", lambda: True)
    data = jpeg(1)
    samples = [SimpleNamespace(image=data, header=examine_image(data, 10**6)) for _ in range(12)]
    options = SimpleNamespace(batch_size=4, rounds=2, workers=1)
    rates = bench_loader.report_dali(options, samples)
    assert len(rates) == 2 and len(begun) == 3 * 3 and all(len(batch) == 4 for batch in begun)
    assert "DALI 9.9" in capsys.readouterr().out


def test_no_dali_is_told_in_one_line(monkeypatch, tmp_path, capsys) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr("cmpt.data.dali.dali_installed", lambda: False)
    assert bench_loader.main([*ARGUMENTS, "--gpu", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("--gpu needs DALI: pip install nvidia-dali-cuda130\n")
