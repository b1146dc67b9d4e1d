"""Train a sentencepiece tokenizer on the captions of webdataset shards.

A unigram model that folds case and Unicode forms (nmt_nfkc_cf) and falls back to bytes, so no
text is unknown. Its special tokens are laid out as in T5 and SigLIP (pad 0, end 1, unknown 2, no
begin token), which lets it be exported as a Hugging Face T5 tokenizer. The same captions give the
same model on every run.
"""

import argparse
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2


def expand_braces(pattern: str) -> list[str]:
    """`a-{0000..0002}.tar` and `{a,b}.tar` as the shell expands them, leading zeros kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        middles = names.split(",")
    else:
        width = len(first) if first.startswith("0") else 0
        middles = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for middle in middles for text in expand_braces(head + middle + tail)]


def read_captions(shards: Iterable[str | Path], field: str) -> Iterator[str]:
    """All captions of the shards, in their order, each on one line.

    `field` is a key of each sample's `.json`, which holds a text or a list of texts, or `.txt` for
    the sample's text file. Raises ValueError for a sample without the field.
    """
    suffix = ".txt" if field == ".txt" else ".json"
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(suffix) else None
                if file is None:
                    continue
                text = file.read().decode("utf-8")
                values = text if suffix == ".txt" else json.loads(text).get(field)
                values = [values] if isinstance(values, str) else values
                if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                    raise ValueError(
                        f"{shard}: {member.name}: field {field!r} holds {values!r}, expected a text or a list of texts"
                    )
                yield from (" ".join(value.split()) for value in values if value.strip())


def train(captions: Sequence[str], vocab_size: int, character_coverage: float = 1.0) -> bytes:
    """A serialized sentencepiece model with exactly `vocab_size` pieces.

    Raises ValueError if the captions do not support that many.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            # Unigram gives several segmentations with probabilities and, on so small a corpus,
            # fewer odd fragments than BPE merges; T5 and SigLIP use it as well.
            model_type="unigram",
            vocab_size=vocab_size,
            # Captions differ in case by accident ("Ice Cream Cone"), not in meaning.
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=True,
            # Digits apart: "45" and "46" share pieces, which a small vocabulary cannot hold whole.
            split_digits=True,
            character_coverage=character_coverage,
            pad_id=PAD_ID,
            eos_id=END_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            # The order in which threads add up would change the last bits of the scores.
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size: got {vocab_size} for {len(captions)} captions: {error}") from error
    return model.getvalue()


def main() -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", nargs="+", metavar="SHARDS",
                        help="tar files; braces expand: train-{0000..0007}.tar")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.model")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="PIECES",
                        help="number of pieces, special tokens and 256 bytes included "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--caption-field", default="captions", metavar="FIELD",
                        help="key in the .json that holds the caption or a list of captions, or "
                        "'.txt' for text files (default: %(default)s)")  # fmt: skip
    parser.add_argument("--character-coverage", type=float, default=1.0, metavar="FRACTION",
                        help="share of the corpus' characters that get a piece of their own; the "
                        "others become bytes (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args()
    shards = [shard for pattern in arguments.shards for shard in expand_braces(pattern)]
    captions = list(read_captions(shards, arguments.caption_field))
    if not captions:
        raise ValueError(f"shards: no captions in {len(shards)} shards, expected some")
    model = train(captions, arguments.vocab_size, arguments.character_coverage)
    beside = arguments.out.with_name(arguments.out.name + ".new")
    beside.write_bytes(model)
    os.replace(beside, arguments.out)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lengths = sorted(len(ids) for ids in processor.encode(captions))
    print(
        f"{arguments.out}: {processor.get_piece_size()} pieces, {len(model)} bytes; "
        f"{len(captions)} captions of {sum(lengths) / len(lengths):.2f} tokens on average "
        f"(median {lengths[len(lengths) // 2]}, 99 % at most {lengths[len(lengths) * 99 // 100]}, "
        f"longest {lengths[-1]}; end token not counted)",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
