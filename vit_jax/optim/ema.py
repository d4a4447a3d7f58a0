"""The exponential moving average that makes a teacher of the students."""

from __future__ import annotations

from typing import Any

import jax


def update(teacher: Any, student: Any, momentum: float | jax.Array) -> Any:
  """momentum * teacher + (1 - momentum) * student, leaf by leaf, in the teacher's type."""
  return jax.tree.map(lambda t, s: (momentum * t + (1.0 - momentum) * s).astype(t.dtype), teacher, student)
