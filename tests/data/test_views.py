"""The description of views: defaults equal to the config's, human errors, the size of a loss group."""

import dataclasses

import pytest

from vit_jax.config import default
from vit_jax.data.views import Views


def test_defaults_are_those_of_the_config():
  config = default()
  views = Views()
  for field in dataclasses.fields(Views):
    for section in ("crops", "augment"):
      if field.name in config[section]:
        assert getattr(views, field.name) == config[section][field.name], field.name
  assert views.mask_probability == config.ibot.mask_probability
  assert views.mask_ratio == config.ibot.mask_ratio
  assert views.mask_shift == config.ibot.mask_shift


@pytest.mark.parametrize(
  ("change", "key"),
  [
    ({"local_scale": (0.5, 0.2)}, "crops.local_scale"),
    ({"global_scale": (0.0, 1.0)}, "crops.global_scale"),
    ({"flip": 1.5}, "crops.flip"),
    ({"blur": (0.0, 0.9)}, "augment.blur"),
    ({"blur_sigma": (0.0, 2.0)}, "augment.blur_sigma"),
    ({"hue": 0.6}, "augment.hue"),
    ({"mask_ratio": (0.5, 0.1)}, "ibot.mask_ratio"),
    ({"loss_group_size": 0}, "loss_group_size"),
  ],
)
def test_a_value_out_of_range_is_refused_with_its_key(change, key):
  with pytest.raises(ValueError, match=key):
    Views(**change)


def test_lists_become_tuples_so_that_views_can_be_compared_and_hashed():
  assert hash(Views(mask_grid=[14, 14])) == hash(Views())


@pytest.mark.parametrize(("batch", "size"), [(8, 8), (64, 64), (256, 64), (96, 48), (67, 1)])
def test_group_size_is_the_largest_divisor_up_to_64(batch, size):
  assert Views().group_size(batch) == size


def test_a_given_group_size_is_kept():
  assert Views(loss_group_size=16).group_size(64) == 16
