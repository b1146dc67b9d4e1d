from __future__ import annotations

import re

import pytest

import bench_retrieval


def test_both_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_retrieval.main(["--images", "50", "--texts", "150", "--dim", "16", "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^bare +[\d.]+ s .*peak 0\.\d+ GB$", said, re.MULTILINE)
    assert re.search(r"^retrieval is [\d.]+ bare products", said, re.MULTILINE)


def test_texts_are_a_multiple_of_images() -> None:
    with pytest.raises(SystemExit):
        bench_retrieval.main(["--images", "50", "--texts", "70"])
