"""Cutting and resizing on the host against the reference's transforms and Pillow."""

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures
from tests.golden import Golden
from vit_jax.data.resampling import crop_and_resize, planes, resize, resize_window


def worst(result, expected):
  return int(np.abs(np.asarray(result).astype(int) - np.asarray(expected).astype(int)).max())


def columns_first(pixels, size):
  """As Pillow resized until its release 13, which begins with the rows where that is cheaper."""
  image = Image.fromarray(pixels)
  return image.resize((size, image.height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("image", ["img0", "img1"])
def test_crops_are_those_of_the_reference_and_do_not_look_outside_the_box(image):
  golden = Golden("aug_ops").under(image)
  pixels = golden["image"]
  for number, (top, left, height, width, size, _) in enumerate(golden["crop_boxes"].tolist()):
    crop = crop_and_resize(planes(pixels), top, left, height, width, size)
    assert worst(crop, golden[f"crop{number}/tensor_uint8"]) <= 1
    assert worst(crop, columns_first(pixels[top : top + height, left : left + width], size)) <= 1
    blind = np.zeros_like(pixels)
    box = np.s_[top : top + height, left : left + width]
    blind[box] = pixels[box]
    np.testing.assert_array_equal(crop_and_resize(planes(blind), top, left, height, width, size), crop)


@pytest.mark.parametrize("size", [1, 7, 16, 33, 96])
def test_any_box_at_any_size_is_pillows(size):
  rng = np.random.default_rng(size)
  for _ in range(25):
    height, width = rng.integers(1, 300, 2).tolist()
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert worst(resize(noise, size), columns_first(noise, size)) <= 2  # rounded twice, and noise is nothing but edges


def test_crops_of_a_smooth_picture_are_within_a_level_of_pillow():
  pixels = pictures.smooth(90, 120, 4)
  for box, size in (((0, 0, 90, 120), 32), ((13, 21, 50, 37), 32), ((60, 80, 30, 40), 32)):
    top, left, height, width = box
    expected = Image.fromarray(pixels).crop((left, top, left + width, top + height)).resize((size, size), 3)
    assert worst(crop_and_resize(planes(pixels), *box, size), expected) <= 1


def test_sums_are_exact_whatever_their_order():
  """Mirrored and transposed images are the same sums in another order: not even one level may differ."""
  noise = np.random.default_rng(0).integers(0, 2, (150, 90, 3), dtype=np.uint8) * np.uint8(255)
  whole = resize(noise, 64)  # scales whose weights are the same seen from either end
  np.testing.assert_array_equal(resize(np.ascontiguousarray(noise[:, ::-1]), 64), whole[:, ::-1])
  np.testing.assert_array_equal(resize(np.ascontiguousarray(noise[::-1]), 64), whole[::-1])


def test_an_image_of_the_size_is_left_as_it_is():
  noise = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
  np.testing.assert_array_equal(crop_and_resize(planes(noise), 3, 5, 32, 32, 32), noise[3:35, 5:37])


@pytest.mark.parametrize("size", [(37, 61), (200, 90), (50, 70), (9, 300)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_a_window_is_within_a_level_of_pillows_and_the_same_wherever_it_lies(size, kernel):
  rng = np.random.default_rng(0)
  pixels = np.where(rng.random((64, 80, 5)) < 0.2, 255, rng.integers(0, 256, (64, 80, 5))).astype(np.uint8)
  whole = resize_window(pixels, size, (0, 0, *size), kernel)
  filter = Image.Resampling[kernel.upper()]
  for channel in range(5):
    # Rows first, as PyTorch and older versions of Pillow; newer ones begin with the axis that saves more work.
    rows = Image.fromarray(pixels[..., channel]).resize((size[1], pixels.shape[0]), filter)
    theirs = np.asarray(rows.resize(size[::-1], filter))
    assert np.abs(whole[..., channel].astype(int) - theirs).max() <= 1
  top, left, height, width = 3, 17, 6, 40
  window = resize_window(pixels, size, (top, left, height, width), kernel)
  np.testing.assert_array_equal(window, whole[top : top + height, left : left + width])
