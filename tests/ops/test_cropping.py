"""Cutting and resizing on the device against the reference's transforms and Pillow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.data import pictures
from tests.golden import Golden
from vit_jax.ops.cropping import crop_weights, resample, resize


@functools.partial(jax.jit, static_argnames="size")
def cut(pixels, box, size, flip=False):
  """One crop of one image [H, W, 3]."""
  top, left, height, width = (x[None, None] for x in box)
  planar = jnp.moveaxis(pixels.astype(jnp.float32), -1, 0)[None]
  rows = crop_weights(top, height, size, pixels.shape[0])
  columns = crop_weights(left, width, size, pixels.shape[1], jnp.asarray(flip)[None, None])
  return jnp.moveaxis(resample(planar, rows, columns)[0, 0], 0, -1)


@pytest.mark.parametrize("image", ["img0", "img1"])
def test_crops_are_those_of_the_reference(image):
  golden = Golden("aug_ops").under(image)
  for number, (*box, size, _) in enumerate(golden["crop_boxes"].tolist()):
    ours = np.asarray(cut(golden["image"], jnp.array(box), size))
    assert np.abs(ours - golden[f"crop{number}/tensor_uint8"]).max() <= 1
    # Pillow 13 begins with the rows where that is cheaper; at sharp edges that shows.
    difference = np.abs(ours - golden[f"crop{number}/pil"])
    assert (difference <= 2).mean() > 0.99 and difference.max() <= 5


def test_crops_of_a_smooth_picture_are_within_a_level_of_pillow():
  pixels = pictures.smooth(90, 120, 4)
  for box, size in (((0, 0, 90, 120), 32), ((13, 21, 50, 37), 32), ((60, 80, 30, 40), 32)):
    top, left, height, width = box
    expected = Image.fromarray(pixels).crop((left, top, left + width, top + height)).resize((size, size), 3)
    assert np.abs(np.asarray(cut(pixels, jnp.array(box), size)) - np.asarray(expected, float)).max() <= 1


def test_a_crop_does_not_look_outside_its_box_and_flips_in_place():
  pixels = pictures.smooth(40, 50, 2)
  box = jnp.array((10, 12, 20, 25))
  blind = np.full_like(pixels, 255)
  blind[10:30, 12:37] = pixels[10:30, 12:37]
  crop = np.asarray(cut(pixels, box, 16))
  np.testing.assert_array_equal(cut(blind, box, 16), crop)
  np.testing.assert_allclose(np.asarray(cut(pixels, box, 16, True))[:, ::-1], crop, atol=1)


def test_resizing_whole_images_is_the_same_operation():
  pixels = pictures.smooth(48, 48, 3)
  planar = jnp.moveaxis(jnp.asarray(pixels, jnp.float32), -1, 0)
  for size in (16, 64):
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), float)
    assert np.abs(np.moveaxis(np.asarray(resize(planar, size)), 0, -1) - expected).max() <= 1
  assert resize(planar, 48) is planar
