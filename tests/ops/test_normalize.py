"""Layer normalisation against the formula differentiated automatically, and what its gradient keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.ops.normalize import layer_norm

EPS = 1e-5


def plain(x, scale, bias):
  y = x if bias is None else x - jnp.mean(x, -1, keepdims=True)
  y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + EPS) * scale
  return y if bias is None else y + bias


@pytest.fixture(scope="module", params=["layernorm", "rmsnorm"])
def inputs(request):
  rng = np.random.default_rng(0)
  x = (3.0 + 2.0 * rng.normal(size=(4, 5, 24))).astype(np.float32)
  scale, bias, gradient = (rng.normal(size=shape).astype(np.float32) for shape in ((24,), (24,), x.shape))
  return x, scale, bias if request.param == "layernorm" else None, gradient


def test_values_and_gradients_are_those_of_the_formula(inputs):
  *arguments, gradient = inputs
  with jax.enable_x64(True):
    wide = [None if a is None else np.asarray(a, np.float64) for a in arguments]
    expected, pull = jax.vjp(plain, *wide)
    slopes = pull(np.asarray(gradient, np.float64))
  found, pull = jax.vjp(lambda *a: layer_norm(*a, EPS, jnp.float32), *arguments)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  for a, b in zip(pull(gradient), slopes, strict=True):
    if b is not None:
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_rounded_once_and_its_gradient_keeps_the_input_only(inputs):
  x, scale, bias, gradient = inputs
  narrow = jnp.asarray(x, jnp.bfloat16)
  norm = lambda x, scale, bias: layer_norm(x, scale, bias, EPS, jnp.bfloat16)  # noqa: E731
  found, pull = jax.vjp(norm, narrow, scale, bias)
  exact = layer_norm(narrow, scale, bias, EPS, jnp.float32)
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
  slopes = pull(jnp.asarray(gradient, jnp.bfloat16))
  assert [s.dtype for s in slopes[:2]] == [jnp.bfloat16, jnp.float32]
  kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= x.size]
  assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
