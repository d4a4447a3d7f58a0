"""What the backward pass recomputes, by name."""

from __future__ import annotations

import jax

REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  "blocks": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(name: str) -> None:
  """Raises a ValueError unless `name` is a key of `REMAT`."""
  if name not in REMAT:
    raise ValueError(f"remat must be one of {sorted(REMAT)}, got {name!r}.")
