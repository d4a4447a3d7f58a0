"""The feed-forward branch of a block: MLP with GELU, exact or approximated, or SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import INIT_STD, Linear
from vit_jax.ops.activations import gelu


class GeluMlp(nn.Module):
  """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

  activation: ClassVar[Callable[[Array], Array]] = staticmethod(gelu)

  hidden: int
  use_bias: bool = True
  init_std: float = INIT_STD
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    types = dict(use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype, param_dtype=self.param_dtype)
    y = Linear((self.hidden,), name="fc1", **types)(x)  # [B, T, F]
    y = nn.with_logical_constraint(y, ("batch", None, "mlp"))
    return Linear((x.shape[-1],), name="fc2", **types)(self.activation(y))


class GeluTanhMlp(GeluMlp):
  """The same with the tanh approximation of GELU (SigLIP, the JAX ViTs of Google)."""

  activation: ClassVar[Callable[[Array], Array]] = staticmethod(jax.nn.gelu)


class SwiGlu(nn.Module):
  """down(silu(gate(x)) * up(x)) (Shazeer 2020); the reference calls the maps w3, w1, w2."""

  hidden: int
  use_bias: bool = True
  init_std: float = INIT_STD
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    types = dict(use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype, param_dtype=self.param_dtype)
    gate = Linear((self.hidden,), name="gate", **types)(x)  # [B, T, F]
    up = Linear((self.hidden,), name="up", **types)(x)  # [B, T, F]
    y = nn.with_logical_constraint(jax.nn.silu(gate) * up, ("batch", None, "mlp"))
    return Linear((x.shape[-1],), name="down", **types)(y)


MLPS = {"gelu": GeluMlp, "gelu_tanh": GeluTanhMlp, "swiglu": SwiGlu}
