"""Teacher targets by softmax centering: the alternative to Sinkhorn-Knopp of DINO and iBOT."""

from __future__ import annotations

import chex
from jaxtyping import Array, Float

from vit_jax.losses.assignment import centered


def softmax_center(
  logits: Float[Array, "N K"], center: Float[Array, " K"], temperature: float | Float[Array, ""]
) -> Float[Array, "N K"]:
  """softmax((logits - center) / temperature); rows sum to 1.

  Subtracting the running mean of the scores keeps single prototypes from taking all samples (DINO, Caron et al. 2021,
  section 3.1); unlike Sinkhorn-Knopp it treats every sample by itself. In float32 whatever the input.

  Args:
    logits: teacher scores of every sample.
    center: running mean of the scores of earlier batches.
    temperature: > 0.

  Raises:
    ValueError: for other shapes or types.
  """
  words = "softmax_center takes logits [N, K] and a center [K], floats"
  chex.assert_rank(logits, 2, custom_message=words, exception_type=ValueError)
  chex.assert_shape(center, logits.shape[1:], custom_message=words, exception_type=ValueError)
  chex.assert_type([logits, center], float, custom_message=words, exception_type=ValueError)
  return centered(logits, center, temperature).probs()
