"""AdamW with parameter groups by path, layer-wise learning-rate decay and clipping per sub-module."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Groups(NamedTuple):
  """Per parameter, as trees like the parameters.

  Attributes:
    lr: factor of the learning rate; an array along the layer axis for stacked blocks.
    weight_decay: factor of the weight decay.
    last_layer: whether it is a prototype layer, which has a learning rate of its own.
  """

  lr: Any
  weight_decay: Any
  last_layer: Any


def path_name(path: tuple) -> str:
  """A leaf's address: "backbone/blocks/attn/qkv/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


NO_DECAY = re.compile(r"(^|/)(bias|gamma)$|norm")
DOWNSAMPLE_NORM = re.compile(r"(^|/)downsample\d/norm/scale$")
EMBEDDING = re.compile(r"(^|/)(cls_token|registers|mask_token|positions|patch_embed/.*)$")


def groups(
  params: Any, *, layerwise_decay: float, patch_embed_lr: float, decay_downsample_norms: bool = False
) -> Groups:
  """The reference's parameter groups (DINOv3 5.2), by path.

  With n blocks, block i has the factor layerwise_decay^(n - i), tokens and patch embedding layerwise_decay^(n + 1),
  everything else 1. Biases, norms and layer scale are not decayed; tokens and the patch embedding are. Of a ConvNeXt no
  factor is but 1.

  Args:
    params: {"backbone": ..., "dino_head": ..., ...} or a part of it; arrays or shapes.
    layerwise_decay: factor of the learning rate from a block to the one before it.
    patch_embed_lr: further factor of the patch embedding.
    decay_downsample_norms: decay the scales of a ConvNeXt's stem and down-sampling norms (four vectors), as the
      reference does, because their names there lack "norm".
  """

  def depth(tree: Any) -> int:
    return next((leaf.shape[0] for path, leaf in tree if "blocks/" in path_name(path)), 0)

  n = depth(jax.tree_util.tree_leaves_with_path(params))

  def lr(path: tuple, leaf: Any) -> Any:
    name = path_name(path)
    if "blocks/" in name:
      layers = layerwise_decay ** (n - np.arange(n, dtype=np.float64))  # [L]
      return layers.reshape(n, *[1] * (len(leaf.shape) - 1))
    if EMBEDDING.search(name):
      return layerwise_decay ** (n + 1) * (patch_embed_lr if "patch_embed" in name else 1.0)
    return 1.0

  def weight_decay(path: tuple, leaf: Any) -> float:
    name = path_name(path)
    exempt = NO_DECAY.search(name) and not (decay_downsample_norms and DOWNSAMPLE_NORM.search(name))
    return 0.0 if exempt else 1.0

  with_path = jax.tree_util.tree_map_with_path
  return Groups(
    lr=with_path(lr, params),
    weight_decay=with_path(weight_decay, params),
    last_layer=with_path(lambda path, _: "last_layer" in path_name(path), params),
  )


def clip(grads: dict[str, Any], limit: float) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """Scales each sub-module's gradient to a norm of at most `limit` (0: no clipping); returns the norms before.

  Norms are of the whole sub-module over all devices, in float32.
  """
  norms = {name: optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), tree)) for name, tree in grads.items()}
  if not limit:
    return grads, norms
  factors = {name: jnp.minimum(1.0, limit / (norm + 1e-6)) for name, norm in norms.items()}
  return {name: jax.tree.map(lambda g, f=factors[name]: g * f, tree) for name, tree in grads.items()}, norms


def adamw_update(
  params: Any,
  grads: Any,
  moments: optax.ScaleByAdamState,
  group: Groups,
  *,
  lr: jax.Array,
  last_layer_lr: jax.Array,
  weight_decay: jax.Array,
  b1: float,
  b2: float,
  eps: float,
) -> tuple[Any, optax.ScaleByAdamState]:
  """One step of AdamW (Loshchilov & Hutter 2019), the decay decoupled and scaled by the group's learning rate.

  A learning rate of 0 leaves a parameter untouched while its moments go on: that is how the prototypes are frozen.

  Raises:
    ValueError: if parameters, gradients and moments are not of the same leaves and shapes.
  """
  words = "adamw_update takes parameters, their gradients and their moments"
  chex.assert_trees_all_equal_shapes(
    params, grads, moments.mu, moments.nu, custom_message=words, exception_type=ValueError
  )
  directions, moments = adam(b1, b2, eps).update(grads, moments)

  def step(p: jax.Array, direction: jax.Array, lr_factor: Any, decay_factor: float, last: bool) -> jax.Array:
    rate = (last_layer_lr if last else lr) * jnp.asarray(lr_factor, p.dtype)
    return p - rate * (direction + weight_decay * decay_factor * p)

  return jax.tree.map(step, params, directions, group.lr, group.weight_decay, group.last_layer), moments


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """The moments of AdamW; its `init` makes their state."""
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
