"""Each image operation against the reference's transforms (Pillow path)."""

import numpy as np
import pytest

from tests.data import hues
from tests.golden import Golden
from vit_jax.data import operations

CHAIN = {"brightness": 1.22, "contrast": 0.75, "saturation": 1.15, "hue": 0.06}


@pytest.fixture(scope="module", params=["img0", "img1"])
def case(request):
  golden = Golden("aug_ops").under(request.param)
  return golden["image"], golden


def worst(result, expected):
  return int(np.abs(np.asarray(result).astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_adjustment(case, name):
  pixels, golden = case
  expected = {
    float(key.rpartition("/")[2]): value for key, value in golden.items() if key.startswith(f"jitter/{name}/")
  }
  assert len(expected) >= 3
  for factor, result in expected.items():
    adjusted = getattr(operations, f"adjust_{name}")(pixels, factor)
    assert worst(adjusted, result) <= 1, factor


def test_jitter_chains_in_their_order(case):
  pixels, golden = case
  chains = {key.rpartition("/")[2]: value for key, value in golden.items() if key.startswith("jitter_chain/")}
  assert len(chains) == 3
  for order, expected in chains.items():
    image = pixels
    for name in order.split("-"):
      image = getattr(operations, f"adjust_{name}")(image, CHAIN[name])
    assert worst(image, expected) <= 1, order


@pytest.mark.parametrize("sigma", ["0.1", "0.5", "1.3", "2.0"])
def test_gaussian_blur(case, sigma):
  pixels, golden = case
  assert worst(operations.gaussian_blur(pixels, float(sigma)), golden[f"blur/pil/{sigma}"]) <= 1


def test_solarize_and_grayscale(case):
  pixels, golden = case
  np.testing.assert_array_equal(operations.solarize(pixels), golden["solarize128"])
  np.testing.assert_array_equal(operations.grayscale(pixels), golden["grayscale"])


def test_hue_over_all_colours_equals_pillow():
  pixels = hues.every_colour(3)
  for shift in (-0.1, 0.0, 0.07):
    assert worst(operations.adjust_hue(pixels, shift), hues.turned_by_pillow(pixels, shift)) <= 1
