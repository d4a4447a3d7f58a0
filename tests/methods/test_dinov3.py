"""What must hold of the training step whatever the numbers."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.methods.dino import dinov3
from vit_jax.train.loop import mesh_context


def tiny(**overrides):
  c = configs.load("configs/tiny.py")
  c.batch_size, c.loss_group_size, c.koleo.group_size = 16, 2, 16
  c.model.depth, c.model.drop_path, c.model.layer_scale, c.model.rope.rescale = 4, 0.25, 0.5, 2.0
  c.optim.eps = 1e-3  # Adam's first steps are otherwise the signs of gradients that are only rounding
  c.duration = "20 steps"
  c.update_from_flattened_dict(overrides)
  configs.validate(c)
  return configs.resolve(c, num_examples=64)


@functools.cache
def batches(num=3):
  config = tiny()
  pipeline = make_pipeline(open_source(config.data.source), dinov3.views(config), batch_size=16, seed=0, workers=0)
  try:
    return [next(pipeline) for _ in range(num)]
  finally:
    pipeline.close()


def run(config, num_devices, num=3):
  """States and metrics of a few steps on a mesh of this many simulated devices."""
  mesh = parallel.make_mesh(config.mesh, jax.devices()[:num_devices])
  shapes = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  shardings = parallel.state_shardings(shapes, mesh)
  state = jax.jit(functools.partial(dinov3.init, config), out_shardings=shardings)(jax.random.key(0))
  step = jax.jit(dinov3.make_step(config), out_shardings=(shardings, None))
  states, metrics = [state], []
  for rows in batches()[:num]:
    batch = jax.device_put(rows, parallel.batch_sharding(mesh))
    with mesh_context(mesh):
      state, values = step(states[-1], batch)
    states.append(state)
    metrics.append(jax.device_get(values))
  return states, metrics


@functools.cache
def one_device():
  return run(tiny(), 1)


def test_eight_devices_give_one_devices_losses():
  """On other meshes: tests/parallel/test_step.py."""
  _, ours = run(tiny(), 8)
  _, expected = one_device()
  for a, b in zip(ours, expected, strict=True):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(ours[0]["loss"], expected[0]["loss"], rtol=1e-5)


def test_teacher_is_the_average_of_students():
  states, metrics = one_device()
  for before, after, values in zip(states, states[1:], metrics, strict=False):
    m = values["momentum"]
    expected = jax.tree.map(lambda t, s, m=m: m * t + (1 - m) * s, before.teacher, after.student)
    chex.assert_trees_all_close(after.teacher, expected, rtol=0, atol=1e-6)
  first, last = states[0].student["dino_head"]["fc1"]["kernel"], states[-1].student["dino_head"]["fc1"]["kernel"]
  assert not np.array_equal(first, last)


def test_the_first_step_of_a_warm_up_from_zero_moves_nothing():
  states, _ = one_device()
  chex.assert_trees_all_equal(states[0].student, states[1].student)


def test_the_frozen_last_layer_waits_while_its_moments_go_on():
  config = tiny(**{"optim.freeze_last_layer": "2 steps", "schedules.lr.start": 1e-3})
  states, _ = run(config, 1, num=3)
  last = lambda state: state.student["dino_head"]["last_layer"]["kernel"]  # noqa: E731
  np.testing.assert_array_equal(last(states[0]), last(states[2]))
  assert not np.array_equal(last(states[2]), last(states[3]))
  assert np.any(states[1].opt_state.mu["dino_head"]["last_layer"]["kernel"])


def test_a_nonfinite_loss_is_skipped_and_counted():
  config = tiny()
  state = jax.jit(functools.partial(dinov3.init, config))(jax.random.key(0))
  broken = state.replace(student=jax.tree.map(lambda x: x * jnp.nan, state.student))
  after, metrics = jax.jit(dinov3.make_step(config))(broken, batches()[0])
  assert metrics["nonfinite"] == 1 and after.step == 1
  np.testing.assert_array_equal(after.teacher["backbone"]["cls_token"], state.teacher["backbone"]["cls_token"])


def test_masked_count_is_constant_per_group():
  shapes = {rows["mask_indices"].shape for rows in batches()}
  assert len(shapes) == 1
  for rows in batches():
    per_group = rows["masks"].reshape(8, -1).sum(1)
    assert set(per_group) == {rows["mask_indices"].shape[1]}


def test_logical_constraints_reach_the_step():
  """Without the mesh context, constraints silently do nothing (memory then grows with the device count)."""
  mesh = parallel.make_mesh(dict(replica=1, data=-1, fsdp=1, tensor=1))
  constrained = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", None, "width")))
  with mesh_context(mesh):
    text = constrained.lower(jnp.ones((8, 2, 4))).as_text()
  assert "sharding" in text
