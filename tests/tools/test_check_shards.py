"""The tool that checks shards: against what was put into them, a loader over the same shards, and a start after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from data.dirty import write_dirty_shards
from data.making import json_sample, text_sample, undecodable_jpeg, write_tar

import check_shards
import shard_contents
from cmpt.data import shards as shards_module
from cmpt.data.index import load_index
from cmpt.data.ledger import main as list_step
from cmpt.data.loader import Loader
from cmpt.data.reader import ShardReader
from cmpt.data.shards import open_shards
from cmpt.data.tokenizer import open_tokenizer
from cmpt.data.validate import Cause
from cmpt.recipe import load_recipe
from cmpt.train import build_loader

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = str(REPOSITORY / "recipes/quickstart.yaml")


@pytest.fixture
def check(tmp_path: Path):
    """Runs the tool in this process: its status, and the result if it wrote one."""

    def run(*arguments: str) -> tuple[int, Any]:
        result = tmp_path / "result.json"
        result.unlink(missing_ok=True)
        common = [f"data.cache_folder={tmp_path}/cache", "--workers", "1", "--json", str(result)]
        status = check_shards.main([*arguments, *common])
        return status, json.loads(result.read_text()) if result.exists() else None

    return run


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Cause]]:
    """A folder of dirty shards, none of its samples after another one of the same key; what is counted of it."""
    folder = tmp_path_factory.mktemp("dirty")
    return folder, write_dirty_shards(folder, good=60, rounds=2)


def sample_causes(expected: dict[str, Cause], *, decoded: bool) -> dict[str, Cause]:
    """Sample -> cause, of the samples alone; those that only the decoder refuses, or all others."""
    return {
        key.removeprefix("repeated/"): cause
        for key, cause in expected.items()
        if "/" in key and (cause == Cause.DECODE_FAILED) == decoded
    }


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def found(result: Any, kind: str = "unusable") -> dict[str, str]:
    return {f"{row['name']}/{sample['key']}": sample["cause"] for row in result["shards"] for sample in row[kind]}


def test_clean_shards_are_told_and_give_status_0(check, tmp_path, capsys) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [text_sample(10 * shard + number) for number in range(10)])
    status, result = check(str(tmp_path / "{0..1}.tar"), str(tmp_path / "[2-9].tar"))
    assert status == 0
    totals = result["totals"]
    assert (totals["shards"], totals["samples"], totals["unusable"]) == (3, 30, 0)
    assert totals["bytes"] == sum((tmp_path / f"{shard}.tar").stat().st_size for shard in range(3))
    assert totals["extensions"] == {"jpg": 30, "txt": 30}
    assert totals["sizes"]["shorter_side"] == {"min": 24, "median": 24, "max": 24, "total": 30 * 24}
    assert totals["sizes"]["longer_side"]["median"] == 32
    captions = [len(f"picture number {number}") for number in range(30)]
    assert totals["sizes"]["caption_characters"] == {
        "min": min(captions), "median": sorted(captions)[15], "max": max(captions), "total": sum(captions)
    }  # fmt: skip
    assert [row["url"] for row in result["shards"]] == [str(tmp_path / f"{shard}.tar") for shard in range(3)]
    told = capsys.readouterr().out
    assert "3 shards, 30 samples" in told and "verdict: everything can be used" in told


def test_every_fault_is_found_where_it_is(check, dirty, capsys) -> None:
    folder, expected = dirty
    status, result = check(str(folder / "dirty-{0..3}.tar"))
    assert status == 1
    assert found(result) == sample_causes(expected, decoded=False)
    assert result["causes"] == Counter(sample_causes(expected, decoded=False).values())
    assert result["causes"] == sum((Counter(row["causes"]) for row in result["shards"]), Counter())
    assert result["totals"]["shard_faults"] == {"truncated_shard": 1, "empty_shard": 1}
    faults = {row["name"]: row["fault"] and row["fault"]["cause"] for row in result["shards"]}
    assert faults == {"dirty-0.tar": None, "dirty-1.tar": None} | {
        key: cause for key, cause in expected.items() if "/" not in key
    }
    for row in result["shards"][:2]:
        with tarfile.open(row["url"]) as archive:
            names = [member.name for member in archive if not member.isdir()]
        keys = [key for key, _ in groupby(names, key=lambda name: name.partition(".")[0])]
        assert row["samples"] == len(keys)
        assert all(keys[sample["place"]] == sample["key"] for sample in row["unusable"])
        repeated = [sample for sample in row["unusable"] if sample["cause"] == "duplicate_key"]
        assert [sample["place"] for sample in repeated] == [len(keys) - 1]  # the repetition, not the first
    told = capsys.readouterr().out
    for cause, count in result["causes"].items():
        assert any(line.split()[:2] == [cause, str(count)] for line in told.splitlines())
    assert "dirty-3.tar   empty_shard" in told and "2 of 4 shards faulty" in told


def test_only_the_decoder_finds_what_only_it_refuses(check, dirty) -> None:
    folder, expected = dirty
    refused = sample_causes(expected, decoded=True)
    status, result = check(str(folder / "dirty-{0..2}.tar"), "--decode")
    assert (status, result["checks"], result["totals"]["undecodable"]) == (1, "pixels", len(refused))
    assert found(result, "undecodable") == refused
    assert found(result) == sample_causes(expected, decoded=False)


def test_an_undecodable_image_alone_is_a_fault_of_decode_only(check, tmp_path) -> None:
    write_tar(tmp_path / "s.tar", [text_sample(1), ("bad", {"jpg": undecodable_jpeg(2), "txt": b"a cat"})])
    assert check(str(tmp_path / "s.tar"))[0] == 0
    assert check(str(tmp_path / "s.tar"), "--decode")[0] == 1


def test_headers_alone_tell_of_missing_parts_and_read_no_sample(check, dirty, monkeypatch) -> None:
    folder, expected = dirty
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("a sample was read"))
    status, result = check(str(folder / "dirty-{0..3}.tar"), "--headers-only")
    assert (status, result["checks"]) == (1, "headers")
    told = (Cause.MISSING_IMAGE, Cause.MISSING_CAPTION, Cause.LINKED_MEMBER, Cause.DUPLICATE_KEY, Cause.EMPTY_IMAGE)
    known = {key: cause for key, cause in sample_causes(expected, decoded=False).items() if cause in told}
    assert found(result) == known
    assert result["totals"]["shard_faults"] == {"truncated_shard": 1, "empty_shard": 1}


def make_loader(overrides: list[str]) -> Loader:
    recipe = load_recipe(QUICKSTART, overrides).recipe
    return build_loader(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length), 0, 1)


def test_the_counts_are_those_of_an_epoch_and_the_order_follows_from_them(check, dirty, tmp_path, capsys) -> None:
    """Of every sample the loader says what the tool says, and a step is computed from the tool's result."""
    folder, expected = dirty
    overrides = [
        f"data.train=[{{urls: ['{folder}/dirty-{{0..3}}.tar']}}]", "data.heldout=[]", "data.caption_extension=txt",
        "data.streams=1", "engine.batch_size=4", "image.size=16", "model.patch_size=8",
        f"data.cache_folder={tmp_path}/cache", f"run.folder={tmp_path}/runs",
    ]  # fmt: skip
    _, result = check("--recipe", QUICKSTART, *overrides, "--decode")
    loader = make_loader(overrides)
    batches = loader.batches(loader.initial_state())
    usable = result["totals"]["samples"] - result["totals"]["unusable"]
    steps = usable // 4 + 1  # the epoch, and a little of the next one
    keys, rejected = [], set()
    for _ in range(steps):
        batch, _ = next(batches)
        keys.append(batch.keys)
        rejected |= {(rejection.key, str(rejection.cause)) for rejection in batch.rejections}
    batches.close()
    assert rejected == {*found(result).items(), *found(result, "undecodable").items()}
    counted = Counter(result["causes"]) + Counter({"decode_failed": result["totals"]["undecodable"]})
    assert Counter(cause for _, cause in rejected) == counted
    capsys.readouterr()
    for step in (1, steps // 2, steps):
        checked = ["--step", str(step), "--checked", str(tmp_path / "result.json"), "--json"]
        assert list_step([QUICKSTART, *overrides, *checked]) == 0
        assert [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()] == keys[step - 1]


def test_a_start_after_it_walks_over_no_tar(check, tmp_path, monkeypatch) -> None:
    paths = [write_tar(tmp_path / f"{shard}.tar", [text_sample(shard)]) for shard in range(2)]
    assert check(str(tmp_path / "{0..1}.tar"), "--beside", "--headers-only")[0] == 0
    monkeypatch.setattr(shards_module, "build_index", lambda *_: pytest.fail("an index was built"))
    for cache in ("cache", "another"):  # that of the tool, and one of another host, which takes those beside
        data = load_recipe(QUICKSTART, [f"data.cache_folder={tmp_path}/{cache}"]).recipe.data
        assert [shard.count for shard in open_shards(map(str, paths), data)] == [1, 1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_index_that_cannot_be_written_ends_it(workers, tmp_path, capsys) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(1)])
    Path(f"{path}{shard_contents.BESIDE}").mkdir()
    (tmp_path / "result.json").write_text("older")
    arguments = [str(path), "--beside", "--json", str(tmp_path / "result.json"), f"data.cache_folder={tmp_path}/cache"]
    assert check_shards.main([*arguments, "--workers", workers]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --beside: {path}") and told.count("\n") == 1
    assert (tmp_path / "result.json").read_text() == "older"
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(".tmp")) == []


def test_keys_of_several_shards_are_counted_and_no_fault(check, tmp_path, capsys) -> None:
    for shard, numbers in enumerate([range(0, 80), range(60, 100), range(99, 140)]):
        write_tar(tmp_path / f"{shard}.tar", [text_sample(number) for number in [*numbers, numbers[0]]])
    status, result = check(str(tmp_path / "{0..2}.tar"))
    assert result["totals"]["shared_keys"] == 20 + 1
    assert result["totals"]["shared_examples"][0] == {"key": "000060", "shards": ["0.tar", "1.tar"]}
    assert result["causes"] == {"duplicate_key": 3} and status == 1  # those within a shard are
    assert (
        "keys in more than one shard, which is no fault: 21, e.g. 000060 in 0.tar and 1.tar" in capsys.readouterr().out
    )


def test_remote_shards_are_fetched_and_those_that_cannot_be_are_named(check, tmp_path) -> None:
    path = write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(5)])
    urls = [f"pipe:cat {path}", "pipe:false"]
    status, result = check(*urls, "data.allow_pipe=true", "data.fetch_attempts=1")
    assert status == 1
    assert [row["samples"] for row in result["shards"]] == [5, 0]
    assert result["shards"][0]["fault"] is None and not result["shards"][0]["unusable"]
    assert result["shards"][1]["fault"]["cause"] == "unreachable_shard"
    (index,) = (tmp_path / "cache/index").rglob("*.npz")
    assert load_index(index).digest


def test_both_parts_of_a_recipe_are_checked_with_its_settings(check, tmp_path) -> None:
    """Held-out pairs are read with their category, as the evaluation does: a JSON that is none loses the pair."""
    write_tar(tmp_path / "train.tar", [json_sample(1, "a cat"), json_sample(2, "")])
    write_tar(tmp_path / "heldout.tar", [json_sample(3, "a dog", category="animals"), json_sample(4, None)])
    status, result = check(
        "--recipe",
        QUICKSTART,
        f"data.train=[{{urls: [{tmp_path}/train.tar]}}]",
        f"data.heldout=[{tmp_path}/heldout.tar]",
    )
    assert status == 1
    assert found(result) == {"train.tar/000002": "empty_caption", "heldout.tar/000004": "caption_wrong_type"}
    assert result["data"]["caption_field"] == "captions"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to check"),
        (["no-such.tar"], "no such file: no-such.tar\n"),
        (["s.tar", "data.caption_fild=x"], "data.caption_field"),
        (["s.tar", "data.caption_extension=html"], "data.caption_extension"),
        (["s.tar", "s.tar"], "listed twice"),
        (["s3x://bucket/s.tar"], "must be a path or one of"),
        (["pipe:cat s.tar"], "needs data.allow_pipe=true"),
        (["{0..x.tar"], "unbalanced braces"),
        (["*.zip"], "matches no file"),
        (["s.tar", "--workers", "0"], "--workers must be at least 1"),
        (["s.tar", "--workers", "many"], "--workers"),
        (["s.tar", "--decode", "--headers-only"], "not allowed with"),
        (["s.tar", "--jsn", "x"], "--jsn"),
        (["s.tar", "--json", "no/folder/x.json"], "no such folder: no/folder"),
        (["s.tar", "--json", "."], "is a folder"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["s.tar", "data.cache_folder=s.tar"], "data.cache_folder: s.tar cannot be written"),
    ],
)
def test_a_wrong_question_gets_a_line_and_status_2(arguments, told, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "s.tar", [text_sample(1)])
    if not any(argument.startswith("data.cache_folder") for argument in arguments):
        arguments = [*arguments, "data.cache_folder=cache"]
    try:
        status = check_shards.main(arguments)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    assert captured.err.startswith("error: ") and told in captured.err and captured.err.count("\n") == 1


def test_progress_is_told_in_lines_where_there_is_no_terminal(check, dirty, capsys, monkeypatch) -> None:
    monkeypatch.setattr(check_shards, "PLAIN_EVERY_S", 0.0)
    folder, _ = dirty
    check(str(folder / "dirty-{0..3}.tar"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("0 of 4 shards  ") and " samples  " in lines[0] and lines[0].endswith("unusable")


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "tools/check_shards.py"), *arguments, "--workers", "2"]
    return subprocess.Popen(
        [*command, f"data.cache_folder={tmp_path}/cache"],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_give_the_result_of_one(check, dirty, tmp_path) -> None:
    folder, _ = dirty
    process = start(tmp_path, str(folder / "dirty-{0..3}.tar"), "--json", "-")
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "verdict: " in errors
    _, expected = check(str(folder / "dirty-{0..3}.tar"))
    result = json.loads(told)
    for row in [*result["shards"], *expected["shards"]]:
        for sample in row["unusable"]:
            del sample["detail"]  # Pillow's messages have addresses of objects in them
    assert result == expected


def test_an_interrupt_ends_all_processes_at_once(tmp_path) -> None:
    """One that fetches, whose fetch ends too, and one that hangs where it opens a file."""
    os.mkfifo(tmp_path / "hangs.tar")
    urls = [f"pipe:echo $$ > {tmp_path}/began; exec sleep 300", str(tmp_path / "hangs.tar")]
    process = start(tmp_path, *urls, "data.allow_pipe=true", "--json", str(tmp_path / "result.json"))
    try:
        begun = time.monotonic()
        while not (tmp_path / "began").exists() or not (fetching := (tmp_path / "began").read_text()):
            assert time.monotonic() - begun < 60 and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and errors.endswith("stopped; no result was written\n")
    assert "Traceback" not in errors
    assert not (tmp_path / "result.json").exists()
    assert not is_alive(int(fetching))  # it is in a session of its own
