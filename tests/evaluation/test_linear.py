"""The linear probe learns what is linear, nothing else, and never looks at the test labels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.test_knn import clusters
from vit_jax.evaluation import linear
from vit_jax.evaluation.linear import LEARNING_RATES, linear_probe

FAST = dict(num_classes=5, min_steps=200, batch_size=128)


def test_separable_classes_are_learned():
  scores = linear_probe(*clusters(400, seed=0, spread=0.3), *clusters(100, seed=1, spread=0.3), **FAST)
  assert scores["top1"] > 0.98
  assert scores["validation_top1"] > 0.95


def test_noise_stays_at_chance():
  rng = np.random.default_rng(2)
  features, labels = rng.normal(size=(2000, 16)).astype(np.float32), rng.integers(0, 5, 2000).astype(np.int32)
  scores = linear_probe(features[:1000], labels[:1000], features[1000:], labels[1000:], **FAST)
  assert abs(scores["top1"] - 0.2) < 0.06  # 4.7 standard deviations


def test_test_labels_choose_nothing():
  train, (test, labels) = clusters(300, seed=3, spread=2.0), clusters(200, seed=4, spread=2.0)
  honest = linear_probe(*train, test, labels, **FAST)
  shuffled = linear_probe(*train, test, np.random.default_rng(0).permutation(labels), **FAST)
  assert (honest["lr"], honest["validation_top1"]) == (shuffled["lr"], shuffled["validation_top1"])
  assert honest["top1"] > shuffled["top1"] + 0.2


def test_validation_images_are_not_trained_on_and_stratified():
  labels = np.repeat(np.arange(6), [1, 2, 10, 40, 100, 200]).astype(np.int32)
  fit, held_out = linear._split(labels, 0.1, np.random.default_rng(0))
  assert not set(fit) & set(held_out)
  assert sorted([*fit, *held_out]) == list(range(len(labels)))
  assert np.bincount(labels[held_out], minlength=6).tolist() == [0, 1, 1, 4, 10, 20]


def test_order_covers_every_image_once_per_pass():
  order = linear._order(10, 7, 4, np.random.default_rng(0))
  assert order.shape == (7, 4)
  assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:20]) == list(range(10))
  assert order.ravel()[:10].tolist() != order.ravel()[10:20].tolist()


def test_training_is_momentum_sgd_with_a_cosine():
  """Against NumPy: cross-entropy gradient, velocity, learning rate of the step, one head after the other."""
  rng = np.random.default_rng(5)
  features, labels = clusters(20, seed=6, classes=3)
  weights, bias = rng.normal(size=(12, 2, 3)).astype(np.float32), np.zeros((2, 3), np.float32)
  rates, order = np.array([0.5, 0.01], np.float32), linear._order(20, 9, 8, rng)
  got_weights, got_bias = linear._fit(
    (jnp.asarray(weights), jnp.asarray(bias)), jnp.asarray(features), jnp.asarray(labels), rates, order
  )
  for head, rate in enumerate(rates):
    w, b = weights[:, head].astype(np.float64), bias[head].astype(np.float64)
    velocity_w, velocity_b = np.zeros_like(w), np.zeros_like(b)
    for step, index in enumerate(order):
      logits = features[index] @ w + b
      probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
      probabilities /= probabilities.sum(axis=1, keepdims=True)
      error = (probabilities - np.eye(3)[labels[index]]) / len(index)
      velocity_w, velocity_b = 0.9 * velocity_w + features[index].T @ error, 0.9 * velocity_b + error.sum(axis=0)
      now = rate * 0.5 * (1 + np.cos(np.pi * step / len(order)))
      w, b = w - now * velocity_w, b - now * velocity_b
    np.testing.assert_allclose(got_weights[:, head], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_bias[head], b, rtol=1e-4, atol=1e-5)


def test_same_seed_same_result_other_seed_other_split():
  train, test = clusters(300, seed=7, spread=3.0), clusters(200, seed=8, spread=3.0)
  first = linear_probe(*train, *test, **FAST)
  assert linear_probe(*train, *test, **FAST) == first
  assert linear_probe(*train, *test, **FAST, seed=1) != first


def test_a_good_rate_is_found_whatever_the_scale_of_features():
  train, test = clusters(400, seed=9, spread=0.5), clusters(200, seed=10, spread=0.5)
  for scale in (0.3, 30.0):
    scores = linear_probe(train[0] * np.float32(scale), train[1], test[0] * np.float32(scale), test[1], **FAST)
    assert scores["top1"] > 0.95
    assert any(scores["lr"] == pytest.approx(rate) for rate in LEARNING_RATES)


def test_diverging_heads_are_not_chosen():
  train, test = clusters(400, seed=11, spread=0.5), clusters(200, seed=12, spread=0.5)
  scores = linear_probe(*train, *test, **FAST, learning_rates=(1e38, 1e-1))
  assert scores["lr"] == pytest.approx(1e-1)
  assert scores["top1"] > 0.95


def test_one_image_per_class_is_too_few():
  features = np.eye(5, dtype=np.float32)
  with pytest.raises(ValueError, match="5 classes has one image only"):
    linear_probe(features, np.arange(5), features, np.arange(5), **FAST)


def test_a_probe_that_diverges_at_every_rate_has_no_score():
  train, test = clusters(400, seed=11, spread=0.5), clusters(200, seed=12, spread=0.5)
  with pytest.raises(ValueError, match=r"diverged at each of its 2 learning rates, from 1e\+38 to 2e\+38"):
    linear_probe(*train, *test, **FAST, learning_rates=(1e38, 2e38))
