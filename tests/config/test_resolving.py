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


@pytest.mark.parametrize(
  ("sizes", "devices", "group", "neighbours"),
  [
    (dict(batch_size=64), 8, 8, 64),
    (dict(batch_size=512), 8, 64, 64),
    (dict(batch_size=132), 2, 33, 33),  # 44 would divide the batch and not be a whole number of groups
    (dict(batch_size=64, micro_batches=2), 4, 8, 8),
    (dict(batch_size=64, loss_group_size=4), 8, 4, 4),
    (dict(batch_size=64, koleo__group_size=16), 8, 8, 16),
  ],
)
def test_many_devices_make_small_loss_groups_and_leave_koleo_its_neighbours(sizes, devices, group, neighbours):
  resolved = resolve(changed(**sizes), num_examples=12800, devices=devices)
  assert (resolved.loss_group_size, resolved.koleo.group_size) == (group, neighbours)


def test_durations_of_gram_anchoring_and_of_the_head_warm_up_become_steps():
  config = changed(
    duration="200 steps", gram__source="init", gram__load_at="10 %", gram__refresh__every="5 %",
    gram__refresh__first="1 epochs", epoch_steps=50, init__freeze_backbone_steps="2 %",
  )  # fmt: skip
  resolved = flatten(resolve(config, num_examples=100))
  assert [resolved[f"gram.{key}"] for key in ("load_at", "refresh.every", "refresh.first")] == [
    "20 steps", "10 steps", "50 steps",
  ]  # fmt: skip
  assert resolved["init.freeze_backbone_steps"] == "4 steps"


def test_a_gram_teacher_that_would_never_be_loaded_is_named():
  with pytest.raises(ConfigError, match=r"^gram\.load_at='100 %': must be before the end of the run of 200 steps"):
    resolve(changed(duration="200 steps", gram__load_at="100 %"), num_examples=100)


def test_resolving_again_changes_nothing():
  once = resolve(default(), num_examples=1000)
  assert flatten(resolve(once, num_examples=5)) == flatten(once)


def test_schedule_longer_than_the_run_is_named():
  config = changed(duration="10 steps", schedules__lr__warmup="5 epochs")
  with pytest.raises(ConfigError, match=r"^schedules\.lr\.warmup='5 epochs': must not be longer than the run of 10"):
    resolve(config, num_examples=6400)


@pytest.mark.parametrize("total", range(1, 25))
def test_percentages_of_a_schedule_that_make_the_run_are_the_run(total):
  config = changed(duration=f"{total} steps", schedules__lr__warmup="10 %", schedules__lr__cosine="90 %")
  lr = resolve(config, num_examples=100).schedules.lr
  warmup, cosine = (int(lr[part].removesuffix(" steps")) for part in ("warmup", "cosine"))
  assert warmup == -(-total // 10) and warmup + cosine == total


def test_what_is_exact_in_steps_stays():
  config = changed(duration="100 steps", schedules__lr__warmup="10 steps", schedules__lr__cosine="2 epochs")
  lr = resolve(config, num_examples=640).schedules.lr
  assert (lr.warmup, lr.cosine) == ("10 steps", "20 steps")


def test_warmup_and_cosine_together_longer_than_the_run_are_named():
  config = changed(duration="10 steps", schedules__lr__warmup="4 steps", schedules__lr__cosine="1 epochs")
  with pytest.raises(ConfigError, match=r"^schedules\.lr\.warmup='4 steps' and schedules\.lr\.cosine='1 epochs': must"):
    resolve(config, num_examples=640)


@pytest.mark.parametrize("duration", ["1e400 steps", "2147483648 steps", "1e22 epochs"])
def test_more_steps_than_are_counted_are_refused(duration):
  with pytest.raises(ConfigError, match=r"^duration='.*': is more than 2,147,483,647 steps of batch_size="):
    resolve(changed(duration=duration), num_examples=640)


def test_as_many_steps_as_are_counted():
  assert resolve(changed(duration="2147483647 steps"), num_examples=640).duration == "2147483647 steps"
