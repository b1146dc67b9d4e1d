"""Shards in, batches out: order, reading, checking, decoding, tokenizing."""

from cmpt.data.heldout import HeldoutBatch, HeldoutSet
from cmpt.data.loader import Loader, batch_digest
from cmpt.data.shards import Shard, open_shards
from cmpt.data.streams import LoaderState
from cmpt.data.tokenizer import Tokenizer, open_tokenizer, pack_captions
from cmpt.data.validate import Cause, DataError

__all__ = [
    "Cause",
    "DataError",
    "HeldoutBatch",
    "HeldoutSet",
    "Loader",
    "LoaderState",
    "Shard",
    "Tokenizer",
    "batch_digest",
    "open_shards",
    "open_tokenizer",
    "pack_captions",
]
