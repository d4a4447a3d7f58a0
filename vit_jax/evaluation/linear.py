"""Linear probe: how well a linear layer on frozen features classifies.

The protocol of DINOv2 and DINOv3: features = class token and mean patch, both of the final norm; one head per learning
rate, all trained at once, SGD with momentum 0.9 and a cosine to zero, no weight decay; the head is chosen on
validation data. Differences, all because features are extracted once:
- no augmentation in training: every epoch sees the same features;
- the validation data is a part of the training split, stratified by class; test labels are read for the final score
  only, and the chosen head is not refitted on the validation part;
- heads are compared at the end of training, not also on the way;
- 10 epochs as there, but at least 1000 steps: on a few thousand images 10 epochs would end far from convergence.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.evaluation.errors import EvaluationError
from vit_jax.evaluation.features import check_labelled

# For a batch of 256; they are scaled by batch / 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

_MOMENTUM = 0.9
_HIGHEST = jax.lax.Precision.HIGHEST  # float32 products also on accelerators


def linear_probe(
  train_features: Float[np.ndarray, "N F"],
  train_labels: Int[np.ndarray, " N"],
  test_features: Float[np.ndarray, "M F"],
  test_labels: Int[np.ndarray, " M"],
  *,
  num_classes: int,
  learning_rates: Sequence[float] = LEARNING_RATES,
  epochs: int = 10,
  min_steps: int = 1000,
  batch_size: int = 1024,
  validation_fraction: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """Test accuracy of the best of several linear classifiers, the best by validation accuracy.

  The features of the training split are on the device as a whole.

  Args:
    train_features: frozen features, from which the validation part is held out.
    train_labels: their labels, in [0, num_classes).
    test_features: frozen features of the test images.
    test_labels: their labels; used for the returned score and nothing else.
    num_classes: outputs of a head.
    learning_rates: one head each, for a batch of 256.
    epochs: passes over the training part.
    min_steps: steps that are made at least.
    batch_size: images per step; capped by the training part.
    validation_fraction: share of every class that is held out to choose the head.
    seed: of the split, of the initial weights and of the order of images.

  Returns:
    "top1" on the test images, and of the chosen head "validation_top1" and "lr" (for a batch of 256).

  Raises:
    ValueError: if shapes or types do not agree, or a set is empty.
    EvaluationError: if no class has two images, one to train and one to validate on; if every head diverges.
  """
  check_labelled("the linear probe", train_features, train_labels, test_features, test_labels)
  rng = np.random.default_rng(seed)
  fit, held_out = _split(train_labels, validation_fraction, rng)
  batch_size = min(batch_size, len(fit))
  steps = max(min_steps, epochs * len(fit) // batch_size)
  rates = np.asarray(learning_rates, np.float32) * (batch_size / 256)  # [H]
  shape = (train_features.shape[1], len(rates), num_classes)
  weights = 0.01 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)  # [F, H, C]
  heads = (weights, jnp.zeros(shape[1:], jnp.float32))
  order = _order(len(fit), steps, batch_size, rng)
  heads = _fit(heads, jnp.asarray(train_features[fit]), jnp.asarray(train_labels[fit]), rates, order)
  accuracy, loss = _score(heads, train_features[held_out], train_labels[held_out], batch_size)  # [H] each
  # Small validation parts tie often; cross-entropy then says which head is really better. A diverged head has none.
  best = max(range(len(rates)), key=lambda head: (np.isfinite(loss[head]), accuracy[head], -loss[head]))
  if not np.isfinite(loss[best]):
    raise EvaluationError(
      f"The linear probe diverged at each of its {len(rates)} learning rates, from {min(learning_rates):g} to "
      f"{max(learning_rates):g}: the features are very large (up to {np.abs(train_features).max():.3g})."
    )
  chosen = jax.tree.map(lambda leaf: leaf[..., best : best + 1, :], heads)
  test_accuracy, _ = _score(chosen, test_features, test_labels, batch_size)
  return {
    "top1": float(test_accuracy[0]),
    "validation_top1": float(accuracy[best]),
    "lr": float(learning_rates[best]),
  }


def _split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Indices to train on and to validate on: of every class with two or more images, `fraction` and at least one."""
  order = rng.permutation(len(labels))
  held_out = []
  for label in np.unique(labels):
    members = order[labels[order] == label]
    if len(members) > 1:
      held_out.append(members[: max(1, min(len(members) - 1, round(fraction * len(members))))])
  if not held_out:
    raise EvaluationError(
      "The linear probe chooses its learning rate on held-out training images, but each of the "
      f"{len(np.unique(labels))} classes has one image only: give more training images."
    )
  chosen = np.sort(np.concatenate(held_out))
  return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _order(num: int, steps: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
  """Which images each step sees: one shuffled pass after the other, cut into batches. [steps, batch_size]"""
  passes = -(-steps * batch_size // num)
  order = np.concatenate([rng.permutation(num).astype(np.int32) for _ in range(passes)])
  return order[: steps * batch_size].reshape(steps, batch_size)


@jax.jit
def _fit(heads: tuple[Array, Array], features: Array, labels: Array, rates: Array, order: Array) -> tuple[Array, Array]:
  """SGD with momentum on the sum of the heads' losses: as heads share nothing, each is trained by its own."""
  steps = order.shape[0]

  def loss(heads: tuple[Array, Array], index: Array) -> Array:
    return jnp.sum(jnp.mean(_cross_entropy(_logits(heads, features[index]), labels[index]), axis=0))

  def step(carry, inputs):
    heads, velocity = carry
    count, index = inputs
    rate = rates * 0.5 * (1.0 + jnp.cos(jnp.pi * count / steps))  # [H]
    velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, jax.grad(loss)(heads, index))
    heads = jax.tree.map(lambda p, v: p - rate[:, None] * v, heads, velocity)
    return (heads, velocity), None

  start = (heads, jax.tree.map(jnp.zeros_like, heads))
  return jax.lax.scan(step, start, (jnp.arange(steps), order))[0][0]


def _logits(heads: tuple[Array, Array], features: Array) -> Array:
  weights, bias = heads  # [F, H, C], [H, C]
  return jnp.einsum("bf,fhc->bhc", features, weights, precision=_HIGHEST) + bias  # [B, H, C]


def _cross_entropy(logits: Array, labels: Array) -> Array:
  picked = jnp.take_along_axis(logits, labels[:, None, None], axis=-1)[..., 0]  # [B, H]
  return jax.nn.logsumexp(logits, axis=-1) - picked  # [B, H]


def _score(
  heads: tuple[Array, Array], features: np.ndarray, labels: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
  """Accuracy and mean cross-entropy of every head, [H] each, over all rows."""
  correct, loss = 0.0, 0.0
  for start in range(0, len(labels), chunk):
    right, nats = _compare(heads, features[start : start + chunk], labels[start : start + chunk])
    correct, loss = correct + np.asarray(right, np.float64), loss + np.asarray(nats, np.float64)
  return correct / len(labels), loss / len(labels)


@jax.jit
def _compare(heads: tuple[Array, Array], features: Array, labels: Array) -> tuple[Array, Array]:
  logits = _logits(heads, features)  # [B, H, C]
  right = jnp.sum(jnp.argmax(logits, axis=-1) == labels[:, None], axis=0)  # [H]
  return right, jnp.sum(_cross_entropy(logits, labels), axis=0)  # [H], [H]
