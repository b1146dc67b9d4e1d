"""What a run measures on its held-out pairs: retrieval, and zero-shot classification where they have categories."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cmpt.data.heldout import HeldoutSet
from cmpt.dist.process_group import gather_objects
from cmpt.evals.embed import Encoder, finite
from cmpt.evals.retrieval import retrieval_of_pairs
from cmpt.evals.zero_shot import class_embeddings, zero_shot


@dataclass(frozen=True)
class HeldoutEmbeddings:
    """N held-out pairs, in the order of the set: the same on every rank."""

    image_NE: Tensor  # fp32 unit rows on the host
    text_NE: Tensor  # of each pair's first caption
    categories: list[str | None]
    captions: list[str]
    indices_N: Tensor  # int64, place in the set


def embed_heldout(heldout: HeldoutSet, encoder: Encoder) -> HeldoutEmbeddings:
    """Every pair once, split over the ranks; every rank calls it and gets all of it."""
    rows: list[tuple[Tensor, Tensor, list[str | None], list[str], Tensor]] = []
    for batch in heldout.batches(encoder.rank, encoder.world_size, encoder.batch_size):
        image_BE, text_BE = encoder.pixels(batch.images_BCHW), encoder.captions(batch.captions)
        rows.append((image_BE, text_BE, batch.categories, batch.captions, batch.indices_B))
    gathered = [row for part in gather_objects(rows) for row in part]
    order = torch.cat([row[4] for row in gathered]).argsort()
    categories = [category for row in gathered for category in row[2]]
    captions = [caption for row in gathered for caption in row[3]]
    return HeldoutEmbeddings(
        image_NE=finite(torch.cat([row[0] for row in gathered])[order]),
        text_NE=finite(torch.cat([row[1] for row in gathered])[order]),
        categories=[categories[i] for i in order.tolist()],
        captions=[captions[i] for i in order.tolist()],
        indices_N=torch.cat([row[4] for row in gathered])[order],
    )


def evaluate_heldout(
    heldout: HeldoutSet, encoder: Encoder, prompts: list[str]
) -> tuple[dict[str, float], HeldoutEmbeddings]:
    """Results by name (recalls and accuracies as fractions) and the embeddings; every rank calls it.

    `prompts`: templates with {} for the category.
    """
    began = time.perf_counter()
    embeddings = embed_heldout(heldout, encoder)
    results = retrieval_of_pairs(embeddings.image_NE, embeddings.text_NE, encoder.rank, encoder.world_size)
    labelled = [(i, category) for i, category in enumerate(embeddings.categories) if category is not None]
    names = sorted({category for _, category in labelled})
    if len(names) > 1:
        class_CE = class_embeddings(encoder, names, [prompt.replace("{}", "{c}") for prompt in prompts])
        rows = torch.tensor([i for i, _ in labelled])
        found = zero_shot(embeddings.image_NE[rows], class_CE, [names.index(category) for _, category in labelled])
        results |= {f"zero_shot_{key}": found[key] for key in ("top1", "top5", "mean_per_class")}
        results["classes"] = found["classes"]
    results["seconds"] = time.perf_counter() - began
    return results, embeddings
