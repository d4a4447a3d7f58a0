"""Teacher targets: the Sinkhorn-Knopp assignment of samples to prototypes."""

from __future__ import annotations

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
  """
  return balanced(logits, temperature, iterations=iterations).probs()
