"""The KoLeo regulariser: spreads features uniformly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import l2_normalize, upcast


def koleo(features: Float[Array, "B D"], *, topk: int = 1, eps: float = 1e-8) -> Float[Array, ""]:
  """KoLeo differential-entropy regulariser: pushes every feature away from its nearest neighbours.

  Minus the mean log distance of each L2-normalised feature to its `topk` nearest neighbours in the batch
  (Sablayrolles et al. 2019, eq. 3; DINOv2 section 4). The gradient flows through both members of a pair, not through
  the choice. Computed in float32 whatever the input.

  Args:
    features: one group of features; B >= topk + 1.
    topk: number of neighbours.
    eps: added to every component of a difference and inside the logarithm.

  Raises:
    ValueError: if the group is too small to have `topk` neighbours.
  """
  num = features.shape[0]
  if num <= topk:
    raise ValueError(
      f"koleo needs more than topk={topk} features in a group, got {num}: "
      "raise batch_size, loss_group_size or koleo.group_size, or set koleo.loss_weight=0."
    )
  x = l2_normalize(upcast(features), eps=eps)  # [B, D]
  frozen = jax.lax.stop_gradient(x)
  similarity = jnp.einsum("id,jd->ij", frozen, frozen, precision=jax.lax.Precision.HIGHEST)  # [B, B]
  similarity = jnp.where(jnp.eye(num, dtype=bool), -jnp.inf, similarity)
  neighbours = jax.lax.top_k(similarity, topk)[1]  # [B, topk]
  distance = jnp.linalg.norm(x[:, None] - x[neighbours] + eps, axis=-1)  # [B, topk]
  return -jnp.mean(jnp.log(distance + eps))
