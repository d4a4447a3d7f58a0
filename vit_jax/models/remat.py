"""What the backward pass recomputes instead of keeping it from the forward pass, by name."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_BLOCK_INPUT = "block_input"
_PRODUCT = "product"  # of a linear map: JAX sees no matrix product in a function with a gradient rule of its own
# "none": nothing. "dots": all but matrix products. "attention": the attention weights of every head, the only arrays
# that grow with the square of the tokens (see ops/attention.py). "blocks": everything, from the inputs of a block on.
# "offload": as "blocks", and these inputs wait in the memory of the host.
REMAT = ("none", "dots", "attention", "blocks", "offload")


def check_remat(name: str) -> None:
  """Raises a ValueError unless `name` is one of `REMAT`."""
  if name not in REMAT:
    raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {name!r}.")


def recomputed(block: type[nn.Module], name: str) -> type[nn.Module]:
  """The block of a scan, with what its backward pass recomputes as `name` says.

  "attention" is for the block itself to do: here, and for blocks without attention, it is as "none".
  """
  if name in ("none", "attention"):
    return block
  policies = jax.checkpoint_policies
  policy = {
    "dots": policies.save_from_both_policies(
      policies.checkpoint_dots_with_no_batch_dims, policies.save_only_these_names(_PRODUCT)
    ),
    "blocks": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_BLOCK_INPUT],
      offload_src="device",
      offload_dst="pinned_host",
    ),
  }[name]
  # A scan already keeps the recomputation apart from the forward pass: prevent_cse would only cost fusion.
  return nn.remat(block, policy=policy, prevent_cse=False)


def block_inputs(xs: Any) -> Any:
  """The inputs of a block, marked as what "offload" keeps."""
  return jax.tree.map(lambda x: checkpoint_name(x, _BLOCK_INPUT), xs)


def linear_outputs(ys: Any) -> Any:
  """The products of a linear map, marked as what "dots" keeps."""
  return jax.tree.map(lambda y: checkpoint_name(y, _PRODUCT), ys)
