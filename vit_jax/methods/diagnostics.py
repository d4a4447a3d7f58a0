"""Metrics that tell a healthy run from a collapsing one; all in float32, none with a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import l2_normalize, upcast

NUM_GLOBAL = 2


def targets(cls: Float[Array, "R K"]) -> dict[str, jax.Array]:
  """Health of the targets of the class tokens of two global crops an image.

  teacher_entropy: mean entropy of the targets, nats. teacher_marginal_entropy: entropy of the mean target, at most
  log K. prototype_usage: perplexity of the mean target over K, 1 when all prototypes are used equally. crop_kl: mean
  Kullback-Leibler divergence between the targets of the two crops of an image, nats: 0 where the teacher no longer
  tells views apart, or all images.

  Args:
    cls: the targets, image by image; rows sum to 1.
  """
  cls = jax.lax.stop_gradient(upcast(cls))
  marginal_entropy = _entropy(jnp.mean(cls, axis=0))
  pairs = cls.reshape(-1, NUM_GLOBAL, cls.shape[-1])  # [B, 2, K]
  logs = jnp.log(jnp.maximum(pairs, jnp.finfo(pairs.dtype).tiny))
  divergence = jnp.sum((pairs[:, 0] - pairs[:, 1]) * (logs[:, 0] - logs[:, 1]), axis=-1) / 2  # [B]  of both directions
  return {
    "teacher_entropy": jnp.mean(_entropy(cls)),
    "teacher_marginal_entropy": marginal_entropy,
    "prototype_usage": jnp.exp(marginal_entropy) / cls.shape[-1],
    "crop_kl": jnp.mean(divergence),
  }


def features(cls: Float[Array, "R D"]) -> dict[str, jax.Array]:
  """Spread of class tokens over the batch.

  feature_std: standard deviation over the batch of the L2-normalised class tokens times sqrt(D), 1 for isotropic and 0
  for constant features. feature_rank: participation ratio of their covariance, (sum of eigenvalues)^2 / sum of squares.
  """
  unit = l2_normalize(jax.lax.stop_gradient(upcast(cls)))  # [R, D]
  centred = unit - jnp.mean(unit, axis=0)  # [R, D]
  covariance = jnp.einsum("rd,re->de", centred, centred)  # [D, D]
  spread = jnp.trace(covariance)
  return {
    "feature_std": jnp.mean(jnp.std(unit, axis=0)) * unit.shape[-1] ** 0.5,
    "feature_rank": spread**2 / jnp.maximum(jnp.sum(jnp.square(covariance)), jnp.finfo(covariance.dtype).tiny),
  }


def similarity(cls: Float[Array, "R D"], patches: Float[Array, "R N D"]) -> dict[str, Float[Array, " R"]]:
  """How alike the patches of each crop are: what drifts upwards in long runs while the class token still improves.

  The degradation of dense features that Gram anchoring cures (DINOv3 section 4.1). patch_similarity: mean cosine
  similarity of two different patches of a crop. patch_cls_similarity: mean cosine similarity of a patch with the
  class token.
  """
  unit = l2_normalize(jax.lax.stop_gradient(upcast(patches)))  # [R, N, D]
  mean = jnp.mean(unit, axis=1)  # [R, D]
  num = patches.shape[1]
  among = (num * jnp.sum(jnp.square(mean), axis=-1) - 1) / max(num - 1, 1)  # [R]  without a patch and itself
  with_cls = jnp.sum(mean * l2_normalize(jax.lax.stop_gradient(upcast(cls))), axis=-1)  # [R]
  return {"patch_similarity": among, "patch_cls_similarity": with_cls}


def means(rows: dict[str, Float[Array, " R"]]) -> dict[str, jax.Array]:
  """Each value averaged over the batch."""
  return {name: jnp.mean(values) for name, values in rows.items()}


def _entropy(probs: Float[Array, "... K"]) -> Float[Array, ...]:
  return -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)
