"""Feature extraction: exact under padding, batch size and number of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.batches import Means, batches, coloured
from vit_jax.evaluation import EvaluationError, evaluate, extract, extract_all, features, make_feature_fn
from vit_jax.models import create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARAMS = {"factor": np.float32(2.0)}


@pytest.fixture(scope="module")
def feature_fn():
  return make_feature_fn(Means(), PARAMS, mean=MEAN, std=STD)


def test_features_are_those_of_the_normalised_image(feature_fn):
  images, labels = coloured(5, seed=0)
  extracted = extract(feature_fn, batches(images, labels, 5))
  normalised = (images / 255.0 - MEAN) / STD
  np.testing.assert_allclose(extracted.cls, 2.0 * normalised.mean(axis=(1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(extracted.patch_mean, extracted.cls, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(extracted.labels, labels)
  assert extracted.cls.dtype == extracted.patch_mean.dtype == np.float32
  assert extracted.cls_and_patch_mean.shape == (5, 6)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_batch_size_and_padding_change_nothing(feature_fn, batch_size):
  images, labels = coloured(13, seed=1)
  whole = extract(feature_fn, batches(images, labels, 13))
  parts = extract(feature_fn, batches(images, labels, batch_size))
  np.testing.assert_allclose(parts.cls, whole.cls, rtol=1e-6)
  np.testing.assert_allclose(parts.patch_mean, whole.patch_mean, rtol=1e-6)
  np.testing.assert_array_equal(parts.labels, labels)


def test_padding_in_the_middle_of_a_batch_is_dropped(feature_fn):
  images, labels = coloured(6, seed=2)
  valid = np.array([True, False, True, True, False, True])
  extracted = extract(feature_fn, [{"images": images, "label": labels, "valid": valid}])
  np.testing.assert_array_equal(extracted.labels, labels[valid])
  alone = extract(feature_fn, batches(images[valid], labels[valid], 4))
  np.testing.assert_allclose(extracted.cls, alone.cls, rtol=1e-6)


def test_images_are_streamed(feature_fn):
  images, labels = coloured(40, seed=3)
  read, done = [], []

  def counted():
    for batch in batches(images, labels, 4):
      read.append(len(done))
      yield batch

  extract(feature_fn, counted(), progress=done.append)
  assert done == list(range(4, 41, 4))
  # Batch i is read when all but a few of the earlier ones are done.
  assert all(index - finished <= features._IN_FLIGHT for index, finished in enumerate(read))


def test_several_functions_share_one_pass(feature_fn):
  images, labels = coloured(10, seed=4)
  passes = iter(batches(images, labels, 4))  # can be read once only
  both = extract_all({"a": feature_fn, "b": lambda x: {"cls": jnp.asarray(x)[:, 0, 0].astype(jnp.float32)}}, passes)
  np.testing.assert_array_equal(both["b"].cls, images[:, 0, 0])
  assert both["b"].patch_mean.shape == (10, 0)
  assert both["b"].cls_and_patch_mean.shape == (10, 3)
  np.testing.assert_allclose(both["a"].cls, extract(feature_fn, batches(images, labels, 10)).cls, rtol=1e-6)


def test_new_parameters_reuse_the_compilation(feature_fn):
  images, labels = coloured(4, seed=5)
  before = extract(feature_fn, batches(images, labels, 4)).cls
  compiled = features._apply._cache_size()
  doubled = make_feature_fn(Means(), {"factor": np.float32(4.0)}, mean=MEAN, std=STD)
  np.testing.assert_allclose(extract(doubled, batches(images, labels, 4)).cls, 2.0 * before, rtol=1e-6)
  assert features._apply._cache_size() == compiled


def test_diverged_parameters_are_named(feature_fn):
  broken = make_feature_fn(Means(), {"factor": np.float32(np.nan)}, mean=MEAN, std=STD)
  with pytest.raises(EvaluationError, match="3 of 3 images have NaN or infinite features/cls"):
    extract(broken, batches(*coloured(3, seed=6), 4))


def test_no_image_is_an_error(feature_fn):
  with pytest.raises(EvaluationError, match="No image"):
    extract(feature_fn, [])


def test_already_normalised_images_are_refused(feature_fn):
  with pytest.raises(ValueError, match=r"uint8 images \[B, H, W, C\].*float32"):
    feature_fn(np.zeros((2, 16, 16, 3), np.float32))


@pytest.fixture(scope="module")
def vit():
  model = create_model("vit_small", patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=64)
  return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]


def test_eight_devices_give_one_devices_features(vit):
  model, params = vit[0], jax.tree.map(np.asarray, vit[1])
  mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
  one = make_feature_fn(model, params, mean=MEAN, std=STD)
  many = make_feature_fn(model, params, mean=MEAN, std=STD, sharding=sharding)
  train, test = coloured(90, seed=7), coloured(30, seed=8)
  outputs = many(train[0][:13])  # 13 images do not divide by 8 devices
  assert outputs["cls"].shape == outputs["patch_mean"].shape == (13, 32)
  assert len(outputs["cls"].sharding.device_set) == 8

  alone = extract(one, batches(*train, 90))
  expected = evaluate(one, batches(*train, 16), batches(*test, 16), tasks=("knn",), num_classes=4)
  with jax.set_mesh(mesh):
    together = extract(many, batches(*train, 12))
    scores = evaluate(many, batches(*train, 12), batches(*test, 12), tasks=("knn",), num_classes=4)
  np.testing.assert_allclose(together.cls, alone.cls, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(together.patch_mean, alone.patch_mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(together.labels, alone.labels)
  assert scores == pytest.approx(expected, abs=0.04)  # rounding may move one test image of 30 over an edge


def test_parameters_spread_over_devices_stay_there(vit):
  """A training loop passes its own sharded parameters; they are gathered by the compiler, not copied by hand."""
  model, params = vit
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))

  def spread(leaf):
    last = ("fsdp",) if leaf.shape[-1] % 8 == 0 else (None,)
    return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.P(*(None,) * (leaf.ndim - 1), *last)))

  many = make_feature_fn(model, jax.tree.map(spread, params), mean=MEAN, std=STD, sharding=sharding)
  images, labels = coloured(10, seed=9)
  expected = extract(make_feature_fn(model, params, mean=MEAN, std=STD), batches(images, labels, 10))
  with jax.set_mesh(mesh):
    got = extract(many, batches(images, labels, 4))
  np.testing.assert_allclose(got.cls, expected.cls, rtol=1e-4, atol=1e-5)
