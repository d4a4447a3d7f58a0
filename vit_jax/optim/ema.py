"""The exponential moving average that makes a teacher of the students."""

from __future__ import annotations

from typing import Any

import chex
import jax


def update(teacher: Any, student: Any, momentum: float | jax.Array) -> Any:
  """momentum * teacher + (1 - momentum) * student, leaf by leaf, in the teacher's type.

  Raises:
    ValueError: if the two do not have the same leaves, each of the same shape.
  """
  words = "a teacher is the average of students with the same parameters"
  chex.assert_trees_all_equal_shapes(teacher, student, custom_message=words, exception_type=ValueError)
  return jax.tree.map(lambda t, s: (momentum * t + (1.0 - momentum) * s).astype(t.dtype), teacher, student)
