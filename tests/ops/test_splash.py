"""The splash kernel of TPUs: its values in Pallas's interpreter, what it takes, and that it is divided over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_jax.inspect.cost import executed
from vit_jax.ops import splash
from vit_jax.ops.attention import attention, plain_attention
from vit_jax.ops.splash import splash_attention, why_not_splash

TOKENS = 270  # more than a block of 256, and no multiple of anything


def inputs(*, batch=2, heads=2):
  draw = np.random.default_rng(0).standard_normal((4, batch, TOKENS, heads, 64))
  return [jnp.asarray(x, jnp.bfloat16) for x in draw]


def with_gradients(function, *qkv_and_gradient):
  *qkv, gradient = qkv_and_gradient
  y, back = jax.vjp(function, *qkv)
  return y, *back(gradient)


def close(got, expected):
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.02 * np.abs(np.float32(b)).max())  # 8 bits


def test_values_and_gradients_are_those_of_the_plain_attention():
  arrays = inputs()
  got = jax.jit(functools.partial(with_gradients, functools.partial(splash_attention, interpret=True)))(*arrays)
  close(got, with_gradients(plain_attention, *arrays))


def test_every_device_computes_its_own_rows_and_heads():
  arrays = inputs(batch=4)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  spec = jax.P("data", None, "tensor", None)
  with jax.set_mesh(mesh):
    got = jax.jit(functools.partial(splash_attention, spec=spec, interpret=True))(*arrays[:3])
  assert got.sharding.shard_shape(got.shape) == (2, TOKENS, 1, 64)
  close([got], [plain_attention(*arrays[:3])])


def test_it_is_for_long_sequences_on_tpus(monkeypatch):
  assert "TPUs" in why_not_splash((2, 1029, 6, 64), jnp.bfloat16)
  monkeypatch.setattr(splash, "platform", lambda: "tpu")
  assert why_not_splash((2, 1029, 6, 64), jnp.bfloat16) is None
  assert "201" in why_not_splash((2, 201, 6, 64), jnp.bfloat16)
  assert "float32" in why_not_splash((2, 1029, 6, 64), jnp.float32)
  assert "72 wide" in why_not_splash((2, 1029, 6, 72), jnp.bfloat16)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    assert "axis 0 of 6" in why_not_splash((6, 1029, 6, 64), jnp.bfloat16, jax.P("data"))
    assert why_not_splash((8, 1029, 6, 64), jnp.bfloat16, jax.P("data")) is None


def test_operations_of_the_kernel_are_counted_for_what_it_pads(monkeypatch):
  monkeypatch.setattr(splash, "platform", lambda: "tpu")
  shape = jax.ShapeDtypeStruct((3, 1000, 2, 64), jnp.bfloat16)
  jaxpr = jax.make_jaxpr(attention)(shape, shape, shape)
  assert "pallas_call" in str(jaxpr)
  assert executed(jaxpr.jaxpr) == pytest.approx(3 * 2 * 4 * 1024 * 1024 * 64, rel=0.01)
