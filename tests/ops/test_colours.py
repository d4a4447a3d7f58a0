"""Colours and blur on the device against the reference's transforms on 8-bit images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data import hues
from tests.golden import Golden
from vit_jax.ops import blur, colours

NAMES = ("brightness", "contrast", "saturation", "hue")
CHAIN = {"brightness": 1.22, "contrast": 0.75, "saturation": 1.15, "hue": 0.06}
adjust = jax.jit(colours.adjust, static_argnames="hue")


@pytest.fixture(scope="module", params=["img0", "img1"])
def case(request):
  golden = Golden("aug_ops").under(request.param)
  return planar(golden["image"]), golden


def planar(pixels):
  return jnp.moveaxis(jnp.asarray(pixels, jnp.float32), -1, 0)


def difference(ours, expected):
  return np.abs(np.moveaxis(np.asarray(ours), 0, -1) - expected)


def adjusted(image, name, factor):
  return adjust(image, jnp.asarray(NAMES.index(name)), jnp.float32(factor))


@pytest.mark.parametrize("name", NAMES)
def test_colour_adjustment(case, name):
  image, golden = case
  factors = {key.rpartition("/")[2]: value for key, value in golden.items() if key.startswith(f"jitter/{name}/")}
  assert len(factors) >= 3
  for factor, expected in factors.items():
    assert difference(adjusted(image, name, float(factor)), expected).max() <= 1, factor


def test_jitter_chains_in_their_order(case):
  image, golden = case
  for key, expected in golden.items():
    if key.startswith("jitter_chain/"):
      result = image
      for name in key.rpartition("/")[2].split("-"):
        result = adjusted(result, name, CHAIN[name])
      assert difference(result, expected).max() <= 1, key


def test_grayscale_and_solarize(case):
  image, golden = case
  assert difference(colours.grayscale(image), golden["grayscale"]).max() == 0
  assert difference(colours.solarize(image), golden["solarize128"]).max() == 0


def test_gaussian_blur(case):
  image, golden = case
  for sigma in (0.1, 0.5, 1.3, 2.0):
    assert difference(blur.gaussian_blur(image, jnp.float32(sigma)), golden[f"blur/pil/{sigma}"]).max() <= 1
  np.testing.assert_array_equal(blur.gaussian_blur(image, jnp.float32(0.0)), image)


@pytest.mark.parametrize("step", [3, 5, 17])  # of 17: where hues come out as whole numbers
def test_hue_over_all_colours_equals_pillow(step):
  pixels = hues.every_colour(step)
  for shift in (-0.1, 0.0, 0.07):
    assert difference(adjusted(planar(pixels), "hue", shift), hues.turned_by_pillow(pixels, shift)).max() == 0


def test_each_image_has_its_own_adjustment_and_nothing_leaves_it_alone():
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7)), jnp.float32)
  which, factors = jnp.arange(5), jnp.array([0.7, 1.3, 0.9, 0.05, 9.0])
  together = adjust(images, which, factors)
  for i in range(4):
    np.testing.assert_array_equal(together[i], adjust(images[i], which[i], factors[i]))
  np.testing.assert_array_equal(together[4], images[4])


def test_the_mean_of_contrast_is_that_of_the_valid_pixels():
  image = jnp.full((3, 8, 8), 100.0).at[:, :, 4:].set(0.0)
  valid = jnp.arange(8)[None, :] < jnp.full((8, 1), 4)
  result = adjust(image, jnp.asarray(colours.CONTRAST), jnp.float32(0.5), valid=valid)
  assert float(result[0, 0, 0]) == 100.0


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_keep_what_has_no_meaning_for_them(channels):
  image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (channels, 6, 7)), jnp.float32)
  for which in (colours.HUE, colours.SATURATION):
    np.testing.assert_array_equal(adjust(image, jnp.asarray(which), jnp.float32(0.1)), image)
  brighter = adjust(image, jnp.asarray(colours.BRIGHTNESS), jnp.float32(1.5))
  np.testing.assert_array_equal(brighter, np.minimum(np.floor(np.asarray(image) * 1.5), 255))
