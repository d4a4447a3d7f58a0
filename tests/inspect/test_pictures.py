"""Tests of vit_jax/inspect/pictures.py and pca.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.views import MultiCrop
from vit_jax.inspect.cost import abstract_params
from vit_jax.inspect.pca import foreground_mask, otsu, principal_colours, principal_components
from vit_jax.inspect.pictures import contact_sheet, feature_sheet, overlay_masks, pca_sheet, save, stacked, to_uint8
from vit_jax.models import create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def make_batch(rng, *, size=32, local=16, number=5, images=3):
  return {
    "global_crops": rng.integers(0, 256, (images, 2, size, size, 3), np.uint8),
    "local_crops": rng.integers(0, 256, (images, number, local, local, 3), np.uint8),
    "masks": np.zeros((images, 2, (size // 8) ** 2), bool),
  }


def sheet_of(batch, **options):
  batch = {"local_crops": np.zeros((len(batch["global_crops"]), 0, 8, 8, 3), np.uint8)} | batch
  return contact_sheet(MultiCrop().panels(batch), **options)


def test_a_mask_changes_exactly_the_masked_cells(rng):
  crops = rng.integers(0, 100, (2, 2, 24, 40, 3), np.uint8)  # 3 x 5 patches of 8; darker than the grey of the overlay
  masks = np.zeros((2, 2, 15), bool)
  masks[1, 0, [0, 7, 14]] = True
  changed = (overlay_masks(crops, masks) != crops).all(axis=-1)
  expected = np.zeros(changed.shape, bool)
  for row, column in ((0, 0), (1, 2), (2, 4)):
    expected[1, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
  assert np.array_equal(changed, expected)


def test_masks_that_do_not_tile_the_crops_are_an_error():
  with pytest.raises(ValueError, match="masks of 15 square patches do not tile crops of 32x32 pixels"):
    overlay_masks(np.zeros((1, 2, 32, 32, 3), np.uint8), np.zeros((1, 2, 15), bool))


def test_the_sheet_contains_every_crop_enlarged_by_whole_pixels(rng):
  batch = make_batch(rng)
  sheet = sheet_of(batch, min_side=64)
  for crop in (
    *batch["global_crops"][:, 0],
    *batch["global_crops"][:, 1],
    *batch["local_crops"].reshape(-1, 16, 16, 3),
  ):
    large = crop.repeat(2, axis=0).repeat(2, axis=1)
    corners = np.argwhere((sheet[:, :, :] == large[0, 0]).all(axis=-1))
    height, width = large.shape[:2]
    assert any(np.array_equal(sheet[y : y + height, x : x + width], large) for y, x in corners)


def test_a_mask_shows_on_the_sheet_at_its_crop_only(rng):
  batch = make_batch(rng)
  plain = sheet_of(batch, min_side=32)
  batch["masks"][2, 1, 5] = True
  rows, columns = np.nonzero((sheet_of(batch, min_side=32) != plain).any(axis=-1))
  assert np.ptp(rows) < 8 and np.ptp(columns) < 8
  assert rows.min() > plain.shape[0] * 2 // 3


def test_gram_crops_are_on_the_sheet(rng):
  batch = make_batch(rng)
  batch["gram_crops"] = rng.integers(0, 256, (3, 2, 48, 48, 3), np.uint8)
  sheet = sheet_of(batch, min_side=32)
  for crop in batch["gram_crops"].reshape(-1, 48, 48, 3):
    corners = np.argwhere((sheet == crop[0, 0]).all(axis=-1))
    assert any(np.array_equal(sheet[y : y + 48, x : x + 48], crop) for y, x in corners)


def test_stacked_sheets_lie_above_each_other(rng):
  narrow, wide = sheet_of(make_batch(rng, number=0)), sheet_of(make_batch(rng))
  both = stacked([narrow, wide])
  assert np.array_equal(both[: len(narrow), : narrow.shape[1]], narrow) and np.array_equal(both[len(narrow) :], wide)


def test_sheets_of_few_images_and_without_local_crops(rng):
  batch = make_batch(rng, number=0)
  assert sheet_of(batch, images=2, min_side=32).shape[0] < sheet_of(batch, min_side=32).shape[0]
  del batch["local_crops"], batch["masks"]
  assert sheet_of(batch).shape[-1] == 3


def test_normalised_crops_look_like_the_pixels_they_were(rng):
  batch = make_batch(rng)
  floats = {name: (batch[name].astype(np.float32) / 255 - MEAN) / STD for name in ("global_crops", "local_crops")} | {
    "masks": batch["masks"]
  }
  assert np.array_equal(sheet_of(floats, mean=MEAN, std=STD), sheet_of(batch))
  with pytest.raises(ValueError, match=r"augment\.mean"):
    to_uint8(floats["local_crops"], None, None)


def test_components_are_those_of_the_singular_value_decomposition(rng):
  features = rng.standard_normal((50, 8)) * np.arange(8, 0, -1)
  components = principal_components(features)
  centred = features - features.mean(axis=0)
  _, _, directions = np.linalg.svd(centred, full_matrices=False)
  assert np.allclose(np.abs(components), np.abs(centred @ directions[:3].T), atol=1e-8)
  assert np.allclose(principal_components(-features), -components)  # the directions keep their signs


@pytest.mark.parametrize("features", [np.ones((20, 5)), np.arange(20.0)[:, None], np.zeros((1, 4))])
def test_features_without_three_directions_have_colours(features):
  colours = principal_colours(features)
  assert colours.shape == (len(features), 3)
  assert (colours[:, 2] == 128).all()  # nothing varies in the third direction: grey


def test_like_features_have_like_colours_in_all_images_when_shared(rng):
  # Two kinds of patches; the second image has only one of them.
  kinds = rng.standard_normal((2, 16))
  which = np.zeros((2, 16), int)
  which[0, 8:] = 1
  patches = kinds[which] + 0.01 * rng.standard_normal((2, 16, 16))
  sheet = pca_sheet(np.zeros((2, 32, 32, 3), np.uint8), patches, (4, 4), per_row=1, min_side=32)
  top, left, row = 24, 6 + 32 + 6, 32 + 6  # header; column of the shared colours; height of a row
  first, second = (sheet[top + i * row : top + i * row + 32, left : left + 32, 0].astype(int) for i in range(2))
  assert abs(first[:16].mean() - second.mean()) < 40 < abs(first[16:].mean() - second.mean())


def test_the_foreground_is_the_part_away_from_the_border(rng):
  inside = np.zeros((6, 6), bool)
  inside[2:4, 2:5] = True
  for sign in (1.0, -1.0):
    patches = rng.standard_normal((2, 36, 8)) * 0.1 + sign * 3 * inside.reshape(1, 36, 1)
    assert np.array_equal(foreground_mask(patches, (6, 6)), np.tile(inside.reshape(36), (2, 1)))
  sheet = pca_sheet(np.zeros((2, 48, 48, 3), np.uint8), patches, (6, 6), foreground=True, min_side=48, per_row=1)
  shared = sheet[24:72, 60:108]
  assert (shared[:16] == 0).all() and (shared[16:32, 16:40] != 0).any()


def test_the_threshold_lies_between_two_clusters(rng):
  values = np.concatenate([rng.normal(0, 0.1, 300), rng.normal(5, 0.1, 100)])
  assert 1 < otsu(values) < 4
  assert np.isfinite(otsu(np.ones(5)))


def test_patches_that_do_not_fit_the_grid_are_an_error():
  with pytest.raises(ValueError, match="grid of 4x5"):
    pca_sheet(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 16, 8)), (4, 5))


def test_features_of_a_model_are_drawn_and_saved(rng, tmp_path):
  model = create_model("vit_small", width=32, depth=1, num_heads=2, mlp_hidden=64, num_registers=2)
  params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract_params(model))
  images = rng.integers(0, 256, (3, 32, 48, 3), np.uint8)
  sheet = feature_sheet(model, params, images, mean=MEAN, std=STD)
  path = save(sheet, tmp_path / "new" / "features.png")
  assert np.array_equal(np.asarray(Image.open(path)), sheet)
  patches = jax.jit(model.apply)({"params": params}, ((images / 255 - MEAN) / STD).astype(np.float32)).patches
  assert np.array_equal(sheet, pca_sheet(images, np.asarray(patches), (2, 3)))
