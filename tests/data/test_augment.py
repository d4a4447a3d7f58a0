"""The multi-crop: recorded draws of the reference replayed, and the distribution of our own draws."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.golden import FOLDER, Golden
from vit_jax.data import operations
from vit_jax.data.augment import Crop, apply_crop, draw_crops, multi_crop
from vit_jax.data.views import Views

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NAMES = ("brightness", "contrast", "saturation", "hue")


def recorded_crops(operations_list):
  """The reference's trace of one image -> our draws: a new crop begins at each RandomResizedCrop."""
  crops = []
  for name, values in operations_list:
    if name == "RandomResizedCrop":
      crops.append(Crop(**values))
    elif name == "RandomHorizontalFlip":
      crops[-1] = crops[-1]._replace(flip=True)
    elif name == "ColorJitter":
      crops[-1] = crops[-1]._replace(jitter=jitter_of(values))
    elif name == "RandomGrayscale":
      crops[-1] = crops[-1]._replace(grayscale=True)
    elif name == "GaussianBlur":
      crops[-1] = crops[-1]._replace(sigma=values["sigma"][0])
    elif name == "RandomSolarize":
      crops[-1] = crops[-1]._replace(solarize=True)
    else:
      raise AssertionError(name)
  return crops


def jitter_of(values):
  return tuple((which, values[f"{NAMES[which]}_factor"]) for which in values["fn_idx"])


def assert_close(pixels, normalised):
  """Two levels of 255 (the tolerance for jitter chains) for at least 99 % of the values, and never far off."""
  levels = (normalised.transpose(1, 2, 0) * STD + MEAN) * 255
  difference = np.abs(pixels - levels)
  assert (difference <= 2.01).mean() >= 0.99
  assert difference.max() <= 6


@pytest.mark.parametrize("kind", ["plain", "no_flip"])
@pytest.mark.parametrize("image", ["image0", "image1"])
def test_recorded_multi_crop_is_reproduced(kind, image):
  golden = Golden("aug_pipeline")
  crops = recorded_crops(golden.settings["traces"][f"{kind}/{image}"]["ops"])
  expected = [*golden[f"{kind}/{image}/global_crops"], *golden[f"{kind}/{image}/local_crops"]]
  assert len(crops) == len(expected) == 4
  for crop, result in zip(crops, expected, strict=True):
    assert_close(apply_crop(Image.fromarray(golden[image]), crop, result.shape[-1]), result)


@pytest.mark.parametrize("image", ["image0", "image1"])
def test_jitter_before_the_crops_is_reproduced(image):
  """The variant that distorts the whole image once: the same operations in another order."""
  golden = Golden("aug_pipeline")
  trace = golden.settings["traces"][f"shared_jitter/{image}"]["ops"]
  first = next(i for i, (name, _) in enumerate(trace) if name == "RandomResizedCrop")
  source = Image.fromarray(golden[image])
  for which, factor in jitter_of(trace[0][1]):
    source = operations.ADJUSTMENTS[which](source, factor)
  if ["RandomGrayscale", {"num_input_channels": 3}] in trace[:first]:
    source = operations.grayscale(source)
  expected = [*golden[f"shared_jitter/{image}/global_crops"], *golden[f"shared_jitter/{image}/local_crops"]]
  for crop, result in zip(recorded_crops(trace[first:]), expected, strict=True):
    assert_close(apply_crop(source, crop, result.shape[-1]), result)


@pytest.fixture(scope="module")
def drawn():
  """Draws for many images of the statistics' size: {"global1" | "global2" | "local": crops}."""
  stats = json.loads((FOLDER / "augmentation_stats.json").read_text())
  views = Views(local_number=stats["local_crops_per_image"])
  rng = np.random.default_rng(11)
  images = [draw_crops(rng, *stats["image_hw"], views) for _ in range(4000)]
  return stats, {
    "global1": [crops[0] for crops in images],
    "global2": [crops[1] for crops in images],
    "local": [crop for crops in images for crop in crops[2:]],
  }


@pytest.mark.parametrize("kind", ["global1", "global2", "local"])
def test_operations_are_applied_as_often_as_in_the_reference(drawn, kind):
  stats, crops = drawn[0][kind], drawn[1][kind]
  ours = {
    "RandomHorizontalFlip": np.mean([crop.flip for crop in crops]),
    "ColorJitter": np.mean([bool(crop.jitter) for crop in crops]),
    "RandomGrayscale": np.mean([crop.grayscale for crop in crops]),
    "GaussianBlur": np.mean([crop.sigma is not None for crop in crops]),
    "RandomSolarize": np.mean([crop.solarize for crop in crops]),
  }
  for name, rate in stats["apply_rate"].items():
    p = max(rate, 1e-6)
    assert abs(ours[name] - rate) <= 4 * np.sqrt(p * (1 - p) * (1 / len(crops) + 1 / stats["crops"])) + 1e-5, name


@pytest.mark.parametrize("kind", ["global1", "global2", "local"])
def test_parameters_are_distributed_as_in_the_reference(drawn, kind):
  (height, width), stats, crops = drawn[0]["image_hw"], drawn[0][kind], drawn[1][kind]
  ours = {
    "area_fraction": [crop.height * crop.width / (height * width) for crop in crops],
    "log_ratio": [np.log(crop.width / crop.height) for crop in crops],
    "center_x": [(crop.left + crop.width / 2) / width for crop in crops],
    "center_y": [(crop.top + crop.height / 2) / height for crop in crops],
    "blur_sigma": [crop.sigma for crop in crops if crop.sigma is not None],
  }
  for which, name in enumerate(NAMES):
    ours[f"{name}_factor"] = [dict(crop.jitter)[which] for crop in crops if crop.jitter]
  for name, expected in stats["parameters"].items():
    values = np.array(ours[name])
    standard_error = expected["std"] * np.sqrt(1 / len(values) + 1 / expected["n"])
    assert abs(values.mean() - expected["mean"]) < 4 * standard_error, name
    assert values.std() == pytest.approx(expected["std"], rel=0.05), name
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, expected["quantiles_5_25_50_75_95"], atol=0.1 * expected["std"] + 1e-3)


def test_jitter_orders_are_all_equally_likely(drawn):
  orders, counts = np.unique(
    [[which for which, _ in crop.jitter] for crop in drawn[1]["local"] if crop.jitter], axis=0, return_counts=True
  )
  assert len(orders) == 24
  expected = counts.sum() / 24
  assert ((counts - expected) ** 2 / expected).sum() < 55  # chi-square, 23 degrees of freedom: p < 0.001


def test_hopeless_aspect_falls_back_to_the_centre():
  views = Views(global_scale=(1.0, 1.0), local_number=0)
  wide = draw_crops(np.random.default_rng(0), 10, 100, views)[0]
  assert (wide.top, wide.left, wide.height, wide.width) == (0, 43, 10, 13)
  tall = draw_crops(np.random.default_rng(0), 100, 10, views)[0]
  assert (tall.top, tall.left, tall.height, tall.width) == (43, 0, 13, 10)


@pytest.mark.parametrize("shape", [(2, 2), (2, 90), (3, 5), (31, 17)])
def test_the_smallest_images_can_be_cropped(shape):
  views = Views(global_size=16, local_size=8, local_number=3)
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
  global_crops, local_crops = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
  for seed in range(30):
    multi_crop(pixels, np.random.default_rng(seed), views, global_crops, local_crops)


def test_without_distortions_a_crop_of_everything_is_the_image():
  views = Views(
    global_size=24,
    global_scale=(1.0, 1.0),
    local_number=0,
    flip=0,
    jitter=0,
    grayscale=0,
    blur=(0, 0, 0),
    solarize=(0, 0, 0),
  )
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
  out = np.zeros((2, 24, 24, 3), np.uint8)
  draws = [draw_crops(np.random.default_rng(seed), 24, 24, views)[0] for seed in range(200)]
  whole = next(seed for seed, crop in enumerate(draws) if (crop.height, crop.width) == (24, 24))
  multi_crop(pixels, np.random.default_rng(whole), views, out, np.zeros((0, 8, 8, 3), np.uint8))
  np.testing.assert_array_equal(out[0], pixels)
