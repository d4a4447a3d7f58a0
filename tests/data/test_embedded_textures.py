"""embedded:textures: the class is in the pattern, and neither in the pixels nor in the colours."""

from __future__ import annotations

import numpy as np
import pytest

from vit_jax.data.embedded import open_embedded, textures


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  return (
    open_embedded("embedded:textures/train?count=1500", cache_dir=cache),
    open_embedded("embedded:textures/test?count=500", cache_dir=cache),
  )


def knn(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
  """Accuracy of the cosine-weighted vote of the 10 nearest (temperature 0.07)."""
  train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
  similarity = test @ train.T  # [N, M]
  nearest = np.argsort(-similarity, axis=1)[:, :10]
  votes = np.zeros((len(test), 20))
  np.add.at(votes, (np.arange(len(test))[:, None], train_labels[nearest]),
            np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07))  # fmt: skip
  return float((votes.argmax(1) == test_labels).mean())


def accuracy(splits, features) -> float:
  train, test = splits
  return knn(features(train.images), train.labels, features(test.images), test.labels)


def small_pixels(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1) / 255.0


def centred_pixels(images: np.ndarray) -> np.ndarray:
  pixels = small_pixels(images)
  return pixels - pixels.mean(1, keepdims=True)


def color_histograms(images: np.ndarray) -> np.ndarray:
  bins = (images.astype(np.int64) * 6 // 256) @ np.array([36, 6, 1])  # [N, H, W]
  return np.stack([np.bincount(image.ravel(), minlength=216) for image in bins]).astype(float)


def local_patterns(images: np.ndarray) -> np.ndarray:
  """Histograms of how the eight neighbours at two distances compare with each pixel: pattern without colour."""
  grey = images.astype(np.float32).mean(-1)  # [N, H, W]
  found = []
  for radius in (1, 3):
    middle = grey[:, radius:-radius, radius:-radius]
    code = np.zeros(middle.shape, np.int64)
    for bit, (dy, dx) in enumerate([(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]):
      y, x = radius * (1 + dy), radius * (1 + dx)
      code |= (grey[:, y : y + middle.shape[1], x : x + middle.shape[2]] > middle).astype(np.int64) << bit
    turned = [((code << k) | (code >> (8 - k))) & 255 for k in range(8)]
    code = np.minimum.reduce(turned)
    found.append(np.stack([np.bincount(image.ravel(), minlength=256) for image in code]))
  counts = np.concatenate(found, 1).astype(float)
  return np.sqrt(counts)


def test_pixels_and_colors_do_not_tell_the_class(splits):
  # Chance is 0.05; with 500 test images three standard errors are 0.03.
  assert accuracy(splits, small_pixels) <= 0.08
  assert accuracy(splits, centred_pixels) <= 0.09  # without the mean colour, which hides the pattern from the cosine
  assert accuracy(splits, color_histograms) <= 0.15


def test_local_patterns_tell_the_class_also_in_crops(splits):
  assert accuracy(splits, local_patterns) > 0.6
  assert accuracy(splits, lambda images: local_patterns(images[:, 24:40, 30:46])) > 0.3  # a sixteenth of the area


def test_labels_are_balanced_and_in_no_visible_order(splits):
  for source in splits:
    assert source.num_classes == len(source.class_names) == 20
    assert np.ptp(np.bincount(source.labels, minlength=20)) == 0
  labels = splits[0].labels.reshape(-1, 20)
  assert len(np.unique(labels, axis=0)) == len(labels)  # every run of twenty is ordered in its own way
  assert not np.array_equal(splits[0].labels[:500], splits[1].labels)


def test_no_image_comes_twice(splits):
  images = np.concatenate([source.images for source in splits])
  assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("name", textures.CLASS_NAMES)
def test_every_texture_has_contrast_everywhere(name):
  images = [textures.render(name, 64, np.random.default_rng(seed)).astype(float).mean(-1) for seed in range(9)]
  quarters = np.reshape(images, (9, 2, 32, 2, 32)).std((2, 4))  # [9, 2, 2]
  assert np.median(quarters.min((1, 2))) > 15.0
