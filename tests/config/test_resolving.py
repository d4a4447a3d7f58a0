"""A config resolved against the data: only steps are left."""

from __future__ import annotations

import pytest

from tests.config.changed import changed
from vit_jax.config import ConfigError, default, flatten, resolve


def test_durations_become_steps_and_automatic_sizes_are_set():
  config = changed(
    duration="2 epochs", batch_size=128, schedules__lr__warmup="10 %", optim__freeze_last_layer="1 epochs"
  )
  resolved = flatten(resolve(config, num_examples=12800))
  assert resolved["duration"] == "200 steps"
  assert resolved["schedules.lr.warmup"] == "20 steps"
  assert resolved["optim.freeze_last_layer"] == "100 steps"
  assert resolved["loss_group_size"] == resolved["koleo.group_size"] == 64
  assert flatten(config)["duration"] == "2 epochs"


def test_resolving_again_changes_nothing():
  once = resolve(default(), num_examples=1000)
  assert flatten(resolve(once, num_examples=5)) == flatten(once)


def test_schedule_longer_than_the_run_is_named():
  config = changed(duration="10 steps", schedules__lr__warmup="5 epochs")
  with pytest.raises(ConfigError, match=r"^schedules\.lr\.warmup='5 epochs': must not be longer than the run of 10"):
    resolve(config, num_examples=6400)
