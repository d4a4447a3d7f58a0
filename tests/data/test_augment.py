"""The multi-crop: recorded draws of the reference replayed, and the distribution of our own draws."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data import pictures
from tests.golden import FOLDER, Golden
from vit_jax.data import operations
from vit_jax.data.resampling import crop_and_resize, planes, resize
from vit_jax.data.views import MultiCrop
from vit_jax.data.views.multi_crop import host as augment
from vit_jax.data.views.multi_crop.host import Crop, apply_crop, apply_crops, draw_crops, multi_crop

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


def assert_close(pixels, normalised, *, overshoots=False):
  """Two levels of 255 (the tolerance for jitter chains) for at least 99 % of the values, and never far off."""
  levels = (normalised.transpose(1, 2, 0) * STD + MEAN) * 255
  if overshoots:
    levels = levels.clip(0, 255)
  difference = np.abs(pixels - levels)
  assert (difference <= 2.01).mean() >= 0.99
  assert difference.max() <= 8  # one step of an 8-bit hue, and the rounding of what follows


@pytest.mark.parametrize("kind", ["plain", "no_flip"])
@pytest.mark.parametrize("image", ["image0", "image1"])
def test_recorded_multi_crop_is_reproduced(kind, image):
  golden = Golden("aug_pipeline")
  crops = recorded_crops(golden.settings["traces"][f"{kind}/{image}"]["ops"])
  expected = [*golden[f"{kind}/{image}/global_crops"], *golden[f"{kind}/{image}/local_crops"]]
  assert len(crops) == len(expected) == 4
  for crop, result in zip(crops, expected, strict=True):
    assert_close(apply_crop(planes(golden[image]), crop, result.shape[-1]), result)


@pytest.mark.parametrize("image", ["image0", "image1"])
def test_jitter_before_the_crops_is_reproduced(image):
  """The variant that distorts the whole image once: the same operations in another order."""
  golden = Golden("aug_pipeline")
  trace = golden.settings["traces"][f"shared_jitter/{image}"]["ops"]
  first = next(i for i, (name, _) in enumerate(trace) if name == "RandomResizedCrop")
  source = golden[image]
  for which, factor in jitter_of(trace[0][1]):
    source = operations.ADJUSTMENTS[which](source, factor)
  if ["RandomGrayscale", {"num_input_channels": 3}] in trace[:first]:
    source = operations.grayscale(source)
  expected = [*golden[f"shared_jitter/{image}/global_crops"], *golden[f"shared_jitter/{image}/local_crops"]]
  for crop, result in zip(recorded_crops(trace[first:]), expected, strict=True):
    assert_close(apply_crop(planes(source), crop, result.shape[-1]), result)


def rows_first(image, top, left, height, width, size):
  """`crop_and_resize` as Pillow 13 does it with some tall boxes; at sharp edges that shows."""
  return crop_and_resize(image.swapaxes(1, 2), left, top, width, height, size).swapaxes(0, 1)


@pytest.mark.parametrize("distorted", [False, True])
@pytest.mark.parametrize("image", ["image0", "image1"])
def test_recorded_gram_crops_are_reproduced(distorted, image, monkeypatch):
  golden = Golden("aug_pipeline")
  kind = f"gram_{'distorted' if distorted else 'clean'}/{image}"
  trace = [(name, values) for name, values in golden.settings["traces"][kind]["ops"] if name != "Resize"]
  views = MultiCrop(global_size=32, local_size=16, local_number=2, gram_size=48, gram_distortions=distorted)
  made = []
  for cut in (crop_and_resize, rows_first):
    monkeypatch.setattr(augment, "crop_and_resize", cut)
    made.append(empty(views))
    apply_crops(planes(golden[image]), recorded_crops(trace), views, *made[-1].values())
  for name, recorded in (("global", "global_crops"), ("local", "local_crops"), ("gram", "gram_teacher_crops")):
    for *ours, theirs in zip(*(arrays[name] for arrays in made), golden[f"{kind}/{recorded}"], strict=True):
      levels = (theirs.transpose(1, 2, 0) * STD + MEAN) * 255
      nearest = min(ours, key=lambda pixels: np.abs(pixels - levels).mean())
      assert_close(nearest, theirs, overshoots=distorted and name != "local")


def empty(views):
  """The arrays that `apply_crops` fills."""
  shapes = {"global": (2, views.global_size), "local": (views.local_number, views.local_size)}
  if views.gram_size is not None:
    shapes["gram"] = (2, views.gram_size)
  return {name: np.zeros((count, size, size, 3), np.uint8) for name, (count, size) in shapes.items()}


@pytest.fixture(scope="module")
def drawn():
  """Draws for many images of the statistics' size: {"global1" | "global2" | "local": crops}."""
  stats = json.loads((FOLDER / "augmentation_stats.json").read_text())
  views = MultiCrop(local_number=stats["local_crops_per_image"])
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
  views = MultiCrop(global_scale=(1.0, 1.0), local_number=0)
  wide = draw_crops(np.random.default_rng(0), 10, 100, views)[0]
  assert (wide.top, wide.left, wide.height, wide.width) == (0, 43, 10, 13)
  tall = draw_crops(np.random.default_rng(0), 100, 10, views)[0]
  assert (tall.top, tall.left, tall.height, tall.width) == (43, 0, 13, 10)


@pytest.mark.parametrize("shape", [(2, 2), (2, 90), (3, 5), (31, 17)])
def test_the_smallest_images_can_be_cropped(shape):
  views = MultiCrop(global_size=16, local_size=8, local_number=3)
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
  global_crops, local_crops = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)
  for seed in range(30):
    multi_crop(pixels, np.random.default_rng(seed), views, global_crops, local_crops)


def test_without_distortions_a_crop_of_everything_is_the_image():
  views = MultiCrop(
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


PLAIN = dict(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def picture():
  return pictures.smooth(96, 120, 5)


def crops_of(picture, views, seed=0):
  arrays = empty(views)
  multi_crop(picture, np.random.default_rng(seed), views, *arrays.values())
  return arrays


@pytest.mark.parametrize("gram_size", [16, 32, 64])
def test_gram_crops_show_what_the_global_crops_show(picture, gram_size):
  views = MultiCrop(global_size=32, local_size=16, local_number=0, gram_size=gram_size, **PLAIN)
  for seed in range(10):
    arrays = crops_of(picture, views, seed)
    small = min(gram_size, 32)
    for shown, gram in zip(arrays["global"], arrays["gram"], strict=True):
      pair = [resize(pixels, small).astype(float) for pixels in (shown, gram)]
      assert np.abs(pair[0] - pair[1]).mean() < 3
      assert np.abs(pair[0] - pair[1][:, ::-1]).mean() > 5  # the same flip, not the other one


def test_gram_crops_are_not_distorted_unless_asked(picture):
  views = MultiCrop(global_size=32, local_size=16, local_number=2, gram_size=48, grayscale=1.0, jitter=0.0)
  clean = crops_of(picture, views)
  assert np.ptp(clean["global"], axis=-1).max() == 0 < np.ptp(clean["gram"], axis=-1).max()
  shared = crops_of(picture, dataclasses.replace(views, gram_distortions=True))
  assert np.ptp(shared["gram"], axis=-1).max() == 0
  np.testing.assert_array_equal(clean["local"], shared["local"])


def test_gram_crops_no_larger_than_the_global_ones_leave_everything_else_as_it_is(picture):
  views = MultiCrop(global_size=32, local_size=16, local_number=2)
  without, beside = crops_of(picture, views), crops_of(picture, dataclasses.replace(views, gram_size=32))
  for name in without:
    np.testing.assert_array_equal(without[name], beside[name])


INSIDE = MultiCrop(global_size=64, local_size=24, local_number=6, local_inside_global=True, stride=8)


def test_local_crops_inside_global_ones_are_windows_of_them(picture):
  views = dataclasses.replace(INSIDE, gram_size=96, **PLAIN)
  flips = set()
  for seed in range(10):
    crops = draw_crops(np.random.default_rng(seed), *picture.shape[:2], views)
    arrays = crops_of(picture, views, seed)
    for i, crop in enumerate(crops[2:]):
      top, left = crop.window
      window = arrays["global"][i // 3, top : top + 24, left : left + 24]
      np.testing.assert_array_equal(arrays["local"][i], window)
      flips.add(crop.flip)
  assert flips == {False, True}


def test_windows_lie_on_patches_with_the_bound_of_the_reference():
  rng = np.random.default_rng(0)
  crops = [crop for _ in range(300) for crop in draw_crops(rng, 96, 120, INSIDE)]
  offsets = np.array([crop.window for crop in crops if crop.window is not None])  # [1800, 2]
  for axis in offsets.T:
    places, counts = np.unique(axis, return_counts=True)
    np.testing.assert_array_equal(places, [0, 8, 16, 24, 32])  # not 40 = 64 - 24, the last that would fit
    assert abs(counts / len(axis) - 0.2).max() < 0.05
  assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [60, 64])
def test_a_window_with_one_place_only_lies_there(size):
  views = dataclasses.replace(INSIDE, local_size=size)
  crops = draw_crops(np.random.default_rng(0), 96, 120, views)
  assert {crop.window for crop in crops[2:]} == {(0, 0)}


def test_local_crops_inside_global_ones_have_their_own_distortions(picture):
  views = dataclasses.replace(INSIDE, flip=0.0)
  crops = draw_crops(np.random.default_rng(1), *picture.shape[:2], views)
  assert len({crop.jitter for crop in crops}) > 4
  sigmas = [crop.sigma for crop in crops[2:]]
  assert any(sigmas) and not all(sigmas)  # the probability of local crops, not of the global one they lie in


def test_shared_colours_are_drawn_once_for_all_crops(picture):
  views = MultiCrop(global_size=32, local_size=16, local_number=2, share_color_jitter=True, flip=0.0)
  grey, own = 0, set()
  for seed in range(200):
    crops = draw_crops(np.random.default_rng(seed), 20, 24, views)
    own |= {(crop.jitter, crop.grayscale) for crop in crops}
  for seed in range(100):
    arrays = crops_of(picture, views, seed)
    is_grey = [np.ptp(crop, axis=-1).max() == 0 for crop in (*arrays["global"], *arrays["local"])]
    assert all(is_grey) or not any(is_grey)
    grey += all(is_grey)
  assert own == {((), False)}
  assert 8 <= grey <= 34  # of 100 with probability 0.2: four standard deviations
