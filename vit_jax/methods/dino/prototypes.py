"""The losses on prototype scores: DINO on class tokens, iBOT on masked patches, as terms of the student's loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.losses.assignment import Assignment
from vit_jax.losses.prototypes import CrossEntropies, cross_entropies
from vit_jax.models import ProjectionHead

Params = dict[str, Any]
Terms = dict[str, jax.Array]


def dino(
  head: ProjectionHead,
  params: Params,
  global_cls: Float[Array, "B G D"],
  local_cls: Float[Array, "B L D"],
  targets: Assignment,
  *,
  weight: float,
  local_loss_weight: jax.Array,
  ignore_diagonal: bool,
  chunk: int | None,
) -> tuple[jax.Array, Terms]:
  """DINO between the crops of each image, weighted as in the published code.

  Local and global crops count by their numbers of pairs; `local_loss_weight` comes on top.

  Args:
    global_cls: the student's class tokens of the global crops.
    local_cls: of the local crops.
    targets: of the global crops, [B * G, K].
    weight: of both terms.
    ignore_diagonal: leave out the pairs of one global crop with itself.
    chunk: tokens whose prototype scores are there at once; None: see `losses.prototypes`.

  Returns:
    The weighted loss, and its terms, unweighted, by name; and the mean entropy of the student's assignments of its
    global crops in nats, as "student_entropy".
  """
  (images, num_global, _), num_local = global_cls.shape, local_cls.shape[1]
  same = jnp.eye(num_global) if ignore_diagonal else jnp.zeros((num_global, num_global))
  in_global = jnp.zeros((num_global + num_local, num_global)).at[:num_global].set(1 - same)  # [S, T]
  in_local = jnp.zeros_like(in_global).at[num_global:].set(1.0)  # [S, T]
  global_pairs = num_global * (num_global - 1 if ignore_diagonal else num_global)
  local_pairs = num_local * num_global
  local_share = local_pairs / (global_pairs + local_pairs)
  mean = {"dino_global": in_global / (images * global_pairs)}
  shares = (1 - local_share) * mean["dino_global"]
  if num_local:
    mean["dino_local"] = in_local / (images * local_pairs)
    shares = local_share * local_loss_weight * mean["dino_local"] + shares
  # The crops of an image stay together: crop after crop, rows would move between devices.
  tokens = jnp.concatenate([global_cls, local_cls], axis=1)  # [B, G + L, D]
  weights = jnp.broadcast_to(weight * shares, (images, *shares.shape))
  found = _losses(head, params, tokens, targets.reshape(images, num_global), weights, chunk)
  summed = jnp.sum(found.crossed, axis=0)  # [S, T]
  terms = {name: jnp.sum(share * summed) for name, share in mean.items()}
  return found.total, terms | {"student_entropy": jnp.mean(found.own[:, :num_global])}


def ibot(
  head: ProjectionHead,
  params: Params,
  patches: Float[Array, "N D"],
  targets: Assignment,
  weights: Float[Array, "groups M"],
  *,
  weight: float,
  num_crops: int,
  chunk: int | None,
) -> tuple[jax.Array, Terms]:
  """iBOT of the masked patches.

  Args:
    patches: the student's.
    targets: of the same patches, [N, K].
    weights: of each, in the batch: 1 / masked patches of its crop.
    weight: of the term.
    num_crops: global crops, also the unmasked ones.
    chunk: as in `dino`.

  Returns:
    The weighted loss, and unweighted as "ibot".
  """
  num = patches.shape[0]
  tokens, weights = patches.reshape(num, 1, patches.shape[1]), weights.reshape(num, 1, 1) / num_crops
  found = _losses(head, params, tokens, targets.reshape(num, 1), weight * weights, chunk)
  return found.total, {"ibot": jnp.sum(weights * found.crossed)}


def _losses(
  head: ProjectionHead,
  params: Params,
  tokens: Float[Array, "U S D"],
  targets: Assignment,
  weights: Float[Array, "U S T"],
  chunk: int | None,
) -> CrossEntropies:
  """The cross-entropies of tokens through a head."""
  rows = tokens.reshape(-1, tokens.shape[-1])  # [U * S, D]
  bottleneck = head.apply({"params": params}, rows, method="project")
  bottleneck = bottleneck.reshape(*tokens.shape[:2], head.bottleneck)  # [U, S, d]
  chunk = chunk and max(1, chunk // tokens.shape[1])
  return cross_entropies(bottleneck, params["last_layer"]["kernel"], targets, weights, chunk=chunk)
