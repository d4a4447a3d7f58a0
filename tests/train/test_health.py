"""Tests of vit_jax/train/health.py with made-up runs: sick ones are named once, healthy ones are left in peace."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from vit_jax.config import default
from vit_jax.train.health import PATIENCE, Health

K = 4096
TOTAL = 1000


def metrics_of(progress, rng, **changes):
  """A healthy run: untrained features all alike, then spreading; targets sharpening; losses falling from log K."""
  uniform = math.log(K)
  noise = 1 + 0.02 * rng.standard_normal()
  metrics = {
    "loss": (3 - 1.2 * progress) * uniform * noise - 0.4,
    "dino_local": (1 - 0.3 * progress) * uniform * noise,
    "dino_global": (1 - 0.4 * progress) * uniform * noise,
    "ibot": 0.5 * (1 - 0.5 * progress) * uniform * noise,
    "koleo": 0.5 - progress,
    "grad_norm/backbone": 2.0 * noise,
    "teacher_entropy": (0.999 - 0.7 * progress) * uniform,
    "teacher_marginal_entropy": 0.99 * uniform,
    "prototype_usage": 0.9,
    "feature_std": min(1.0, 0.03 + 3 * progress),
    "feature_rank": 1.2 + 40 * progress,
    "patch_cls_similarity": 0.9 - 0.6 * min(1.0, 3 * progress),
  }
  return metrics | {name: value(progress) if callable(value) else value for name, value in changes.items()}


def run(changes=None, *, from_step=0, every=10, knn=lambda p: 0.1 + 0.2 * p, prototypes=K, batch_size=64):
  health = Health(TOTAL, batch_size=batch_size, prototypes={"dino": prototypes, "ibot": prototypes})
  rng = np.random.default_rng(0)
  alarms = []
  for step in range(0, TOTAL + 1, every):
    alarms += health.check(step, metrics_of(step / TOTAL, rng, **(changes or {} if step >= from_step else {})))
    if step % 100 == 0:
      alarms += health.check(step, {"knn/top1": knn(step / TOTAL)})
  assert alarms == health.alarms
  return alarms


def kinds(alarms):
  return [alarm.kind for alarm in alarms]


def test_a_healthy_run_is_left_in_peace():
  assert run() == []


def test_a_run_whose_loss_rises_with_the_teacher_temperature_is_healthy():
  uniform = math.log(K)
  loss = {name: lambda p: (0.7 + 0.2 * p) * uniform for name in ("dino_local", "dino_global")}
  assert run(loss | {"loss": lambda p: 3 * (0.7 + 0.15 * p) * uniform}) == []


def test_sharp_targets_of_a_small_batch_are_healthy():
  # 128 crops, each with its own sharp target, use 128 of 65536 prototypes: that is all they can.
  alarms = run({"prototype_usage": 100 / 65536, "teacher_entropy": 0.3}, prototypes=65536)
  assert alarms == []


def test_a_negative_loss_is_healthy():
  assert run({"loss": lambda p: -1.0 + 0.5 * p}) == []


@pytest.mark.parametrize("changes", [{"feature_std": 0.01}, {"feature_rank": 1.1}])
def test_collapse_is_named_once_after_some_patience(changes):
  alarms = run(changes, from_step=500)
  assert kinds(alarms) == ["collapse"]
  assert alarms[0].step == 500 + 10 * (PATIENCE - 1)
  assert "koleo.loss_weight" in alarms[0].message


def test_features_that_spread_slowly_are_no_collapse():
  # Measured on the quick start: an untrained teacher has feature_std 1e-4, and feature_rank 2 for a long while.
  assert run({"feature_std": lambda p: 1e-4 + 0.2 * p, "feature_rank": lambda p: 2.5 - 1.3 * p}) == []


def test_a_single_odd_line_is_no_alarm():
  assert run({"feature_std": lambda p: 0.0 if round(p * 100) % 5 == 0 else 0.7}) == []


def test_few_prototypes_in_use_with_sharp_targets_is_prototype_collapse():
  alarms = run({"prototype_usage": 1.5 / K, "teacher_entropy": 0.01}, from_step=300)
  assert kinds(alarms) == ["prototypes"]
  assert "1.5 of 4096 prototypes" in alarms[0].message


def test_uniform_targets_late_in_the_run_are_named():
  uniform = math.log(K)
  at_uniform = {name: 0.9999 * uniform for name in ("teacher_entropy", "dino_local", "dino_global")}
  alarms = run(at_uniform, knn=lambda p: 0.1 + 0.01 * p)
  assert kinds(alarms) == ["stuck"] and alarms[0].step >= 0.5 * TOTAL
  # Losses at log K say nothing while k-NN accuracy rises.
  assert run(at_uniform) == []
  # Below log K by a little more, as a small model on little data may be while it learns: no alarm.
  below = {name: 0.98 * uniform for name in at_uniform}
  assert run(below, knn=lambda p: 0.1 + 0.01 * p) == []


def test_a_student_worse_than_the_uniform_guess_diverges():
  alarms = run({"dino_global": 1.3 * math.log(K)}, from_step=400)
  assert kinds(alarms) == ["divergence"] and "worse than guessing uniformly" in alarms[0].message


def test_the_uniform_guess_of_ibot_counts_the_unmasked_crops():
  alarms = run({"ibot": 0.6 * math.log(K)}, from_step=400)
  assert kinds(alarms) == ["divergence"] and f"guessing uniformly ({0.5 * math.log(K):.3f})" in alarms[0].message


def test_patches_that_become_like_the_class_token_are_named():
  alarms = run({"patch_cls_similarity": lambda p: 0.3 + 0.6 * (p - 0.4)}, from_step=400)
  assert alarms == []  # 0.66 at the end
  alarms = run({"patch_cls_similarity": lambda p: 0.3 + 1.0 * (p - 0.4)}, from_step=400)
  assert kinds(alarms) == ["dense"] and "gram.source" in alarms[0].message
  assert run({"patch_cls_similarity": 0.9}) == []  # as it always was


def test_a_loss_far_above_its_start_diverges():
  alarms = run({"loss": lambda p: 25.0 * (1 + p)}, from_step=200)
  assert kinds(alarms) == ["divergence"] and "has grown from" in alarms[0].message


def test_nan_is_named_once():
  health = Health(TOTAL, batch_size=64, prototypes={"dino": K})
  rng = np.random.default_rng(0)
  alarms = []
  for step, loss in enumerate([9.0, math.nan, 9.0, math.nan, math.inf, math.nan]):
    alarms += health.check(step, metrics_of(0.0, rng, loss=loss))
  assert kinds(alarms) == ["nonfinite"] and str(alarms[0]).startswith("step 1: not finite: loss.")


def test_a_resumed_watch_that_replays_the_file_goes_on_as_if_never_stopped():
  rng = np.random.default_rng(0)
  collapsing = {"feature_std": lambda p: 0.5 if p < 0.5 else 0.0}
  lines = [(step, metrics_of(step / TOTAL, rng, **collapsing)) for step in range(0, TOTAL, 10)]
  whole = [alarm for step, metrics in lines for alarm in Health(TOTAL, batch_size=64).check(step, metrics)]
  assert whole == []  # a watch that forgets never sees the collapse
  for stop in (30, 60):
    resumed = Health(TOTAL, batch_size=64)
    for step, metrics in lines[:stop]:
      resumed.check(step, metrics)
    said = kinds(resumed.alarms)
    new = [alarm for step, metrics in lines[stop:] for alarm in resumed.check(step, metrics)]
    assert said + kinds(new) == ["collapse"]


def test_knn_that_does_not_improve_is_named():
  assert kinds(run(knn=lambda p: 0.1)) == ["knn"]


def test_methods_without_prototypes_are_watched_too():
  health = Health(100, batch_size=8)
  for step in range(100):
    assert health.check(step, {"loss": 5.0 - step / 50}) == []


def test_every_config_key_that_an_alarm_names_exists():
  uniform = math.log(K)
  collapsing = {"feature_std": lambda p: 0.5 if p < 0.5 else 0.0, "prototype_usage": 0.0, "teacher_entropy": 0.0}
  alarms = run(collapsing, knn=lambda p: 0.1)
  at_uniform = {"teacher_entropy": uniform, "dino_local": 2 * uniform, "dino_global": 2 * uniform}
  alarms += run(at_uniform, knn=lambda p: 0.1)
  alarms += run({"loss": math.nan}, from_step=990)
  assert set(kinds(alarms)) == {"collapse", "prototypes", "stuck", "divergence", "knn", "nonfinite"}
  config = default()
  for alarm in alarms:
    for key in re.findall(r"\b(?:schedules|optim|dino|ibot|koleo|model)\.[a-z_.]*[a-z]", alarm.message):
      node = config
      for part in key.split("."):
        assert part in node, key
        node = node[part]
