"""The description of views: defaults equal to the config's, human errors, the size of a loss group."""

import dataclasses

import numpy as np
import pytest

from vit_jax.config import default
from vit_jax.data.views import MultiCrop


def test_defaults_are_those_of_the_config():
  config = default()
  views = MultiCrop()
  for field in dataclasses.fields(MultiCrop):
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
    ({"gram_size": 0}, "crops.gram_size"),
    ({"local_inside_global": True, "local_number": 3}, "crops.local_number"),
    ({"local_inside_global": True, "local_size": 240}, "crops.local_size"),
    ({"resolutions": ((224, 96, 0, 0.0),)}, "crops.resolutions"),
    ({"resolutions": ((224, 0, 0, 1.0),)}, "crops.local_size"),
  ],
)
def test_a_value_out_of_range_is_refused_with_its_key(change, key):
  with pytest.raises(ValueError, match=key):
    MultiCrop(**change).variants()


def test_lists_become_tuples_so_that_views_can_be_compared_and_hashed():
  assert hash(MultiCrop(mask_grid=[14, 14])) == hash(MultiCrop())


@pytest.mark.parametrize(("batch", "size"), [(8, 8), (64, 64), (256, 64), (96, 48), (67, 1)])
def test_group_size_is_the_largest_divisor_up_to_64(batch, size):
  assert MultiCrop().group_size(batch) == size


def test_a_given_group_size_is_kept():
  assert MultiCrop(loss_group_size=16).group_size(64) == 16


def test_enough_pixels_leaves_every_crop_twice_its_size():
  views = MultiCrop()
  assert views.enough_pixels == 859
  side = np.sqrt(views.local_scale[0]) * views.enough_pixels  # of the smallest local crop of a square image
  assert side >= 2 * views.local_size


def test_variants_are_the_views_of_every_resolution():
  views = MultiCrop(resolutions=[[512, 112, 768, 0.6], [768, 112, 0, 0.4]], stride=16)
  first, second = views.variants()
  assert (first.global_size, first.local_size, first.gram_size, first.mask_grid) == (512, 112, 768, (32, 32))
  assert (second.global_size, second.gram_size, second.mask_grid) == (768, None, (48, 48))
  assert (first.name, second.name) == ("512/112/768", "768/112")
  assert first.enough_pixels > MultiCrop(global_size=512, local_size=112).enough_pixels  # the region is cut out at 768
  assert MultiCrop().variants() == (MultiCrop(),)


def test_views_without_masks_have_none_at_any_resolution():
  views = MultiCrop(mask_grid=None, resolutions=((64, 32, 0, 0.5), (96, 32, 0, 0.5)))
  assert [variant.mask_grid for variant in views.variants()] == [None, None]
