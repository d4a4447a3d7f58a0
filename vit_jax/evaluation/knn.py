"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; the protocol of DINO to DINOv3).

Features are L2-normalised, similarity is their dot product, the neighbours of a test image vote for their label with
the softmax of similarity / temperature over the max(k) nearest. All in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.evaluation.features import check_labelled

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TRAIN_CHUNK, TEST_CHUNK = 65536, 128  # their similarities take 32 MiB


def knn(
  train_features: Float[np.ndarray, "N D"],
  train_labels: Int[np.ndarray, " N"],
  test_features: Float[np.ndarray, "M D"],
  test_labels: Int[np.ndarray, " M"],
  *,
  ks: Sequence[int] = KS,
  temperature: float = TEMPERATURE,
  train_chunk: int = TRAIN_CHUNK,
  test_chunk: int = TEST_CHUNK,
) -> dict[str, float]:
  """Top-1 accuracy of the weighted k-NN classifier, for several k.

  Works on any features: also on pixels and histograms. Memory on the device: the test features, one chunk of the
  training features and a [test_chunk, train_chunk] block of similarities.

  Args:
    train_features: features of the images that vote.
    train_labels: their labels, >= 0.
    test_features: features of the images to classify.
    test_labels: their labels.
    ks: numbers of neighbours; those above N become N.
    temperature: of the softmax that weighs votes.
    train_chunk: training rows compared at a time (at least max(k)). The result does not depend on it.
    test_chunk: test rows classified at a time. The result does not depend on it.

  Returns:
    "k<k>/top1" for every (capped) k, and "top1": that of the smallest k (10), fixed beforehand, because the best of
    several would be a choice made on the test labels.

  Raises:
    ValueError: if shapes or types do not agree, a set is empty, or a k is below 1.
  """
  check_labelled("k-NN", train_features, train_labels, test_features, test_labels)
  if not ks or min(ks) < 1:
    raise ValueError(f"ks must be numbers of neighbours >= 1, got {tuple(ks)}.")
  ks = tuple(sorted({min(k, len(train_features)) for k in ks}))
  neighbours = nearest(
    train_features, train_labels, test_features, ks[-1], train_chunk=train_chunk, test_chunk=test_chunk
  )
  correct = np.zeros(len(ks), np.int64)
  for start, (similarity, labels) in zip(range(0, len(test_labels), test_chunk), neighbours, strict=True):
    truth = test_labels[start : start + test_chunk]
    predicted = np.asarray(_vote(similarity, labels, ks, temperature))  # [ks, chunk]
    correct += (predicted[:, : len(truth)] == truth).sum(axis=1)
  accuracy = dict(zip(ks, (correct / len(test_labels)).tolist(), strict=True))
  return {"top1": accuracy[ks[0]]} | {f"k{k}/top1": value for k, value in accuracy.items()}


def nearest(
  train_features: Float[np.ndarray, "N D"],
  train_labels: Int[np.ndarray, " N"],
  test_features: Float[np.ndarray, "M D"],
  k: int,
  *,
  train_chunk: int = TRAIN_CHUNK,
  test_chunk: int = TEST_CHUNK,
) -> list[tuple[Array, Array]]:
  """Similarities and labels, both [test_chunk, k], of the k nearest training rows, nearest first, per test chunk."""
  train_chunk = min(max(train_chunk, k), len(train_features))
  train_chunk += -train_chunk % 16  # padded so that it divides into groups
  test_chunk = min(test_chunk, len(test_features))
  queries = [
    _normalize(_padded(test_features[start : start + test_chunk], test_chunk))  # [test_chunk, D]
    for start in range(0, len(test_features), test_chunk)
  ]
  nothing = (jnp.full((test_chunk, k), -jnp.inf), jnp.full((test_chunk, k), -1, jnp.int32))
  best = [nothing] * len(queries)
  for start in range(0, len(train_features), train_chunk):
    rows = train_features[start : start + train_chunk]
    keys = _normalize(_padded(rows, train_chunk))  # [train_chunk, D]
    labels = jnp.asarray(_padded(train_labels[start : start + train_chunk], train_chunk), jnp.int32)
    best = [_merge(pair, query, keys, labels, len(rows)) for pair, query in zip(best, queries, strict=True)]
  return best


@jax.jit
def _merge(best: tuple[Array, Array], query: Array, keys: Array, labels: Array, num_valid: int) -> tuple[Array, Array]:
  """The best k of the k so far and of one chunk; the earlier training row wins a tie, whatever the chunks."""
  best_similarity, best_labels = best  # [Q, k] each
  k = best_labels.shape[1]
  similarity = jnp.matmul(query, keys.T, precision=jax.lax.Precision.HIGHEST)  # [Q, chunk]
  similarity, rows = _candidates(similarity, k, num_valid)  # [Q, c] each
  similarity, index = jax.lax.top_k(jnp.concatenate([best_similarity, similarity], axis=1), k)  # [Q, k]
  old = jnp.take_along_axis(best_labels, jnp.minimum(index, k - 1), axis=1)  # [Q, k]
  new = jnp.take_along_axis(rows, jnp.maximum(index - k, 0), axis=1)  # [Q, k]
  return similarity, jnp.where(index < k, old, labels[new])


def _candidates(
  similarity: Float[Array, "Q n"], k: int, num_valid: int | Array
) -> tuple[Float[Array, "Q c"], Int[Array, "Q c"]]:
  """Some of the n columns in their order, and which they are; the k largest are among them, of equal ones the first.

  They are those of the k groups of neighbouring columns with the largest maxima: each of these has a column that is
  larger than any of another group, or as large and earlier. Two searches of about sqrt(n k) values instead of one of n.
  The columns from `num_valid` on are padding that repeats the last one: -inf in what is found.
  """
  num = similarity.shape[1]
  size = _group_size(num, k)
  groups = similarity.reshape(len(similarity), num // size, size)  # [Q, g, size]
  # Whole groups are masked, and what is found: a mask over all columns would take as long as the searches.
  largest = jnp.where(jnp.arange(0, num, size) < num_valid, jnp.max(groups, axis=2), -jnp.inf)  # [Q, g]
  chosen = jnp.sort(jax.lax.top_k(largest, k)[1], axis=1)[:, :, None]  # [Q, k, 1]
  rows = (chosen * size + jnp.arange(size)).reshape(len(similarity), k * size)
  found = jnp.take_along_axis(groups, chosen, axis=1).reshape(rows.shape)
  return jnp.where(rows < num_valid, found, -jnp.inf), rows


def _group_size(num: int, k: int) -> int:
  """Columns of a group: a power of two, as close to sqrt(num / k) as divides num."""
  return math.gcd(num, 1 << max(num // k, 1).bit_length() // 2)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _vote(similarity: Array, labels: Array, ks: tuple[int, ...], temperature: float) -> Array:
  """The class with the largest sum of weights among the first k neighbours, for each k: [ks, Q].

  Every neighbour collects the weights of those that share its label, so that memory does not grow with the number of
  classes. Of two classes with equal sums the one with the nearer neighbour wins.
  """
  weights = jax.nn.softmax(similarity / temperature, axis=1)  # [Q, max(k)]
  predicted = []
  for k in ks:
    same = labels[:, :k, None] == labels[:, None, :k]  # [Q, k, k]
    votes = jnp.sum(jnp.where(same, weights[:, :k, None], 0.0), axis=1)  # [Q, k]
    winner = jnp.argmax(votes, axis=1)[:, None]  # [Q, 1]
    predicted.append(jnp.take_along_axis(labels, winner, axis=1)[:, 0])  # [Q]
  return jnp.stack(predicted)  # [ks, Q]


@jax.jit
def _normalize(features: Array) -> Array:
  features = features.astype(jnp.float32)
  norm = jnp.linalg.norm(features, axis=1, keepdims=True)  # [N, 1]
  return features / jnp.maximum(norm, 1e-12)  # a zero row stays zero: similarity 0 to everything


def _padded(rows: np.ndarray, num: int) -> np.ndarray:
  return np.pad(rows, [(0, num - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")
