"""The tokenizer trainer: deterministic, no text unknown, special tokens as in T5."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import sentencepiece

import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
CLIPART = REPOSITORY / "cmpt/data/clipart"
VOCAB_SIZE = 3584


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def json_bytes(record: dict[str, object]) -> bytes:
    return json.dumps(record).encode()


@pytest.fixture(scope="module")
def shipped() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(CLIPART / "tokenizer.model"))


def test_braces_expand_as_in_a_shell() -> None:
    assert train_tokenizer.expand_braces("a-{0008..0010}.tar") == ["a-0008.tar", "a-0009.tar", "a-0010.tar"]
    assert train_tokenizer.expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert train_tokenizer.expand_braces("plain.tar") == ["plain.tar"]


def test_captions_come_from_lists_texts_and_text_files(tmp_path: Path) -> None:
    members = {
        "1.json": json_bytes({"captions": ["a cat", "cat  on\na mat", " "]}),
        "1.txt": b"from the text file\n",
        "2.json": json_bytes({"captions": "a dog"}),
    }
    shard = write_tar(tmp_path / "s.tar", members)
    assert list(train_tokenizer.read_captions([shard], "captions")) == ["a cat", "cat on a mat", "a dog"]
    assert list(train_tokenizer.read_captions([shard], ".txt")) == ["from the text file"]


def test_a_missing_caption_field_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"1.json": json_bytes({"caption": "a cat"})})
    with pytest.raises(ValueError, match=r"1\.json: field 'captions' holds None"):
        list(train_tokenizer.read_captions([shard], "captions"))


def test_two_trainings_give_the_same_bytes() -> None:
    captions = list(train_tokenizer.read_captions([CLIPART / "heldout-0000.tar"], "captions"))
    first, second = (train_tokenizer.train(captions, vocab_size=600) for _ in range(2))
    assert first == second


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 4096 for 2 captions"):
        train_tokenizer.train(["a cat", "a dog"], vocab_size=4096)


def test_special_tokens_are_laid_out_as_in_t5(shipped: sentencepiece.SentencePieceProcessor) -> None:
    assert (shipped.pad_id(), shipped.eos_id(), shipped.unk_id(), shipped.bos_id()) == (0, 1, 2, -1)
    assert shipped.get_piece_size() == VOCAB_SIZE


def test_no_text_is_unknown_to_the_shipped_tokenizer(shipped: sentencepiece.SentencePieceProcessor) -> None:
    for text in ("a red apple", "Ωmega 漢字 🙂", "ſ\u0301 zażółć", "\x07"):
        ids = shipped.encode(text)
        assert shipped.unk_id() not in ids, text
    assert shipped.decode(shipped.encode("漢字 🙂")) == "漢字 🙂"


def test_case_does_not_matter(shipped: sentencepiece.SentencePieceProcessor) -> None:
    assert shipped.encode("Ice Cream Cone") == shipped.encode("ice cream cone")


def test_heldout_captions_take_few_tokens(shipped: sentencepiece.SentencePieceProcessor) -> None:
    captions = list(train_tokenizer.read_captions([CLIPART / "heldout-0000.tar"], "captions"))
    tokens = sum(len(ids) for ids in shipped.encode(captions))
    words = sum(len(caption.split()) for caption in captions)
    assert tokens / words < 2.5, "more tokens per word than a vocabulary of the corpus should need"


def test_shipped_tokenizer_is_the_one_that_the_command_makes(tmp_path: Path) -> None:
    shards = train_tokenizer.expand_braces(str(CLIPART / "train-{0000..0007}.tar"))
    captions = list(train_tokenizer.read_captions(shards, "captions"))
    made = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer.train(captions, VOCAB_SIZE))
    shipped = sentencepiece.SentencePieceProcessor(model_file=str(CLIPART / "tokenizer.model"))
    pieces = [[model.id_to_piece(number) for number in range(VOCAB_SIZE)] for model in (made, shipped)]
    assert sorted(pieces[0]) == sorted(pieces[1])
