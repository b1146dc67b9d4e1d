"""A few queries and what the model finds for them, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmpt.data.heldout import HeldoutSet
from cmpt.evals.heldout import HeldoutEmbeddings


@dataclass(frozen=True)
class QueryExamples:
    queries: list[str]
    images_NKHWC: NDArray[np.uint8]
    hits_NK: NDArray[np.bool_]
    scores_NK: NDArray[np.float64]  # cosine


def query_examples(embeddings: HeldoutEmbeddings, heldout: HeldoutSet, count: int = 10, best: int = 5) -> QueryExamples:
    """The `best` images for the captions of `count` pairs spread evenly over the set, chosen without looking."""
    total = len(embeddings.captions)
    chosen = [i * total // min(count, total) for i in range(min(count, total))]
    scores_NK, found_NK = (embeddings.text_NE[chosen] @ embeddings.image_NE.T).topk(min(best, total), dim=1)
    places = embeddings.indices_N[found_NK]
    images = [[heldout.pixels(place).transpose(1, 2, 0) for place in row] for row in places.tolist()]
    return QueryExamples(
        queries=[embeddings.captions[i] for i in chosen],
        images_NKHWC=np.array(images, dtype=np.uint8),
        hits_NK=(found_NK.numpy() == np.array(chosen)[:, None]),
        scores_NK=scores_NK.double().numpy(),
    )
