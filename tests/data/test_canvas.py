"""What the host does for crops that the device makes: decoding, as small as allowed, onto a canvas."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data import pictures
from vit_jax.data import jpeg
from vit_jax.data.canvas import fit_into, fitting
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.views import MultiCrop


def jpeg_of(pixels, **options):
  return pictures.encoded(pixels, "JPEG", quality=90, **options)


@pytest.mark.parametrize("orientation", range(10))
def test_jpegs_are_decoded_to_the_pixels_of_pillow_whatever_their_orientation(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = jpeg_of(pictures.smooth(51, 77), exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("enough", [200, 100, 60, 26, 10])
def test_shrunk_jpegs_are_those_of_pillow(enough):
  data = jpeg_of(pictures.smooth(211, 317))
  image = Image.open(io.BytesIO(data))
  if 211 // enough >= 2:
    image.draft(None, (317 // (211 // enough), 211 // (211 // enough)))
  np.testing.assert_array_equal(decode(data, enough=enough), np.asarray(image))


def test_what_libjpeg_refuses_is_left_to_pillow():
  data = jpeg_of(pictures.smooth(40, 56))
  with pytest.raises(BadImage):
    decode(data[: len(data) // 2])
  cmyk = jpeg_of(Image.fromarray(pictures.smooth(40, 56)).convert("CMYK"))
  assert decode(cmyk).shape == (40, 56, 3)
  grey = decode(jpeg_of(Image.fromarray(pictures.smooth(40, 56)).convert("L")))
  assert np.ptp(grey, axis=-1).max() == 0


def test_a_jpeg_is_shrunk_as_far_as_it_still_fills_the_canvas():
  assert jpeg.shrinking((4000, 3000), None, (576, 576)) == 4
  assert jpeg.shrinking((500, 375), None, (576, 576)) == 1
  assert jpeg.shrinking((1000, 800), None, (512, 512)) == 1  # 500 would be enlarged no crop, but 512 fits
  assert jpeg.shrinking((3000, 4000), None, (384, 512)) == 4  # it may have to be turned
  assert jpeg.shrinking((4000, 3000), 300, None) == 8


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (90, 20), (20, 90), (64, 64), (300, 2)])
def test_an_image_lies_in_the_corner_of_its_canvas_in_its_own_shape(size):
  canvas = np.full((48, 64, 3), 7, np.uint8)
  image = pictures.smooth(*size)
  height, width = fit_into(canvas, image)
  assert (height, width) == fitting(size, (48, 64))
  assert height <= 48 and width <= 64
  if size[0] <= 48 and size[1] <= 64:
    np.testing.assert_array_equal(canvas[:height, :width], image)
  else:
    assert height == 48 or width == 64
    assert min(height, width) == 1 or width / height == pytest.approx(size[1] / size[0], rel=0.1)
    assert np.abs(canvas[:height, :width].mean((0, 1)) - image.mean((0, 1))).max() < 3
  assert not canvas[height:].any() and not canvas[:, width:].any()


def test_on_the_canvas_that_is_chosen_no_crop_of_a_photograph_is_enlarged():
  for views in (MultiCrop(), MultiCrop(global_size=512, local_size=112), MultiCrop(gram_size=448)):
    height, width = fitting((3000, 4000), views.enough_canvas)
    assert views.base_size**2 <= views.global_scale[0] * height * width
    assert views.local_size**2 <= views.local_scale[0] * height * width
  with pytest.raises(ValueError, match="data.canvas"):
    MultiCrop(canvas=(1, 5))
