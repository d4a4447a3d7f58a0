"""Distillation: what the teacher sees, what a student learns from it, several students at once."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.methods.teacher import WIDTH, distilling, save_teacher
from vit_jax import parallel
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.methods import frozen_teacher
from vit_jax.methods.dino import dinov3, distillation
from vit_jax.methods.dino.crops import Normalization, flatten_crops, gather_masked
from vit_jax.methods.dino.targets import assign
from vit_jax.optim import ema
from vit_jax.train.loop import mesh_context

# What lets a student learn within a few steps.
OWN = (
  "model.layer_scale=1.0", "schedules.lr.peak=1e-2", "schedules.lr.start=1e-2", "schedules.lr.warmup=0 steps",
  "optim.freeze_last_layer=0 steps", "optim.layerwise_decay=1.0",
)  # fmt: skip
COMMON = ("duration=40 steps", *(f"schedules.teacher_temperature.{part}=0.01" for part in ("start", "peak", "end")))
# A ConvNeXt of four blocks, whose patches are 32 pixels wide.
CONVNEXT = (
  "model.depth=None", "model.width=None", "model.num_heads=None", "model.mlp_hidden=None", "model.depths=(1,1,1,1)",
  "model.widths=(8,8,16,32)", "crops.global_size=64", "crops.local_size=32",
)  # fmt: skip
TWO = (
  *COMMON,
  "distillation.students=(a=configs/tiny.py,b=configs/tiny.py)",
  *(f"students.a.{key}" for key in OWN),
  "students.b.model.depth=3",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return save_teacher(tmp_path_factory.mktemp("teacher"))


def normalized(config, batch):
  return Normalization(config.augment.mean, config.augment.std)(batch)


def batches(config, num):
  pipeline = make_pipeline(
    open_source(config.data.source), distillation.views(config), batch_size=config.batch_size, seed=0, workers=0
  )
  try:
    return [next(pipeline) for _ in range(num)]
  finally:
    pipeline.close()


def start(config):
  """A state whose frozen teacher is that of the config."""
  state = jax.jit(functools.partial(distillation.init, config))(jax.random.key(config.seed))
  return state.replace(frozen=jax.tree.map(jnp.asarray, frozen_teacher(config).params()))


def run(config, num):
  """The states before and after each of some steps, and the metrics of each."""
  step = jax.jit(distillation.make_step(config))
  states, metrics = [start(config)], []
  for batch in batches(config, num):
    state, values = step(states[-1], batch)
    states.append(state)
    metrics.append(jax.device_get(values))
  return states, metrics


@pytest.fixture(scope="module")
def single(teacher):
  """One student: config, states, metrics."""
  config = distilling(teacher, *COMMON, *OWN)
  return config, *run(config, 40)


@pytest.fixture(scope="module")
def double(teacher):
  """Two students, of which one is the single one, for the first steps."""
  config = distilling(teacher, *TWO)
  return config, *run(config, 3)


def assert_equal(ours, expected):
  chex.assert_trees_all_equal(ours, expected)


def test_the_teacher_is_another_model_and_is_left_untouched(single):
  config, states, _ = single
  assert states[0].frozen["backbone"]["cls_token"].shape == (WIDTH,)
  assert states[0].student["backbone"]["cls_token"].shape == (config.model.width,)
  assert_equal(states[-1].frozen, states[0].frozen)


def test_the_average_of_the_student_is_kept_and_exported(single):
  _, states, metrics = single
  for before, after, values in zip(states, states[1:], metrics, strict=False):
    expected = ema.update(before.teacher, after.student, values["momentum"])
    chex.assert_trees_all_close(after.teacher, expected, rtol=0, atol=1e-6)
  model, params = distillation.export(states[-1])
  assert params is states[-1].teacher["backbone"]
  assert model.apply({"params": params}, jnp.zeros((1, 32, 32, 3))).cls.shape == (1, 32)
  assert not np.array_equal(params["patch_embed"]["kernel"], states[0].teacher["backbone"]["patch_embed"]["kernel"])


def test_the_losses_are_those_of_an_unmasked_student_at_the_masked_positions(single):
  config, states, metrics = single
  batch = normalized(config, batches(config, 1)[0])
  net = dinov3.modules(config)
  outputs = dinov3.teacher_outputs(frozen_teacher(config).modules, states[0].frozen, batch)
  targets = assign(outputs, metrics[0]["teacher_temperature"])
  apply = lambda name, x: getattr(net, name).apply({"params": states[0].student[name]}, x)  # noqa: E731
  features = apply("backbone", flatten_crops(batch["global_crops"]))
  scores = apply("ibot_head", gather_masked(features.patches, batch["mask_indices"]))
  cross_entropy = -jnp.sum(targets.patches.probs() * jax.nn.log_softmax(scores / 0.1), -1)
  ibot = jnp.sum(cross_entropy * batch["mask_weights"].reshape(-1)) / (2 * config.batch_size)
  np.testing.assert_allclose(metrics[0]["ibot"], ibot, rtol=1e-5)
  masks = batch["masks"].reshape(-1, batch["masks"].shape[-1])
  masked = net.backbone.apply(
    {"params": states[0].student["backbone"]}, flatten_crops(batch["global_crops"]), masks=masks
  )
  assert not np.allclose(features.patches, masked.patches)


def test_the_loss_falls(single):
  _, _, metrics = single
  values = [m["dino_local"] + m["dino_global"] + m["ibot"] for m in metrics]
  assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.1


def test_each_of_several_students_is_what_it_is_alone(single, double):
  _, alone, alone_metrics = single
  _, both, both_metrics = double
  for name in ("student", "teacher", "opt_state", "counters"):
    ours, expected = getattr(both[-1], name)["a"], getattr(alone[len(both) - 1], name)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
  for ours, expected in zip(both_metrics, alone_metrics, strict=False):
    for name in ("loss", "dino_local", "ibot", "koleo", "lr", "grad_norm/backbone", "feature_std"):
      np.testing.assert_allclose(ours[f"a/{name}"], expected[name], rtol=1e-4, atol=1e-6)
    assert ours["teacher_entropy"] == pytest.approx(expected["teacher_entropy"], rel=1e-6)
  assert both[-1].student["b"]["backbone"]["blocks"]["norm1"]["scale"].shape[0] == 3
  model, _ = distillation.export(both[-1], "b")
  assert model.depth == 3


def uses_of_width(config, width):
  """How many operations of the step have an operand with this number of channels."""

  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "optimization_barrier":
        continue  # hands the frozen parameters on
      total += any(getattr(value.aval, "shape", ())[-1:] == (width,) for value in equation.invars)
      for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
          inner = getattr(inner, "jaxpr", inner)
          total += count(inner) if hasattr(inner, "eqns") else 0
    return total

  state = jax.eval_shape(functools.partial(distillation.init, config), jax.random.key(0))
  return count(jax.make_jaxpr(distillation.make_step(config))(state, batches(config, 1)[0]).jaxpr)


def test_several_students_share_one_pass_of_the_teacher(single, double):
  once = uses_of_width(single[0], WIDTH)
  assert once > 20
  assert uses_of_width(double[0], WIDTH) == once


def test_the_next_student_waits_for_the_one_before(double):
  """What keeps the memory of several students that of the largest (the CPU's compiler drops these barriers)."""
  config = double[0]
  state = jax.eval_shape(functools.partial(distillation.init, config), jax.random.key(0))
  jaxpr = jax.make_jaxpr(distillation.make_step(config))(state, batches(config, 1)[0]).jaxpr
  barriers = [equation for equation in jaxpr.eqns if equation.primitive.name == "optimization_barrier"]
  crops = (config.batch_size, 2, 32, 32, 3)
  assert any(var.aval.shape == crops for barrier in barriers for var in barrier.outvars)  # the second student's batch


@pytest.mark.parametrize("patch_size", [pytest.param(4, marks=pytest.mark.slow), 16])
def test_the_teachers_images_are_resized_to_the_grid_of_the_student(teacher, patch_size):
  config = distilling(teacher, **{"model.patch_size": patch_size})
  assert distillation.views(config).mask_grid == (32 // patch_size,) * 2
  states, metrics = run(config, 1)
  batch = normalized(config, batches(config, 1)[0])
  size = 32 // patch_size * 8  # the teacher has patches of 8 pixels
  resized = [
    np.stack([np.asarray(Image.fromarray(np.asarray(crop[..., c]), "F").resize((size, size), Image.BILINEAR))
              for c in range(3)], -1)
    for crop in flatten_crops(batch["global_crops"])
  ]  # fmt: skip
  crops = np.stack(resized).reshape(config.batch_size, 2, size, size, 3)
  np.testing.assert_allclose(distillation.resized(batch["global_crops"], size), crops, atol=1e-5)
  seen = batch | {"global_crops": jnp.asarray(crops)}
  outputs = dinov3.teacher_outputs(frozen_teacher(config).modules, states[0].frozen, seen)
  targets = assign(outputs, metrics[0]["teacher_temperature"])
  entropy = -jnp.sum(targets.cls.probs() * targets.cls.logs(), -1).mean()
  np.testing.assert_allclose(metrics[0]["teacher_entropy"], entropy, rtol=1e-5)
  assert np.isfinite(metrics[0]["loss"])


@pytest.mark.slow
def test_eight_devices_distil_as_one(teacher):
  sharded = distilling(teacher, *TWO, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "loss_group_size": 2})
  mesh = parallel.make_mesh(sharded.mesh, jax.devices()[:8])
  state = start(sharded)
  shardings = parallel.state_shardings(state, mesh)
  specs = {str(leaf.spec) for leaf in jax.tree.leaves((shardings.frozen, shardings.opt_state["b"].mu))}
  assert any("fsdp" in spec for spec in specs) and any("tensor" in spec for spec in specs)
  batch = batches(sharded, 1)[0]
  step = distillation.make_step(sharded)
  _, expected = jax.jit(step)(state, batch)
  with mesh_context(mesh):
    _, ours = jax.jit(step, out_shardings=(shardings, None))(
      jax.device_put(state, shardings), jax.device_put(batch, parallel.batch_sharding(mesh))
    )
  for name in expected:
    np.testing.assert_allclose(ours[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_convnext_of_stride_32_learns_from_a_vit(teacher):
  config = distilling(teacher, "model.name=dinov3_convnext_tiny", "model.patch_size=None", *CONVNEXT)
  assert distillation.views(config).mask_grid == (2, 2)
  states, metrics = run(config, 1)
  assert np.isfinite(metrics[0]["loss"])
  assert states[1].student["backbone"]["stage0"]["layers"]["mlp"]["fc1"]["kernel"].shape[0] == 1
