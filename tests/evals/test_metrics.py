from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmpt.evals.retrieval import ranks_of_matches, retrieval
from cmpt.evals.zero_shot import class_embeddings, zero_shot


def test_ranks_on_a_matrix_made_by_hand() -> None:
    # Query n against keys: rows of this matrix are the scores.
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.2, 0.1]])
    assert ranks_of_matches(scores, torch.eye(3)).tolist() == [0, 2, 2]


def test_a_tie_counts_against_the_match() -> None:
    same = F.normalize(torch.ones(4, 8), dim=1)
    results = retrieval(same, same)
    assert results["image_to_text_r1"] == 0.0
    assert results["image_to_text_median_rank"] == 4.0


def test_blocks_do_not_change_ranks() -> None:
    image, text = (F.normalize(torch.randn(50, 8), dim=1) for _ in range(2))
    assert torch.equal(ranks_of_matches(image, text, block_rows=7), ranks_of_matches(image, text))


def test_perfect_retrieval_and_chance() -> None:
    image = F.normalize(torch.randn(40, 16), dim=1)
    results = retrieval(image, image)
    assert results["image_to_text_r1"] == results["text_to_image_r10"] == 1.0
    assert results["chance_r10"] == 0.25 and results["pairs"] == 40


def test_zero_shot_counts_top_1_top_5_and_the_mean_over_classes() -> None:
    classes = torch.eye(6)
    images = torch.eye(6)[[0, 0, 0, 1]]  # the last is called class 1, whatever its label
    results = zero_shot(images, classes, [0, 0, 0, 2])
    assert results["zero_shot_top1"] == 0.75
    assert results["zero_shot_mean_per_class"] == 0.5
    assert results["classes"] == 6


def test_class_embedding_is_the_unit_mean_of_its_prompts() -> None:
    prompts = F.normalize(torch.randn(3, 4, 8), dim=-1)
    made = class_embeddings(prompts)
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.cosine_similarity(made, prompts.sum(1)), torch.ones(3))
    assert made.shape == (3, 8)


@pytest.mark.parametrize("pairs", [1, 2])
def test_tiny_sets_do_not_break_it(pairs: int) -> None:
    image = F.normalize(torch.randn(pairs, 4), dim=1)
    assert retrieval(image, image)["chance_r10"] == 1.0
