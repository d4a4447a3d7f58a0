"""Durations in steps, and the sizes that follow from others."""

from __future__ import annotations

import re

import pytest

from tests.config.changed import changed
from vit_jax.config import ConfigError, loss_group_size, resolve_duration


@pytest.mark.parametrize(
  ("text", "steps"),
  [
    ("100 steps", 100),
    ("100", 100),
    ("1 step", 1),
    ("1e3 steps", 1000),
    ("1 epoch", 16),  # 1000 images / 64, rounded up
    ("2 epochs", 32),
    ("0.5 epochs", 8),
    ("2e6 examples", 31250),
    ("65 examples", 2),
    ("10 %", 60),
    ("10%", 60),
    ("0.1 %", 1),
    ("0 steps", 0),
    ("0 %", 0),
    ("0 epochs", 0),
  ],
)
def test_duration_in_steps(text, steps):
  assert resolve_duration(text, batch_size=64, num_examples=1000, total_steps=600) == steps


def test_epoch_is_epoch_steps_where_given():
  assert resolve_duration("2 epochs", batch_size=64, num_examples=1000, epoch_steps=100) == 200


@pytest.mark.parametrize("percent", range(1, 101))
def test_percentages_of_whole_steps_are_exact(percent):
  assert resolve_duration(f"{percent} %", batch_size=1, total_steps=100_000) == percent * 1000


@pytest.mark.parametrize(
  "text", ["", "ten steps", "10 apples", "-1 steps", "1 2 steps", "steps", "1.2.3 epochs", "1_ %"]
)
def test_text_that_is_no_duration_is_named(text):
  with pytest.raises(ConfigError, match=f"^optim.freeze_last_layer={re.escape(repr(text))}: must "):
    resolve_duration(text, batch_size=1, num_examples=1, total_steps=1, key="optim.freeze_last_layer")


def test_duration_whose_measure_is_unknown_is_named():
  with pytest.raises(ConfigError, match=r"^duration='10 %': .*percentage"):
    resolve_duration("10 %", batch_size=1, num_examples=1)
  with pytest.raises(ConfigError, match=r"^duration='1 epochs': .*epoch_steps"):
    resolve_duration("1 epochs", batch_size=1)


@pytest.mark.parametrize(("batch", "given", "group"), [(64, None, 64), (7, None, 7), (256, None, 64), (96, None, 48),
                                                       (131, None, 1), (64, 8, 8)])  # fmt: skip
def test_loss_group_size(batch, given, group):
  assert loss_group_size(changed(batch_size=batch, loss_group_size=given)) == group


@pytest.mark.parametrize(("batch", "micro", "devices", "group"), [(64, 1, 8, 8), (64, 2, 8, 4), (2048, 1, 8, 64),
                                                                  (96, 1, 8, 12), (96, 1, 5, 48)])  # fmt: skip
def test_a_loss_group_is_of_one_device(batch, micro, devices, group):
  assert loss_group_size(changed(batch_size=batch, micro_batches=micro), devices) == group
