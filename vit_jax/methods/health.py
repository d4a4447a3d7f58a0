"""Metrics that tell a healthy run from a collapsing one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import l2_normalize, upcast


def metrics(targets: Float[Array, "R K"], features: Float[Array, "R D"]) -> dict[str, jax.Array]:
  """Health of a batch, in float32.

  teacher_entropy: mean entropy of the targets, nats. teacher_marginal_entropy: entropy of the mean target, at most
  log K. prototype_usage: perplexity of the mean target over K, 1 when all prototypes are used equally. feature_std:
  standard deviation over the batch of the L2-normalised class tokens times sqrt(D), 1 for isotropic and 0 for constant
  features. feature_rank: participation ratio of their covariance, (sum of eigenvalues)^2 / sum of squares.

  Args:
    targets: assignments of the class tokens; rows sum to 1.
    features: the teacher's class tokens.
  """
  marginal = jnp.mean(targets, axis=0)  # [K]
  marginal_entropy = _entropy(marginal)
  unit = l2_normalize(upcast(features))  # [R, D]
  centred = unit - jnp.mean(unit, axis=0)  # [R, D]
  covariance = jnp.einsum("rd,re->de", centred, centred)  # [D, D]
  spread = jnp.trace(covariance)
  return {
    "teacher_entropy": jnp.mean(_entropy(targets)),
    "teacher_marginal_entropy": marginal_entropy,
    "prototype_usage": jnp.exp(marginal_entropy) / targets.shape[-1],
    "feature_std": jnp.mean(jnp.std(unit, axis=0)) * unit.shape[-1] ** 0.5,
    "feature_rank": spread**2 / jnp.maximum(jnp.sum(jnp.square(covariance)), jnp.finfo(covariance.dtype).tiny),
  }


def _entropy(probs: Float[Array, "... K"]) -> Float[Array, ...]:
  return -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)
