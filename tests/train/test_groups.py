"""Loss groups on any number of devices: they fit, and a run that goes on keeps those that it began with."""

from __future__ import annotations

import jax
import pytest

from vit_jax import config as configs
from vit_jax.config import ConfigError
from vit_jax.train import planning, setup


def prepared(config, devices):
  return planning.prepare(config, jax.devices()[:devices]).config


@pytest.mark.parametrize("recipe", ["configs/dinov3_vits16.py", "configs/tiny.py", "configs/dinov3_vits16.py:cpu"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_recipe_runs_on_any_number_of_devices_as_it_stands(recipe, devices):
  config = configs.load(recipe)
  resolved = prepared(config, devices)
  assert resolved.loss_group_size == config.batch_size // devices
  assert resolved.koleo.group_size == config.batch_size


def test_a_run_that_goes_on_elsewhere_keeps_its_groups(tmp_path):
  config = configs.load("configs/dinov3_vits16.py")
  assert setup.grouped_as_begun(config, tmp_path) is config
  configs.save(prepared(config, 8), tmp_path / setup.CONFIG_FILE)
  resolved = prepared(setup.grouped_as_begun(config, tmp_path), 2)
  assert (resolved.loss_group_size, resolved.koleo.group_size) == (8, 64)
  assert config.loss_group_size is None  # a copy

  config.batch_size = 32  # another run
  assert setup.grouped_as_begun(config, tmp_path) is config
  config.batch_size, config.loss_group_size = 64, 4
  assert setup.grouped_as_begun(config, tmp_path) is config


def test_groups_that_do_not_fit_more_devices_are_named_with_what_would(tmp_path):
  config = configs.load("configs/dinov3_vits16.py")
  configs.save(prepared(config, 2), tmp_path / setup.CONFIG_FILE)
  with pytest.raises(ConfigError, match="loss_group_size=32: must divide the 8 images .* example 8, or batch_size=256"):
    prepared(setup.grouped_as_begun(config, tmp_path), 8)
