"""Schedules against the reference's, both systems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax.optim.schedules import Schedule, scale_lr

GOLDEN = Golden("schedules")
RULES = {"sqrt_wrt_1024": "sqrt_1024", "linear_wrt_256": "linear_256"}


def build(settings):
  """Our schedules for the reference's settings, by the reference's names."""
  epoch, total = settings["epoch_length"], settings["epochs"] * settings["epoch_length"]
  factor = scale_lr(settings["batch_per_device"] * settings["world_size"], RULES[settings["lr_scaling"]])

  def make(start, peak, end, warmup, version, truncate=0.0):
    warmup = warmup * epoch
    return Schedule(start, peak, end, warmup, total - warmup, version=version, truncate=truncate)

  if "v2" in settings:
    values = {name: make(s["start"], s["peak"], s["end"], s["warmup_epochs"], 2) for name, s in settings["v2"].items()}
    s = settings["v2"]["lr"]
    values["lr"] = make(s["start"], s["peak"] * factor, s["end"] * factor, s["warmup_epochs"], 2)
    return values, s["freeze_last_layer_epochs"] * epoch
  s, cut = settings["v1"], settings["v1"]["schedule_trunc_extra"]
  return {
    "lr": make(0.0, s["lr"] * factor, s["min_lr"], s["warmup_epochs"], 1, cut),
    "weight_decay": make(s["weight_decay"], s["weight_decay"], s["weight_decay_end"], 0, 1, cut),
    "momentum": make(s["momentum_teacher"], s["momentum_teacher"], s["final_momentum_teacher"], 0, 1, cut),
    "teacher_temp": make(
      s["warmup_teacher_temp"], s["teacher_temp"], s["teacher_temp"], s["warmup_teacher_temp_epochs"], 1
    ),
  }, s["freeze_last_layer_epochs"] * epoch


@pytest.mark.parametrize("case", sorted(GOLDEN.settings))
def test_schedules_equal_the_reference(case):
  g = GOLDEN.under(case)
  steps = g["iterations"]
  schedules, frozen = build(GOLDEN.settings[case])
  for name, schedule in schedules.items():
    np.testing.assert_allclose(schedule(steps), g[name], rtol=1e-9, atol=1e-15, err_msg=name)
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(traced, g[name], rtol=2e-5, atol=2e-7 * schedule.peak, err_msg=f"{name} in float32")
  np.testing.assert_allclose(
    np.where(steps < frozen, 0, schedules["lr"](steps)), g["last_layer_lr"], rtol=1e-9, atol=1e-15
  )


def test_the_cosine_ends_before_the_run_when_it_is_shorter():
  schedule = Schedule(0.0, 0.0, 2.0, warmup=10, cosine=5)
  assert schedule(10) == 0.0
  assert np.all(schedule(np.arange(14, 100)) == 2.0)


def test_a_cosine_of_one_step_is_at_its_peak():
  schedule, steps = Schedule(0.0, 1.0, 5.0, warmup=2, cosine=1), np.arange(5)
  for values in (schedule(steps), jax.vmap(schedule)(jnp.arange(5))):
    np.testing.assert_array_equal(values, [0, 0.5, 1, 5, 5])


def test_lr_scaling_has_the_reference_factors():
  np.testing.assert_allclose([scale_lr(b, "sqrt_1024") for b in (256, 1024, 4096)], [2, 4, 8])
  assert scale_lr(512, "linear_256") == 2
  with pytest.raises(ValueError, match="optim.lr_scaling"):
    scale_lr(512, "cubic")
