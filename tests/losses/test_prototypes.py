"""The losses from the bottleneck on are those of whole score matrices, whatever the chunk, with their gradients."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import losses, parallel
from vit_jax.losses import chunks
from vit_jax.losses.assignment import balanced, centered
from vit_jax.losses.prototypes import cross_entropies

UNITS, STUDENT, TEACHER, BOTTLENECK, K = 8, 3, 2, 6, 40


def inputs(dtype=jnp.float32, units=UNITS):
  """Bottleneck, prototypes, teacher scores and weights."""
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.standard_normal((units, STUDENT, BOTTLENECK)), dtype)
  kernel = jnp.asarray(rng.standard_normal((BOTTLENECK, K)), jnp.float32)
  logits = jnp.asarray(rng.standard_normal((units * TEACHER, K)), dtype)
  weights = jnp.asarray(rng.uniform(size=(units, STUDENT, TEACHER)), jnp.float32)
  return z, kernel, logits, weights


def targets_of(logits):
  return balanced(logits, 0.1).reshape(-1, TEACHER)


def expected(z, kernel, logits, weights):
  """From whole arrays of scores and probabilities."""
  log_student = jax.nn.log_softmax(jnp.einsum("usd,dk->usk", z, kernel) / 0.1)
  probs = losses.sinkhorn_knopp(logits, 0.1).reshape(*z.shape[:1], TEACHER, K)
  return -jnp.sum(weights * jnp.einsum("usk,utk->ust", log_student, probs, precision="highest"))


def total(z, kernel, logits, weights, chunk=None):
  return 3.0 * cross_entropies(z, kernel, targets_of(logits), weights, chunk=chunk).total


@pytest.mark.parametrize("chunk", [None, 4, 3, 1], ids=["whole", "even", "overlapping", "single"])
def test_values_and_gradients_are_those_of_whole_score_matrices(chunk):
  args = inputs()
  got = jax.jit(jax.value_and_grad(functools.partial(total, chunk=chunk), argnums=(0, 1, 2, 3)))(*args)
  want = jax.value_and_grad(lambda *a: 3.0 * expected(*a), argnums=(0, 1))(*args)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  for ours, theirs in zip(got[1], want[1], strict=False):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  assert not any(np.any(constant) for constant in got[1][2:])  # targets and weights have none
  np.testing.assert_allclose(total(*args, chunk=chunk), want[0], rtol=1e-6)  # the same without a gradient


@pytest.mark.parametrize("chunk", [None, 3])
def test_single_cross_entropies_are_those_of_the_public_losses(chunk):
  z, kernel, logits, weights = inputs()
  found = cross_entropies(z, kernel, targets_of(logits), weights, chunk=chunk)
  scores, probs = jnp.einsum("usd,dk->usk", z, kernel), losses.sinkhorn_knopp(logits, 0.1).reshape(UNITS, TEACHER, K)
  dino = losses.dino(scores.swapaxes(0, 1), probs.swapaxes(0, 1))
  np.testing.assert_allclose(jnp.mean(found.crossed), dino, rtol=1e-6)
  ibot = losses.ibot(scores[:, 0], probs[:, 0], weights[:, 0, 0], num_crops=4)
  np.testing.assert_allclose(jnp.sum(found.crossed[:, 0, 0] * weights[:, 0, 0]) / 4, ibot, rtol=1e-6)
  logs = jax.nn.log_softmax(scores / 0.1)
  np.testing.assert_allclose(found.own, -jnp.sum(jnp.exp(logs) * logs, -1), atol=5e-4)  # of scores around 100


def test_no_array_of_all_scores_is_made_where_they_are_many(monkeypatch):
  """Also without being asked for: by size."""
  args = inputs(units=64)
  whole = 64 * STUDENT * K

  def largest():
    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*args))
    return f"f32[1,64,{STUDENT},{K}]" in text

  assert largest()
  monkeypatch.setattr(chunks, "CHUNK_SCORES", whole // 8)
  assert not largest()


def test_half_precision_scores_lose_in_float32():
  args = inputs(jnp.bfloat16)
  found = cross_entropies(*args[:2], targets_of(args[2]), args[3], chunk=3)
  assert all(x.dtype == jnp.float32 for x in found)
  grads = jax.grad(total, argnums=(0, 1))(*args)
  assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
  wide = [x.astype(jnp.float32) for x in args]
  np.testing.assert_allclose(found.total, expected(*wide), rtol=5e-3)
  want = jax.grad(lambda *a: 3.0 * expected(*a), argnums=(0, 1))(*wide)
  for ours, theirs in zip(grads, want, strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def test_devices_have_chunks_of_their_own_and_the_same_values():
  args = inputs()
  mesh = parallel.make_mesh({"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
  function = jax.value_and_grad(functools.partial(total, chunk=1), argnums=(0, 1))
  rows, columns = jax.P(("data", "fsdp")), jax.P(None, ("tensor", "fsdp"))
  spread = [
    jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(args, (rows, columns, rows, rows), strict=True)
  ]
  with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.ACTIVATION_AXES):
    compiled = jax.jit(function).lower(*spread).compile()
  got, want = compiled(*spread), function(*args)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_an_assignment_that_is_not_finite_says_so():
  logits = inputs()[2]
  for make in (lambda x: balanced(x, 0.1), lambda x: centered(x, jnp.zeros(K), 0.1)):
    assert make(logits).finite()
    assert not make(logits.at[1, 1].set(jnp.nan)).finite()
    assert not make(logits.at[1, 1].set(jnp.inf)).finite()


def test_balancing_is_safe_where_a_sample_and_a_prototype_are_far_from_all_others():
  """The sums without maxima: neither may vanish."""
  logits = np.random.default_rng(1).standard_normal((16, K)).astype(np.float32)
  logits[3] -= 500.0
  logits[:, 5] -= 800.0
  logits[7, 9] += 300.0
  probs = losses.sinkhorn_knopp(jnp.asarray(logits), 0.05)
  exact = np.asarray(logits, np.float64) / 0.05
  sample = np.zeros((16, 1))
  for _ in range(3):
    prototype = -np.logaddexp.reduce(exact + sample, axis=0, keepdims=True)
    sample = -np.logaddexp.reduce(exact + prototype, axis=1, keepdims=True)
  # Float32 keeps the exponents, up to 16,000 here, to a thousandth.
  np.testing.assert_allclose(probs, np.exp(exact + prototype + sample), rtol=6e-3, atol=1e-9)
