"""Tokenizers: CLIP's against open_clip's own file, sentencepiece against its own library."""

from __future__ import annotations

import gzip
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
import torch

from cmpt.data.tokenizer import ClipTokenizer, clean_text, open_tokenizer, pack_captions
from cmpt.recipe import schema

TEXTS = [
    "a photo of a cat",
    "A Photo, of a CAT!!! (2023) -- it's they'll don't I'd we've",
    "  white   space\tand\nlines  ",
    "naïve café – “quoted” … ½ £5 ＦＵＬＬ ﬁne",
    "日本語のキャプション and кириллица и العربية",
    "emoji 😀👨‍👩‍👧 and flags 🇫🇷",
    "AT&amp;T &lt;b&gt;bold&lt;/b&gt; &amp;amp;lt; &quot;x&quot;",
    "mojibake schÃ¶n âœ” doesnâ€™t",
    "12345 6.789 3rd x2 __under_score__ #tag @name http://a.b/c?d=e&f=g",
    "İstanbul ǅ straße ſ K",
    "combining e\u0301 and\u00a0no-break\u200bzero\u00adsoft",
    "'s 'T 'RE x'm ''s",
    "?!?! ... --- *** $$$ \\ / |",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "",
    "!",
    "word " * 300,
    "\x07bell \x1b[31mred\x1b[0m",
]


def load_simple_tokenizer() -> ModuleType:
    """open_clip/tokenizer.py by its path: importing the package would need torchvision."""
    pytest.importorskip("ftfy")
    pytest.importorskip("regex")
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the extra open-clip is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "tokenizer.py"
    file_spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert file_spec is not None and file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    sys.modules["open_clip_tokenizer"] = module
    file_spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("context_length", [77, 16])
def test_clip_bpe_equals_open_clip(context_length) -> None:
    theirs = load_simple_tokenizer().SimpleTokenizer(context_length=context_length)
    ours = open_tokenizer(schema.Tokenizer("clip_bpe"), context_length)
    assert (ours.vocab_size, ours.eot_id) == (49408, 49407) == (theirs.vocab_size, theirs.eot_token_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids[0] == 49406 and ids[-1] == 49407 and len(ids) <= context_length
        assert ids == theirs([text])[0].tolist()[: len(ids)], text
        assert not theirs([text])[0][len(ids) :].any(), text


def test_clip_ids_word_by_word_are_those_of_the_whole_text() -> None:
    """What is all ASCII takes another way; here are texts of both kinds, with every sign next to every other."""
    load_simple_tokenizer()
    tokenizer = open_tokenizer(schema.Tokenizer("clip_bpe"), 77)
    assert isinstance(tokenizer, ClipTokenizer)
    generator = random.Random(0)
    signs = [*map(chr, range(128)), *"''''stredlvm    ABCabc123&;<>", "é", "\u212a", "—"]
    for trial in range(3000):
        text = "".join(generator.choices(signs, k=trial % 40))
        assert tokenizer.text_ids(text) == tokenizer._bpe.encode(clean_text(text).lower()).ids, repr(text)


def test_a_special_token_in_a_caption_stays_text() -> None:
    load_simple_tokenizer()
    ours = open_tokenizer(schema.Tokenizer("clip_bpe"), 77)
    ids = ours.encode("before <end_of_text> after <start_of_text>")
    assert ids.count(ours.eot_id) == 1 and ids.count(ours.eot_id - 1) == 1


def test_clip_bpe_with_a_small_merges_file(tmp_path) -> None:
    pytest.importorskip("ftfy")
    path = tmp_path / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\nc a\nca t</w>\nd o\n")
    tokenizer = open_tokenizer(schema.Tokenizer("clip_bpe", str(path)), 8)
    assert tokenizer.vocab_size == 512 + 3 + 2
    cat, do = 512 + 1, 512 + 2
    begin, end = 515, 516
    letter = {chr(code): code - ord("!") for code in range(ord("!"), ord("~") + 1)}
    assert tokenizer.encode("Cat") == [begin, cat, end]
    assert tokenizer.encode("dog") == [begin, do, letter["g"] + 256, end]
    assert tokenizer.encode("a") == [begin, letter["a"] + 256, end]
    assert tokenizer.encode("cat " * 20) == [begin, *[cat] * 6, end]
    assert tokenizer.decode(tokenizer.encode("  CAT dog é ")) == "cat dog é "


def test_sentencepiece_ends_with_eos_and_has_no_begin_token(tokenizer) -> None:
    processor: sentencepiece.SentencePieceProcessor = tokenizer._processor
    text = "picture number 12"
    assert tokenizer.encode(text) == [*processor.encode(text), processor.eos_id()]
    assert tokenizer.encode("") == [processor.eos_id()]
    assert tokenizer.vocab_size == processor.vocab_size()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_captions_are_cut_before_the_end_of_text(tokenizer) -> None:
    ids = tokenizer.encode("picture number 12 " * 50)
    assert len(ids) == tokenizer.context_length
    assert ids[-1] == tokenizer.eot_id and tokenizer.eot_id not in ids[:-1]


def test_faults_name_the_field(tmp_path, monkeypatch) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    cases = [
        (schema.Tokenizer("wordpiece"), 'tokenizer.kind must be "sentencepiece" or "clip_bpe", got \'wordpiece\''),
        (schema.Tokenizer("sentencepiece"), "tokenizer.path must name a .model file"),
        (schema.Tokenizer("sentencepiece", str(tmp_path / "no.model")), "tokenizer.path: no such file"),
        (schema.Tokenizer("sentencepiece", str(tmp_path / "x.model")), "is not a sentencepiece model"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            open_tokenizer(settings, 77)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else found(name))
    if found("ftfy") is not None:
        with pytest.raises(ValueError, match="tokenizer.path is null and open_clip_torch is not installed"):
            open_tokenizer(schema.Tokenizer("clip_bpe"), 77)


def test_captions_are_packed_longest_first_and_stable() -> None:
    captions = [[5, 1], [7, 8, 9, 1], [6, 1], [1], [2, 3, 4, 1]]
    packed = pack_captions(captions)
    assert packed.lengths == [4, 4, 2, 2, 1]
    assert packed.order_B.tolist() == [1, 4, 0, 2, 3]
    assert packed.position_U.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 0]
    assert packed.ids_U.dtype == packed.position_U.dtype == packed.order_B.dtype == torch.int64
    for row, ids in zip(packed.order_B.tolist(), packed.ids_U.split(packed.lengths), strict=True):
        assert ids.tolist() == captions[row]
