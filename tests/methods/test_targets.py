"""Targets by softmax centering: the centres follow the scores, are part of the state, and a resumed run has them."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.test_accumulation import abstract_batch, config_of, fresh_state
from tests.methods.test_dinov3 import batches
from vit_jax import losses, parallel
from vit_jax.checkpoints import Checkpoints
from vit_jax.methods.dino import dinov3
from vit_jax.methods.dino.student import SELF_DISTILLATION, Student
from vit_jax.methods.dino.targets import Centering, TeacherOutputs, assign

K = 8
SOFTMAX = {"dino.centering": "softmax", "ibot.centering": "softmax", "ibot.center_momentum": 0.8}


def outputs():
  rng = np.random.default_rng(0)
  cls, patches = (jnp.asarray(rng.standard_normal((n, K)), jnp.float32) for n in (4, 3))
  return TeacherOutputs(cls=cls, patches=patches, features=cls, similarity={})


def moved(config, centers, seen, batch, *, keep=False):
  return Centering.of(config).moved({"centers": centers}, seen, batch, jnp.array(keep))["centers"]


# Two masked crops: one with two masked patches, the other with one.
BATCH = {"mask_weights": jnp.array([[0.5, 0.5, 1.0]])}


def test_softmax_centering_is_the_softmax_of_what_exceeds_the_center():
  logits, center = outputs().cls, jnp.arange(K) / 10
  probs = losses.softmax_center(logits, center, 0.5)
  expected = np.exp((logits - center) / 0.5)
  np.testing.assert_allclose(probs, expected / expected.sum(1, keepdims=True), rtol=1e-5)
  assert losses.softmax_center(logits.astype(jnp.bfloat16), center, 0.5).dtype == jnp.float32


def test_a_batch_without_masks_leaves_the_patches_center_where_it_is():
  config, seen = config_of(1, 16, **SOFTMAX), outputs()
  seen, batch = seen._replace(patches=seen.patches[:0]), {"mask_weights": BATCH["mask_weights"][:, :0]}
  before = {head: jnp.full(K, 2.0) for head in ("dino", "ibot")}
  after = moved(config, before, seen, batch)
  np.testing.assert_array_equal(after["ibot"], before["ibot"])
  assert (after["dino"] != before["dino"]).all()


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
def test_a_step_without_masks_is_finite(centering):
  """Nobody masks where iBOT has no weight."""
  config = config_of(1, 16, **{"ibot.loss_weight": 0.0, "ibot.mask_probability": 0.0, "ibot.centering": centering})
  mesh = parallel.make_mesh(dict(replica=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(0, 2, x.shape).astype(x.dtype) for name, x in abstract_batch(config, mesh).items()}
  assert batch["mask_indices"].shape[-1] == 0
  state = fresh_state().replace(own=Centering.of(config).init())
  _, metrics = jax.jit(dinov3.make_step(config))(state, batch)
  assert np.isfinite(metrics["loss"]) and metrics["nonfinite"] == 0


def test_each_head_is_centred_as_configured():
  both, seen = {"dino": jnp.arange(K) / 10, "ibot": jnp.arange(K) / 5}, outputs()
  only = assign(seen, 0.1, {"ibot": both["ibot"]})
  np.testing.assert_allclose(only.cls.probs(), losses.sinkhorn_knopp(seen.cls, 0.1))
  np.testing.assert_allclose(only.patches.probs(), losses.softmax_center(seen.patches, both["ibot"], 0.1))
  assert Centering.of(config_of(1, 16)).init() == {}
  assert set(Centering.of(config_of(1, 16, **{"ibot.centering": "softmax"})).init()["centers"]) == {"ibot"}


def test_centers_move_towards_the_mean_of_crops_and_not_of_patches():
  config, seen = config_of(1, 16, **SOFTMAX), outputs()
  before = {head: jnp.full(K, 2.0) for head in ("dino", "ibot")}
  after = moved(config, before, seen, BATCH)
  np.testing.assert_allclose(after["dino"], 0.9 * 2 + 0.1 * seen.cls.mean(0), rtol=1e-6)
  per_crop = (seen.patches[:2].mean(0) + seen.patches[2]) / 2
  np.testing.assert_allclose(after["ibot"], 0.8 * 2 + 0.2 * per_crop, rtol=1e-6)
  kept = moved(config, before, seen, BATCH, keep=True)
  np.testing.assert_array_equal(kept["dino"], before["dino"])


@functools.cache
def stepped():
  """The step of a run with centres on eight devices, from its state, and what it makes of two batches."""
  config = config_of(1, 16, **SOFTMAX, **{"mesh.data": 4, "mesh.tensor": 2})
  mesh = parallel.make_mesh(config.mesh)
  state = fresh_state().replace(own=Centering.of(config).init())
  shardings = parallel.state_shardings(state, mesh)
  rows = [{name: batch[name] for name in abstract_batch(config, mesh)} for batch in batches()[:2]]
  with jax.set_mesh(mesh):
    step = jax.jit(dinov3.make_step(config), out_shardings=(shardings, None))
    states = [jax.device_put(state, shardings)]
    for batch in rows:
      states.append(step(states[-1], jax.device_put(batch, parallel.batch_sharding(mesh)))[0])
  return config, mesh, step, rows, states


@pytest.mark.slow
def test_a_step_uses_the_centers_before_it_and_spreads_them_like_prototypes():
  config, _, _, rows, states = stepped()
  one = jax.device_get(states[1])
  student = Student.of(config, SELF_DISTILLATION)
  seen = dinov3.teacher_outputs(student.net, fresh_state().teacher, student.normalization(rows[0]))
  expected = moved(config, Centering.of(config).init()["centers"], seen, rows[0])
  for head in ("dino", "ibot"):
    np.testing.assert_allclose(one.own["centers"][head], expected[head], rtol=1e-4, atol=1e-6)
    assert states[1].own["centers"][head].sharding.spec == jax.P("tensor")


@pytest.mark.slow
def test_a_resumed_run_has_its_centers(tmp_path):
  config, mesh, step, rows, states = stepped()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, states[1], {}, {}, {})
    checkpoints.wait()
    restored = checkpoints.restore(states[1]).state
  with jax.set_mesh(mesh):
    after, _ = step(restored, jax.device_put(rows[1], parallel.batch_sharding(mesh)))
  chex.assert_trees_all_equal(
    (after.own["centers"], after.student), (states[2].own["centers"], states[2].student)
  )
