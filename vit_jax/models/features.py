"""What every backbone returns, and the random choices that it may be given."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array

from vit_jax.models.positions import RopeDraws


def _short(name: str, value: Any) -> str:
  """An array as its type and shape; anything else that a tree of this structure may hold as itself."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"{name}={value.dtype}[{', '.join(map(str, value.shape))}]"
  return f"{name}={value!r}"


@flax.struct.dataclass
class Features:
  """What a backbone returns for a batch of images of one resolution.

  Attributes:
    cls: [B, D] the feature of the whole image: the class token after the final norm, or what the model pools instead.
    registers: [B, R, D] register tokens after the final norm.
    patches: [B, N, D] patch tokens after the final norm, row-major.
    prenorm: [B, T, D] all tokens before the final norm: class token (where there is one), registers, patches.
  """

  cls: Array
  registers: Array
  patches: Array
  prenorm: Array

  def __repr__(self) -> str:
    return f"Features({', '.join(_short(name, getattr(self, name)) for name in self.__dataclass_fields__)})"


@flax.struct.dataclass
class Draws:
  """The random choices of a training pass for one resolution, per block (L blocks); None: off.

  Attributes:
    kept: rows of each loss group that keep their branches, [L, 2 (attention, feed-forward), groups, m].
    rope: coordinate augmentation of the rotary positions, for each loss group.
  """

  kept: Array | None = None
  rope: RopeDraws | None = None
