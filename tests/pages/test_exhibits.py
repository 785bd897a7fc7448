"""What is shown of an example, and how scores are counted."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from torch_influence.exhibits import Image, Row, Words, binned, exhibit, shortened, split

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, size=(5, 7), dtype=np.uint8)
COLOURS = GENERATOR.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (BYTES, BYTES),
        (torch.from_numpy(BYTES), BYTES),
        (BYTES[None], BYTES),
        (BYTES[..., None], BYTES),
        (COLOURS, COLOURS),
        (COLOURS.transpose(2, 0, 1), COLOURS),
        (torch.from_numpy(COLOURS.transpose(2, 0, 1) / 255.0), COLOURS),
        (torch.tensor([[0.0, 0.2], [0.6, 1.0]], requires_grad=True), [[0, 51], [153, 255]]),
        (torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), [[0, 255]]),
        (np.array([[False, True]]), [[0, 255]]),
        (np.array([[-1.0, 0.0, 3.0]]), [[0, 64, 255]]),  # standardised: from the least to the largest
        (np.array([[10, 20, 30]]), [[0, 128, 255]]),
        (np.array([[0.0, np.nan, 1.0, np.inf]]), [[0, 0, 255, 0]]),
        (np.full((1, 2), 7.0), [[128, 128]]),
        (np.full((1, 2), np.nan), [[0, 0]]),
    ],
)
def test_images(thing: Any, expected: Any) -> None:
    shown = exhibit(thing)
    assert isinstance(shown, Image)
    assert shown.pixels.dtype == np.uint8
    np.testing.assert_array_equal(shown.pixels, expected)


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        ("a text", Words("a text")),
        (torch.tensor([1.5, -2.0]), Row(["x0", "x1"], ["1.5", "-2"])),
        (torch.tensor([3, 14]), Row(["x0", "x1"], ["3", "14"])),
        ((0.123456, 2), Row(["x0", "x1"], ["0.1235", "2"])),
        ({"age": 31, "height": torch.tensor(1.25)}, Row(["age", "height"], ["31", "1.25"])),
        (torch.tensor(2.5), Words("2.5")),
        (7, Words("7")),
        (torch.zeros(2, 3, 4, 5), Words("Tensor of shape [2, 3, 4, 5]")),
        (torch.zeros(5, 3, 7), Words("Tensor of shape [5, 3, 7]")),  # no channels
        (np.array(["a", "b"]), Words("['a' 'b']")),
        (None, Words("None")),
        ([], Words("[]")),
    ],
)
def test_all_else(thing: Any, expected: Any) -> None:
    shown = exhibit(thing)
    if isinstance(expected, Row):
        expected_values = [float(value) for value in expected.values]
        assert isinstance(shown, Row)
        assert list(shown.names) == list(expected.names)
        assert [float(value) for value in shown.values] == expected_values
    else:
        assert shown == expected


def test_features_have_the_names_given() -> None:
    assert exhibit(torch.ones(2), ["a", "b"]) == Row(["a", "b"], ["1", "1"])
    with pytest.raises(ValueError, match="feature_names: expected 2, as many as numbers in a row, got 3"):
        exhibit(torch.ones(2), ["a", "b", "c"])


def test_a_long_row_says_how_much_is_left_out() -> None:
    row = Row([f"x{i}" for i in range(10)], [str(i) for i in range(10)])
    assert shortened(row, 10) == row
    assert shortened(row, 4) == Row(["x0", "x1", "x2", "…"], ["0", "1", "2", "7 more"])


@pytest.mark.parametrize(
    ("example", "thing", "label"),
    [
        ((BYTES, 3), BYTES, "3"),
        ([BYTES, torch.tensor(3)], BYTES, "3"),
        (Pair(BYTES, np.int64(3)), BYTES, "3"),
        ((BYTES, "cat"), BYTES, "cat"),
        ((BYTES, torch.tensor([0.5])), BYTES, "0.5"),
        ((BYTES, BYTES), BYTES, ""),  # a mask is no label
        ((BYTES,), BYTES, ""),
        ({"input_ids": BYTES, "text": "hello", "label": 1}, "hello", "1"),
        ({"name": 3, "pixels": BYTES, "target": "dog"}, BYTES, "dog"),
        ("text", "text", ""),
        ((1.0, 2.0), (1.0, 2.0), ""),
        ({"age": 3, "y": 1}, {"age": 3, "y": 1}, ""),
    ],
)
def test_examples_are_taken_apart(example: Any, thing: Any, label: str) -> None:
    assert split(example)[0] is thing or split(example)[0] == thing
    assert split(example)[1] == label


@pytest.mark.parametrize("count", [1, 2, 7, 41])
@pytest.mark.parametrize("kind", ["both", "positive", "negative", "tiny", "huge"])
def test_every_score_is_in_one_bin_of_its_own_sign(count: int, kind: str) -> None:
    scores = np.random.default_rng(count).standard_cauchy(500)
    scores = {"positive": abs(scores), "negative": -abs(scores), "tiny": scores * 1e-300, "huge": scores * 1e300}.get(
        kind, scores
    )
    found = binned(scores, count)
    assert found.counts.sum() == 500
    assert 0 in found.edges
    assert found.counts[found.edges[1:] > 0].sum() == found.helpful == (scores > 0).sum()
    assert found.counts[found.edges[:-1] < 0].sum() == found.harmful == (scores < 0).sum()
    assert (found.zero, found.lost) == (0, 0)
    assert len(found.counts) <= count + 1
    rounding = 1e-9 * np.abs(scores).max()
    for low, high, inside in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        surely = ((scores > low + rounding) & (scores < high - rounding)).sum()
        perhaps = ((scores >= low - rounding) & (scores <= high + rounding)).sum()
        assert surely <= inside <= perhaps


def test_zeros_and_what_is_not_finite_are_counted_apart() -> None:
    found = binned([0.0, -0.0, float("nan"), float("inf"), 1.0], 4)
    assert (found.zero, found.lost, found.helpful, found.harmful) == (2, 2, 1, 0)
    assert found.counts.sum() == 1
    for nothing in ([], [0.0, 0.0]):
        found = binned(nothing, 4)
        assert found.counts.sum() == 0
        assert found.zero == len(nothing)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        binned([1.0], 0)
    with pytest.raises(ValueError, match=r"scores: expected those of one query, \[n\], got shape \[2, 2\]"):
        binned(torch.ones(2, 2), 3)
