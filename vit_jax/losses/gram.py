"""The Gram anchoring loss: keeps the similarities between patches close to those of an earlier teacher."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import l2_normalize, upcast

REMOVE_NEGATIVE = (None, "both", "teacher", "teacher_only")


def gram(
  student: Float[Array, "B N D"],
  teacher: Float[Array, "B N E"],
  *,
  normalize: bool = True,
  per_image: bool = True,
  remove_negative: str | None = None,
) -> Float[Array, ""]:
  """Mean squared difference of the Gram matrices of two sets of patch features (DINOv3 section 4).

  In float32 whatever the input; the gradient reaches the student only.

  Args:
    student: patch features; or [M, D] rows of selected patches with `per_image=False`.
    teacher: patch features of the same images, of the same or of another width.
    normalize: L2-normalise every patch first.
    per_image: one N x N matrix per image; otherwise one matrix over all patches of the batch.
    remove_negative: which negative similarities become 0 first. "both": those of either side. "teacher": the
      teacher's, and the student's where both are negative. "teacher_only": the teacher's alone, which is what the
      reference's option of removing only the teacher's negatives computes.

  Raises:
    ValueError: for other shapes or types, another `remove_negative`, or rows without images and `per_image=True`.
  """
  words = "gram takes patch features [B, N, D] of the same images, floats, or with per_image=False rows [M, D]"
  chex.assert_rank([student, teacher], {2, 3}, custom_message=words, exception_type=ValueError)
  chex.assert_equal_rank([student, teacher], custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape_prefix([student, teacher], student.ndim - 1, custom_message=words, exception_type=ValueError)
  chex.assert_type([student, teacher], float, custom_message=words, exception_type=ValueError)
  if remove_negative not in REMOVE_NEGATIVE:
    raise ValueError(f"remove_negative must be one of {REMOVE_NEGATIVE}, got {remove_negative!r}.")
  if student.ndim == 2 and per_image:
    raise ValueError(
      "per_image=True needs features [B, N, D]; for rows [M, D] of selected patches set per_image=False."
    )
  student, teacher = upcast(student), upcast(jax.lax.stop_gradient(teacher))
  if normalize:
    student, teacher = l2_normalize(student), l2_normalize(teacher)
  if not per_image:
    student, teacher = (x.reshape(1, -1, x.shape[-1]) for x in (student, teacher))

  def similarities(x: Array) -> Array:
    return jnp.einsum("bnd,bmd->bnm", x, x, precision=jax.lax.Precision.HIGHEST)  # [B, N, N]

  s, t = similarities(student), similarities(teacher)
  if remove_negative == "both":
    s, t = jnp.maximum(s, 0), jnp.maximum(t, 0)
  elif remove_negative == "teacher":
    s, t = jnp.where((s < 0) & (t < 0), 0, s), jnp.maximum(t, 0)
  elif remove_negative == "teacher_only":
    t = jnp.maximum(t, 0)
  return jnp.mean(jnp.square(s - t))
