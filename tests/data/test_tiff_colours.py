"""What the bands of a TIFF file are is read from it, not guessed from their number."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import BadImage, OtherChannels, decode

tifffile = pytest.importorskip("tifffile")

_RANDOM = np.random.default_rng(0)
GREY = _RANDOM.integers(0, 65536, (6, 8), dtype=np.uint16)
FOUR = _RANDOM.integers(0, 65536, (6, 8, 4), dtype=np.uint16)


def _tiff(array: np.ndarray, **options) -> bytes:
  file = io.BytesIO()
  tifffile.imwrite(file, array, **options)
  return file.getvalue()


@pytest.mark.parametrize("array", [GREY, GREY >> 8 << 8, (GREY >> 8).astype(np.uint8), (GREY / 65535).astype("f4")])
def test_where_the_least_value_is_white_it_becomes_white(array):
  black, white = (decode(_tiff(array, photometric=kind)) for kind in ("minisblack", "miniswhite"))
  np.testing.assert_array_equal(white, 255 - black)


def test_a_range_is_that_of_the_values_as_they_are_stored_where_the_least_is_white():
  x_ray = _tiff(np.array([[0, 4095], [2048, 4095]], np.uint16), photometric="miniswhite")
  assert decode(x_ray, value_range=(0, 4095))[..., 0].tolist() == [[255, 0], [127, 0]]
  np.testing.assert_array_equal(decode(x_ray, channels=1)[..., 0], [[0, 15], [8, 15]])  # bands are taken as they are


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("array", [FOUR, (FOUR >> 8).astype(np.uint8)])
@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_a_fourth_band_that_is_not_said_to_be_alpha_is_none(array, planar, value_range):
  stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
  file = _tiff(stored, photometric="rgb", extrasamples=["unspecified"], planarconfig=planar)
  expected = array[..., :3] if array.dtype == np.uint8 else array[..., :3] >> 8
  found = decode(file, value_range=value_range)
  assert np.abs(found.astype(int) - expected).max() <= (value_range is not None)  # which is rounded, not cut off


def test_four_bands_without_a_word_on_them_are_refused_with_the_key_to_set():
  with pytest.raises(OtherChannels, match="none of which is said to be alpha.*model.in_channels=4"):
    decode(_tiff(FOUR, photometric="minisblack", planarconfig="contig"))  # red, green, blue, infrared of a satellite


def test_other_colours_of_16_bits_are_no_rgb():
  expected = np.asarray(Image.fromarray((FOUR >> 8).astype(np.uint8), "CMYK").convert("RGB"))
  np.testing.assert_array_equal(decode(_tiff(FOUR, photometric="separated"), value_range=(0, 65535)), expected)
  with pytest.raises(BadImage, match="16 bits of Lab: convert it to RGB"):
    decode(_tiff(FOUR[..., :3], photometric="cielab"))
  with pytest.raises(BadImage, match="16 bits of CMYK: convert it to RGB"):
    decode(_tiff(np.moveaxis(FOUR, 2, 0), photometric="separated", planarconfig="separate"))
  with pytest.raises(BadImage, match="multiplied by their alpha"):
    decode(_tiff(FOUR, photometric="rgb", extrasamples=["assocalpha"]), value_range=(0, 65535))
