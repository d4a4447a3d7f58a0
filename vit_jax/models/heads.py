"""The projection head of DINO and iBOT."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import INIT_STD, Linear
from vit_jax.ops.activations import gelu
from vit_jax.ops.normalize import l2_normalize, upcast


class ProjectionHead(nn.Module):
  """MLP with GELU, L2-normalised bottleneck, then one linear score per prototype (no bias, no weight norm).

  Attributes:
    hidden: channels of the hidden layers.
    bottleneck: channels of the normalised bottleneck.
    prototypes: K, number of scores.
    num_layers: linear layers up to the bottleneck.
    mlp_bias: whether these have a bias.
    init_std: standard deviation of all initial weights. The smaller a head, the larger it may be: with
      bottleneck ** -0.5 the prototypes start at length 1, so that the first targets already differ.
    dtype, param_dtype: compute and parameter types.
  """

  hidden: int
  bottleneck: int
  prototypes: int
  num_layers: int = 3
  mlp_bias: bool = True
  init_std: float = INIT_STD
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self) -> None:
    types = dict(init_std=self.init_std, dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
    sizes = [self.hidden] * (self.num_layers - 1) + [self.bottleneck]
    self.mlp = [
      Linear((size,), use_bias=self.mlp_bias, name=f"fc{i}", **types) for i, size in enumerate(sizes, start=1)
    ]
    # Prototypes are spread over more axes than their scores: left to itself, XLA would gather them over all of these.
    self.last_layer = Linear((self.prototypes,), use_bias=False, kernel_axes=(None, "prototypes"), **types)

  def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N K"]:
    """Prototype scores of features."""
    return self.scores(self.project(x))

  def project(self, x: Float[Array, "N D"]) -> Float[Array, "N bottleneck"]:
    """The L2-normalised bottleneck (normalised in float32)."""
    for i, layer in enumerate(self.mlp):
      x = layer(x if i == 0 else gelu(x))
      x = nn.with_logical_constraint(x, ("batch", "mlp" if i == 0 and self.num_layers > 1 else "width"))
    return l2_normalize(upcast(x)).astype(x.dtype)

  def scores(self, z: Float[Array, "N bottleneck"]) -> Float[Array, "N K"]:
    """Scores of an already normalised bottleneck."""
    return nn.with_logical_constraint(self.last_layer(z), ("batch", "prototypes"))
