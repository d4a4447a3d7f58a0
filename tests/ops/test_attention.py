"""Attention: the values of the definition, and which implementation takes what."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.ops import attention as ops
from vit_jax.ops.attention import attention, plain_attention, why_not_cudnn


def inputs(dtype, *, head_dim=8):
  draw = np.random.default_rng(0).standard_normal((4, 2, 13, 3, head_dim))
  return [jnp.asarray(x, dtype) for x in 3.0 * draw]


def definition(query, key, value):
  logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 4e-2)])
def test_values_and_gradients_are_those_of_the_definition(dtype, tolerance):
  *qkv, gradient = inputs(dtype)
  y, back = jax.vjp(attention, *qkv)
  want, want_back = jax.vjp(definition, *(x.astype(jnp.float32) for x in qkv))
  assert y.dtype == dtype
  for got, expected in zip((y, *back(gradient)), (want, *want_back(gradient.astype(jnp.float32))), strict=True):
    np.testing.assert_allclose(np.float32(got), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_large_logits_do_not_overflow():
  query, key, value, _ = inputs(jnp.float32)
  y, back = jax.vjp(plain_attention, 1e3 * query, key, value)
  chex.assert_tree_all_finite((y, back(y)))


def test_cudnn_is_asked_only_for_what_it_can_do(monkeypatch):
  assert why_not_cudnn((2, 201, 6, 64), jnp.bfloat16) is None
  assert "float32" in why_not_cudnn((2, 201, 6, 64), jnp.float32)
  assert "60 wide" in why_not_cudnn((2, 201, 6, 60), jnp.bfloat16)
  assert "256 wide" in why_not_cudnn((2, 201, 6, 256), jnp.float16)
  assert "3 axes" in why_not_cudnn((201, 6, 64), jnp.bfloat16)
  asked = []
  monkeypatch.setattr(ops.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(ops, "why_no_cudnn", lambda: None)
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, implementation: asked.append(implementation))
  attention(*inputs(jnp.bfloat16)[:3])
  attention(*inputs(jnp.float32)[:3])
  assert asked == ["cudnn"]


class Gpu:
  """A device as JAX describes a GPU."""

  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


@pytest.mark.parametrize(("capability", "why"), [("7.5", "has 7.5"), ("gfx90a", "has gfx90a"), ("9.0", "cuDNN")])
def test_a_gpu_without_cudnns_attention_gets_the_plain_one(monkeypatch, capability, why):
  """Of the last, the library is missing: here it is."""
  ops.why_no_cudnn.cache_clear()
  monkeypatch.setattr(ops.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(ops.jax, "local_devices", lambda: [Gpu(capability)])
  assert why in ops.why_no_cudnn()
  qkv = inputs(jnp.bfloat16)[:3]
  np.testing.assert_array_equal(np.float32(attention(*qkv)), np.float32(plain_attention(*qkv)))
  ops.why_no_cudnn.cache_clear()
