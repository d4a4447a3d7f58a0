"""Pixels and colour histograms as features."""

from __future__ import annotations

import numpy as np

from tests.evaluation.batches import coloured
from vit_jax.evaluation.baselines import BASELINES, histogram, majority, pixels


def test_pixels_keep_the_differences_of_constant_areas():
  image = np.zeros((1, 64, 64, 3), np.uint8)
  image[:, :, 32:] = [255, 51, 0]
  small = np.asarray(pixels(image)["cls"]).reshape(16, 16, 3)
  np.testing.assert_allclose(small[:, 9:] - small[0, 0, 0], np.broadcast_to([1.0, 0.2, 0.0], (16, 7, 3)), atol=1e-6)
  np.testing.assert_allclose(small[:, :7], small[0, 0, 0], atol=1e-6)


def test_pixels_of_a_16_px_image_are_the_image_less_its_mean():
  images, _ = coloured(3, seed=0)
  flat = images.reshape(3, -1) / 255.0
  np.testing.assert_allclose(pixels(images)["cls"], flat - flat.mean(axis=1, keepdims=True), atol=1e-5)


def test_histogram_counts_colours():
  images, _ = coloured(4, seed=1, size=20)
  for image, counted in zip(images, np.asarray(histogram(images)["cls"]), strict=True):
    expected = np.histogramdd(image.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)[0]
    np.testing.assert_allclose(counted, expected.ravel() / 400, atol=1e-6)


def test_histogram_ignores_where_colours_are():
  images, _ = coloured(2, seed=2)
  np.testing.assert_array_equal(histogram(images)["cls"], histogram(images[:, ::-1, ::-1])["cls"])


def test_every_baseline_gives_one_float_row_per_image():
  images, _ = coloured(3, seed=3, size=24)
  for feature_fn in BASELINES.values():
    features = np.asarray(feature_fn(images)["cls"])
    assert features.shape[0] == 3 and features.ndim == 2 and features.dtype == np.float32


def test_majority_is_that_of_the_training_labels():
  assert majority(np.array([0, 1, 1]), np.array([0, 0, 0, 1])) == 0.25
