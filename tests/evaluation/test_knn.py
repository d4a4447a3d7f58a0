"""Weighted k-NN against a plain restatement, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest

from vit_jax.evaluation.knn import knn, nearest


def plain_knn(train, train_labels, test, test_labels, ks, temperature=0.07):
  """The definition, one test image and one neighbour after the other, in float64."""
  train = train / np.linalg.norm(train, axis=1, keepdims=True).astype(np.float64)
  test = test / np.linalg.norm(test, axis=1, keepdims=True).astype(np.float64)
  ks = sorted({min(k, len(train)) for k in ks})
  correct = dict.fromkeys(ks, 0)
  for row, truth in zip(test, test_labels, strict=True):
    similarity = train @ row
    nearest = np.argsort(-similarity)[: max(ks)]
    weights = np.exp(similarity[nearest] / temperature)
    weights /= weights.sum()
    for k in ks:
      votes = np.zeros(train_labels.max() + 1)
      for neighbour, weight in zip(nearest[:k], weights[:k], strict=True):
        votes[train_labels[neighbour]] += weight
      correct[k] += votes.argmax() == truth
  return {f"k{k}/top1": value / len(test_labels) for k, value in correct.items()}


def clusters(num, *, seed, classes=5, width=12, spread=1.0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, num).astype(np.int32)
  centres = np.random.default_rng(99).normal(size=(classes, width))
  return (centres[labels] + spread * rng.normal(size=(num, width))).astype(np.float32), labels


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_matches_the_plain_definition(spread):
  train, test = clusters(300, seed=0, spread=spread), clusters(80, seed=1, spread=spread)
  scores = knn(*train, *test)
  expected = plain_knn(*train, *test, ks=(10, 20, 100, 200))
  assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-9)
  assert 0.2 < scores["top1"] < 1.0  # a problem on which the choice of neighbours matters


def test_headline_is_k_10_and_not_the_best_on_test():
  scores = knn(*clusters(300, seed=2, spread=2.5), *clusters(100, seed=3, spread=2.5))
  assert scores["top1"] == scores["k10/top1"]
  assert scores["top1"] != max(scores.values())


@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(1, 1), (64, 7), (100, 80), (299, 79), (300, 1000)])
def test_chunks_change_nothing(train_chunk, test_chunk):
  train, test = clusters(300, seed=4, spread=2.0), clusters(80, seed=5, spread=2.0)
  chunked = knn(*train, *test, ks=(3, 15), train_chunk=train_chunk, test_chunk=test_chunk)
  assert chunked == knn(*train, *test, ks=(3, 15))


def test_order_of_training_images_does_not_matter():
  train, labels = clusters(200, seed=6, spread=2.0)
  test = clusters(60, seed=7, spread=2.0)
  order = np.random.default_rng(0).permutation(200)
  assert knn(train[order], labels[order], *test) == knn(train, labels, *test)


def test_lengths_of_features_do_not_matter():
  train, labels = clusters(200, seed=8, spread=2.0)
  test = clusters(60, seed=9, spread=2.0)
  scale = np.float32(2.0) ** np.random.default_rng(0).integers(-5, 6, (200, 1))  # powers of two: no rounding
  assert knn(train * scale, labels, *test) == knn(train, labels, *test)


def test_k_is_capped_by_the_training_set():
  train, test = clusters(15, seed=10), clusters(20, seed=11)
  scores = knn(*train, *test)
  assert set(scores) == {"top1", "k10/top1", "k15/top1"}
  assert scores["k15/top1"] == plain_knn(*train, *test, ks=(15,))["k15/top1"]


def test_one_training_image_answers_its_label():
  test = clusters(20, seed=12, classes=2)
  scores = knn(np.ones((1, 12), np.float32), np.array([1], np.int32), *test)
  assert scores == {"top1": test[1].mean(), "k1/top1": test[1].mean()}


def test_separable_clusters_are_perfect():
  scores = knn(*clusters(300, seed=13, spread=0.05), *clusters(100, seed=14, spread=0.05))
  assert scores["k10/top1"] == scores["k20/top1"] == 1.0


def test_noise_is_at_chance():
  rng = np.random.default_rng(15)
  features, labels = rng.normal(size=(2500, 16)).astype(np.float32), rng.integers(0, 5, 2500).astype(np.int32)
  scores = knn(features[:1500], labels[:1500], features[1500:], labels[1500:])
  assert all(abs(value - 0.2) < 0.06 for value in scores.values())  # 0.06: 4.7 standard deviations


def test_large_features_of_half_precision_origin_are_compared_in_float32():
  train, labels = clusters(100, seed=16)
  test, truth = clusters(50, seed=17)
  half = [array.astype(np.float16) for array in (train * 1000, test * 1000)]  # squares overflow float16
  expected = knn(half[0].astype(np.float32), labels, half[1].astype(np.float32), truth)
  assert knn(half[0], labels, half[1], truth) == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(ks=(0, 10)), "ks must be"),
    (dict(ks=()), "ks must be"),
    (dict(test_features=np.ones((4, 3), np.float32)), "width 12, test features 3"),
    (dict(train_features=np.ones((0, 12), np.float32), train_labels=np.ones(0, np.int32)), r"train_features \[0, 12\]"),
    (dict(test_labels=np.ones(3, np.int32)), r"test_labels \[3\]"),
  ],
)
def test_mismatches_are_named(change, message):
  arguments = dict(
    train_features=np.ones((4, 12), np.float32),
    train_labels=np.ones(4, np.int32),
    test_features=np.ones((4, 12), np.float32),
    test_labels=np.ones(4, np.int32),
  )
  with pytest.raises(ValueError, match=message):
    knn(**(arguments | change))


@pytest.mark.parametrize("train_chunk", [50, 400, 1000])
def test_of_equally_near_rows_the_earlier_ones_are_neighbours(train_chunk):
  rng = np.random.default_rng(18)
  kinds = np.eye(8, dtype=np.float32) @ np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
  train, test = kinds[rng.integers(0, 8, 1000)], kinds  # every row many times
  similarity = np.asarray(test @ train.T)
  expected = np.argsort(-np.round(similarity, 4), axis=1, kind="stable")[:, :9]
  found = nearest(train, np.arange(1000), test, 9, train_chunk=train_chunk)
  np.testing.assert_array_equal(found[0][1], expected)


def test_rows_that_fill_up_a_chunk_are_nobodys_neighbours():
  rng = np.random.default_rng(19)
  train, test = rng.normal(size=(1003, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
  test[0] = train[-1]  # the row that is repeated where there are no more
  unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (train, test)]
  ((similarity, rows),) = nearest(train, np.arange(1003), test, 5, test_chunk=20)
  np.testing.assert_array_equal(rows, np.argsort(-(unit[1] @ unit[0].T), axis=1)[:, :5])
  np.testing.assert_allclose(similarity, -np.sort(-(unit[1] @ unit[0].T), axis=1)[:, :5], atol=1e-6)
