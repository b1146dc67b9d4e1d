"""Shards in, batches out: order, reading, checking, decoding, tokenizing."""
