"""The kernel for short attention on TPUs: its values in Pallas's interpreter, what it takes, and that it is divided."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from vit_jax.models import VisionTransformer
from vit_jax.models.positions import Rope
from vit_jax.ops import attention, fused_attention
from vit_jax.ops.attention import self_attention
from vit_jax.ops.fused_attention import why_not_fused

interpreted = functools.partial(fused_attention.fused_attention, interpret=True)
CASES = {  # batch, tokens, heads, width of a head, tokens that are rotated, type of the tables, groups of rows
  "local crops": (3, 37, 4, 64, 36, "float32", 1),
  "registers": (2, 25, 4, 32, 20, "float32", 1),
  "wide heads, reference's tables": (2, 41, 2, 128, 36, "bfloat16", 1),
  "no rotation": (2, 17, 2, 64, None, "float32", 1),
  "groups": (6, 17, 2, 64, 16, "float32", 2),
}


def inputs(batch, tokens, heads, width, rotated, dtype, groups=1):
  rng = np.random.default_rng(0)
  qkv = jnp.asarray(rng.standard_normal((batch, tokens, 3, heads, width)), jnp.bfloat16)
  gradient = jnp.asarray(rng.standard_normal((batch, tokens, heads, width)), jnp.bfloat16)
  if rotated is None:
    return qkv, None, gradient
  angles = np.tile(rng.uniform(-3, 3, (groups, rotated, width // 2)), 2)
  angles = angles if groups > 1 else angles[0]
  return qkv, (jnp.asarray(np.sin(angles), dtype), jnp.asarray(np.cos(angles), dtype)), gradient


def with_gradients(function, qkv, tables, gradient):
  y, back = jax.vjp(lambda qkv: function(qkv, tables), qkv)
  return y, *back(gradient)


def close(got, expected):
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.015 * np.abs(np.float32(b)).max())  # 8 bits


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_rotation_and_plain_attention(case):
  arrays = inputs(*case)
  close(jax.jit(functools.partial(with_gradients, interpreted))(*arrays), with_gradients(self_attention, *arrays))


@pytest.mark.parametrize("case", ["local crops", "groups"])
def test_rows_that_fill_no_block_are_computed_like_the_others(monkeypatch, case):
  arrays = inputs(*CASES[case])
  expected = with_gradients(interpreted, *arrays)
  monkeypatch.setattr(fused_attention, "_BLOCK_BYTES", 2 * 3 * 2 * 48 * 128)  # two rows of 128 channels
  for a, b in zip(with_gradients(interpreted, *arrays), expected, strict=True):
    np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_device_computes_its_own_rows_and_heads(groups):
  arrays = inputs(4, 37, 4, 64, 36, "float32", groups)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  spec = jax.P("data", None, None, "tensor", None)
  with jax.set_mesh(mesh):
    y, gradient = jax.jit(functools.partial(with_gradients, functools.partial(interpreted, spec=spec)))(*arrays)
  assert y.sharding.shard_shape(y.shape) == (2, 37, 2, 64)
  assert gradient.sharding.shard_shape(gradient.shape) == (2, 37, 3, 2, 64)
  close([y, gradient], with_gradients(self_attention, *arrays))


def test_a_model_computes_the_same_with_it(monkeypatch):
  """Several resolutions, registers, drop path, random positions, recomputation: all that meets it in training."""
  model = VisionTransformer(
    width=128, depth=2, num_heads=2, num_registers=2, drop_path=0.3, rope=Rope(rescale=2.0), remat="dots",
    dtype=jnp.bfloat16,
  )  # fmt: skip
  crops = [jax.random.normal(jax.random.key(i), (4, side, side, 3)) for i, side in enumerate((64, 32))]
  params = model.init(jax.random.key(0), crops[0])["params"]
  rngs = {"drop_path": jax.random.key(1), "rope": jax.random.key(2)}

  @jax.value_and_grad
  def loss(params):
    tokens = [f.prenorm for f in model.apply({"params": params}, crops, train=True, rngs=rngs, groups=2)]
    return sum(jnp.mean(jnp.square(x.astype(jnp.float32))) for x in tokens)

  expected = loss(params)
  monkeypatch.setattr(attention, "why_not_fused", lambda *_: None)
  monkeypatch.setattr(attention, "fused_attention", interpreted)
  assert "backward_kernel" in str(jax.make_jaxpr(loss)(params))
  close(jax.tree.leaves(loss(params)), jax.tree.leaves(expected))


def test_a_device_on_which_it_is_wrong_or_fails_gets_plain_attention(monkeypatch, caplog):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  reasons = []

  @jax.jit
  def program(x):  # asked in the middle of a program for a mesh, as by a model
    reasons.append(attention.why_no_fused.__wrapped__(interpret=True))
    return x + 1

  with jax.set_mesh(mesh):
    program(jnp.zeros(8))
    assert reasons == [None] and not caplog.text
    monkeypatch.setattr(attention, "fused_attention", lambda *args, **_: 1.1 * interpreted(*args))
    program(jnp.zeros(16))
    assert "off by" in reasons[1] and "Attention by XLA" in caplog.text
    monkeypatch.setattr(attention, "fused_attention", lambda *args, **_: 1 / 0)
    program(jnp.zeros(24))
    assert reasons[2] == "it fails on an example: division by zero"


def test_it_is_for_short_sequences_on_tpus(monkeypatch):
  assert "TPUs" in why_not_fused((2, 201, 3, 6, 64), jnp.bfloat16)
  monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
  for heads, width in ((6, 64), (1, 128), (4, 32)):
    assert why_not_fused((2, 201, 3, heads, width), jnp.bfloat16) is None
  assert "1029" in why_not_fused((2, 1029, 3, 6, 64), jnp.bfloat16)
  assert "float32" in why_not_fused((2, 201, 3, 6, 64), jnp.float32)
  for heads, width in ((16, 72), (3, 64)):
    assert f"{heads} of {width}" in why_not_fused((2, 201, 3, heads, width), jnp.bfloat16)
  mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    assert "axis 3 of 6" in why_not_fused((2, 201, 3, 6, 64), jnp.bfloat16, jax.P(None, None, None, "tensor"))
    assert "1 of 64" in why_not_fused((2, 201, 3, 4, 64), jnp.bfloat16, jax.P(None, None, None, "tensor"))
    assert why_not_fused((2, 201, 3, 8, 64), jnp.bfloat16, jax.P(None, None, None, "tensor")) is None


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_it_compiles_for_tpus(topology):
  pytest.importorskip("libtpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  longest, narrow = (2, 511, 8, 128, 504, "bfloat16"), (3, 201, 8, 32, None, "float32")
  for case in (CASES["local crops"], CASES["groups"], longest, narrow):
    arrays = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
      inputs(*case),
    )
    step = jax.jit(functools.partial(with_gradients, fused_attention.fused_attention)).lower(*arrays)
    assert step.compile().as_text().count("tpu_custom_call") == 2  # forward and backward
