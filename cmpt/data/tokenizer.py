"""Text to token ids: sentencepiece and CLIP's byte-pair encoding behind one interface."""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, models, pre_tokenizers

from cmpt.batch import PackedText
from cmpt.data.validate import DataError
from cmpt.recipe import RecipeError, schema
from cmpt.recipe.paths import resolve_path


class Tokenizer(ABC):
    """Captions to ids and back. Safe to share between threads."""

    context_length: int  # most ids of a caption, end-of-text included
    vocab_size: int
    eot_id: int
    begin: tuple[int, ...] = ()  # the begin token, if the kind has one

    def encode(self, text: str) -> list[int]:
        """Ids of one caption: the begin token if the kind has one, the text, end-of-text last; cut before it."""
        return self.framed(self.text_ids(text))

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text as those of a caption: begin and end-of-text around them, cut to the context length."""
        return [*self.begin, *ids][: self.context_length - 1] + [self.eot_id]

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """Ids of the text alone, uncut."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""


def open_tokenizer(settings: schema.Tokenizer, context_length: int) -> Tokenizer:
    """The tokenizer of a recipe. Raises DataError that names the field at fault."""
    if context_length < 2:
        raise DataError(f"model.context_length must be at least 2, got {context_length}")
    path = Path(resolve_path(settings.path)) if settings.path is not None else None
    if path is not None and not path.is_file():
        raise DataError(f"tokenizer.path: no such file: {path}")
    if settings.kind == "sentencepiece":
        if path is None:
            raise DataError("tokenizer.path must name a .model file with kind sentencepiece, got null")
        return SentencepieceTokenizer(path, context_length)
    if settings.kind == "clip_bpe":
        return ClipTokenizer(path if path is not None else _merges_of_open_clip(), context_length)
    raise DataError(f'tokenizer.kind must be "sentencepiece" or "clip_bpe", got {settings.kind!r}')


def with_vocabulary(recipe: schema.Recipe, tokenizer: Tokenizer) -> schema.Recipe:
    """The recipe with the size of the token embedding filled in from the tokenizer, where it is null.

    Raises RecipeError if it is given and smaller than the tokenizer's.
    """
    size = recipe.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise RecipeError([f"model.vocab_size = {size}: must be at least the tokenizer's {tokenizer.vocab_size}"])
    return replace(recipe, model=replace(recipe.model, vocab_size=size))


class SentencepieceTokenizer(Tokenizer):
    """A trained sentencepiece model; its eos piece is the end-of-text, and there is no begin token.

    Texts are cleaned as open_clip's HFTokenizer cleans them, so that an exported model sees the same ids there.
    """

    def __init__(self, path: Path, context_length: int) -> None:
        _require_ftfy("sentencepiece")
        model = read_sentencepiece(path)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.context_length = context_length
        self.vocab_size = self._processor.vocab_size()
        self.eot_id = self._processor.eos_id()
        if self.eot_id < 0:
            raise DataError(f"tokenizer.path: {path} has no eos piece, which is needed as end-of-text")

    def text_ids(self, text: str) -> list[int]:
        return self._processor.encode(clean_text(text), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([token for token in ids if not self._processor.is_control(token)])


# sentencepiece adds up scores in float32, the tokenizers of an exported model in float64. Sums of multiples of this are
# exact in both (up to 16,384), so that segmentations of equal score ("na|nan" and "nan|na") tie in both, and both take
# the same. It is far below what separates two segmentations otherwise: no clip-art caption changes.
_SCORE_STEP = 2.0**-10


def read_sentencepiece(path: Path) -> Any:
    """The ModelProto of a sentencepiece model, scores rounded to `_SCORE_STEP`. Raises DataError."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise DataError("tokenizer.kind sentencepiece needs the package protobuf: pip install protobuf") from error
    try:
        # The library's own check comes first: it also refuses what parses but is no usable model.
        serialized = sentencepiece.SentencePieceProcessor(model_file=str(path)).serialized_model_proto()
    except (RuntimeError, OSError) as error:
        raise DataError(f"tokenizer.path: {path} is not a sentencepiece model: {error}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
    for piece in model.pieces:
        piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    return model


# Words, single digits and runs of other signs, after lower-casing (openai/CLIP, simple_tokenizer.py).
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The same where all is ASCII.
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
_WORDS_REMEMBERED = 1 << 16
_CLIP_MERGES = 49152 - 256 - 2  # what CLIP uses of the 262,144 in its file
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
"""Of CLIP's own merges, a line each: those that open_clip always uses."""
_END_OF_WORD = "</w>"


class ClipTokenizer(Tokenizer):
    """CLIP's lower-cased byte-pair encoding, id for id as open_clip's SimpleTokenizer.

    One difference on purpose: a caption that spells out a special token stays ordinary text, so that it cannot
    plant an end-of-text in its middle.
    """

    def __init__(self, path: Path, context_length: int) -> None:
        _require_ftfy("clip_bpe")
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]  # the first line is a version
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer.path: {path} is not a gzipped list of merges: {error}") from error
        self.merges_sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines if line)]
        letters = _letters_of_bytes()
        pieces = [*letters, *(letter + _END_OF_WORD for letter in letters), *map("".join, merges)]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._bpe = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_END_OF_WORD, fuse_unk=False)
        )
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._ids_of_word = lru_cache(_WORDS_REMEMBERED)(lambda word: self._bpe.encode(word).ids)
        self._pieces = pieces
        self._byte_of_letter = {letter: byte for byte, letter in _bytes_to_letters().items()}
        self._specials_from = len(pieces)
        self.begin = (len(pieces),)
        self.context_length = context_length
        self.vocab_size = len(pieces) + 2
        self.eot_id = len(pieces) + 1

    def text_ids(self, text: str) -> list[int]:
        text = clean_text(text).lower()
        if not text.isascii():
            return self._bpe.encode(text).ids
        # Captions are made of few words, and to ask for each costs less than to have the library cut the text.
        return list(chain.from_iterable(map(self._ids_of_word, _ASCII_WORDS.findall(text))))

    def decode(self, ids: Sequence[int]) -> str:
        letters = "".join(self._pieces[token] for token in ids if token < self._specials_from)
        words = letters.split(_END_OF_WORD)
        return " ".join(bytes(map(self._byte_of_letter.__getitem__, word)).decode("utf-8", "replace") for word in words)


def _require_ftfy(kind: str) -> None:
    if importlib.util.find_spec("ftfy") is None:
        raise DataError(f"tokenizer.kind {kind} needs the package ftfy, as open_clip does: pip install ftfy")


def clean_text(text: str) -> str:
    """open_clip's cleaning: mojibake and fancy quotes mended, HTML entities resolved, one space between words."""
    # Plain ASCII is most captions: there ftfy changes nothing and would cost most of the time.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def _bytes_to_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in the order in which the vocabulary begins."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + nth) for nth, byte in enumerate(others)}


def _letters_of_bytes() -> list[str]:
    return list(_bytes_to_letters().values())


def _merges_of_open_clip() -> Path:
    """The merges file inside an installed open_clip_torch, without importing it."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise DataError(
        "tokenizer.path is null and open_clip_torch is not installed; with kind clip_bpe give the path of "
        "bpe_simple_vocab_16e6.txt.gz or pip install open_clip_torch"
    )


def pack_captions(captions: Sequence[list[int]]) -> PackedText:
    """Captions (as ids) one after the other, longest first; captions of equal length keep their order."""
    order = sorted(range(len(captions)), key=lambda row: -len(captions[row]))
    lengths = [len(captions[row]) for row in order]
    return PackedText(
        ids_U=torch.tensor([token for row in order for token in captions[row]], dtype=torch.int64),
        position_U=torch.tensor([place for length in lengths for place in range(length)], dtype=torch.int64),
        lengths=lengths,
        order_B=torch.tensor(order, dtype=torch.int64),
    )
