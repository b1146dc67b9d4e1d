"""The loader as a whole, on real shards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.making import jpeg, json_sample, take, text_sample, undecodable_jpeg, write_tar

from cmpt.batch import ImageTextBatch
from cmpt.data import reader as reader_module
from cmpt.data.loader import batch_digest
from cmpt.data.streams import LoaderState
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema


def assert_same_batch(a: ImageTextBatch, b: ImageTextBatch) -> None:
    torch.testing.assert_close(a.images_BCHW, b.images_BCHW, rtol=0, atol=0)
    torch.testing.assert_close(a.text.ids_U, b.text.ids_U, rtol=0, atol=0)
    torch.testing.assert_close(a.text.order_B, b.text.order_B, rtol=0, atol=0)
    torch.testing.assert_close(a.ordinal_B, b.ordinal_B, rtol=0, atol=0)
    torch.testing.assert_close(a.valid_B, b.valid_B, rtol=0, atol=0)
    assert (a.text.lengths, a.keys, a.stream_digests) == (b.text.lengths, b.keys, b.stream_digests)
    assert a.rejections == b.rejections


def captions_of(batch: ImageTextBatch) -> list[tuple[int, ...]]:
    """Token ids per row, out of the packed order."""
    rows: list[tuple[int, ...]] = [()] * len(batch.keys)
    for row, ids in zip(batch.text.order_B.tolist(), batch.text.ids_U.split(batch.text.lengths), strict=True):
        rows[row] = tuple(ids.tolist())
    return rows


def test_batch_has_the_promised_form(make_loader, shard_pattern, tokenizer) -> None:
    loader = make_loader(shard_pattern)
    assert loader.samples_per_epoch == 30
    (first, state), (second, _) = take(loader, 2)
    assert first.images_BCHW.shape == (8, 3, 16, 16)
    assert first.images_BCHW.dtype == torch.uint8 and first.images_BCHW.is_contiguous()
    assert first.ordinal_B.tolist() == list(range(8))
    assert second.ordinal_B.tolist() == list(range(8, 16))
    assert first.valid_B.all() and first.valid_B.dtype == torch.bool
    assert len(first.stream_digests) == 4 and all(len(digest) == 16 for digest in first.stream_digests)
    assert state.step == 1 and not first.rejections
    for key, ids in zip(first.keys, captions_of(first), strict=True):
        shard, _, name = key.partition("/")
        assert shard.startswith("train-000")
        assert tokenizer.decode(list(ids)) == f"picture number {int(name)}"
        assert ids[-1] == tokenizer.eot_id


def test_every_sample_once_per_epoch(make_loader, shard_pattern, settings) -> None:
    settings.streams = 2
    batches = take(make_loader(shard_pattern, batch_size=6), 10)
    keys = [key for batch, _ in batches for key in batch.keys]
    assert sorted(keys[:30]) == sorted(keys[30:])
    assert len(set(keys[:30])) == 30
    assert keys[:30] != keys[30:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batch_does_not_depend_on_the_world_size(make_loader, shard_pattern, world_size) -> None:
    whole = take(make_loader(shard_pattern), 9)
    parts = [take(make_loader(shard_pattern, rank=rank, world_size=world_size), 9) for rank in range(world_size)]
    for step, (batch, state) in enumerate(whole):
        shares = [part[step][0] for part in parts]
        assert [key for share in shares for key in share.keys] == batch.keys
        assert [ids for share in shares for ids in captions_of(share)] == captions_of(batch)
        assert torch.equal(torch.cat([share.images_BCHW for share in shares]), batch.images_BCHW)
        assert torch.equal(torch.cat([share.ordinal_B for share in shares]), batch.ordinal_B)
        digests = [digest for share in shares for digest in share.stream_digests]
        assert batch_digest(digests) == batch_digest(batch.stream_digests)
        assert LoaderState.merge([part[step][1] for part in parts]) == state


def test_resume_after_any_step_is_bit_identical(make_loader, shard_pattern) -> None:
    whole = take(make_loader(shard_pattern), 10)
    for step in range(9):
        saved = LoaderState.from_json(whole[step][1].to_json())
        for (batch, state), (expected, expected_state) in zip(
            take(make_loader(shard_pattern), 2, saved), whole[step + 1 : step + 3], strict=False
        ):
            assert_same_batch(batch, expected)
            assert state == expected_state


def test_resume_at_another_world_size(make_loader, shard_pattern) -> None:
    whole = take(make_loader(shard_pattern), 5)
    two = [take(make_loader(shard_pattern, rank=rank, world_size=2), 2) for rank in range(2)]
    merged = LoaderState.merge([part[1][1] for part in two])
    four = [take(make_loader(shard_pattern, rank=rank, world_size=4), 3, merged) for rank in range(4)]
    for step in range(3):
        assert [key for part in four for key in part[step][0].keys] == whole[2 + step][0].keys


def test_resume_reads_nothing_that_was_already_consumed(make_loader, shard_pattern, monkeypatch) -> None:
    whole = take(make_loader(shard_pattern), 6)
    loader, read = make_loader(shard_pattern), []
    original = reader_module.ShardReader.members

    def recording(self, shard, place):
        members = original(self, shard, place)
        read.append(f"{shard.name}/{members.key}")
        return members

    monkeypatch.setattr(reader_module.ShardReader, "members", recording)
    take(loader, 1, whole[2][1])
    assert sorted(read[:8]) == sorted(whole[3][0].keys)


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 5)])
def test_contents_do_not_depend_on_threads_or_prefetch(make_loader, shard_pattern, settings, workers, prefetch) -> None:
    expected = take(make_loader(shard_pattern), 6)
    settings.workers, settings.prefetch_batches = workers, prefetch
    for (batch, state), (other, other_state) in zip(take(make_loader(shard_pattern), 6), expected, strict=True):
        assert_same_batch(batch, other)
        assert state == other_state


def test_seed_changes_order_and_crops(make_loader, shard_pattern) -> None:
    (a, _), (b, _) = take(make_loader(shard_pattern, seed=1), 1)[0], take(make_loader(shard_pattern, seed=2), 1)[0]
    assert a.keys != b.keys
    assert a.stream_digests != b.stream_digests


def test_a_phase_may_change_the_image_and_keeps_the_order(make_loader, shard_pattern) -> None:
    loader = make_loader(shard_pattern)
    batches = loader.batches(loader.initial_state(), schema.Image(size=8))
    small, _ = next(batches)
    batches.close()
    assert small.images_BCHW.shape == (8, 3, 8, 8)
    assert small.keys == take(loader, 1)[0][0].keys


def broken_samples() -> dict[str, tuple[Cause, dict[str, bytes]]]:
    good_image, good_text = jpeg(1), b"fine"
    return {
        "bad-a": (Cause.MISSING_IMAGE, {"txt": good_text}),
        "bad-b": (Cause.MISSING_CAPTION, {"jpg": good_image}),
        "bad-c": (Cause.EMPTY_IMAGE, {"jpg": b"", "txt": good_text}),
        "bad-d": (Cause.HTML_PAGE, {"jpg": b"<html>404</html>", "txt": good_text}),
        "bad-e": (Cause.TRUNCATED_IMAGE, {"jpg": good_image[: len(good_image) // 2], "txt": good_text}),
        "bad-f": (Cause.BROKEN_HEADER, {"png": b"\x89PNG\r\n\x1a\n" + bytes(40), "txt": good_text}),
        "bad-g": (Cause.CAPTION_NOT_UTF8, {"jpg": good_image, "txt": b"caf\xe9"}),
        "bad-h": (Cause.EMPTY_CAPTION, {"jpg": good_image, "txt": b" \n\t "}),
        "bad-i": (Cause.TOO_MANY_PIXELS, {"jpg": jpeg(1, 80, 80), "txt": good_text}),
    }


def test_broken_samples_are_replaced_and_counted_by_cause_and_key(make_loader, settings, tmp_path) -> None:
    settings.max_image_pixels = 80 * 80 - 1
    broken = broken_samples()
    samples = [text_sample(number) for number in range(15)] + [(key, members) for key, (_, members) in broken.items()]
    write_tar(tmp_path / "mixed.tar", samples)
    settings.streams = 2
    batches = take(make_loader(str(tmp_path / "mixed.tar"), batch_size=2), 12)
    keys = [key for batch, _ in batches for key in batch.keys]
    assert all(batch.valid_B.all() for batch, _ in batches)
    assert not any("bad" in key for key in keys)
    assert set(keys) == {f"mixed.tar/{number:06d}" for number in range(15)}
    rejected = {rejection.key: rejection.cause for batch, _ in batches for rejection in batch.rejections}
    assert rejected == {f"mixed.tar/{key}": cause for key, (cause, _) in broken.items()}


def test_one_epoch_counts_every_broken_sample_once(make_loader, settings, tmp_path) -> None:
    samples = [text_sample(number) for number in range(8)] + [(f"bad-{n}", {"jpg": b"x"}) for n in range(6)]
    write_tar(tmp_path / "mixed.tar", samples)
    settings.streams = 1
    batches = take(make_loader(str(tmp_path / "mixed.tar"), batch_size=1), 8 + 8)
    rejected = Counter(rejection.key for batch, _ in batches for rejection in batch.rejections)
    counts = Counter(key for batch, _ in batches for key in batch.keys)
    assert set(counts.values()) == {2}
    assert set(rejected) == {f"mixed.tar/bad-{n}" for n in range(6)}
    assert max(rejected.values()) <= 2


def test_resume_after_rejections_is_bit_identical(make_loader, tmp_path) -> None:
    samples = [text_sample(n) if n % 3 else (f"bad-{n}", {"jpg": b"x", "txt": b"y"}) for n in range(60)]
    write_tar(tmp_path / "mixed.tar", samples)
    whole = take(make_loader(str(tmp_path / "mixed.tar")), 8)
    for step in range(7):
        batch, _ = take(make_loader(str(tmp_path / "mixed.tar")), 1, whole[step][1])[0]
        assert_same_batch(batch, whole[step + 1][0])


def test_a_stream_that_rejects_everything_stops_with_causes_and_examples(make_loader, tmp_path) -> None:
    samples = [(f"{n:03d}", {"jpg": jpeg(n), "txt": b" "} if n % 2 else {"txt": b"no image"}) for n in range(20)]
    write_tar(tmp_path / "hopeless.tar", samples)
    loader = make_loader(str(tmp_path / "hopeless.tar"))
    with pytest.raises(
        DataError,
        match=r"data\.train\.0 \(.*hopeless\.tar\): 20 samples in a row.*empty_caption \d+.*hopeless\.tar/0",
    ):
        take(loader, 1)
    assert no_threads_left()


def test_an_undecodable_image_is_a_hole_that_keeps_its_slot(make_loader, tmp_path) -> None:
    samples = [text_sample(number) for number in range(16)]
    write_tar(tmp_path / "s.tar", samples)
    expected = take(make_loader(str(tmp_path / "s.tar")), 2)
    samples[5] = ("000005", {**samples[5][1], "jpg": undecodable_jpeg(5)})
    write_tar(tmp_path / "s.tar", samples)
    found = take(make_loader(str(tmp_path / "s.tar")), 2)
    for (batch, state), (whole, whole_state) in zip(found, expected, strict=True):
        assert (batch.keys, batch.stream_digests, state) == (whole.keys, whole.stream_digests, whole_state)
        for b, key in enumerate(batch.keys):
            assert bool(batch.valid_B[b]) == (key != "s.tar/000005")
            assert torch.equal(
                batch.images_BCHW[b], whole.images_BCHW[b] if batch.valid_B[b] else torch.zeros(3, 16, 16)
            )
    holes = [rejection for batch, _ in found for rejection in batch.rejections]
    assert [(hole.cause, hole.key) for hole in holes] == [(Cause.DECODE_FAILED, "s.tar/000005")]
    assert holes[0].detail


def test_weighted_sources_get_their_shares_each_in_its_own_order(make_loader, settings, tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [text_sample(n) for n in range(10)])
    write_tar(tmp_path / "b.tar", [text_sample(n) for n in range(50)])
    loader = make_loader(str(tmp_path / "a.tar"), str(tmp_path / "b.tar"), weights=(3.0, 1.0), batch_size=16)
    assert loader.samples_per_epoch == 60
    batches = take(loader, 40)
    keys = [key for batch, _ in batches for key in batch.keys]
    assert abs(sum(key.startswith("a.tar") for key in keys) / len(keys) - 0.75) < 0.06
    visits = Counter(key for key in keys if key.startswith("a.tar"))
    assert len(visits) == 10 and max(visits.values()) - min(visits.values()) <= settings.streams
    resumed = take(
        make_loader(str(tmp_path / "a.tar"), str(tmp_path / "b.tar"), weights=(3.0, 1.0), batch_size=16),
        1,
        batches[20][1],
    )
    assert_same_batch(resumed[0][0], batches[21][0])


def test_the_same_key_in_two_sources_has_two_digests(make_loader, settings, tmp_path) -> None:
    settings.streams = 1
    digests = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "s.tar", [text_sample(1)])
    for weights in ((1.0, 1e-9), (1e-9, 1.0)):
        loader = make_loader(str(tmp_path / "x/s.tar"), str(tmp_path / "y/s.tar"), weights=weights, batch_size=1)
        digests.append(take(loader, 1)[0][0].stream_digests)
    assert digests[0] != digests[1]


def test_a_source_smaller_than_the_number_of_streams_is_refused(make_loader, settings, tmp_path) -> None:
    settings.streams = 8
    write_tar(tmp_path / "s.tar", [text_sample(n) for n in range(8)])
    write_tar(tmp_path / "t.tar", [text_sample(n) for n in range(7)])
    with pytest.raises(DataError, match=r"data\.train\.1 \(.*t\.tar\): holds 7 samples, fewer than data\.streams = 8"):
        make_loader(str(tmp_path / "s.tar"), str(tmp_path / "t.tar"))


def test_a_list_of_captions_is_sampled_evenly_and_by_ordinal(make_loader, settings, tmp_path, tokenizer) -> None:
    settings.caption_extension, settings.caption_field = "json", "captions"
    texts = ["a red cat", "two dogs", "the first caption"]
    write_tar(tmp_path / "s.tar", [json_sample(n, texts) for n in range(20)])
    batches = take(make_loader(str(tmp_path / "s.tar"), batch_size=32), 20)
    counts = Counter(tokenizer.decode(list(ids)) for batch, _ in batches for ids in captions_of(batch))
    assert set(counts) == set(texts)
    assert min(counts.values()) > 640 / 3 * 0.8


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("cmpt")]


def test_closing_early_ends_all_threads(make_loader, shard_pattern) -> None:
    loader = make_loader(shard_pattern)
    batches = loader.batches(loader.initial_state())
    next(batches)
    assert not no_threads_left()
    batches.close()
    assert no_threads_left()


def test_an_error_of_the_consumer_ends_all_threads(make_loader, shard_pattern) -> None:
    loader = make_loader(shard_pattern)

    def consume() -> None:
        for _ in loader.batches(loader.initial_state()):
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        consume()
    assert no_threads_left()


def test_a_worker_error_reaches_the_consumer_and_ends_all_threads(make_loader, shard_pattern, monkeypatch) -> None:
    loader = make_loader(shard_pattern)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of the program, not of a sample")

    monkeypatch.setattr("cmpt.data.decoders.train_pixels", fail)
    batches = loader.batches(loader.initial_state())
    with pytest.raises(ZeroDivisionError, match="a fault of the program"):
        next(batches)
    assert no_threads_left()


@pytest.mark.parametrize("ending", ["raise RuntimeError('step failed')", "sys.exit(1)"])
def test_a_process_can_end_with_the_iterator_left_open(shard_pattern, model_path, settings, ending) -> None:
    code = f"""
import sys
from cmpt.data.loader import Loader
from cmpt.data.shards import open_shards
from cmpt.data.tokenizer import SentencepieceTokenizer
from cmpt.recipe import schema
data = schema.Data(train=[schema.Source([{shard_pattern!r}])], streams=4, cache_folder={settings.cache_folder!r})
tokenizer = SentencepieceTokenizer({str(model_path)!r}, 32)
loader = Loader(data, schema.Image(size=16), shards=[open_shards(data.train[0].urls, data)], tokenizer=tokenizer,
                context_length=32, seed=0, batch_size=8, rank=0, world_size=1)
batches = loader.batches(loader.initial_state())
next(batches)
{ending}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "Fatal" not in result.stderr


def test_wrong_sizes_and_states_are_refused(make_loader, shard_pattern, settings) -> None:
    with pytest.raises(ValueError, match="engine.batch_size must be divisible by data.streams 4, got 6"):
        make_loader(shard_pattern, batch_size=6)
    with pytest.raises(ValueError, match="data.streams must be divisible by the world size 3, got 4"):
        make_loader(shard_pattern, world_size=3)
    half = make_loader(shard_pattern, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"no streams \[2, 3\]; merge"):
        make_loader(shard_pattern).batches(half.initial_state())
    with pytest.raises(ValueError, match="data.streams is 4, the loader state has stream 7"):
        make_loader(shard_pattern).batches(LoaderState.initial(range(8), 1))
    with pytest.raises(ValueError, match="data.train has 1 sources, the loader state is of 2"):
        make_loader(shard_pattern).batches(LoaderState.initial(range(4), 2))


def test_fingerprint_tells_other_data(make_loader, shard_pattern, tmp_path) -> None:
    before = make_loader(shard_pattern).data_fingerprint
    assert make_loader(shard_pattern, seed=9).data_fingerprint == before
    write_tar(tmp_path / "train-0001.tar", [text_sample(number) for number in range(8)])
    assert make_loader(shard_pattern).data_fingerprint != before


def test_crop_and_flip_follow_the_ordinal_not_the_key(make_loader, settings, tmp_path) -> None:
    settings.streams = 1
    write_tar(tmp_path / "s.tar", [text_sample(1)])
    image = replace(schema.Image(size=16), crop_scale=(0.3, 1.0), flip=True)
    batch, _ = take(make_loader(str(tmp_path / "s.tar"), batch_size=8, image=image), 1)[0]
    views = {batch.images_BCHW[b].numpy().tobytes() for b in range(8)}
    assert len(set(batch.keys)) == 1 and len(views) == 8
    assert np.asarray(batch.images_BCHW).std() > 0
