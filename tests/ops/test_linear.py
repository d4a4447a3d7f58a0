"""The product of a linear map: values and gradients are those of automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.ops.linear import joined, linear

SHAPES = {
  "wider": ((8,), (24,)),
  "narrower": ((24,), (8,)),
  "onto several axes": ((8,), (3, 2, 4)),
  "from several axes": ((6, 4), (8,)),
  "from several axes onto more": ((2, 4), (3, 3)),
}


@pytest.mark.parametrize("inputs, outputs", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("leading", [(5,), (3, 7)], ids=["rows", "tokens"])
def test_gradients_are_those_of_automatic_differentiation(leading, inputs, outputs):
  rng = np.random.default_rng(0)
  x, kernel, pull = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((*leading, *inputs), (*inputs, *outputs), (*leading, *outputs))
  )

  def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel, len(inputs))

  def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = linear(x.reshape(*leading, -1), joined(kernel, len(inputs)))
    return y.reshape(*leading, *outputs)

  found, back = jax.vjp(ours, x, kernel)
  wanted, plain_back = jax.vjp(plain, x, kernel)

  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  for found, wanted in zip(back(pull), plain_back(pull), strict=True):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_stay_sixteen_bits():
  x, kernel = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
  y, back = jax.vjp(linear, x, kernel)
  assert {y.dtype, *(gradient.dtype for gradient in back(y))} == {jnp.dtype(jnp.bfloat16)}


def test_gradient_of_the_weights_transposes_no_wide_tokens():
  """What the gradient is spelled out for: of 512 tokens of 24 channels in a gradient, none is copied into columns."""
  x, kernel = jnp.ones((4, 128, 8)), jnp.ones((8, 24))

  def transposed(product) -> bool:
    loss = lambda x, kernel: jnp.sum(jnp.sin(product(jnp.cos(x), kernel)))  # noqa: E731
    return "f32[24,512]" in jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()

  assert transposed(jnp.matmul)  # else this test says nothing any more, and XLA does without our help
  assert not transposed(linear)


def test_heads_and_their_channels_are_one_axis_on_a_tpu(monkeypatch):
  kernel = jnp.arange(2 * 4 * 3 * 5 * 6).reshape(2, 4, 3, 5, 6)
  assert joined(kernel, 2).shape == (8, 3, 5, 6)
  monkeypatch.setattr("vit_jax.ops.linear.platform", lambda: "tpu")
  assert joined(kernel, 2).shape == (8, 3, 30) and joined(kernel, 4).shape == (120, 6)
