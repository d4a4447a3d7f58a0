"""embedded:photos: tiles of photographs of other packages, and what is said when those are absent."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from vit_jax.data.embedded import open_embedded, photos, scene

installed = pytest.mark.skipif(
  any(importlib.util.find_spec(package) is None for package in ("skimage", "sklearn")),
  reason="the photographs are in scikit-image and scikit-learn",
)


@pytest.fixture(autouse=True)
def nothing_remembered():
  for remembered in (photos.load, photos.tiles):
    remembered.cache_clear()
  yield
  photos.tiles.cache_clear()  # perhaps of stand-ins


@pytest.mark.parametrize("use", [
  lambda folder: open_embedded("embedded:photos", cache_dir=folder),
  lambda folder: open_embedded("embedded:shapes?count=1&background=photo", cache_dir=folder),
  lambda folder: scene(0, background="photo"),
])  # fmt: skip
def test_absent_packages_are_named_with_the_command_that_installs_them(use, tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r'pip install "vit-jax\[photos\]"'):
    use(tmp_path)


@pytest.fixture
def gradients(monkeypatch):
  """Two stand-in photographs in which every pixel says where it is."""
  y, x = np.meshgrid(np.arange(96), np.arange(128), indexing="ij")
  first = np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)
  second = np.stack([y, x, np.full_like(x, 255)], -1).astype(np.uint8)
  monkeypatch.setattr(photos, "load", lambda: {"first": first, "second": second})


def test_tiles_alternate_between_train_and_test_like_a_chessboard(gradients):
  seen = {}
  for split in (0, 1):
    images, labels = photos.tiles(split, 32)
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    for image, label in zip(images, labels, strict=True):
      assert (image[..., 2] == (255 if label else 0)).all()
      row, column = image[0, 0, 0] // 32, image[0, 0, 1] // 32
      assert (row + column) % 2 == split
      seen[label, row, column] = split
  assert len(seen) == 2 * 3 * 4  # every tile once


def test_blank_tiles_are_left_out(monkeypatch, tmp_path):
  photo = np.zeros((64, 64, 3), np.uint8)
  photo[:32, :32] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
  monkeypatch.setattr(photos, "load", lambda: {"dark": photo})
  assert photos.available(0, size=32) == 1
  with pytest.raises(ValueError, match="0 tiles of size=32.*lower size"):
    open_embedded("embedded:photos/test?size=32", cache_dir=tmp_path)


def test_too_large_a_count_says_how_many_there_are(gradients, tmp_path):
  with pytest.raises(ValueError, match="12 tiles of size=32"):
    open_embedded("embedded:photos?size=32&count=13", cache_dir=tmp_path)


def test_backgrounds_are_crops_reduced_by_whole_numbers(gradients):
  for seed in range(10):
    image = photos.crop(np.random.default_rng(seed), 32)
    steps = np.diff(image[:, 0, 0].astype(int))
    assert image.shape == (32, 32, 3) and np.ptp(steps) == 0 and steps[0] in (1, 2, 3)
  with pytest.raises(ValueError, match="up to size 96"):
    photos.crop(np.random.default_rng(0), 100)


@installed
def test_real_photographs_are_read(tmp_path):
  train = open_embedded("embedded:photos?size=64", cache_dir=tmp_path)
  test = open_embedded("embedded:photos/test?size=64", cache_dir=tmp_path)
  assert set(train.labels) == set(test.labels) == set(range(train.num_classes))
  assert len(train) > 300
  assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
  assert scene(0, background="photo").caption.endswith("on a photograph")
