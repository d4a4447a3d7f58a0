"""The DINO loss: cross-entropy between the prototype assignments of crops of one image."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import upcast


def dino(
  student_logits: Float[Array, "S B K"],
  teacher_probs: Float[Array, "T B K"],
  *,
  temperature: float = 0.1,
  ignore_diagonal: bool = False,
) -> Float[Array, ""]:
  """Mean cross-entropy of every student crop with every teacher crop of the same image.

  DINO (Caron et al. 2021, eq. 3) with Sinkhorn-Knopp targets (DINOv2 section 4), in float32 whatever the input.

  Args:
    student_logits: prototype scores of S crops of B images.
    teacher_probs: targets of T crops of the same images; rows sum to 1.
    temperature: of the student's softmax.
    ignore_diagonal: leave out the pairs of crop i with crop i, in the sum and in the count.

  Raises:
    ValueError: for other shapes or types, or if `ignore_diagonal` leaves no pair.
  """
  words = "dino takes student_logits [S, B, K] and teacher_probs [T, B, K], floats, of the same images and prototypes"
  both = [student_logits, teacher_probs]
  chex.assert_rank(both, 3, custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape_suffix(both, 2, custom_message=words, exception_type=ValueError)
  chex.assert_type(both, float, custom_message=words, exception_type=ValueError)
  crops, batch = student_logits.shape[:2]
  pairs = crops * teacher_probs.shape[0] - (min(crops, teacher_probs.shape[0]) if ignore_diagonal else 0)
  if pairs == 0:
    raise ValueError("ignore_diagonal leaves no pair of crops: give the teacher or the student a second crop.")
  scaled, probs = upcast(student_logits) / temperature, upcast(teacher_probs)
  normalizer = jax.nn.logsumexp(scaled, axis=-1)  # [S, B]
  agreement = jnp.einsum("sbk,tbk->st", scaled, probs, precision=jax.lax.Precision.HIGHEST)  # [S, T]
  total = jnp.einsum("sb,tb->st", normalizer, jnp.sum(probs, axis=-1), precision=jax.lax.Precision.HIGHEST)
  entropy = total - agreement  # [S, T]  -sum_bk p log softmax(s)
  if ignore_diagonal:
    entropy = entropy * (1.0 - jnp.eye(*entropy.shape, dtype=entropy.dtype))
  return jnp.sum(entropy) / (batch * pairs)
