"""The feed-forward branch of a block, of several token arrays: MLP with GELU, exact or approximated, or SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import INIT_STD, Linear
from vit_jax.ops.activations import gelu

Tokens = tuple[Float[Array, "B T D"], ...]


class GeluMlp(nn.Module):
  """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

  activation: ClassVar[Callable[[Array], Array]] = staticmethod(gelu)

  hidden: int
  use_bias: bool = True
  init_std: float = INIT_STD
  quantization: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, xs: Tokens) -> Tokens:
    names = ("use_bias", "init_std", "quantization", "dtype", "param_dtype")
    types = {name: getattr(self, name) for name in names}
    ys = Linear((self.hidden,), name="fc1", kernel_axes=(None, "mlp"), **types)(xs)  # [B, T, F]
    ys = tuple(self.activation(nn.with_logical_constraint(y, ("batch", None, "mlp"))) for y in ys)
    return Linear((xs[0].shape[-1],), name="fc2", kernel_axes=("mlp", None), **types)(ys)


class GeluTanhMlp(GeluMlp):
  """The same with the tanh approximation of GELU (SigLIP, the JAX ViTs of Google)."""

  activation: ClassVar[Callable[[Array], Array]] = staticmethod(jax.nn.gelu)


class SwiGlu(nn.Module):
  """down(silu(gate(x)) * up(x)) (Shazeer 2020); the reference calls the maps w3, w1, w2."""

  hidden: int
  use_bias: bool = True
  init_std: float = INIT_STD
  quantization: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, xs: Tokens) -> Tokens:
    names = ("use_bias", "init_std", "quantization", "dtype", "param_dtype")
    types = {name: getattr(self, name) for name in names}
    gates, ups = (Linear((self.hidden,), name=name, kernel_axes=(None, "mlp"), **types)(xs) for name in ("gate", "up"))
    ys = (jax.nn.silu(gate) * up for gate, up in zip(gates, ups, strict=True))  # [B, T, F]
    ys = tuple(nn.with_logical_constraint(y, ("batch", None, "mlp")) for y in ys)
    return Linear((xs[0].shape[-1],), name="down", kernel_axes=("mlp", None), **types)(ys)


MLPS = {"gelu": GeluMlp, "gelu_tanh": GeluTanhMlp, "swiglu": SwiGlu}
