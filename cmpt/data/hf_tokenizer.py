"""A sentencepiece model as a Hugging Face tokenizer, so that open_clip gives an exported model the ids of its training.

The ids are equal by construction (tests/data/test_hf_tokenizer.py) because
- `SentencepieceTokenizer` cleans text as open_clip does and rounds scores so that ties break alike (see there);
- no piece that sentencepiece never takes from a text (end-of-text, unknown, padding, bytes) can be taken here;
- the model's own table of characters is applied one character at a time: left to itself, the library drops the accent
  of "X̂", as the shortest rule that fits decides about a whole cluster. What sentencepiece joins from several characters
  (a letter and its accents, Korean letters) NFKC joins beforehand.

Three differences are left, all in text that nobody writes (pinned by `test_what_still_differs`): compatibility letters
(mathematical, circled, …) with two combining marks of which the letter takes only the second; combining marks after
characters newer than the library's Unicode tables; and marks in an order, or wide tildes, that open_clip's cleaning
would have mended but for HTML entities that ftfy leaves alone (those in a text with "<").
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from cmpt.data.tokenizer import SentencepieceTokenizer, read_sentencepiece
from cmpt.data.validate import DataError

_TABLES = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")  # those that are NFKC and what acts on single characters
_SPACE = "▁"  # stands for a space in pieces
# Keeps characters apart in between: a control character, so no cluster spans it, and white space to Python, so none is
# in a cleaned text.
_APART = "\x85"


def write_hf_tokenizer(model_file: Path, folder: Path, context_length: int) -> dict[str, Any]:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model (a copy) into `folder`, made if need be.

    `context_length`: ids of a text, end-of-text included; shorter texts are padded to it, with the end-of-text where
    the model has no pad piece. Returns the entries of open_clip's `text_cfg` that belong to the files; "local-dir:"
    makes open_clip look into the folder whatever `hf_tokenizer_name` says, on the Hub it must name the repository.
    Raises DataError for a file that is no sentencepiece model, or one whose ids cannot be reproduced exactly.
    """
    if context_length < 2:
        raise DataError(f"model.context_length must be at least 2, got {context_length}")
    eos_id = SentencepieceTokenizer(model_file, context_length).eot_id
    model = read_sentencepiece(model_file)
    _check(model, model_file)
    ids = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    unknown_id, pad_id = ids.unk_id(), ids.pad_id() if ids.pad_id() >= 0 else eos_id
    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    # Texts have no raw space when the model sees them, so a piece with one is out of their reach. Bytes must keep their
    # names. The unknown character's score counts from the lowest, which in sentencepiece is that of a normal piece.
    names = [piece.piece if piece.type in (piece.NORMAL, piece.BYTE) else f" {piece.piece}" for piece in model.pieces]
    lowest = min(piece.score for piece in normal)
    scores = [piece.score if piece.type == piece.NORMAL else lowest for piece in model.pieces]
    special = {"eos_token": names[eos_id], "unk_token": names[unknown_id], "pad_token": names[pad_id]}

    byte_fallback = model.trainer_spec.byte_fallback
    backend = tokenizers.Tokenizer(
        models.Unigram(list(zip(names, scores, strict=True)), unk_id=unknown_id, byte_fallback=byte_fallback)
    )
    backend.normalizer = _normalizer(model.normalizer_spec)
    if byte_fallback:
        cut = _byte_name_cut([piece.piece for piece in normal], model_file)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", special["eos_token"]], special_tokens=[(special["eos_token"], eos_id)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(sorted(set(special.values())))
    backend.enable_truncation(context_length)
    backend.enable_padding(length=context_length, pad_id=pad_id, pad_token=special["pad_token"])

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "split_special_tokens": True,  # a text that spells one out stays text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(model_file, folder / "tokenizer.model")
    return {"hf_tokenizer_name": "local-dir", "pad_id": pad_id, "eos_id": eos_id, "pool_type": "eos"}


def _check(model: Any, path: Path) -> None:
    """Raises DataError, with field, value and constraint, for what the tokenizers library cannot express exactly."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type)
    own = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    other_table = normalizer.precompiled_charsmap and normalizer.name not in _TABLES
    faults = {
        f"trainer_spec.model_type must be UNIGRAM, got {kind}": kind != "UNIGRAM",
        f"trainer_spec.user_defined_symbols must be empty, got {own[:4]}": own,
        "trainer_spec.treat_whitespace_as_suffix must be false, got true": trainer.treat_whitespace_as_suffix,
        "normalizer_spec.escape_whitespaces must be true, got false": not normalizer.escape_whitespaces,
        f"normalizer_spec.name must be one of {', '.join(_TABLES)}, or identity, got {normalizer.name!r}": other_table,
    }
    for fault, found in faults.items():
        if found:
            raise DataError(f"tokenizer.path: {path} cannot be exported to open_clip: {fault}")


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps += [normalizers.Replace(Regex(_never_joined()), _APART), normalizers.NFKC()]
        # Never at the start of a text, which the library cannot insert before without losing count.
        every = r"(?<=.)(?=[^\x00-\x7f])|(?<=[^\x00-\x7f])(?=.)"
        steps += [normalizers.Replace(Regex(every), _APART), normalizers.Precompiled(spec.precompiled_charsmap)]
        steps += [normalizers.Replace(_APART, "")]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps += [normalizers.Prepend(_SPACE)]
    steps += [normalizers.Replace(" ", _SPACE)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(f"{_SPACE}+$"), "")]  # sentencepiece removes a literal one as well
    return normalizers.Sequence(steps)


def _never_joined() -> str:
    """A pattern for the places where NFKC would join or reorder characters and sentencepiece's tables do not."""
    canonical, compatible = normalizers.NFD().normalize_str, normalizers.NFKD().normalize_str
    characters = [chr(code) for code in (*range(0xA0, 0xD800), *range(0xE000, 0x30000))]
    # What stands for several characters ("ﬁ", "™", "¨" for space and dots): its last does not join with what follows.
    several = "".join(
        character
        for character in characters
        if compatible(character)[0] == " " or (canonical(character) == character and len(compatible(character)) > 1)
    )
    # Marks that join with no letter: what follows them must not join with the letter either.
    joining = "".join(sorted({mark for character in characters for mark in canonical(character)[1:]}))
    korean = "\u3131-\u318e\uffa0-\uffdc"  # compatibility letters, which sentencepiece never adds to a whole syllable
    return (
        f"(?<=[{several}])(?=[\\p{{M}}\u1161-\u11ff\uff9e\uff9f{korean}])|(?<=[\uac00-\ud7a3])(?=[{korean}])"
        f"|(?<=[\\p{{M}}&&[^{joining}]])(?=\\p{{M}})"
    )


def _byte_name_cut(pieces: list[str], path: Path) -> str:
    """A pattern that cuts a byte's name where a text spells it out ("<0x41>"), in a place that no piece spans."""
    parts = ["<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">"]
    for place in range(1, len(parts)):
        if not any(re.search(parts[place - 1] + parts[place], piece) for piece in pieces):
            before = f"(?<={''.join(parts[: place - 1])})" if place > 1 else ""
            return f"{before}{parts[place - 1]}(?={''.join(parts[place:])})"
    raise DataError(
        f"tokenizer.path: {path} cannot be exported to open_clip: in the names of bytes, such as <0x41>, there must be "
        "a place that no piece spans, but its pieces span all"
    )
