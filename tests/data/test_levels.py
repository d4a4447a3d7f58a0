"""Values of more than 8 bits are scaled by their type or by a given range, never by what one file holds."""

import io
import json
import logging

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.data import pictures
from vit_jax import config as configs
from vit_jax.config import ConfigError
from vit_jax.data.decode import BadImage, OtherChannels, UnknownRange, decode, read_samples
from vit_jax.data.levels import Spread, advice
from vit_jax.data.scanning import scan
from vit_jax.data.sources import open_source
from vit_jax.train import setup

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")  # of 12 bits


def tif(array, **options):
  file = io.BytesIO()
  tifffile.imwrite(file, array, **options)
  return file.getvalue()


def npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def test_the_same_value_is_the_same_level_in_every_file():
  dark, bright = np.full((8, 8), 30_000, np.int32), np.full((8, 8), 30_000, np.int32)
  bright[0, 0] = 70_000
  for array in (dark, bright):
    for data in (tif(array), npy(array), array):
      with pytest.raises(UnknownRange, match=r"has int32 values from 30000 to .*set data.value_range=\(low,high\)"):
        decode(data)
      assert decode(data, value_range=(0, 70_000))[5, 5, 0] == round(30_000 / 70_000 * 255)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u4", "u8", ">i4", ">u4"])
def test_integers_that_say_nothing_of_their_range_are_refused_without_one(dtype):
  array = np.full((8, 8, 3), 100, dtype)
  for data in (array, npy(array), tif(array, photometric="rgb")):
    with pytest.raises(UnknownRange, match="data.value_range"):
      decode(data)
    assert (decode(data, value_range=(0, 200)) == 128).all()


def test_unsigned_32_bits_and_signed_16_of_a_tiff_are_what_they_are():
  for value, kind, bounds in ((4_000_000_000, np.uint32, (0, 4_000_000_000)), (-300, np.int16, (-600, 0))):
    array = np.full((8, 8), value, kind)
    assert read_samples(tif(array)).array[0, 0, 0] == value
    assert decode(tif(array), value_range=bounds)[0, 0, 0] == (255 if value > 0 else 128)


def test_types_that_tell_their_range():
  levels = np.arange(256).reshape(16, 16)
  for array in (levels.astype(np.uint8), (levels * 257).astype(">u2"), levels / 255, (levels / 255).astype(np.float16)):
    assert np.abs(decode(npy(array))[:, :, 0].astype(int) - levels).max() == 0
  assert decode(levels > 100)[:, :, 0].tolist() == ((levels > 100) * 255).tolist()


@pytest.mark.parametrize("value", [1.02, -0.02, 255.0, -1.0])
def test_floats_outside_0_to_1_are_refused_and_rounding_is_not(value):
  array = np.full((8, 8, 3), 0.5, np.float32)
  array[0, 0, 0] = value
  with pytest.raises(UnknownRange, match=r"a.npy: has float32 values from .*floats are taken for 0 \(black\) to 1"):
    decode(npy(array), "a.npy")
  assert decode(npy(array), value_range=(-1, 255)).shape == (8, 8, 3)
  array[0, 0] = (1.001, -0.001, 1.0)
  assert decode(npy(array))[0, 0].tolist() == [255, 0, 255]


def test_missing_values_are_black_and_an_image_of_them_is_refused():
  array = np.full((8, 8), 0.5, np.float32)
  array[:4] = np.nan  # a half
  assert decode(array)[:, :, 0].tolist() == [[0] * 8] * 4 + [[128] * 8] * 4
  array[4, 0] = np.nan
  with pytest.raises(BadImage, match=r"33 of its 64 values are missing \(NaN\): at most half of them may be"):
    decode(array)
  with pytest.raises(BadImage, match="64 of its 64 values are missing"):
    decode(npy(np.full((8, 8), np.nan)), value_range=(0, 1))
  array[:] = 0.5
  array[0, :3] = (np.inf, -np.inf, np.nan)
  for value_range in (None, (0, 1)):
    with pytest.raises(BadImage, match="2 of its 64 values are infinite"):
      decode(array, value_range=value_range)


def test_the_bits_that_a_file_declares_are_its_range():
  values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
  pgm = b"P5 64 64 4095\n" + values.astype(">u2").tobytes()
  np.testing.assert_array_equal(read_samples(pgm).array[:, :, 0], values)
  assert np.abs(decode(pgm)[:, :, 0].astype(int) - (values >> 4)).max() <= 1
  np.testing.assert_allclose(decode(pgm, value_range=(0, 1000))[:, :, 0], np.clip(values / 1000, 0, 1) * 255, atol=0.51)
  packed = tif(values, bitspersample=12)
  assert read_samples(packed).bits == 12
  np.testing.assert_array_equal(decode(packed)[:, :, 0], values >> 4)


def test_deep_colour_is_read_whole_in_every_format():
  deep = np.random.default_rng(0).integers(0, 1000, (12, 16, 3), dtype=np.uint16)
  alpha = np.full((12, 16, 1), 65535, np.uint16)
  expected = np.round(deep / 1000 * 255).astype(int)
  files = {
    "PNG": cv2.imencode(".png", deep[:, :, ::-1])[1].tobytes(),
    "PPM": b"P6\n# a comment\n16 12\n65535\n" + deep.astype(">u2").tobytes(),
    "TIFF": tif(deep, photometric="rgb"),
    "planar": tif(np.moveaxis(deep, 2, 0), photometric="rgb", planarconfig="separate"),
    "npy": npy(np.moveaxis(deep, 2, 0)),
  }
  for name, data in files.items():
    assert np.abs(decode(data, value_range=(0, 1000)).astype(int) - expected).max() <= 1, name
    assert np.abs(decode(data).astype(int) - (deep >> 8)).max() <= (name == "PPM"), name  # which Pillow rounds
  both = cv2.imencode(".png", np.concatenate([deep[:, :, ::-1], alpha], 2))[1].tobytes()
  assert np.abs(decode(both, value_range=(0, 1000)).astype(int) - expected).max() <= 1


def test_a_range_beyond_the_type_is_no_fault():
  array = np.full((8, 8), 1000, np.uint16)
  assert decode(array, value_range=(0, 100_000))[0, 0, 0] == 3
  assert decode(array.astype(np.float16), value_range=(0, 1_000_000))[0, 0, 0] == 0


def test_channels_first_is_understood_where_it_is_clear():
  rgb = pictures.smooth(20, 30)
  for array in (rgb, np.moveaxis(rgb, 2, 0), rgb.astype(np.uint16) * 257, np.moveaxis(rgb, 2, 0) / np.float32(255)):
    np.testing.assert_array_equal(decode(npy(array)), rgb)
  grey = rgb[:, :, 0]
  np.testing.assert_array_equal(decode(grey[None]), np.repeat(grey[:, :, None], 3, 2))
  np.testing.assert_array_equal(decode(np.ascontiguousarray(rgb[:3])), rgb[:3])  # [3, W, 3]: as documented
  with pytest.raises(OtherChannels, match=r"shape \(5, 20, 30\).*set model.in_channels=5"):
    decode(np.zeros((5, 20, 30), np.uint8))


@pytest.mark.parametrize(
  ("seen", "expected"),
  [
    (Spread("uint16", 0, 200), "(0,255)"),
    (Spread("uint16", 3, 4000), "(0,4095)"),
    (Spread("uint16", 0, 10_000), "(0,10000)"),
    (Spread("uint16", 0, 60_000), None),
    (Spread("uint16", 0, 4095, bits=12), None),
    (Spread("int32", 0, 255), "(0,255)"),
    (Spread("int16", -1024, 3071), "(-1024,3071)"),
    (Spread("int64", 70_000, 70_000), "(0,70000)"),
    (Spread("float32", 0.0, 1.0005), None),
    (Spread("float32", 0.5, 254.9), "(0,255)"),
    (Spread("float64", -0.99, 0.98), "(-1,1)"),
    (Spread("float32", -3.25, 12.5), "(-3.25,12.5)"),
    (Spread("float32", np.inf, -np.inf, 9, 9), None),
    (Spread("uint8", 0, 3), None),
  ],
)
def test_the_range_to_set(seen, expected):
  assert advice(seen) == expected


def folder(root, arrays):
  root.mkdir()
  for i, array in enumerate(arrays):
    (root / f"{i}.npy").write_bytes(npy(array))
  return f"folder:{root}"


def test_scan_says_what_values_reach_and_the_key_to_set(tmp_path):
  twelve = [np.full((8, 8), value, np.uint16) for value in (7, 4000)]
  spec = folder(tmp_path / "a", twelve)
  found = scan(open_source(spec), spec, progress=lambda count: None)
  line = next(line for line in found.report().splitlines() if line.startswith("values"))
  assert line.split(None, 1)[1] == (
    "uint16: 7 to 4000; without a range they become at most 15 of 255: --config.data.value_range=(0,4095)"
  )
  assert not found.broken
  spec = folder(tmp_path / "b", [np.full((8, 8), value, np.int32) for value in (-5, 900)] + [np.full((8, 8), np.nan)])
  found = scan(open_source(spec), spec, progress=lambda count: None)
  text = found.report()
  assert len(found.broken) == 3 and "and 1 more for such a reason" not in text
  assert "values       int32: -5 to 900; refused without a range: --config.data.value_range=(-5,900)" in text
  found.write(tmp_path / "scan.json")
  values = {entry["kind"]: entry for entry in json.loads((tmp_path / "scan.json").read_text())["values"]}
  assert values["int32"]["value_range"] == "(-5,900)" and values["float64"]["low"] is None
  found = scan(open_source(spec), spec, value_range=(0, 900), progress=lambda count: None)
  assert len(found.broken) == 1 and "what is not from 0 to 900 is cut off" in found.report()
  found = scan(open_source(spec), spec, value_range=(0, 65535), progress=lambda count: None)
  assert "int32: -5 to 900; they become at most 4 of 255" in found.report()


def run_of(source: str, **keys) -> ConfigDict:
  config = configs.default()
  config.data.source = source
  for key, value in keys.items():
    config.data[key] = value
  return config


def test_a_run_that_cannot_know_its_range_is_refused_before_it_starts(tmp_path, caplog):
  spec = folder(tmp_path / "a", [np.full((8, 8, 3), value, np.int32) for value in (10, 900, 20)])
  source = open_source(spec)
  with pytest.raises(ConfigError, match=r"data.value_range=None: .*int32 .*here: \(0,4095\) for the int32 tried"):
    setup._check_images(run_of(spec), source, 3)
  setup._check_images(run_of(spec, value_range=(0.0, 900.0)), source, 3)
  (tmp_path / "a" / "0.npy").write_bytes(npy(pictures.smooth(8, 8)))
  (tmp_path / "a" / "1.npy").write_bytes(npy(pictures.smooth(8, 8)))
  setup._check_images(run_of(spec), source, 3)  # one odd record among others is a bad record
  spec = folder(tmp_path / "b", [np.full((8, 8), 200, np.uint16)])
  with caplog.at_level(logging.WARNING):
    setup._check_images(run_of(spec), open_source(spec), 3)
  assert "uint16 values from 200 to 200: without a range they become at most 0 of 255" in caplog.text
  assert Image.fromarray(decode(npy(np.full((8, 8), 200, np.uint16)))).getextrema()[0] == (0, 0)
