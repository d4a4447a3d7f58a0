"""Mask quotas against the reference's, block masks against its statistics."""

import json

import numpy as np
import pytest

from tests.golden import Golden
from vit_jax.data.views.multi_crop import masks

GRIDS = ("g14_n30", "g14_n98", "g6_n10", "g10x14_n50")
DRAWS = 4000


def test_counts_equal_the_reference():
  golden = Golden("collate")
  assert len(golden.settings["counts"]) == 48
  for case in golden.settings["counts"]:
    counts = masks.mask_counts(case["crops"], case["patches"], case["mask_sample_probability"], tuple(case["ratio"]))
    np.testing.assert_array_equal(counts, golden[f"counts/{case['index']}/requested"], err_msg=json.dumps(case))


@pytest.mark.parametrize(
  ("patches", "ratio", "quotas"),
  [
    (100, (0.1, 0.7), [70]),
    (100, (0.4, 0.8), [50, 60, 70, 80]),
    (36, (0.25, 0.75), [15, 21, 27]),
    (100, (0.1, 0.5), [18, 26, 34, 42, 50]),
  ],
)
def test_quotas_are_products_of_float32(patches, ratio, quotas):
  """As PyTorch computes them; in float64 a share just below 0.7 of 100 patches would mask 69 of them."""
  rows = 2 * len(quotas)
  assert list(masks.mask_counts(rows, patches, 0.5, ratio)) == quotas + [0] * len(quotas)


@pytest.mark.parametrize(
  ("rows", "patches", "probability", "ratio", "quotas"),
  [  # quotas: {masked row: patches}, made by the reference's own lines with PyTorch; each differs if rounded twice
    (12, 576, 1.0, (0.25, 0.75), {6: 312}),
    (16, 256, 1.0, (0.2, 0.65), {8: 115}),
    (16, 1024, 1.0, (0.2, 0.65), {8: 463}),
    (72, 36, 0.5, (0.1, 0.5), {20: 12}),
    (120, 576, 0.5, (0.1, 0.5), {34: 192}),
    (144, 36, 0.5, (0.1, 0.5), {41: 12}),
    (196, 196, 0.5, (0.1, 0.5), {52: 62, 62: 69}),
    (240, 576, 0.5, (0.1, 0.5), {69: 192}),
  ],
)
def test_quotas_are_rounded_once(rows, patches, probability, ratio, quotas):
  counts = masks.mask_counts(rows, patches, probability, ratio)
  assert {row: counts[row] for row in quotas} == quotas


@pytest.mark.slow
def test_quotas_are_those_of_torch_in_every_setting():
  torch = pytest.importorskip("torch")
  ratios = [(low / 20, high / 20) for low in range(0, 20) for high in range(low + 1, 21)] + [(0.15, 0.45)]
  for masked in (*range(1, 130), 192, 255, 256, 257, 512, 1024):
    for ratio in ratios:
      shares = torch.linspace(*ratio, masked + 1)
      for patches in (36, 49, 196, 256, 576, 1024, 2304):
        quotas = (patches * shares[1:]).to(torch.int64).numpy()  # int(patches * share) of each
        np.testing.assert_array_equal(masks.mask_counts(masked, patches, 1.0, ratio), quotas)


@pytest.mark.parametrize(
  ("side", "images", "total"),
  [(14, 64, 3771), (14, 8, 507), (16, 16, 1274), (16, 64, 4941), (32, 8, 2659), (48, 8, 5987)],
)
def test_masked_patches_of_a_group(side, images, total):
  assert masks.masked_patches(images, (side, side), 0.5, (0.1, 0.5)) == total


@pytest.fixture(scope="module", params=GRIDS)
def drawn(request):
  golden = Golden("masking_stats")
  settings = golden.settings[request.param]
  rng = np.random.default_rng(7)
  grid, count = tuple(settings["grid"]), settings["requested"]
  return np.stack([masks.block_mask(rng, grid, count) for _ in range(DRAWS)]), golden.under(request.param), settings


def z_score(values, mean_std, num):
  mean, std = mean_std
  return abs(values.mean() - mean) / np.sqrt(std**2 / len(values) + std**2 / num)


def test_block_masks_reach_their_count_exactly(drawn):
  mask, _, settings = drawn
  assert set(mask.sum((1, 2))) == {settings["requested"]}


def test_block_masks_cover_cells_as_often_as_the_reference(drawn):
  mask, golden, settings = drawn
  p = golden["cell_probability"]
  sigma = np.sqrt(p * (1 - p) * (1 / DRAWS + 1 / settings["draws"]))
  assert np.abs((mask.mean(0) - p) / sigma).max() < 4.5  # the largest of up to 196


def test_block_masks_clump_as_the_reference(drawn):
  mask, golden, settings = drawn
  horizontal = (mask[:, :, 1:] & mask[:, :, :-1]).sum((1, 2))
  vertical = (mask[:, 1:] & mask[:, :-1]).sum((1, 2))
  assert z_score(horizontal, golden["horizontal_pairs/mean_std"], settings["draws"]) < 4
  assert z_score(vertical, golden["vertical_pairs/mean_std"], settings["draws"]) < 4
  assert horizontal.std() == pytest.approx(golden["horizontal_pairs/mean_std"][1], rel=0.06)


def test_rectangles_are_as_many_and_as_full_as_the_reference(drawn):
  _, golden, settings = drawn
  rng = np.random.default_rng(8)
  covered = [masks._cover(masks._uniforms(rng), *settings["grid"], settings["requested"]) for _ in range(DRAWS)]
  blocks = np.array([number for _, number in covered])
  cells = np.array([bits.bit_count() for bits, _ in covered])
  assert z_score(blocks, golden["blocks_per_mask/mean_std"], settings["draws"]) < 4
  assert z_score(cells, golden["count_from_blocks/mean_std"], settings["draws"]) < 4


@pytest.mark.parametrize("count", [0, 1, 2, 35, 36])
def test_extreme_counts_are_met(count):
  assert masks.block_mask(np.random.default_rng(0), (6, 6), count).sum() == count


def test_more_patches_than_the_grid_has_are_refused():
  with pytest.raises(ValueError, match="37 of the 36"):
    masks.block_mask(np.random.default_rng(0), (6, 6), 37)


@pytest.mark.parametrize("shift", [False, True])
def test_masked_count_is_constant_per_group(shift):
  total = masks.masked_patches(8, (6, 6), 0.5, (0.1, 0.5))
  rows = []
  for seed in range(20):
    mask = masks.group_masks(np.random.default_rng(seed), 8, (6, 6), 0.5, (0.1, 0.5), shift=shift)
    assert mask.shape == (8, 2, 36)
    assert mask.sum() == total
    assert sorted(mask.reshape(16, 36).sum(1)) == sorted(masks.mask_counts(16, 36, 0.5, (0.1, 0.5)))
    rows.append(mask.any(-1))
  assert (np.mean(rows, axis=0) > 0).all() and (np.mean(rows, axis=0) < 1).all()  # any crop, never always


def test_shift_wraps_blocks_around_the_edges():
  """A block touches opposite edges of a row at once only if it was rolled (it never spans a whole side)."""

  def wrapped(shift):
    rng = np.random.default_rng(1)
    mask = np.concatenate([masks.group_masks(rng, 16, (8, 8), 0.5, (0.1, 0.1), shift=shift) for _ in range(10)])
    grid = mask.reshape(-1, 8, 8)
    return (grid[:, :, 0] & grid[:, :, -1]).sum()

  assert wrapped(True) > 3 * wrapped(False) + 10


def test_indices_and_weights_are_those_of_the_reference_collate():
  golden = Golden("collate")
  mask = golden["example/collated_masks"]  # [2B, N], crop-major; which row is which crop does not matter here
  indices, weights = masks.indices_and_weights(mask.reshape(-1, 2, mask.shape[-1]))
  np.testing.assert_array_equal(indices, golden["example/mask_indices_list"])
  np.testing.assert_allclose(weights, golden["example/masks_weight"], rtol=1e-6)
  assert indices.dtype == np.int32 and weights.dtype == np.float32
