"""What KA is in a run, in words, and where a score is mostly chance."""

import pytest
import torch

from fomo.eval.meaning import FEW, RECALL_AT, in_words, meaning, near_chance
from fomo.eval.zero_shot import recall

PHOTOS, CAPTIONS = ("photos", "classification", 40), ("captions", "retrieval", 50)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ([PHOTOS], "KA: accuracy on photos"),
        ([CAPTIONS], "KA: recall@5 among 50 pictures on captions"),
        (
            [PHOTOS, CAPTIONS],
            "KA: accuracy on photos; recall@5 among 50 pictures on captions; the mean of 2 sets",
        ),
        (
            [("coco", "retrieval", 5000), PHOTOS, ("pets", "classification", 9)],
            "KA: accuracy on photos, pets; recall@5 among 5,000 pictures on coco; the mean of 3 sets",
        ),
        (
            [(f"set {i}", "classification", 10) for i in range(41)],
            "KA: accuracy on 41 sets; the mean of 41 sets",
        ),
    ],
)
def test_ka_is_said_in_a_line(sets, told):
    assert meaning("KA", iter(sets)) == told


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (
            [("photos", "classification", [12] * 4)],
            "accuracy on 4 classes of photos, 12 held-out pictures each",
        ),
        (
            [("shop", "classification", [1, 3, 2])],
            "accuracy on 3 classes of shop, 1 to 3 held-out pictures each",
        ),
        ([("one", "classification", [1])], "accuracy on 1 class of one, 1 held-out picture each"),
        ([("gaps", "classification", [0, 1])], "accuracy on 2 classes of gaps, 0 to 1 held-out picture each"),
        ([("coco", "retrieval", [5000])], "recall@5 among 5,000 pictures on coco"),
        (
            [("a", "classification", [2, 2]), ("b", "retrieval", [9])],
            "accuracy on a; recall@5 among 9 pictures on b; the mean of 2 sets",
        ),
    ],
)
def test_a_score_is_said_with_classes_and_pictures(sets, told):
    assert in_words(sets) == told


@pytest.mark.parametrize("pictures", [1, 2, 4, 5, 6, 12, 19, 20, 50])
def test_chance_is_told_where_few_pictures_are_compared(pictures):
    """The oracle: recall of random features, over many draws."""
    lines = near_chance([("photos", "classification", 2), ("captions", "retrieval", pictures)])
    assert bool(lines) == (pictures < FEW)
    generator = torch.Generator().manual_seed(pictures)
    draws = [torch.randn(2, pictures, 8, generator=generator) for _ in range(400)]
    found = [recall(*draw, torch.arange(pictures)).details[f"t2i@{RECALL_AT}"] for draw in draws]
    chance = 100 * min(RECALL_AT / pictures, 1)
    assert sum(found) / len(found) == pytest.approx(chance, abs=2.5)
    for line in lines:
        assert line.startswith(f"captions: {pictures} test pictures are few, ")
        assert f"by chance alone in {chance:.0f}%; recall@1 says more" in line
