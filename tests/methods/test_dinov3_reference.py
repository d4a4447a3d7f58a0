"""The training step against the reference's: losses, gradients, AdamW, EMA, five steps, two loss groups; the same with
Gram anchoring to a gram teacher that sees larger crops, and to the EMA teacher."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from tests.methods import reference_step as reference
from vit_jax.methods.dino import dinov3
from vit_jax.methods.dino.student import SELF_DISTILLATION, Student
from vit_jax.methods.dino.targets import assign

STEPS = ("step_base", "step_gram")
TERMS = {
  "loss": "total_loss",
  "dino_local": "dino_local_crops_loss",
  "dino_global": "dino_global_crops_loss",
  "koleo": "koleo_loss",
  "ibot": "ibot_loss",
}


def terms(case):
  """Our names and the reference's of what a step logs."""
  return TERMS | ({"gram": "gram_loss"} if "gram" in case else {})


@functools.cache
def run(name="step_base"):
  """The five steps of a golden run: settings, states after each step, metrics of each step."""
  golden = Golden(f"{name}_result")
  config = reference.build_config(golden.settings)
  step = jax.jit(dinov3.make_step(config))
  states, metrics = [reference.build_state(config, name)], []
  for i in range(5):
    state, values = step(states[-1], reference.build_batch(config, name, i))
    states.append(state)
    metrics.append(values)
  return golden, config, states, metrics


def objective(config, state, batch, temperature):
  """student -> (loss, terms) of a batch."""
  learner, net = Student.of(config, SELF_DISTILLATION), dinov3.modules(config)
  batch = learner.normalization(batch)
  targets = assign(dinov3.teacher_outputs(net, state.teacher, batch, keep_patches=learner.shares_patches), temperature)
  if learner.anchoring is not None:
    targets = targets._replace(anchor=learner.anchoring.features(net.backbone, state, batch, targets.anchor))
  weights = jnp.float32(1), jnp.float32(config.schedules.gram_loss_weight.peak)
  draws = learner.draw(state.student, batch, jax.random.key(0))

  def losses(student):
    total, terms, cls = learner.loss(student, targets, batch, draws, *weights)
    koleo, more = learner.objective.spread(cls, num_global=2)
    return total + koleo, terms | more

  return losses


def gradients(config, state, batch, temperature):
  losses = objective(config, state, batch, temperature)
  return jax.jit(jax.grad(losses, has_aux=True))(state.student)[0]


def assert_trees_close(tree, expected, *, of_maximum, only=None):
  for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
    scale = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(leaf, want, rtol=0, atol=of_maximum * scale + 1e-12, err_msg=str(path))


@pytest.mark.parametrize("golden_step", STEPS)
def test_losses_of_five_steps_equal_the_reference(golden_step):
  golden, _, _, metrics = run(golden_step)
  for ours, theirs in terms(golden_step).items():
    values = [float(m[ours]) for m in metrics]
    np.testing.assert_allclose(values, golden[f"steps_f64/{theirs}"], rtol=2e-6, err_msg=ours)
  for name in ("backbone", "dino_head", "ibot_head"):
    values = [float(m[f"grad_norm/{name}"]) for m in metrics]
    np.testing.assert_allclose(values, golden[f"steps_f64/grad_norm_{name}"], rtol=1e-5)


@pytest.mark.parametrize("golden_step", STEPS)
def test_schedules_of_five_steps_equal_the_reference(golden_step):
  golden, _, _, metrics = run(golden_step)
  names = {"lr": "lr", "weight_decay": "wd", "momentum": "momentum", "teacher_temperature": "teacher_temp"}
  for ours, theirs in names.items():
    np.testing.assert_allclose([float(m[ours]) for m in metrics], golden[f"steps/{theirs}"], rtol=1e-6)


@pytest.mark.parametrize("golden_step", STEPS)
def test_gradients_of_the_first_step_equal_the_reference(golden_step):
  golden, config, states, metrics = run(golden_step)
  batch = reference.build_batch(config, golden_step, 0)
  grads = gradients(config, states[0], batch, metrics[0]["teacher_temperature"])
  assert_trees_close(grads, reference.build_params(config, golden.under("grad0")), of_maximum=1e-5)


@pytest.mark.parametrize("golden_step", STEPS)
def test_student_after_adamw_equals_the_reference(golden_step):
  golden, config, states, metrics = run(golden_step)
  expected = reference.build_params(config, golden.under("student1"))
  difference = jax.tree.map(lambda a, b: jnp.abs(a - b).ravel(), states[1].student, expected)
  error = jnp.concatenate(jax.tree.leaves(difference)) / metrics[0]["lr"]
  # Adam's first step is about +-lr per element, whatever the gradient: rounding shows where the gradient is near zero.
  assert np.quantile(error, 0.999) < 1e-3
  assert np.max(error) < 0.05


def named_leaves(config, params):
  """{reference name: array} of a parameter tree."""
  from vit_jax import weights

  out = {}
  for name, module in dinov3.modules(config)._asdict().items():
    state_dict = weights.to_state_dict(params[name], module)
    out |= {f"{name}.{key}": value for key, value in state_dict.items()}
  return out


@pytest.mark.parametrize("golden_step", STEPS)
def test_teacher_after_the_average_and_student_after_five_steps_equal_the_reference(golden_step):
  golden, config, states, metrics = run(golden_step)
  for prefix, params, tolerance in (("teacher1", states[1].teacher, 1e-3), ("student5", states[5].student, 0.02)):
    ours = named_leaves(config, params)
    for key, want in golden.under(prefix).items():
      np.testing.assert_allclose(ours[key], want, rtol=0, atol=tolerance * float(metrics[0]["lr"]), err_msg=key)


@pytest.mark.parametrize("golden_step", STEPS)
def test_norms_of_every_parameter_follow_the_reference_for_five_steps(golden_step):
  golden, config, states, _ = run(golden_step)
  for kind in ("student", "teacher"):
    for i in range(5):
      ours = named_leaves(config, getattr(states[i + 1], kind))
      values = [np.linalg.norm(ours[name]) for name in golden.settings[f"{kind}_param_names"]]
      np.testing.assert_allclose(values, golden[f"steps/{kind}_norms"][i], rtol=2e-5)


@pytest.mark.parametrize("case", ["koleo_local", "koleo_global"])
def test_two_loss_groups_equal_two_processes_of_the_reference(case):
  golden, settings = Golden("step_base_2proc"), Golden("step_base_result").settings
  config = reference.build_config(settings, groups=2)
  if case == "koleo_global":
    config.koleo.group_size = config.batch_size
  state = reference.build_state(config, "step_base")
  batch = reference.build_batch(config, "step_base", 0, 1)
  temperature = golden.settings["teacher_temp"]
  total, terms = objective(config, state, batch, temperature)(state.student)
  for ours, theirs in TERMS.items():
    value = total if ours == "loss" else terms[ours]
    ranks = [golden[f"{case}/{theirs}/rank{r}"] for r in range(2)]
    np.testing.assert_allclose(value, np.mean(ranks), rtol=1e-5, err_msg=ours)
  ours = named_leaves(config, gradients(config, state, batch, temperature))
  for key, want in golden.under(f"{case}/grad").items():
    np.testing.assert_allclose(ours[key], want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=key)


VARIANTS = {
  "default": {},
  "ignore_diag_flipped": {"dino.ignore_diagonal": False},
  "koleo_top2": {"koleo.topk": 2},
  "local_reweighted": {
    "schedules.local_loss_weight.start": 0.3,
    "schedules.local_loss_weight.peak": 1.0,
    "schedules.local_loss_weight.end": 0.5,
    "schedules.local_loss_weight.warmup": "8 steps",
  },
  "gram_from_ema_all_img": {
    "gram.source": "ema",
    "schedules.gram_loss_weight.peak": 1.5,
    "schedules.gram_loss_weight.end": 1.5,
  },
  "gram_from_ema_masked": {
    "gram.source": "ema",
    "gram.per_image": False,
    "gram.tokens": "masked",
    "gram.remove_negative": "both",
  },
  "gram_from_ema_unmasked_nonorm": {
    "gram.source": "ema",
    "gram.per_image": False,
    "gram.tokens": "unmasked",
    "gram.normalize": False,
  },
  "rope_bf16": {},
}


@pytest.mark.parametrize("case", VARIANTS)
def test_losses_of_changed_settings_equal_the_reference(case):
  golden = Golden("step_base_variants").under(case)
  dtype = "bfloat16" if case == "rope_bf16" else "float32"
  config = reference.build_config(Golden("step_base_result").settings, rope_dtype=dtype)
  config.update_from_flattened_dict(VARIANTS[case])
  state, batch = reference.build_state(config, "step_base"), reference.build_batch(config, "step_base", 0)
  _, metrics = jax.jit(dinov3.make_step(config))(state, batch)
  for ours, theirs in terms(case).items():
    np.testing.assert_allclose(metrics[ours], golden[theirs], rtol=1e-5, err_msg=ours)
  for name in ("backbone", "dino_head", "ibot_head"):
    np.testing.assert_allclose(metrics[f"grad_norm/{name}"], golden[f"grad_norm_{name}"], rtol=1e-4)
