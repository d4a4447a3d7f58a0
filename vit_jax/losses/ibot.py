"""The iBOT loss: cross-entropy of masked patches with the teacher's view of the same patches."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import upcast


def ibot(
  student_logits: Float[Array, "M K"],
  teacher_probs: Float[Array, "M K"],
  weights: Float[Array, " M"],
  *,
  num_crops: int,
  temperature: float = 0.1,
) -> Float[Array, ""]:
  """sum_j w_j CE_j / num_crops over the M masked patches.

  iBOT (Zhou et al. 2022) as DINOv2 and DINOv3 weigh it: w_j = 1 / (masked patches of that crop), and `num_crops`
  counts all global crops, also the unmasked ones. In float32 whatever the input.

  Args:
    student_logits: prototype scores of the masked patches.
    teacher_probs: targets of the same patches; rows sum to 1.
    weights: per patch; 0 for padding.
    num_crops: the divisor.
    temperature: of the student's softmax.

  Raises:
    ValueError: for other shapes or types.
  """
  words = "ibot takes student_logits and teacher_probs [M, K] with weights [M], floats"
  chex.assert_rank([student_logits, teacher_probs, weights], [2, 2, 1], custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape([student_logits, teacher_probs], custom_message=words, exception_type=ValueError)
  chex.assert_shape(weights, student_logits.shape[:1], custom_message=words, exception_type=ValueError)
  chex.assert_type([student_logits, teacher_probs, weights], float, custom_message=words, exception_type=ValueError)
  scaled, probs = upcast(student_logits) / temperature, upcast(teacher_probs)
  normalizer = jax.nn.logsumexp(scaled, axis=-1)  # [M]
  entropy = normalizer * jnp.sum(probs, axis=-1) - jnp.sum(scaled * probs, axis=-1)  # [M]
  return jnp.sum(entropy * upcast(weights)) / num_crops
