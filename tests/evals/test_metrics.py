"""What is counted as right, on matrices small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmpt.evals import retrieval as module
from cmpt.evals.composition import composition
from cmpt.evals.retrieval import match_ranks, recalls, retrieval_of_pairs
from cmpt.evals.zero_shot import mean_of_prompts, zero_shot


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_ranks_of_pairs_on_a_matrix_made_by_hand() -> None:
    # Row n: what image n scores for each text.
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.2, 0.1]])
    own = torch.arange(3)
    assert [ranks.tolist() for ranks in match_ranks(scores, torch.eye(3), own, 0, 1)] == [[0, 2, 2], [0, 0, 2]]


def test_with_several_captions_the_best_counts_and_its_siblings_do_not() -> None:
    # Texts 0 to 2 are image 0's, 3 and 4 image 1's, 5 is image 2's.
    scores = torch.tensor(
        [
            [0.1, 0.9, 0.95, 0.92, 0.0, 0.3],  # best own 0.95: nothing above
            [0.9, 0.1, 0.2, 0.3, 0.5, 0.6],  # best own 0.5: 0.9 and 0.6 above
            [0.7, 0.1, 0.8, 0.2, 0.3, 0.7],  # own 0.7: 0.8 above, and a tie
        ]
    )
    captions_of = [3, 2, 1]
    image_M = torch.tensor([0, 0, 0, 1, 1, 2])
    # By column: image 0 for texts 0 to 2, image 1 for 3 and 4, image 2 for 5.
    ranks = match_ranks(scores, torch.eye(6), image_M, 0, 1)
    assert [one.tolist() for one in ranks] == [[0, 2, 2], [2, 0, 0, 1, 0, 0]]
    found = recalls(scores, torch.eye(6), captions_of, 0, 1)
    assert found["image_to_text_r1"] == pytest.approx(1 / 3) and found["image_to_text_r5"] == 1.0
    assert found["text_to_image_r1"] == pytest.approx(4 / 6)
    assert (found["images"], found["texts"]) == (3, 6)


def test_a_tie_counts_against_the_match() -> None:
    same = F.normalize(torch.ones(4, 8), dim=1)
    results = retrieval_of_pairs(same, same, 0, 1)
    assert results["image_to_text_r1"] == 0.0
    assert results["image_to_text_median_rank"] == 4.0
    several = recalls(same, F.normalize(torch.ones(12, 8), dim=1), [3, 3, 3, 3], 0, 1)
    assert several["image_to_text_r5"] == several["text_to_image_r1"] == 0.0
    assert several["image_to_text_r10"] == several["text_to_image_r5"] == 1.0  # nine foreign captions, three images


def test_images_whose_own_captions_tie_lose_nothing() -> None:
    texts = torch.eye(2)[[0, 0, 1]]
    assert recalls(torch.eye(2), texts, [2, 1], 0, 1)["image_to_text_r1"] == 1.0


@pytest.mark.parametrize("tile", [(7, 5), (1, 1), (13, 1000)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_are_those_of_the_whole_matrix(
    tile: tuple[int, int], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any tiles and shared by any number of ranks; against the definition, in whole numbers with many ties."""
    generator = torch.Generator().manual_seed(0)
    image_M = torch.repeat_interleave(torch.arange(50) % 4 + 1)
    image = torch.randint(-2, 3, (50, 6), generator=generator).float()
    text = torch.randint(-2, 3, (len(image_M), 6), generator=generator).float()
    score = image @ text.T
    own = image_M == torch.arange(50)[:, None]
    best = score.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    expected = (
        ((score >= best) & ~own).sum(dim=1),
        ((score >= score[image_M, torch.arange(len(text))]) & ~own).sum(dim=0),
    )

    monkeypatch.setattr(module, "TILE", tile)
    shares: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        found: list[torch.Tensor] = []
        monkeypatch.setattr(module, "sum_over_ranks", lambda counts, found=found: found.append(counts) or counts)
        ranks = match_ranks(image, text, image_M, rank, world_size)
        shares.append(found)
    if world_size == 1:
        assert all(torch.equal(a, b) for a, b in zip(ranks, expected, strict=True))
    together = [sum(parts) for parts in zip(*shares, strict=True)]
    alone: list[torch.Tensor] = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda counts: alone.append(counts) or counts)
    match_ranks(image, text, image_M, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_perfect_retrieval_and_chance() -> None:
    image = unit(40, 16)
    results = retrieval_of_pairs(image, image, 0, 1)
    assert results["image_to_text_r1"] == results["text_to_image_r10"] == 1.0
    assert results["chance_r10"] == 0.25 and results["pairs"] == 40


def test_zero_shot_counts_top_1_top_5_and_the_mean_over_classes_that_have_samples() -> None:
    classes = torch.eye(7)
    images = torch.eye(7)[[0, 0, 0, 1]] + 0.01 * torch.arange(7)  # the last is called class 1, whatever its label
    results = zero_shot(images, classes, [0, 0, 0, 2])
    assert results["top1"] == 0.75 and results["top5"] == 0.75  # classes 1, 6, 5, 4, 3 come before class 2
    assert results["mean_per_class"] == 0.5
    assert results["classes"] == 7 and results["samples"] == 4
    assert zero_shot(images, classes, [0, 0, 0, 3])["top5"] == 1.0


def test_equal_classes_are_never_right() -> None:
    classes = torch.eye(3)[[0, 0, 2]]
    results = zero_shot(torch.eye(3)[[0, 0, 2]], classes, [0, 1, 2])
    assert results["top1"] == pytest.approx(1 / 3)
    assert results["top5"] == 1.0


def test_class_embedding_is_the_unit_mean_of_its_prompts() -> None:
    prompts = unit(3, 4, 8)
    made = mean_of_prompts(prompts)
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.cosine_similarity(made, prompts.sum(1)), torch.ones(3))
    assert made.shape == (3, 8)


def test_composition_is_a_mean_over_categories_and_equal_scores_are_wrong() -> None:
    image, true, false = torch.eye(2)[[0, 0, 0, 1]], torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[1, 0, 0, 0]]
    found = composition(image, true, false, ["swap_obj", "swap_obj", "add_att", "add_att"])
    assert found == {"accuracy": 0.5, "swap_obj": 0.5, "add_att": 0.5, "samples": 4}
    uneven = composition(image, true, false, ["a", "a", "a", "b"])
    assert uneven["a"] == pytest.approx(1 / 3) and uneven["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_sets_do_not_break_it(count: int) -> None:
    image = unit(count, 4)
    assert retrieval_of_pairs(image, image, 0, 1)["chance_r10"] == 1.0
    assert recalls(image, image, [1] * count, 0, 1)["image_to_text_r1"] == 1.0
    assert zero_shot(image, image, list(range(count)))["mean_per_class"] == 1.0
    assert composition(image, image, -image, ["x"] * count)["accuracy"] == 1.0
