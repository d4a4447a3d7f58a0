"""Accumulated steps equal whole ones, for the memory of a micro-batch."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.test_dinov3 import batches, tiny
from vit_jax import parallel
from vit_jax.data.views.multi_crop.masks import masked_patches
from vit_jax.methods.accumulation import MicroBatches
from vit_jax.methods.dino import dinov3
from vit_jax.models.features import Draws
from vit_jax.models.positions import RopeDraws
from vit_jax.train.loop import mesh_context

NUM_STEPS = 2


def config_of(num, koleo, **overrides):
  """Drop path, moved rotary positions, masks; 8 loss groups of 2 images; KoLeo among `koleo` images.

  Deep enough (see tiny()) that no image skips attention in every block: such class tokens are equal, and KoLeo's
  logarithm of their distance is rounding.
  """
  own = {"model.rope.jitter": 1.5, "schedules.lr.start": 1e-3, "koleo.group_size": koleo}
  return tiny(**own, micro_batches=num, **overrides)


@functools.cache
def fresh_state():
  """A state whose features differ between images by more than rounding, as those of a fresh one do not."""
  state = jax.device_get(jax.jit(functools.partial(dinov3.init, config_of(1, 16)))(jax.random.key(0)))

  def spread(path, leaf):
    return 10 * leaf if "kernel" in jax.tree_util.keystr(path) else leaf

  student, teacher = (jax.tree_util.tree_map_with_path(spread, params) for params in (state.student, state.teacher))
  return state.replace(student=student, teacher=teacher)


def abstract_batch(config, mesh):
  """Shapes of a batch, spread over the mesh."""
  views, size, group = dinov3.views(config), config.batch_size, config.loss_group_size
  masked = masked_patches(group, views.mask_grid, views.mask_probability, views.mask_ratio)
  crops = lambda number, side: ((size, number, side, side, 3), jnp.uint8)  # noqa: E731
  shapes = {
    "global_crops": crops(2, views.global_size),
    "local_crops": crops(views.local_number, views.local_size),
    "masks": ((size, 2, views.mask_grid[0] * views.mask_grid[1]), bool),
    "mask_indices": ((size // group, masked), jnp.int32),
    "mask_weights": ((size // group, masked), jnp.float32),
  }
  sharding = parallel.batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def compiled(config, num_devices):
  """(the step of a config on so many devices, its mesh, the shardings of its state)."""
  mesh = parallel.make_mesh(config.mesh, jax.devices()[:num_devices])
  sizes = {key: config[key] for key in ("batch_size", "loss_group_size", "micro_batches")}
  parallel.check_batch(mesh, **sizes)
  shardings = parallel.state_shardings(fresh_state(), mesh)
  state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), fresh_state(), shardings)
  step = jax.jit(dinov3.make_step(config), out_shardings=(shardings, None))
  with mesh_context(mesh):
    return step.lower(state, abstract_batch(config, mesh)).compile(), mesh, shardings


class Steps(NamedTuple):
  """A few steps, and the program that made them."""

  states: list[Any]
  metrics: list[dict[str, Any]]
  compiled: Any


@functools.cache
def steps(num, koleo=16, num_devices=1, **overrides):
  config = config_of(num, koleo, **{name.replace("__", "."): value for name, value in overrides.items()})
  step, mesh, shardings = compiled(config, num_devices)
  states, metrics = [jax.device_put(fresh_state(), shardings)], []
  for rows in batches()[:NUM_STEPS]:
    batch = {name: rows[name] for name in abstract_batch(config, mesh)}
    state, values = step(states[-1], jax.device_put(batch, parallel.batch_sharding(mesh)))
    states.append(state)
    metrics.append(jax.device_get(values))
  return Steps(states, metrics, step)


def assert_same_steps(ours, expected, tolerance=3e-4):
  """Metrics to float32 rounding; parameters and moments to a share of the largest value of their array."""
  for a, b in zip(ours.metrics, expected.metrics, strict=True):
    assert set(a) == set(b)
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=1e-6, err_msg=name)
  for a, b in zip(ours.states, expected.states, strict=True):
    pairs = zip(jax.tree_util.tree_leaves_with_path(trained(a)), jax.tree.leaves(trained(b)), strict=True)
    for (path, got), want in pairs:
      largest = float(np.max(np.abs(want), initial=0.0))
      np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest, err_msg=str(path))


def trained(state):
  return jax.device_get((state.student, state.teacher, state.opt_state))


CASES = [
  pytest.param(4, 16, id="4"),
  pytest.param(2, 16, id="2", marks=pytest.mark.slow),
  pytest.param(4, 2, id="4, KoLeo within loss groups", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num", "koleo"), CASES)
def test_accumulated_steps_equal_whole_ones(num, koleo):
  assert_same_steps(steps(num, koleo), steps(1, koleo))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained(steps(1, koleo).states[-1]), trained(fresh_state()))
  assert min(jax.tree.leaves(moved[0]["backbone"]["blocks"]["mlp"])) > 1e-5  # it would show


@pytest.mark.slow
def test_accumulated_steps_on_eight_devices_equal_whole_ones_on_one():
  sharded = steps(2, 16, 8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert_same_steps(sharded, steps(1), tolerance=5e-4)


def test_four_micro_batches_need_clearly_less_memory():
  whole, parts = (steps(num).compiled.memory_analysis().temp_size_in_bytes for num in (1, 4))
  assert parts < 0.5 * whole


def test_no_tokens_move_between_devices():
  """Only KoLeo's class tokens do, of which all devices need all: micro-batches are spread over the devices."""
  width, batch, found = 32, 32, []
  step, *_ = compiled(config_of(2, batch, batch_size=batch), 8)
  for shape in re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)", step.as_text()):
    found.append([int(size) for size in shape.split(",")])
  assert any(sizes[-2:] == [batch, width] for sizes in found)  # the pattern finds KoLeo's gather
  assert all(np.prod(sizes) <= 2 * batch * max(batch, width) for sizes in found), found


def test_split_gives_every_micro_batch_a_share_of_every_device_and_merge_undoes_it():
  micro = MicroBatches(num=2, groups=8)
  tree = {"images": jnp.arange(16), "masked": jnp.arange(24.0).reshape(8, 3), "rows": jnp.arange(64).reshape(32, 2)}
  parts = micro.split(tree)
  # Eight groups of two images over four devices: [0 1 2 3], [4 5 6 7], …; one group of each device in each part.
  np.testing.assert_array_equal(parts["images"], [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])
  np.testing.assert_array_equal(parts["masked"][1], tree["masked"][1::2])
  chex.assert_trees_all_equal(micro.merge(parts), tree)


def test_draws_are_split_like_the_groups_they_are_for():
  kept = jnp.arange(3 * 2 * 8 * 5).reshape(3, 2, 8, 5)
  rope = RopeDraws(shift=jnp.arange(3 * 8 * 2).reshape(3, 8, 2))
  (split,) = MicroBatches(num=4, groups=8).split_draws([Draws(kept=kept, rope=rope)])
  assert split.kept.shape == (4, 3, 2, 2, 5) and split.rope.shift.shape == (4, 3, 2, 2)
  np.testing.assert_array_equal(split.kept[1], kept[:, :, 1::4])
  np.testing.assert_array_equal(split.rope.shift[1], rope.shift[:, 1::4])


def test_coupled_terms_get_the_gradient_of_the_whole_batch():
  """For any function: a term of all rows at once beside a mean over rows, against plain differentiation."""
  rng = np.random.default_rng(0)
  x, w = jnp.asarray(rng.standard_normal((12, 3)), jnp.float32), jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
  features = lambda w, part: jnp.tanh(part[0] @ w)  # noqa: E731
  across = lambda f: (jnp.linalg.norm(jnp.cumsum(f, axis=0)), {"rows": jnp.float32(f.shape[0])})  # noqa: E731

  def local(w, part):
    return jnp.mean(features(w, part) ** 3), {"cube": jnp.mean(part[0])}, features(w, part)

  whole = (x, [])  # no random draws

  micro = MicroBatches(num=3, groups=6)
  loss, terms, seen, grads = micro.value_and_grad(local, across, w, whole, first_pass=features)
  expected = jax.value_and_grad(lambda w: local(w, whole)[0] + across(features(w, whole))[0])(w)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
  np.testing.assert_allclose(grads, expected[1], rtol=1e-5)
  np.testing.assert_allclose(seen, features(w, whole), rtol=1e-6)
  np.testing.assert_allclose(terms["cube"], jnp.mean(x), atol=1e-7)
  assert terms["rows"] == 12 and grads.dtype == jnp.float32


def test_groups_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="micro_batches=3: must divide the 8 loss groups"):
    MicroBatches(num=3, groups=8)


def test_micro_batches_that_are_uneven_over_devices_are_refused():
  mesh = parallel.make_mesh(dict(replica=1, data=8, fsdp=1, tensor=1))
  parallel.check_batch(mesh, batch_size=64, loss_group_size=2, micro_batches=4)
  with pytest.raises(parallel.MeshError, match=r"micro_batches=4: .* 2 loss groups of one device.*loss_group_size=2"):
    parallel.check_batch(mesh, batch_size=64, loss_group_size=4, micro_batches=4)
