"""NaN and infinity among weights: who starts from them has a model that computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_NAMED = 5


def is_finite(values: np.ndarray) -> bool:
  """Whether all values are finite. The sum is, if they are; only where it is not is a second look needed."""
  if not jnp.issubdtype(values.dtype, jnp.floating):
    return True
  with np.errstate(all="ignore"):
    wide = np.promote_types(values.dtype, np.float32) if values.dtype.kind == "f" else np.float32
    return bool(np.isfinite(np.sum(values, dtype=wide))) or bool(np.all(np.isfinite(values)))


def nonfinite(tensors: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> list[str]:
  """The names of the tensors (arrays or lazy ones) that hold NaN or infinity.

  Args:
    tensors: by name.
    share: (index, count): of so many equal shares of the tensors, only this one is read.
  """
  index, count = share
  return [name for name in list(tensors)[index::count] if not is_finite(np.asarray(tensors[name]))]


def named(names: Sequence[str]) -> str:
  """What is wrong with tensors of these names, in words."""
  more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
  return f"NaN or infinity in {', '.join(names[:_NAMED])}{more}"
