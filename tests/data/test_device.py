"""The multi-crop on the device: the host's crops again, whatever the options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.data import pictures
from vit_jax.data.groups import LossGroups
from vit_jax.data.views import MultiCrop, on_one_device
from vit_jax.data.views.multi_crop import device
from vit_jax.data.views.multi_crop import host as augment
from vit_jax.ops import colours

SMALL = MultiCrop(global_size=32, local_size=16, local_number=2, mask_grid=(2, 2), loss_group_size=4)
PLAIN = dataclasses.replace(SMALL, jitter=0.0, blur=(0.0, 0.0, 0.0))  # compiles in a third of the time
PHOTOS = [pictures.smooth(height, width, seed) for seed, (height, width) in enumerate([(60, 48), (48, 60), (40, 64)])]


class Photos:
  """Smooth pictures of several shapes."""

  num_classes = 0
  class_names = ()

  def __len__(self):
    return len(PHOTOS)

  def __getitem__(self, index):
    return {"image": PHOTOS[index], "label": index}

  def describe(self, index):
    return f"photo-{index}"


def both(views, groups=(0, 1), canvas=(64, 64)):
  """The crops of some loss groups, as the host and as the device makes them."""
  raw = dataclasses.replace(views, canvas=canvas)
  make = on_one_device(raw)
  for number in groups:
    host, group = (LossGroups(Photos(), v, 5, 4)[number] for v in (views, raw))
    shapes = {name: (array.shape, array.dtype) for name, array in group.items() if name != "bad_records"}
    assert shapes == raw.arrays(4)
    del host["bad_records"], group["bad_records"]
    yield host, jax.device_get(make(group))


OPTIONS = {
  "gram": dataclasses.replace(SMALL, gram_size=48),
  "gram distorted": dataclasses.replace(SMALL, gram_size=48, gram_distortions=True),
  "inside, shared": dataclasses.replace(SMALL, local_inside_global=True, stride=8, share_color_jitter=True, flip=0.0),
}


@pytest.mark.parametrize("views", OPTIONS.values(), ids=OPTIONS)
def test_both_paths_make_the_same_crops(views):
  for host, ours in both(views):
    assert ours.keys() == host.keys()
    for name, array in host.items():
      assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype)
      difference = np.abs(ours[name].astype(float) - array)
      if not name.endswith("crops"):
        assert difference.max() == 0
        continue
      assert (difference <= 2).mean() > 0.98, name  # a step of Pillow's 8-bit hue is up to 6 levels
      assert difference.mean() < 0.3, name


def test_a_canvas_that_is_too_small_holds_the_image_shrunk():
  group = LossGroups(Photos(), dataclasses.replace(SMALL, canvas=(32, 32)), 5, 4)[0]
  for canvas, (height, width) in zip(group["canvas"], group["valid"], strict=True):
    assert max(height, width) == 32 and min(height, width) in (20, 26)
    assert canvas[:height, :width].min() >= 0 and not canvas[height:].any() and not canvas[:, width:].any()


def test_crops_do_not_depend_on_the_number_of_devices():
  views = dataclasses.replace(PLAIN, canvas=(64, 64))
  group = LossGroups(Photos(), views, 5, 4)[0]
  group = {name: array for name, array in group.items() if not name.startswith(("mask", "bad"))}
  alone = on_one_device(views)(group)
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  spread = jax.device_put(group, NamedSharding(mesh, PartitionSpec("data")))
  together = jax.jit(functools.partial(views.on_device, mesh=mesh, axes="data"))
  made = together(spread)
  for name, array in alone.items():
    np.testing.assert_array_equal(made[name], array, err_msg=name)
  text = together.lower(spread).compile().as_text()
  assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_images_are_worked_on_in_chunks_with_the_same_result(monkeypatch):
  views = dataclasses.replace(PLAIN, canvas=(64, 64))
  group = LossGroups(Photos(), views, 5, 4)[0]
  arrays = [group[name] for name in ("canvas", "valid", "random")]
  whole = jax.jit(functools.partial(device.make_crops, views=views))(*arrays)
  monkeypatch.setattr(device, "_CHUNK", 2)
  parts = jax.jit(functools.partial(device.make_crops, views=views))(*arrays)
  for name, array in whole.items():
    np.testing.assert_array_equal(parts[name], array)


@pytest.fixture(scope="module")
def drawn():
  """The parameters of 10,000 images on both paths, from the same random numbers."""
  views = MultiCrop(local_number=2)
  sizes = np.array([(375, 500), (500, 375), (300, 900), (64, 64)] * 2500, np.int32)
  rng = np.random.default_rng(3)
  numbers = np.stack([augment.random_numbers(rng, views) for _ in sizes])
  rng = np.random.default_rng(3)
  host = [augment.draw_crops(rng, int(h), int(w), views) for h, w in sizes]
  return host, jax.device_get(jax.jit(functools.partial(device.draw, views=views))(numbers, sizes))


def test_ten_thousand_draws_of_every_parameter_are_those_of_the_host(drawn):
  host, ours = drawn
  crops = [crop for image in host for crop in image]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ours)
  boxes = np.array([crop[:4] for crop in crops])
  same = (boxes == flat.box).all(-1)
  assert same.mean() > 0.999  # the rest by float32, and then by a pixel
  assert np.abs(boxes - flat.box)[~same].max(initial=0) <= 1
  for name in ("flip", "grayscale", "solarize"):
    np.testing.assert_array_equal(getattr(flat, name), [getattr(crop, name) for crop in crops])
  np.testing.assert_allclose(flat.sigma, [crop.sigma or 0.0 for crop in crops], atol=1e-5)
  jittered = np.array([bool(crop.jitter) for crop in crops])
  np.testing.assert_array_equal((flat.order != colours.NOTHING).all(-1), jittered)
  orders = np.array([[which for which, _ in crop.jitter] for crop in crops if crop.jitter])
  np.testing.assert_array_equal(flat.order[jittered], orders)
  factors = np.array([[dict(crop.jitter)[i] for i in range(4)] for crop in crops if crop.jitter])
  np.testing.assert_allclose(flat.factors[jittered], factors, atol=1e-6)


def test_blur_comes_as_often_as_the_published_weights_had_it(drawn):
  blurred = drawn[1].sigma > 0  # [10000, 4]
  assert not blurred[:, 0].any()
  for crop, rate in ((1, 0.9), (2, 0.5), (3, 0.5)):
    assert abs(blurred[:, crop].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 10_000)


def test_each_of_several_resolutions_makes_its_own_crops():
  views = dataclasses.replace(PLAIN, canvas=(64, 64), resolutions=((32, 16, 0, 0.5), (32, 24, 0, 0.5)))
  groups = LossGroups(Photos(), views, 5, 4)
  seen = set()
  for number in range(6):
    group, variant = groups[number], groups.views(number)
    del group["bad_records"]
    crops = on_one_device(variant)(group)
    assert crops["local_crops"].shape[-2] == variant.sizes["local"]
    seen.add(crops["local_crops"].shape[-2])
  assert seen == {16, 24}


def test_the_whole_multi_crop_is_a_small_part_of_a_training_step():
  """Of ViT-S/16 at 2 x 224 and 8 x 96, counted by XLA; the step's products, by hand, without heads and attention."""
  views = MultiCrop()
  canvas = dataclasses.replace(views, canvas=views.enough_canvas).canvas
  assert canvas == (576, 576)
  shapes = [((1, *canvas, 3), jnp.uint8), ((1, 2), jnp.int32), ((1, *augment.random_shape(views)), jnp.float32)]
  arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  made = jax.jit(functools.partial(device.make_crops, views=views)).lower(*arguments)
  pixels = [jax.ShapeDtypeStruct((n, 3, size, size), jnp.float32) for n, size in ((2, 224), (8, 96))]
  each = [jax.ShapeDtypeStruct(x.shape[:1], kind) for x in pixels for kind in (jnp.int32, jnp.float32)]
  jitter = [jax.jit(colours.adjust).lower(x, *each[2 * i : 2 * i + 2]) for i, x in enumerate(pixels)]
  # XLA counts the body of the loop over the four adjustments once.
  flops = made.cost_analysis()["flops"] + 3 * sum(one.cost_analysis()["flops"] for one in jitter)
  tokens = 2 * 197 + 8 * 37
  block = 2 * 12 * 384**2  # a token's multiply-adds in one block
  step = 12 * block * (3 * tokens + 2 * 197)  # student forward and backward, teacher forward
  assert 2e9 < flops < 0.05 * step
