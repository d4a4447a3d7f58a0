"""Frozen features: a jitted function from images to features, and their extraction from a whole split, once.

Protocols (k-NN, linear probe, ...) are functions of the extracted arrays and never see a model; a model never sees
them. Exact under padding: rows that are not `valid` are dropped on the host, whatever the model made of them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vit_jax.evaluation.errors import EvaluationError
from vit_jax.models.inputs import prepare_images
from vit_jax.parallel import processes

# uint8 images [B, H, W, 3] -> {"cls": [B, D]} and, where the features have patches, {"patch_mean": [B, D]}; float32.
FeatureFn = Callable[[UInt8[np.ndarray, "B H W C"]], Mapping[str, Array]]
# Called after every batch with the number of images that are done.
Progress = Callable[[int], None]

_IN_FLIGHT = 2  # batches dispatched before the oldest is fetched: the host reads images while the device computes


@dataclasses.dataclass(frozen=True)
class Extracted:
  """The features of a split, in the order of its images, without padding."""

  cls: Float[np.ndarray, "N D"]  # one vector per image
  patch_mean: Float[np.ndarray, "N P"]  # mean of the patch features; P = 0 for features without patches
  labels: Int[np.ndarray, " N"]  # -1: the image has no label

  @property
  def cls_and_patch_mean(self) -> Float[np.ndarray, "N D+P"]:
    """Both side by side: what the linear probe reads."""
    return np.concatenate([self.cls, self.patch_mean], axis=1)  # [N, D + P]

  def check_finite(self, *, patch_mean: bool = True) -> None:
    """Raises EvaluationError if an image's class token, or patch mean, is not finite: no score of it would be right."""
    for key in ("cls", "patch_mean") if patch_mean else ("cls",):
      array = getattr(self, key)
      bad = int((~np.isfinite(array).all(axis=1)).sum())
      if bad:
        raise EvaluationError(
          f"{bad} of {len(array)} images have NaN or infinite features/{key}: the parameters have diverged or are "
          "not those of this model, so no score is given. Evaluate an earlier checkpoint."
        )


def make_feature_fn(
  model: Any,
  params: Any,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  sharding: jax.sharding.NamedSharding | None = None,
) -> FeatureFn:
  """A function from uint8 images to the frozen float32 features of `model`.

  Models of one architecture share one compilation, so a training loop may call this anew at every evaluation.

  Args:
    model: a module whose `apply({"params": params}, images)` returns features with `cls` and `patches`; hashable, as
      Linen modules are.
    params: its parameters, on the devices already or as numpy arrays.
    mean: channel means of images in [0, 1], as in training (`augment.mean`).
    std: channel standard deviations of images in [0, 1], as in training (`augment.std`).
    sharding: how the leading axis of a batch is spread over the devices of a mesh (all processes must then pass the
      same images). The features come back whole on every device. None: the default device.

  Returns:
    images [B, H, W, C] uint8 -> {"cls": [B, D] (final norm), "patch_mean": [B, D]}. Any B: with a sharding the batch
    is padded to a multiple of the devices and the padding is cut off again.
  """
  replicated = None if sharding is None else jax.sharding.NamedSharding(sharding.mesh, jax.P())
  # Once, not at every call; arrays that are on devices already keep their sharding.
  params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, replicated), params)
  arguments = model, tuple(map(float, mean)), tuple(map(float, std)), replicated, params
  compiled: set[tuple[int, ...]] = set()

  def feature_fn(images: UInt8[np.ndarray, "B H W C"]) -> dict[str, Array]:
    _check_images(images)
    if sharding is None:
      return _apply(*arguments, images)
    num = len(images)
    padding = -num % sharding.num_devices
    images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))  # [B + padding, H, W, 3]
    # By callback: each process places the rows of its own devices, one process or many.
    placed = jax.make_array_from_callback(images.shape, sharding, lambda index: images[index])
    if placed.shape not in compiled:
      compiled.add(placed.shape)
      processes.compile_together("features", _apply, *arguments, placed)
    return {name: features[:num] for name, features in _apply(*arguments, placed).items()}

  return feature_fn


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply(model, mean, std, replicated, params, images) -> dict[str, Array]:
  features = model.apply({"params": params}, prepare_images(model, images, mean, std))
  outputs = {
    "cls": features.cls.astype(jnp.float32),  # [B, D]
    "patch_mean": jnp.mean(features.patches.astype(jnp.float32), axis=1),  # [B, D]
  }
  return outputs if replicated is None else jax.lax.with_sharding_constraint(outputs, replicated)


def extract(
  feature_fn: FeatureFn, batches: Iterable[Mapping[str, Any]], *, progress: Progress | None = None
) -> Extracted:
  """The features of every valid image of `batches`, which must be finite; see `extract_all`."""
  features = extract_all({"features": feature_fn}, batches, progress=progress)["features"]
  features.check_finite()
  return features


def extract_all(
  feature_fns: Mapping[str, FeatureFn], batches: Iterable[Mapping[str, Any]], *, progress: Progress | None = None
) -> dict[str, Extracted]:
  """The features that several functions give to the same images, in one pass over them.

  Images are streamed: a few batches are in memory at a time, and the features.

  Args:
    feature_fns: name -> feature function.
    batches: dicts of "images" [b, S, S, 3] uint8, "label" [b] int and "valid" [b] bool (False: padding).
    progress: called after every batch with the number of valid images so far.

  Returns:
    name -> features [N, D] of the N valid images, in their order.

  Raises:
    EvaluationError: if there is no image. Whether the features are finite is for whoever reads them
      (`Extracted.check_finite`).
  """
  collected = {name: collections.defaultdict(list) for name in feature_fns}
  labels: list[np.ndarray] = []
  in_flight: collections.deque = collections.deque()
  done = 0

  def fetch() -> None:
    nonlocal done
    outputs, valid = in_flight.popleft()
    for name, features in outputs.items():
      for key, value in features.items():
        collected[name][key].append(np.asarray(value, np.float32)[valid])  # [valid, D]
    done += int(valid.sum())
    if progress is not None:
      progress(done)

  for batch in batches:
    images, valid = np.asarray(batch["images"]), np.asarray(batch["valid"], bool)
    labels.append(np.asarray(batch["label"], np.int32)[valid])
    in_flight.append(({name: feature_fn(images) for name, feature_fn in feature_fns.items()}, valid))
    if len(in_flight) > _IN_FLIGHT:
      fetch()
  while in_flight:
    fetch()
  if not done:
    raise EvaluationError("No image to extract features from: the source is empty, or max_examples is 0.")
  return {name: _join(parts, np.concatenate(labels)) for name, parts in collected.items()}


def check_labelled(
  task: str, train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> None:
  """Raises a ValueError unless there are features [N, D] and [M, D] with a label each, as tasks take them."""

  def shown(name: str, features: np.ndarray, labels: np.ndarray) -> str:
    return f"{name}_features {list(np.shape(features))} with {name}_labels {list(np.shape(labels))}"

  got = f"{shown('train', train_features, train_labels)} and {shown('test', test_features, test_labels)}"
  words = f"{task} takes float features [N, D] with integer labels [N], N >= 1, got {got}"
  features = [train_features, test_features]
  chex.assert_rank(features, 2, custom_message=words, exception_type=ValueError)
  chex.assert_type(features, float, custom_message=words, exception_type=ValueError)
  for rows, labels in zip(features, (train_labels, test_labels), strict=True):
    chex.assert_axis_dimension_gt(rows, 0, 0, custom_message=words, exception_type=ValueError)
    chex.assert_shape(labels, rows.shape[:1], custom_message=words, exception_type=ValueError)
    chex.assert_type(labels, int, custom_message=words, exception_type=ValueError)
  words = f"train features have width {train_features.shape[1]}, test features {test_features.shape[1]}"
  chex.assert_equal_shape_suffix(features, 1, custom_message=words, exception_type=ValueError)


def _join(parts: Mapping[str, list[np.ndarray]], labels: np.ndarray) -> Extracted:
  arrays = {key: np.concatenate(chunks) for key, chunks in parts.items()}  # each [N, D]
  return Extracted(arrays["cls"], arrays.get("patch_mean", np.zeros((len(labels), 0), np.float32)), labels)


def _check_images(images: np.ndarray) -> None:
  words = f"a feature function takes uint8 images [B, H, W, C] and normalises them itself, got {images.dtype}"
  chex.assert_rank(images, 4, custom_message=words, exception_type=ValueError)
  chex.assert_type(images, np.uint8, custom_message=words, exception_type=ValueError)
