"""Teacher targets by softmax centering: the alternative to Sinkhorn-Knopp of DINO and iBOT."""

from __future__ import annotations

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
  """
  return centered(logits, center, temperature).probs()
