"""What a run measures on its held-out pairs: retrieval, and zero-shot classification where they have categories."""

from __future__ import annotations

import time

import torch

from cmpt.data.heldout import HeldoutSet
from cmpt.data.tokenizer import Tokenizer
from cmpt.evals.embed import HeldoutEmbeddings, embed_heldout, embed_texts
from cmpt.evals.retrieval import retrieval
from cmpt.evals.zero_shot import class_embeddings, zero_shot
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Recipe


class HeldoutSuite:
    """Bound to one held-out set; `evaluate` may be called as often as one likes and changes nothing in the model."""

    def __init__(
        self,
        heldout: HeldoutSet,
        tokenizer: Tokenizer,
        recipe: Recipe,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        assert recipe.model.patch_size
        self.heldout = heldout
        self.tokenizer = tokenizer
        self.evaluation, self.image, self.patch_size = recipe.evaluation, recipe.image, recipe.model.patch_size
        self.rank, self.world_size, self.device = rank, world_size, device

    @torch.no_grad()
    def evaluate(self, clip: CLIP) -> tuple[dict[str, float], HeldoutEmbeddings]:
        """Results by name (recalls and accuracies as fractions) and the embeddings; every rank calls it."""
        began = time.perf_counter()
        training = clip.training
        clip.eval()
        embeddings = embed_heldout(
            clip,
            self.heldout,
            self.tokenizer,
            self.image,
            self.patch_size,
            batch_size=self.evaluation.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
        )
        results = retrieval(embeddings.image_NE, embeddings.text_NE)
        results |= self._classify(clip, embeddings)
        clip.train(training)
        results["seconds"] = time.perf_counter() - began
        return results, embeddings

    def _classify(self, clip: CLIP, embeddings: HeldoutEmbeddings) -> dict[str, float]:
        """Every rank embeds all class prompts: there are few, and under ZeRO 3 all ranks must take part."""
        labelled = [(i, c) for i, c in enumerate(embeddings.categories) if c is not None]
        names = sorted({category for _, category in labelled})
        if len(names) < 2:
            return {}
        templates = self.evaluation.prompts
        prompts = [template.format(name) for name in names for template in templates]
        prompt_CTE = embed_texts(clip, self.tokenizer, prompts, self.device).view(len(names), len(templates), -1)
        rows = torch.tensor([i for i, _ in labelled])
        labels = [names.index(category) for _, category in labelled]
        return zero_shot(embeddings.image_NE[rows], class_embeddings(prompt_CTE), labels)
