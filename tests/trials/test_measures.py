"""Losses by position and distance: against a loop over labels."""

from __future__ import annotations

import math

import torch

from llcompile.trials.batches import IGNORED, Batch
from llcompile.trials.measures import CHOOSE, JUDGE, Half, bins_of, edges, measure

TRAINED, LONGEST, VOCABULARY = 8, 20, 5


def batch(rows: int) -> Batch:
    tokens, labels = (torch.randint(VOCABULARY, (rows, LONGEST)) for _ in range(2))
    labels[torch.rand(labels.shape) < 0.5] = IGNORED
    return Batch(tokens, labels, torch.randint(0, 9, labels.shape))


def test_edges_split_at_the_training_length() -> None:
    bounds = edges(TRAINED, LONGEST)
    assert bounds == (0, 2, 4, 6, 8, 11, 14, 17, 20)
    assert bins_of(bounds, TRAINED) == {"inside": (0, 1, 2, 3), "beyond": (4, 5, 6, 7), "all": tuple(range(8))}
    assert bins_of(edges(8, 8), 8)["beyond"] == ()
    assert edges(2, 3) == (0, 1, 2, 3)  # no bin is empty


def test_sums_are_those_of_a_loop() -> None:
    batches, bounds = [batch(3), batch(2)], edges(TRAINED, LONGEST)
    logits = {id(b): torch.randn(*b.tokens.shape, VOCABULARY) for b in batches}
    halves = measure(lambda b: logits[id(b)], batches, bounds)
    for half in (CHOOSE, JUDGE):
        loss, right, count, far = [0.0] * 8, [0] * 8, [0] * 8, [0] * 4
        for b in batches:
            for row in range(half, b.tokens.shape[0], 2):
                for t in range(LONGEST):
                    label = int(b.labels[row, t])
                    if label == IGNORED:
                        continue
                    place = next(i for i in range(8) if bounds[i] <= t < bounds[i + 1])
                    scores = logits[id(b)][row, t].double()
                    loss[place] += float(scores.logsumexp(0) - scores[label])
                    right[place] += int(scores.argmax()) == label
                    count[place] += 1
                    assert b.distance is not None
                    distance = int(b.distance[row, t])
                    if distance > 0:
                        far[int(math.log2(distance))] += 1
        found = halves[half]
        torch.testing.assert_close(torch.tensor(found.position.loss), torch.tensor(loss), rtol=1e-5, atol=1e-5)
        assert found.position.right == tuple(map(float, right))
        assert found.position.count == tuple(count)
        assert found.distance.count == tuple(far)
        assert found.position.value("accuracy", [0, 1]) == sum(right[:2]) / sum(count[:2])
    assert halves[CHOOSE] != halves[JUDGE]


def test_a_half_survives_json() -> None:
    half = measure(lambda b: torch.randn(*b.tokens.shape, VOCABULARY), [batch(4)], edges(TRAINED, LONGEST))[JUDGE]
    assert Half.of(half.to_dict()) == half
    assert half.position.value("loss", []) is None
