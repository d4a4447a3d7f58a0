"""Metrics that tell a healthy run from a collapsing one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import l2_normalize, upcast


def targets(probs: Float[Array, "R K"]) -> dict[str, jax.Array]:
  """Health of the assignments of the class tokens, rows of which sum to 1; in float32.

  teacher_entropy: mean entropy of the targets, nats. teacher_marginal_entropy: entropy of the mean target, at most
  log K. prototype_usage: perplexity of the mean target over K, 1 when all prototypes are used equally.
  """
  marginal = jnp.mean(probs, axis=0)  # [K]
  marginal_entropy = _entropy(marginal)
  return {
    "teacher_entropy": jnp.mean(_entropy(probs)),
    "teacher_marginal_entropy": marginal_entropy,
    "prototype_usage": jnp.exp(marginal_entropy) / probs.shape[-1],
  }


def features(cls: Float[Array, "R D"]) -> dict[str, jax.Array]:
  """Health of the class tokens of a batch, in float32.

  feature_std: standard deviation over the batch of the L2-normalised class tokens times sqrt(D), 1 for isotropic and 0
  for constant features. feature_rank: participation ratio of their covariance, (sum of eigenvalues)^2 / sum of squares.
  """
  unit = l2_normalize(upcast(cls))  # [R, D]
  centred = unit - jnp.mean(unit, axis=0)  # [R, D]
  covariance = jnp.einsum("rd,re->de", centred, centred)  # [D, D]
  spread = jnp.trace(covariance)
  return {
    "feature_std": jnp.mean(jnp.std(unit, axis=0)) * unit.shape[-1] ** 0.5,
    "feature_rank": spread**2 / jnp.maximum(jnp.sum(jnp.square(covariance)), jnp.finfo(covariance.dtype).tiny),
  }


def _entropy(probs: Float[Array, "... K"]) -> Float[Array, ...]:
  return -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)
