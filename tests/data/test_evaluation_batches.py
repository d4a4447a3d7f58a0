"""Evaluation batches: the reference's preprocessing, exact padding, unreadable images left out."""

import logging

import numpy as np
import pytest

from tests.golden import Golden
from vit_jax.data.evaluation_batches import evaluation_batches, fitting_crop_ratio, framed, resize_and_crop


class Labelled:
  num_classes = 0
  class_names = ()

  def __init__(self, count, shape=(30, 40), bad=()):
    self.count, self.shape, self.bad = count, shape, bad

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.bad:
      return {"image": b"", "label": index}
    return {"image": np.full((*self.shape, 3), index % 256, np.uint8), "label": index}

  def describe(self, index):
    return f"picture-{index}"


@pytest.mark.parametrize("image", ["img0", "img1"])
def test_resize_and_crop_is_the_evaluation_transform_of_the_reference(image):
  golden = Golden("aug_ops").under(image)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  expected = (golden["eval_transform"].transpose(1, 2, 0) * std + mean) * 255
  pixels = resize_and_crop(golden["image"], 28)
  assert pixels.shape == (28, 28, 3)
  difference = np.abs(pixels - expected)
  assert difference.max() <= 2.01  # the reference resizes tensors here, Pillow rounds between its two passes
  assert difference.mean() < 0.5


def test_an_image_of_the_size_is_left_alone():
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  np.testing.assert_array_equal(resize_and_crop(pixels, 32), pixels)
  wide = np.random.default_rng(0).integers(0, 256, (32, 50, 3), dtype=np.uint8)
  np.testing.assert_array_equal(resize_and_crop(wide, 32), wide[:, 9:41])


@pytest.mark.parametrize("shape", [(2, 2), (3, 200), (200, 3), (57, 31)])
def test_every_shape_gives_the_size(shape):
  assert resize_and_crop(np.zeros((*shape, 3), np.uint8), 24).shape == (24, 24, 3)


def test_a_given_crop_ratio_is_that_of_all_images_alike():
  pixels = np.random.default_rng(0).integers(0, 256, (32, 50, 3), dtype=np.uint8)
  np.testing.assert_array_equal(framed(32)(pixels), pixels[:, 9:41])
  np.testing.assert_array_equal(framed(32, 1.0)(pixels), pixels[:, 9:41])
  assert (framed(32, 0.875)(pixels) != pixels[:, 9:41]).any()
  np.testing.assert_array_equal(framed(28, 0.875)(pixels), pixels[2:30, 11:39])
  batch = next(evaluation_batches(Labelled(3, (24, 24)), image_size=24, batch_size=3, max_examples=3, crop_ratio=0.5))
  assert batch["images"].shape == (3, 24, 24, 3) and batch["valid"].all()


@pytest.mark.parametrize(
  ("shape", "bad", "ratio"), [((16, 16), (), 1.0), ((16, 40), (0, 7), 1.0), ((17, 16), (), 1.0), ((30, 40), (), 0.875)]
)
def test_images_that_have_the_size_already_are_kept_whole(shape, bad, ratio):
  assert fitting_crop_ratio(Labelled(100, shape, bad), 16) == ratio
  assert fitting_crop_ratio(Labelled(1, shape), 16) == ratio


def test_one_image_of_another_size_is_enough_to_resize_all():
  class Mixed(Labelled):
    def __getitem__(self, index):
      return {"image": np.zeros((16, 16 if index else 20, 3) if index else (20, 20, 3), np.uint8), "label": 0}

  assert fitting_crop_ratio(Mixed(50), 16) == 0.875
  assert fitting_crop_ratio(Labelled(9, bad=range(9)), 16) == 0.875  # none can be read, which others say


def test_every_image_comes_once_in_order_and_padding_is_marked():
  batches = list(evaluation_batches(Labelled(10), image_size=16, batch_size=4, max_examples=100))
  assert [batch["valid"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
  assert np.concatenate([batch["label"][batch["valid"]] for batch in batches]).tolist() == list(range(10))
  for batch in batches:
    assert batch["images"].shape == (4, 16, 16, 3) and batch["images"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["images"][batch["valid"], 8, 8, 0], batch["label"][batch["valid"]])
    assert (batch["label"][~batch["valid"]] == -1).all()


def test_a_full_last_batch_is_followed_by_none():
  assert len(list(evaluation_batches(Labelled(8), image_size=16, batch_size=4, max_examples=100))) == 2


def test_a_limit_takes_the_same_random_choice_each_time():
  def labels():
    batches = evaluation_batches(Labelled(1000), image_size=8, batch_size=32, max_examples=50)
    return np.concatenate([batch["label"][batch["valid"]] for batch in batches])

  chosen = labels()
  np.testing.assert_array_equal(chosen, labels())
  assert len(set(chosen)) == 50 and (np.diff(chosen) > 0).all()
  assert chosen.max() > 800 and chosen.min() < 200  # not the first fifty


def test_unreadable_images_are_left_out_with_a_warning(caplog):
  with caplog.at_level(logging.WARNING):
    batches = list(evaluation_batches(Labelled(10, bad=(0, 7)), image_size=16, batch_size=8, max_examples=100))
  assert len(batches) == 1 and batches[0]["valid"].all()
  assert batches[0]["label"].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
  assert "picture-7" in caplog.text
