"""Exported sentencepiece tokenizers: open_clip, reading the written folder, must give cmpt's own ids, padded."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

import cmpt.data
from cmpt.data.hf_tokenizer import write_hf_tokenizer
from cmpt.data.tokenizer import SentencepieceTokenizer, clean_text
from cmpt.data.validate import DataError

pytest.importorskip("transformers")
sentencepiece_model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")

CLIPART = Path(cmpt.data.__file__).parent / "clipart"
NASTY = [
    "",
    "   ",
    "\t\n \r\n",
    "!",
    "  white   space\tand\nlines\r\n  ",
    "A Photo, of a CAT!!! (2023) -- it's they'll 'S",
    "word " * 300,
    "supercalifragilisticexpialidocious" * 20,
    "nanananananana batman cccccccccccc hahahahahahaha !!!!!!!! ........ 0000000000",
    "emoji 😀 😀😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️‍🔥 1️⃣ and flags 🇫🇷🇹🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇫",
    "日本語のキャプション 中文字幕，测试。 한국어 ㄱㅏㄴㅏ 가ㄳ ㅋㅋㅋ ㅠㅠ",
    "العربية مَرْحَبًا ﷺ لا‎ ‏ עִבְרִית हिन्दी क्षि ภาษาไทย ကျွန်",
    "combining e\u0301 E\u0301 x\u0302 X\u0302 X\u0302\u0323 q\u0307\u0323 \u0301 leading J\u030c T\u0308 Z̷̢̛a̴͝l̶g̷o̵",
    "math 𝐀 𝐀\u0301 𝗩𝗶𝗲\u0323\u0302𝘁 𝕬\u0334\u0301 Ⓐ\u0308 ™\u0323 Ⅻ\u0301 ½ x² ㎏ ㍿ ﷼ ℌ",
    "ＦＵＬＬ　ｗｉｄｔｈ！ ｶﾞｷﾞ ﾊﾟ ﾡￂ ～",
    "AT&amp;T &lt;b&gt;bold&lt;/b&gt; &amp;amp;lt; &quot;x&quot; &#39; &nbsp; &#x1F600; a < b &eacute;&#769; &",
    "mojibake schÃ¶n âœ” doesnâ€™t l’été “quoted” … –",
    "\x07bell \x1b[31mred\x1b[0m \x00 \x01\x02 \x7f \x80 \x85 \x8f\x9f \ufeff \ufffd \ufffc",
    "\x8fleading \x9f",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\u00adsoft\u00a0no-break\u3000wide\u2028line\u202eleft",
    "</s> <unk> <pad> <s> before</s>after </S> ＜/s＞ < /s> <<//ss>> </s></s>",
    " </s>  <unk> a </s> b",
    "<0x41> <0x00><0xFF> <<0x41>> <0xe9> ＜0x42＞ <0x4 0x41>",
    "▁ ▁▁ a▁b ▁a a▁ a ▁ b▁▁",
    "İstanbul ISPARTA ı ǅ ǆ straße STRAẞE ß\u0307 ſt ﬁne ﬀ ﬃ Å K Ω",
    "Ωμέγα ΐ ᾳ ῳ ͅ ´ ῍\u0335 ¨\u0323 ΙΣ Σ ς",
    "\u0301",
    "😀",
    "\ufdd0 \U0010ffff \ue000 \U000e0041",
]
RANGES = [
    *[(0x20, 0x7F)] * 4,
    *[(0xA0, 0x250), (0x250, 0x370), (0x300, 0x370), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00)],
    *[(0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2200), (0x2200, 0x2800), (0x3000, 0x3400)],
    *[(0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFE00), (0xFE00, 0xFFF0), (0x1D400, 0x1D800), (0x1F100, 0x1F700)],
    *[(0x1F900, 0x1FA00), (0xE0020, 0xE0080), (0x1, 0x20), (0x80, 0xA0)],
]

Write = Callable[..., "Pair"]


class Pair:
    """cmpt's tokenizer, and open_clip's on what was written from the same model."""

    def __init__(self, open_clip: ModuleType, model: Path, folder: Path, context_length: int) -> None:
        self.entries = write_hf_tokenizer(model, folder, context_length)
        text_cfg = {"context_length": context_length, **self.entries}
        config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text_cfg}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        self.theirs = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.ours = SentencepieceTokenizer(model, context_length)

    def check(self, texts: Sequence[str]) -> None:
        batch = self.theirs(list(texts))
        assert batch.shape == (len(texts), self.ours.context_length)
        for text, row in zip(texts, batch.tolist(), strict=True):
            assert row == self.padded(text), f"{text!r} = {ascii(text)}"

    def padded(self, text: str) -> list[int]:
        ids = self.ours.encode(text)
        return ids + [self.entries["pad_id"]] * (self.ours.context_length - len(ids))


@pytest.fixture(scope="module")
def pair(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(open_clip, CLIPART / "tokenizer.model", tmp_path_factory.mktemp("export") / "made" / "here", 256)


def read_captions() -> Iterator[str]:
    for path in sorted(CLIPART.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    yield from json.loads(file.read())["captions"]


def train(folder: Path, **settings: Any) -> Path:
    """A model of 600 pieces, of captions and of texts that make pieces span "<0", "/s>" and the like."""
    captions = [*list(read_captions())[:1500], *["see </s> or <unk> at <0x41> of É Ｂ", "<b>x</b></s>"] * 100]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **({"vocab_size": 600, "hard_vocab_limit": False} | settings),
    )
    (folder / "trained.model").write_bytes(model.getvalue())
    return folder / "trained.model"


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    characters = [chr(code) for start, end in RANGES for code in range(start, end)]
    marks = [chr(code) for code in range(0x300, 0x370)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    texts = []
    for _ in range(count // 4):
        texts.append("".join(rng.choices(characters, k=rng.randint(1, 30))))
        texts.append("".join(rng.choices("<>/s0x41▁unkpadbE &;", k=rng.randint(1, 40))))
        texts.append("".join(rng.choices("abcdens .!", k=rng.randint(1, 120))))
        texts.append("".join(rng.choice(letters) + "".join(rng.choices(marks, k=rng.randint(0, 4))) for _ in range(8)))
    return texts


def test_real_captions_get_the_same_ids(pair: Pair) -> None:
    captions = list(read_captions())
    pair.check(captions[:: len(captions) // 1000])


def test_nasty_texts_get_the_same_ids(pair: Pair) -> None:
    pair.check(NASTY)
    for text in NASTY:  # alone, as a batch must not matter
        pair.check([text])


def test_random_texts_get_the_same_ids(pair: Pair) -> None:
    pair.check(random_texts(4000, seed=1))


def test_every_character_gets_the_same_ids(pair: Pair) -> None:
    blocks = [range(0x1, 0x3400), range(0x4D00, 0x4E10), range(0x9FF0, 0xAC10), range(0xD7A0, 0xD800)]
    blocks += [range(0xF900, 0x10000), range(0x10000, 0x12000), range(0x16000, 0x17000), range(0x1B000, 0x20000)]
    characters = [chr(code) for block in blocks for code in block]
    pair.check([" a".join(characters[start : start + 16]) for start in range(0, len(characters), 16)])


@pytest.mark.parametrize("context_length", [2, 3, 5, 16, 77])
def test_long_texts_are_cut_alike(open_clip, tmp_path, context_length) -> None:
    pair = Pair(open_clip, CLIPART / "tokenizer.model", tmp_path, context_length)
    pair.check(["tree " * length for length in (0, 1, 2, 3, 4, 14, 15, 16, 17, 75, 76, 77, 78, 500)])
    pair.check(NASTY)


def test_segmentations_of_equal_score_tie_in_both(pair: Pair) -> None:
    # Without rounded scores, float32 and float64 choose differently here.
    pair.check([letter * count for letter in "abcdefghijklmnopqrstuvwxyz.!-#" for count in range(2, 60)])
    pair.check(["nanananananana batman"])


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_rule_name": "identity"},  # sentencepiece's own numbering: no pad piece, end-of-text 2
        {"normalization_rule_name": "nmt_nfkc", "pad_id": 3, "eos_id": 0, "unk_id": 2, "bos_id": 1},
        {
            "normalization_rule_name": "nfkc",
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            "vocab_size": 900,
        },
        {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False, "bos_id": -1},
        {"split_by_whitespace": False, "control_symbols": ["<b>", "[x]"], "eos_piece": "[END]", "pad_id": 5},
        {"split_by_unicode_script": False, "byte_fallback": True, "eos_id": 1, "bos_id": 2, "vocab_size": 1000},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_other_models_get_the_same_ids(open_clip, tmp_path, settings) -> None:
    pair = Pair(open_clip, train(tmp_path, **settings), tmp_path / "folder", 32)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "trained.model"))
    assert pair.entries["eos_id"] == processor.eos_id()
    assert pair.entries["pad_id"] == (processor.pad_id() if "pad_id" in settings else processor.eos_id())
    pair.check(NASTY)
    pair.check(random_texts(1500, seed=2))
    pair.check([*read_captions()][:300])


def change_model(folder: Path, change: Callable[[Any], object], **settings: Any) -> Path:
    """A trained model, changed by `change` from ModelProto in place."""
    path = train(folder, **settings)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_pieces_that_span_names_of_bytes_are_kept(open_clip, tmp_path) -> None:
    def change(model: Any) -> None:
        for piece, name in zip(list(model.pieces)[-3:], ["▁<0x4", "<0x", "=<"], strict=True):
            piece.piece, piece.score = name, -1.0

    pair = Pair(open_clip, change_model(tmp_path, change, byte_fallback=True, vocab_size=900), tmp_path / "folder", 64)
    texts = ["a <0x41>", "<0x41>", "=<0x41>", "<<0x4F>>", "<0x41><0x42>", "<0xG1>", *NASTY]
    pair.check(texts)
    assert "▁<0x4" in pair.ours._processor.encode("a <0x41>", out_type=str)


def test_the_unknown_score_counts_from_normal_pieces(open_clip, tmp_path) -> None:
    def change(model: Any) -> None:
        for piece in model.pieces:
            piece.score = -20.0 if piece.piece == "c" else piece.score
        *_, unused, long, rest = model.pieces
        unused.type, unused.score = 5, -1000.0
        long.piece, long.score = "ẑab", -20.0
        rest.piece, rest.score = "abc", -1.0

    path = change_model(tmp_path, change, normalization_rule_name="identity")
    pair = Pair(open_clip, path, tmp_path / "folder", 64)
    unused = sentencepiece.SentencePieceProcessor(model_file=str(path)).id_to_piece(pair.ours.vocab_size - 3)
    pair.check(["ẑabc", "xẑabc ẑab", unused, unused[1:] * 3, f"a{unused}b", *NASTY])
    assert pair.ours.encode("ẑabc")[-2] == pair.ours.vocab_size - 1


def test_the_entries_and_files(pair: Pair) -> None:
    assert pair.entries == {"hf_tokenizer_name": "local-dir", "pad_id": 0, "eos_id": 1, "pool_type": "eos"}
    inner = pair.theirs.tokenizer
    assert (inner.pad_token_id, inner.eos_token_id, inner.unk_token_id) == (0, 1, 2)
    assert len(inner) == pair.ours.vocab_size and inner.model_max_length == 256
    assert (Path(inner.name_or_path) / "tokenizer.model").read_bytes() == (CLIPART / "tokenizer.model").read_bytes()
    ids = pair.theirs(["A red naïve </s> 😀"])[0].tolist()
    assert inner.decode(ids, skip_special_tokens=True) == "a red naïve </s> 😀" == pair.ours.decode(pair.ours.encode(
        "A red naïve </s> 😀"))  # fmt: skip


def test_the_copied_model_changes_nothing(open_clip, tmp_path) -> None:
    pair = Pair(open_clip, CLIPART / "tokenizer.model", tmp_path / "with", 32)
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    (tmp_path / "without" / "tokenizer.model").unlink()
    without = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'without'}")
    assert type(without.tokenizer) is type(pair.theirs.tokenizer)
    assert without(NASTY).equal(pair.theirs(NASTY))


def test_a_saved_copy_gives_the_same_ids(open_clip, pair: Pair, tmp_path) -> None:
    pair.theirs.save_pretrained(tmp_path)
    shutil.copy(Path(pair.theirs.tokenizer.name_or_path) / "open_clip_config.json", tmp_path)
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(NASTY).equal(pair.theirs(NASTY))


def test_the_entries_are_keys_that_open_clip_knows(open_clip, pair: Pair) -> None:
    config = open_clip.CLIPTextCfg(**pair.entries)
    assert (config.eos_id, config.pad_id, config.pool_type) == (1, 0, "eos")


def test_text_is_cleaned_as_by_open_clip(open_clip) -> None:
    clean = open_clip.tokenizer.get_clean_fn("whitespace")
    for text in [*NASTY, *random_texts(2000, seed=4), *["a  b\tc", " a ", "a\x1fb", "A B", "&lt;", "x & y", "a\x0bb"]]:
        assert clean_text(text) == clean(text), ascii(text)


def test_what_still_differs(pair: Pair) -> None:
    """As in the docstring of cmpt/data/hf_tokenizer.py; one that no longer differs must be struck off there."""
    for text in [
        "𝐳\u0330\u0301",  # a mathematical letter, a mark that it does not take, and one that it takes
        "\U0001e068\u0308",  # a modifier letter of Unicode 15 with a mark
        "< &#65374;",  # a wide tilde
        "< q&#771;&#803;",  # marks in an order that is not canonical
    ]:
        assert pair.theirs([text])[0].tolist() != pair.padded(text), ascii(text)


def test_what_cannot_be_expressed_is_refused(tmp_path) -> None:
    (tmp_path / "rules.tsv").write_text("E9\t65\n", encoding="utf-8")
    cases: list[tuple[str, dict[str, Any], Callable[[Any], object]]] = [
        ("model_type must be UNIGRAM, got BPE", {"model_type": "bpe"}, lambda model: None),
        ("model_type must be UNIGRAM, got CHAR", {"model_type": "char"}, lambda model: None),
        (r"user_defined_symbols must be empty, got \['@@'\]", {"user_defined_symbols": ["@@"]}, lambda model: None),
        ("treat_whitespace_as_suffix must be false", {"treat_whitespace_as_suffix": True}, lambda model: None),
        ("name must be one of nfkc, .*, or identity, got 'user_defined'",
         {"normalization_rule_tsv": str(tmp_path / "rules.tsv")}, lambda model: None),
        ("escape_whitespaces must be true", {},
         lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False)),
        ("must be a place that no piece spans", {"byte_fallback": True, "vocab_size": 900},
         lambda model: [setattr(piece, "piece", name) for piece, name in
                        zip(list(model.pieces)[-5:], ["<0", "0x", "xA", "A1", "1>"], strict=True)]),
    ]  # fmt: skip
    for message, settings, change in cases:
        path = change_model(tmp_path, change, **settings)
        with pytest.raises(DataError, match=message):
            write_hf_tokenizer(path, tmp_path / "folder", 32)
        assert not (tmp_path / "folder").exists()


def test_faults_name_the_file(tmp_path, monkeypatch) -> None:
    for name, content in {"text": b"not a model", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"tokenizer.path: .*{name} is not a sentencepiece model"):
            write_hf_tokenizer(tmp_path / name, tmp_path / "folder", 32)
    with pytest.raises(DataError, match="tokenizer.path: .*none is not a sentencepiece model: .*o such file"):
        write_hf_tokenizer(tmp_path / "none", tmp_path / "folder", 32)
    with pytest.raises(DataError, match="has no eos piece"):
        write_hf_tokenizer(train(tmp_path, eos_id=-1), tmp_path / "folder", 32)
    with pytest.raises(DataError, match="model.context_length must be at least 2, got 1"):
        write_hf_tokenizer(CLIPART / "tokenizer.model", tmp_path / "folder", 1)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(DataError, match="tokenizer.kind sentencepiece needs the package protobuf"):
        write_hf_tokenizer(CLIPART / "tokenizer.model", tmp_path / "folder", 32)
