"""The networks of a student or a teacher: a backbone and a head for each of DINO and iBOT."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.methods.settings import build_backbone
from vit_jax.models import ProjectionHead, VisionTransformer

Params = dict[str, Any]


class Modules(NamedTuple):
  """The modules whose parameters a student or a teacher is made of."""

  backbone: VisionTransformer
  dino_head: ProjectionHead
  ibot_head: ProjectionHead


def modules(config: Any) -> Modules:
  """The modules of `config`, in its compute type."""

  def head(values: Any) -> ProjectionHead:
    return ProjectionHead(
      hidden=values.hidden,
      bottleneck=values.bottleneck,
      prototypes=values.prototypes,
      num_layers=values.num_layers,
      init_std=values.init_std,
      dtype=config.model.dtype,
    )

  return Modules(backbone=build_backbone(config), dino_head=head(config.dino), ibot_head=head(config.ibot))


def init_params(net: Modules, keys: tuple[jax.Array, jax.Array, jax.Array], image_size: int) -> Params:
  """Fresh parameters by sub-module.

  Args:
    keys: of backbone, DINO head and iBOT head.
    image_size: side of the image that the backbone is traced with.
  """
  image = jnp.zeros((1, image_size, image_size, net.backbone.in_channels))
  token = jnp.zeros((1, net.backbone.width))
  return {
    "backbone": net.backbone.init(keys[0], image)["params"],
    "dino_head": net.dino_head.init(keys[1], token)["params"],
    "ibot_head": net.ibot_head.init(keys[2], token)["params"],
  }


def scores(net: Modules, params: Params, head: str, tokens: Float[Array, "R D"]) -> Float[Array, "R K"]:
  """Prototype scores of tokens by the head of this name."""
  with jax.named_scope(head):
    return getattr(net, head).apply({"params": params[head]}, tokens)
