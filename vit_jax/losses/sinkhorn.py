"""Teacher targets: the Sinkhorn-Knopp assignment of samples to prototypes."""

from __future__ import annotations

import chex
from jaxtyping import Array, Float

from vit_jax.losses.assignment import balanced


def sinkhorn_knopp(
  logits: Float[Array, "N K"], temperature: float | Float[Array, ""], *, iterations: int = 3
) -> Float[Array, "N K"]:
  """Assignment of N samples to K prototypes in which every prototype gets about the same mass; rows sum to 1.

  Sinkhorn-Knopp on exp(logits / temperature) (SwAV, Caron et al. 2020, eq. 3; DINOv2 section 4), each iteration
  normalising prototypes over all samples, then samples. All samples form one problem: pass the whole batch. Computed
  in float32 whatever the input, and on logarithms: the same mathematics, without overflow at any logit.

  Args:
    logits: teacher scores of every sample.
    temperature: > 0.
    iterations: >= 1.

  Raises:
    ValueError: for another shape or type, or fewer than one iteration.
  """
  words = f"sinkhorn_knopp takes logits [N, K], floats, and at least one iteration, got iterations={iterations}"
  chex.assert_rank(logits, 2, custom_message=words, exception_type=ValueError)
  chex.assert_type(logits, float, custom_message=words, exception_type=ValueError)
  chex.assert_scalar_positive(iterations, custom_message=words, exception_type=ValueError)
  return balanced(logits, temperature, iterations=iterations).probs()
