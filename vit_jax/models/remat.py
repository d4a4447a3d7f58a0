"""What the backward pass recomputes, by name."""

from __future__ import annotations

import flax.linen as nn
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


def recomputed(block: type[nn.Module], name: str) -> type[nn.Module]:
  """The block of a scan, with what its backward pass recomputes as `name` says."""
  if name == "none":
    return block
  # A scan already keeps the recomputation apart from the forward pass: prevent_cse would only cost fusion.
  return nn.remat(block, policy=REMAT[name], prevent_cse=False)
