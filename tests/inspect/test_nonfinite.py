"""The first value that is not finite is found where it is made."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.inspect.nonfinite import find_nonfinite


def layers(weights, x):
  """A stack of four layers in a loop, then a masked softmax."""

  @jax.checkpoint
  def layer(x, w):
    with jax.named_scope("blocks"):
      with jax.named_scope("attn"):
        x = jax.nn.gelu(x @ w)
      with jax.named_scope("mlp"):
        return jnp.exp(x) - 1, None

  with jax.named_scope("backbone"):
    x, _ = jax.lax.scan(layer, x, weights)
  with jax.named_scope("loss"):
    masked = jnp.where(jnp.eye(3, dtype=bool), -jnp.inf, x @ x.T)  # an intended infinity
    return jnp.sum(jax.nn.softmax(masked) ** 2)


def inputs():
  rng = np.random.default_rng(0)
  return jnp.asarray(0.1 * rng.standard_normal((4, 5, 5)), jnp.float32), jnp.ones((3, 5))


def test_a_healthy_computation_has_none_and_keeps_its_result():
  weights, x = inputs()
  function = jax.value_and_grad(layers)
  result, events = find_nonfinite(function, weights, x)
  assert events == []
  expected = function(weights, x)
  chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_nan_in_a_parameter_shows_in_the_layer_that_uses_it(layer):
  weights, x = inputs()
  _, events = find_nonfinite(jax.value_and_grad(layers), weights.at[layer, 1, 1].set(jnp.nan), x)
  assert str(events[0]) == f"backbone/blocks[{layer}]/attn: dot_general"


def test_an_overflow_shows_where_it_is_made():
  weights, x = inputs()
  _, events = find_nonfinite(layers, weights.at[0].set(0.2).at[1].set(30.0), x)
  assert str(events[0]) == "backbone/blocks[1]/mlp: exp"


def test_a_gradient_that_alone_is_not_finite_is_found():
  def loss(x):
    with jax.named_scope("koleo"):
      return jnp.sqrt(jnp.sum(jnp.square(x)))

  value, events = find_nonfinite(jax.value_and_grad(loss), jnp.zeros(3))
  assert value[0] == 0.0 and events[0].where == "koleo"


def test_a_loop_that_runs_backwards_is_told_in_the_order_of_time():
  def loss(x, w):
    def layer(x, w):
      with jax.named_scope("blocks"):
        return jnp.abs(x) ** w, None

    return jnp.sum(jax.lax.scan(layer, x, w)[0])

  _, events = find_nonfinite(jax.grad(loss), jnp.zeros(3), jnp.array([1.0, 0.5, 1.0, 0.5]))
  backward = [event.where for event in events if event.backward]
  assert backward[0] == "blocks[3]"
