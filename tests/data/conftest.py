"""Fixtures over the helpers of making.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sentencepiece
from data.caching import CacheMaker, make_caches, serve
from data.flaky_server import FlakyServer
from data.making import text_sample, write_tar

from cmpt.data.loader import Loader
from cmpt.data.shards import open_shards
from cmpt.data.tokenizer import Tokenizer, open_tokenizer
from cmpt.recipe import schema

CONTEXT_LENGTH = 32


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model that spells the captions of these tests without unknown pieces."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    lines = [f"picture number {number}" for number in range(200)] + ["a red cat", "two dogs", "the first caption"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return open_tokenizer(schema.Tokenizer("sentencepiece", str(model_path)), CONTEXT_LENGTH)


@pytest.fixture
def settings(tmp_path: Path) -> schema.Data:
    return schema.Data(streams=4, workers=2, prefetch_batches=2, cache_folder=str(tmp_path / "cache"))


@pytest.fixture
def shard_pattern(tmp_path: Path) -> str:
    """Three good shards of 11, 7 and 12 samples."""
    number = 0
    for shard, count in enumerate((11, 7, 12)):
        write_tar(tmp_path / f"train-{shard:04d}.tar", [text_sample(number + nth) for nth in range(count)])
        number += count
    return str(tmp_path / "train-{0000..0002}.tar")


LoaderMaker = Callable[..., Loader]


@pytest.fixture
def make_loader(settings: schema.Data, tokenizer: Tokenizer) -> LoaderMaker:
    """A loader over text-captioned shards; keyword arguments change what is special about a test."""

    def make(
        *patterns: str,
        weights: Sequence[float] = (),
        batch_size: int = 8,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 3,
        image: schema.Image | None = None,
        text_masking: schema.TextMasking | None = None,
        decode: schema.Decode | None = None,
    ) -> Loader:
        weights = weights or (1.0,) * len(patterns)
        settings.train = [schema.Source([urls], weight) for urls, weight in zip(patterns, weights, strict=True)]
        return Loader(
            settings,
            image or schema.Image(size=16, crop_scale=(0.5, 1.0), flip=True),
            shards=[open_shards(source.urls, settings) for source in settings.train],
            tokenizer=tokenizer,
            context_length=CONTEXT_LENGTH,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            text_masking=text_masking,
            decode=decode,
        )

    return make


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    yield from serve(tmp_path / "served")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def make_cache(folder: Path) -> Iterator[CacheMaker]:
    yield from make_caches(folder)
