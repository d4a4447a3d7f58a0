"""Images of any number of channels, and of more bits than 8: from the file to crops, batches and statistics."""

import dataclasses
import io

import jax
import numpy as np
import pytest

from vit_jax.data import augment, device, operations
from vit_jax.data.canvas import fit_into
from vit_jax.data.converting import _encoded
from vit_jax.data.decode import BadImage, OtherChannels, decode
from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.groups import LossGroups, batch_shapes
from vit_jax.data.resampling import crop_and_resize, planes
from vit_jax.data.scanning import scan
from vit_jax.data.sources import open_source
from vit_jax.data.views import Views
from vit_jax.inspect import pictures

DEEP = np.random.default_rng(0).integers(0, 10_000, (20, 30, 13), dtype=np.uint16)
LEVELS = np.round(DEEP / 10_000 * 255).astype(np.uint8)
RANGE = (0, 10_000)
SPEC = "synthetic:photo?size=48x40&count=30&distinct=5&classes=2&channels=5&dtype=uint16"
VIEWS = Views(
  global_size=32, local_size=16, local_number=2, mask_grid=(2, 2), loss_group_size=4, channels=5,
  saturation=0.0, hue=0.0, grayscale=0.0, jitter=1.0, blur=(1.0, 0.0, 0.5), solarize=(0.0, 1.0, 0.0),
)  # fmt: skip


def saved(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def test_arrays_keep_their_channels_wherever_these_are():
  for array in (DEEP, np.moveaxis(DEEP, 2, 0), saved(DEEP)):
    np.testing.assert_array_equal(decode(array, channels=13, value_range=RANGE), LEVELS)


@pytest.mark.parametrize(
  "layout",
  [{"planarconfig": "contig"}, {"planarconfig": "separate"}, {"planarconfig": "contig", "compression": "zlib"}],
)
def test_multi_band_tiff_keeps_its_bands(layout, tmp_path):
  tifffile = pytest.importorskip("tifffile")
  array = np.moveaxis(DEEP, 2, 0) if layout.get("planarconfig") == "separate" else DEEP
  tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **layout)
  np.testing.assert_array_equal(decode(tmp_path / "a.tif", channels=13, value_range=RANGE), LEVELS)
  with pytest.raises(OtherChannels, match=r"model.in_channels=13"):
    decode((tmp_path / "a.tif").read_bytes())


def test_other_channels_are_refused_with_what_was_found():
  with pytest.raises(OtherChannels, match=r"b.npy: has 13 channel\(s\), not the 4 of model.in_channels"):
    decode(saved(DEEP), "b.npy", channels=4)
  with pytest.raises(OtherChannels, match=r"set model.in_channels=13"):
    decode(DEEP)
  with pytest.raises(OtherChannels, match=r"has 1 channel\(s\)"):
    decode(DEEP[:, :, 0], channels=5)


def test_the_range_is_the_same_for_all_images_and_not_for_those_of_8_bits():
  dark, bright = np.full((4, 4), 100, np.uint16), np.full((4, 4), 60_000, np.uint16)
  assert decode(dark, value_range=(0, 1000))[0, 0, 0] == 26 and decode(bright, value_range=(0, 1000)).min() == 255
  assert decode(dark)[0, 0, 0] == 0 and decode(bright)[0, 0, 0] == 60_000 >> 8
  floats = np.array([[-3.0, -1.0], [0.0, np.nan]], np.float32)
  assert decode(floats, value_range=(-1, 1))[:, :, 0].tolist() == [[0, 0], [128, 0]]
  eight = np.full((4, 4, 3), 77, np.uint8)
  np.testing.assert_array_equal(decode(eight, value_range=(0, 1000)), eight)


def test_16_bit_colour_png_is_scaled_from_all_its_bits():
  import cv2

  deep = np.random.default_rng(1).integers(0, 1000, (8, 9, 3), dtype=np.uint16)
  data = cv2.imencode(".png", deep[:, :, ::-1])[1].tobytes()
  np.testing.assert_allclose(decode(data, value_range=(0, 1000)), deep / 1000 * 255, atol=0.51)


def test_channels_are_resized_each_as_by_itself():
  crop = crop_and_resize(planes(LEVELS), 2, 3, 15, 20, 11)
  alone = [crop_and_resize(planes(LEVELS[:, :, i : i + 1]), 2, 3, 15, 20, 11) for i in range(13)]
  np.testing.assert_array_equal(crop, np.concatenate(alone, axis=-1))
  np.testing.assert_array_equal(operations.flip(crop, True), crop[:, ::-1])
  canvas = np.empty((16, 16, 13), np.uint8)
  assert fit_into(canvas, LEVELS) == (11, 16)
  one = np.empty((16, 16, 1), np.uint8)
  fit_into(one, np.ascontiguousarray(LEVELS[:, :, 9:10]))
  np.testing.assert_array_equal(canvas[:, :, 9:10], one)


def test_host_and_device_make_the_same_crops_of_five_channels():
  raw = dataclasses.replace(VIEWS, canvas=(64, 64))
  source = open_source(SPEC)
  host, group = (LossGroups(source, views, 5, 4)[1] for views in (VIEWS, raw))
  del host["bad_records"], group["bad_records"]
  ours = jax.device_get(device.one_device(raw)(group))
  for name, (shape, kind) in batch_shapes(VIEWS, 4).items():
    assert (host[name].shape, host[name].dtype) == (shape, kind) == (ours[name].shape, ours[name].dtype)
    if name.endswith("crops"):
      difference = np.abs(ours[name].astype(int) - host[name])
      assert (difference <= 2).mean() > 0.98 and difference.mean() < 0.3, name
  assert pictures.contact_sheet(host, images=2).shape[-1] == 3


def test_views_refuse_colour_operations_without_colours():
  with pytest.raises(ValueError, match=r"augment.hue = 0.1: .*0 for images that are not RGB"):
    dataclasses.replace(VIEWS, hue=0.1)
  assert augment.random_shape(VIEWS) == augment.random_shape(dataclasses.replace(VIEWS, channels=3, hue=0.1))


def test_evaluation_batches_and_statistics_have_all_channels():
  source = open_source(SPEC)
  batch = next(evaluation_batches(source, image_size=16, batch_size=4, max_examples=4, channels=5))
  assert batch["images"].shape == (4, 16, 16, 5) and batch["valid"].all()
  found = scan(source, SPEC, workers=1, progress=lambda count: None)
  pixels = np.stack([decode(source[i]["image"], channels=5) for i in range(5)]) / 255.0
  np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), atol=1e-6)
  np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), atol=1e-6)
  assert found.channels == {5: 30} and "--config.model.in_channels=5" in found.report()
  assert found.kinds == {"array uint16 x 5": 30}


def test_a_conversion_keeps_what_no_image_format_holds():
  np.testing.assert_array_equal(np.load(io.BytesIO(_encoded(DEEP, "a", 8))), DEEP)
  assert _encoded(saved(DEEP), "a", None) == saved(DEEP)


@pytest.mark.parametrize(
  "layout",
  [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 4}, {"planarconfig": "separate"}],
  ids=str,
)
def test_a_multi_band_tiff_that_is_cut_off_is_bad_unless_all_values_are_there(layout):
  tifffile = pytest.importorskip("tifffile")
  array = np.moveaxis(DEEP, 2, 0) if "planarconfig" in layout else DEEP
  file = io.BytesIO()
  tifffile.imwrite(file, array, photometric="minisblack", **layout)
  whole = file.getvalue()
  assert decode(whole, channels=13, value_range=RANGE).shape == (20, 30, 13)
  bad = 0
  for kept in (0.1, 0.2, 0.5, 0.7, 0.9, 0.999):
    try:
      pixels = decode(whole[: int(kept * len(whole))], channels=13, value_range=RANGE)
      np.testing.assert_array_equal(pixels, LEVELS)  # what was lost says nothing of them
    except BadImage:
      bad += 1
  assert bad >= 4


def test_a_16_bit_tiff_with_one_colour_after_the_other_keeps_its_colours():
  tifffile = pytest.importorskip("tifffile")  # Pillow makes noise of it
  file = io.BytesIO()
  tifffile.imwrite(file, np.moveaxis(DEEP[:, :, :3], 2, 0), photometric="rgb", planarconfig="separate")
  np.testing.assert_array_equal(decode(file.getvalue()), DEEP[:, :, :3] >> 8)
