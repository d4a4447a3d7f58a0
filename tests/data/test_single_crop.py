"""Another method's views through the same pipeline: one crop of each image with its label, no masks, no groups."""

import numpy as np
import pytest

from tests.data.test_pipeline import Numbered
from vit_jax.data.groups import LossGroups
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.views import SingleCrop
from vit_jax.inspect.pictures import contact_sheet

VIEWS = SingleCrop(size=32, stride=8)


def batches(number, seed=0, **options):
  with make_pipeline(Numbered(20, bad=[3]), VIEWS, batch_size=8, seed=seed, workers=0, **options) as pipeline:
    return [next(pipeline) for _ in range(number)]


def test_batches_have_the_announced_arrays_and_every_readable_image_with_its_label():
  made = batches(5)  # two epochs
  for batch in made:
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == VIEWS.arrays(8)
  assert set(np.concatenate([batch["label"] for batch in made])) == set(range(20)) - {3}


def test_a_batch_depends_on_the_seed_and_its_place_alone():
  one, same, other = batches(3), batches(3), batches(3, seed=1)
  for a, b in zip(one, same, strict=True):
    np.testing.assert_array_equal(a["images"], b["images"])
  assert any((a["images"] != b["images"]).any() for a, b in zip(one, other, strict=True))


def test_a_size_that_is_no_whole_number_of_patches_is_refused():
  with pytest.raises(ValueError, match="crops.global_size=30: must be a multiple of 8"):
    SingleCrop(size=30, stride=8)


def test_what_is_drawn_is_said_and_shown():
  groups = LossGroups(Numbered(20), VIEWS, 0, 4)
  group = groups[0]
  for (name, drawn), label in zip(groups.drawn(0, 4), group["label"], strict=True):
    assert name == f"picture-{label}" and len(drawn.captions) == 1
  sheet = contact_sheet(VIEWS.panels(VIEWS.on_device({"images": group["images"]})), min_side=32)
  assert sheet.shape[-1] == 3 and sheet.shape[0] > 4 * 32
