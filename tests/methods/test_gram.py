"""Gram anchoring: when the gram teacher is loaded and refreshed, which patches are compared, what a step does."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.teacher import distilling, save_teacher
from tests.methods.test_dinov3 import batches, tiny
from tests.methods.test_dinov3 import run as run_on_mesh
from vit_jax import losses
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.methods.base import State
from vit_jax.methods.dino import dinov3, distillation, gram
from vit_jax.methods.dino.crops import flatten_crops
from vit_jax.methods.dino.student import SELF_DISTILLATION, Student


def settings(**values):
  flat = {"gram.source": "init"} | values
  return tiny(**flat)


def simulated(config, steps):
  """Per step: the gram teacher that the step uses, and whether there is one; the teacher of step i is the number i."""
  counters = {"gram_loaded": jnp.int32(0), "gram_refreshes": jnp.int32(0)}
  teacher = lambda i: {"backbone": {"w": jnp.float32(i)}}  # noqa: E731
  state = State(
    step=jnp.int32(0), student=None, teacher=teacher(0), own={"gram_teacher": {"w": jnp.float32(-1)}}, opt_state=None,
    key=None, counters=counters, model=None,
  )  # fmt: skip
  used, anchoring = [], gram.Anchoring.of(config)
  for i in range(steps):
    state = anchoring.load(state)
    used.append((int(state.own["gram_teacher"]["w"]), bool(anchoring.loaded(state))))
    state = anchoring.refresh(state.replace(step=state.step + 1, teacher=teacher(i + 1)))
  return used, {name: int(value) for name, value in state.counters.items()}


@pytest.mark.parametrize(("first", "every", "most"), [(None, 3, None), (7, 3, None), (6, 3, 1), (0, 1, 4), (9, 2, 2)])
def test_the_gram_teacher_is_refreshed_when_the_reference_would(first, every, most):
  rule = {"gram.refresh.every": f"{every} steps", "gram.refresh.max": most}
  if first is not None:
    rule["gram.refresh.first"] = f"{first} steps"
  used, counters = simulated(settings(**rule), 19)
  expected, current, n = [], -1, 0
  for it in range(19):
    expected.append((current, True))
    if (it + 1) >= (first or 0) and (it + 1) % every == 0 and (most is None or n < most):
      current, n = it + 1, n + 1
  assert used == expected
  assert counters["gram_refreshes"] == n


def test_load_at_copies_the_teacher_once_before_its_step():
  used, counters = simulated(settings(**{"gram.load_at": "4 steps"}), 7)
  assert used == [(-1, True)] * 4 + [(4, True)] * 3  # with a source there is a gram teacher from the start
  used, _ = simulated(settings(**{"gram.source": None, "gram.load_at": "4 steps"}), 7)
  assert used == [(-1, False)] * 4 + [(4, True)] * 3
  assert counters == {"gram_loaded": 1, "gram_refreshes": 0}


def test_refreshes_wait_for_the_first_gram_teacher():
  config = settings(**{"gram.source": None, "gram.load_at": "4 steps", "gram.refresh.every": "3 steps"})
  used, counters = simulated(config, 9)
  assert used == [(-1, False)] * 4 + [(4, True)] * 2 + [(6, True)] * 3
  assert counters == {"gram_loaded": 1, "gram_refreshes": 2}


def groups_of_patches():
  """Two loss groups of two images: student and teacher patches, masks that differ between crops, and their indices."""
  rng = np.random.default_rng(0)
  student, teacher = (jnp.asarray(rng.normal(size=(8, 6, 5)), jnp.float32) for _ in range(2))
  masks = np.zeros((4, 2, 6), bool)
  for group in range(2):
    flat = masks[2 * group : 2 * group + 2].reshape(-1)
    flat[rng.choice(24, 9, replace=False)] = True
  indices = np.stack([np.flatnonzero(masks[2 * i : 2 * i + 2]) for i in range(2)])
  return student, teacher, {"masks": jnp.asarray(masks), "mask_indices": jnp.asarray(indices)}


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
def test_each_loss_group_has_a_matrix_of_its_own_chosen_patches(tokens):
  student, teacher, batch = groups_of_patches()
  config = settings(**{"gram.tokens": tokens, "gram.per_image": False, "gram.stats": True})
  found = gram.Anchoring.of(config).terms(student, teacher, batch, groups=2)
  masks = np.asarray(batch["masks"]).reshape(2, -1)
  chosen = {"all": masks | True, "masked": masks, "unmasked": ~masks}

  def expected(kind):
    groups = [
      losses.gram(s.reshape(-1, 5)[pick], t.reshape(-1, 5)[pick], per_image=False)
      for s, t, pick in zip(student.reshape(2, -1, 5), teacher.reshape(2, -1, 5), chosen[kind], strict=True)
    ]
    return np.mean(groups)

  np.testing.assert_allclose(found["gram"], expected(tokens), rtol=1e-5)
  np.testing.assert_allclose(found["gram_masked"], expected("masked"), rtol=1e-5)
  np.testing.assert_allclose(found["gram_unmasked"], expected("unmasked"), rtol=1e-5)


def test_matrices_per_image_do_not_depend_on_groups_and_statistics_have_no_gradient():
  student, teacher, batch = groups_of_patches()
  config = settings(**{"gram.stats": True})
  anchoring = gram.Anchoring.of(config)
  terms = anchoring.terms(student, teacher, batch, groups=2)
  np.testing.assert_allclose(terms["gram"], losses.gram(student, teacher), rtol=1e-6)
  gradient = jax.grad(lambda s: anchoring.terms(s, teacher, batch, groups=2)["gram_masked"])(student)
  assert not np.any(gradient)


def test_without_anchoring_the_state_and_the_metrics_know_nothing_of_it():
  config = tiny()
  state = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  assert state.own == {} and set(state.counters) == {"nonfinite"}
  _, metrics = jax.eval_shape(dinov3.make_step(config), state, batches()[0])
  assert not [name for name in metrics if "gram" in name]


@pytest.mark.parametrize("size", [32, 48, 64])
def test_gram_crops_of_any_size_come_to_the_grid_of_the_student(size):
  config = settings()
  state = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  rows = {"global_crops": jax.ShapeDtypeStruct((4, 2, 32, 32, 3), jnp.float32)}
  rows["gram_crops"] = jax.ShapeDtypeStruct((4, 2, size, size, 3), jnp.float32)
  net = dinov3.modules(config)
  anchor = jax.eval_shape(lambda *given: gram.Anchoring.of(config).features(net.backbone, *given, None), state, rows)
  assert anchor.shape == (8, 16, 32)


@functools.cache
def run():
  """Six steps with everything that changes with the step: head warm-up, loading, refreshes."""
  config = settings(**{
    "gram.source": None, "gram.load_at": "2 steps", "gram.refresh.first": "3 steps", "gram.refresh.every": "2 steps",
    "gram.per_image": False, "gram.tokens": "masked", "gram.stats": True, "init.freeze_backbone_steps": "2 steps",
    "schedules.lr.start": 1e-3, "optim.freeze_last_layer": "0 steps", "model.drop_path": 0.0,
    "schedules.gram_loss_weight.peak": 3.0, "schedules.gram_loss_weight.end": 3.0,
  })  # fmt: skip
  states = [jax.jit(functools.partial(dinov3.init, config))(jax.random.key(0))]
  step, metrics = jax.jit(dinov3.make_step(config)), []
  for i in range(6):
    state, values = step(states[-1], batches()[i % 3])
    states.append(state)
    metrics.append(jax.device_get(values))
  return SimpleNamespace(config=config, states=states, metrics=metrics, step=step)


def test_eight_devices_give_one_devices_metrics():
  config = run().config.copy_and_resolve_references()
  config.mesh.update(data=2, fsdp=2, tensor=2)
  states, metrics = run_on_mesh(config, 8)
  for ours, expected in zip(metrics, run().metrics, strict=False):
    for name in ("loss", "gram", "gram_masked", "gram_unmasked", "grad_norm/backbone"):
      np.testing.assert_allclose(ours[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name)
  kernel = states[-1].own["gram_teacher"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.sharding == states[-1].teacher["backbone"]["blocks"]["mlp"]["fc1"]["kernel"].sharding
  assert not kernel.sharding.is_fully_replicated


def test_micro_batches_give_the_step_of_the_whole_batch():
  config = run().config.copy_and_resolve_references()
  config.micro_batches = 4
  state, values = jax.jit(dinov3.make_step(config))(run().states[3], batches()[0])
  for name in ("loss", "gram", "gram_masked", "gram_unmasked", "grad_norm/backbone"):
    np.testing.assert_allclose(values[name], run().metrics[3][name], rtol=1e-5, err_msg=name)
  chex.assert_trees_all_close(state.student, run().states[4].student, rtol=0, atol=1e-6)
  assert_same(state.own["gram_teacher"], state.teacher["backbone"])


@pytest.mark.parametrize(("source", "own"), [("ema", False), ("teacher", False), ("init", True)])
def test_a_distilled_student_is_anchored_too(tmp_path, source, own):
  config = distilling(save_teacher(tmp_path), f"gram.source={source}")
  state = jax.eval_shape(functools.partial(distillation.init, config), jax.random.key(0))
  rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of(config).items()}
  after, metrics = jax.eval_shape(distillation.make_step(config), state, rows)
  assert {"gram", "gram_loss_weight"} <= set(metrics)
  assert ("gram_teacher" in after.own) == own


def batch_of(config):
  source = open_source(config.data.source)
  with make_pipeline(source, distillation.views(config), batch_size=config.batch_size, seed=0, workers=0) as pipeline:
    return next(pipeline)


def assert_same(a, b):
  chex.assert_trees_all_equal(a, b)


def moved(a, b):
  return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_steps_load_then_refresh_the_gram_teacher_from_the_average():
  states = run().states
  for i, source in [
    (1, 0),
    (2, 0),
    (3, 2),
    (4, 4),
    (5, 4),
    (6, 6),
  ]:  # after step i: a copy of the teacher after `source`
    assert_same(states[i].own["gram_teacher"], states[source].teacher["backbone"])
  assert int(states[6].counters["gram_loaded"]) == 1
  assert int(states[6].counters["gram_refreshes"]) == 2


def test_the_term_counts_from_the_step_at_which_there_is_a_gram_teacher():
  metrics = run().metrics
  for i, values in enumerate(metrics):
    anchored = i >= 2
    assert values["gram_loss_weight"] == (3.0 if anchored else 0.0)
    assert (values["gram"] > 0) == (values["gram_unmasked"] > 0) == anchored
    parts = (
      run().config.dino.loss_weight * dino_part(values)
      + values["ibot"]
      + 0.1 * 2 * values["koleo"]
      + values["gram_loss_weight"] * values["gram"]
    )
    np.testing.assert_allclose(values["loss"], parts, rtol=1e-5)


def dino_part(values):
  local, pairs = 2 * 2, 2 * 1
  return (local * values["dino_local"] + pairs * values["dino_global"]) / (local + pairs)


def test_a_head_warm_up_holds_the_backbone_and_nothing_else():
  states = run().states
  for kind in ("student", "teacher"):
    params = [getattr(state, kind) for state in states]
    assert_same(params[0]["backbone"], params[2]["backbone"])
    assert moved(params[2]["backbone"], params[3]["backbone"])
    for head in ("dino_head", "ibot_head"):
      assert moved(params[0][head], params[1][head])
  assert moved(states[0].opt_state.mu["backbone"], states[1].opt_state.mu["backbone"])


def test_two_loss_groups_are_the_mean_of_each_alone():
  """With one matrix over the patches of a group, the term of the batch is the mean of the groups' terms."""
  ours, state = run(), run().states[3]
  learner = Student.of(ours.config, SELF_DISTILLATION)
  backbone, anchoring = learner.net.backbone, learner.anchoring
  rows = learner.normalization({name: jnp.asarray(x) for name, x in batches()[0].items()})
  anchor = anchoring.features(backbone, state, rows, None)
  student = backbone.apply({"params": state.student["backbone"]}, flatten_crops(rows["global_crops"])).patches
  whole = anchoring.terms(student, anchor, rows, groups=8)["gram"]
  parts = []
  for g in range(8):  # groups of two images, four crops
    part = {"masks": rows["masks"][2 * g : 2 * g + 2], "mask_indices": rows["mask_indices"][g : g + 1]}
    parts.append(anchoring.terms(student[4 * g : 4 * g + 4], anchor[4 * g : 4 * g + 4], part, groups=1)["gram"])
  np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-5)
