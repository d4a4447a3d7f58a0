"""Evaluation of a model on sources of images: what `vit-jax evaluate` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.data.limits import DEFAULT, Limits
from vit_jax.evaluation.baselines import BASELINES
from vit_jax.evaluation.errors import EvaluationError, Incomplete
from vit_jax.evaluation.features import FeatureFn, Progress, make_feature_fn
from vit_jax.evaluation.protocols import check_tasks, evaluate
from vit_jax.evaluation.report import check_path, save
from vit_jax.evaluation.splits import open_splits

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def evaluate_model(
  model: Any,
  params: Any,
  *,
  tasks: Sequence[str],
  train_source: str,
  test_source: str | None = None,
  image_size: int = 224,
  batch_size: int = 64,
  max_examples: int | None = 50_000,
  mean: tuple[float, ...] = IMAGENET_MEAN,
  std: tuple[float, ...] = IMAGENET_STD,
  value_range: tuple[float, float] | None = None,
  crop_ratio: float | None = None,
  baselines: bool = True,
  sharding: jax.sharding.NamedSharding | None = None,
  cache_dir: str | os.PathLike | None = None,
  limits: Limits = DEFAULT,
  seed: int = 0,
  progress: Progress | None = None,
  show: Callable[[Mapping[str, float], Mapping[str, str]], None] | None = None,
  output: str | os.PathLike | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Scores the frozen features of a model, next to those of its untrained self, of pixels and of colours.

  Args:
    model: a backbone, as `vit_jax.load_model` returns it.
    params: its parameters.
    tasks: of `TASKS`.
    train_source: specification of the labelled images that vote or train the probe.
    test_source: specification of the images that are classified; None: see `splits.open_splits`.
    image_size: images are resized so that the shorter side is a little longer, and cut to this size. Take the size of
      the training crops.
    batch_size: images at a time, over all devices.
    max_examples: images of each source at most; None: all.
    mean: channel means of the training images in [0, 1] (`augment.mean`).
    std: their channel standard deviations (`augment.std`).
    value_range: of images that do not have 8 bits (`data.value_range`).
    crop_ratio: side of the centre crop over the resized short side (`evaluation.crop_ratio`); None: 224 / 256, but an
      image whose short side has the size already is only cropped.
    baselines: whether the untrained network, pixels and colours are scored too.
    sharding: how a batch is spread over devices; see `features.make_feature_fn`.
    cache_dir: see `data.cache_dir`.
    limits: bounds on the bytes and pixels of each image (`data.max_file_bytes`, `data.max_pixels`).
    seed: of the untrained network and of the linear probe.
    progress: called with the number of images done.
    show: called with the results and with what failed (see `Incomplete`) before they are written to a file.
    output: file for the results, .json or .md; None: none.
    about: what else to write into it, such as where the model is from.

  Returns:
    see `evaluate`; the baselines are "untrained", "pixels", "histogram" and "majority".

  Raises:
    EvaluationError: for what `evaluate`, `open_splits` and `report.save` refuse, before anything long is done.
    Incomplete: as of `evaluate`, after the file has been written.
  """
  check_tasks(tasks)
  if output is not None:
    check_path(output)
  splits = open_splits(train_source, test_source, max_examples=max_examples, cache_dir=cache_dir, limits=limits)
  splits.keep()
  options = dict(mean=mean, std=std, sharding=sharding)
  further: dict[str, FeatureFn] = {}
  if baselines:
    untrained = untrained_params(model, params, image_size=image_size, seed=seed)
    further = {"untrained": make_feature_fn(model, untrained, **options), **BASELINES}
  train, test = splits.batches(
    image_size=image_size,
    batch_size=batch_size,
    channels=model.in_channels,
    value_range=value_range,
    crop_ratio=crop_ratio,
  )
  failed: dict[str, str] = {}
  try:
    results = evaluate(
      make_feature_fn(model, params, **options),
      train,
      test,
      tasks=tasks,
      num_classes=splits.num_classes,
      shared_classes=splits.shared_classes,
      baselines=further,
      names=splits.names,
      seed=seed,
      progress=progress,
    )
  except Incomplete as error:
    results, failed = error.results, error.failed
  if show is not None:
    show(results, failed)
  if output is not None:
    save(output, results, about=dict(about or {}) | splits.about() | {"image_size": image_size}, failed=failed)
  if failed:
    raise Incomplete(results, failed)
  return results


def check_image_size(size: int, stride: int, key: str) -> None:
  """Raises EvaluationError unless images of `size` pixels are whole patches; `key` is what the user calls the size."""
  if size < stride:
    raise EvaluationError(f"{key}={size}: is smaller than a patch of the model, {stride} pixels")
  if size % stride:
    below = size // stride * stride
    raise EvaluationError(
      f"{key}={size}: must be a multiple of {stride}, the pixels of a patch of the model: {below} or {below + stride}"
    )


def untrained_params(model: Any, params: Any, *, image_size: int, seed: int = 0) -> Any:
  """Initial parameters of `model`, with the types and on the devices of `params`."""
  image = jnp.zeros((1, image_size, image_size, model.in_channels))

  def init(key: jax.Array) -> Any:
    return jax.tree.map(lambda new, old: new.astype(old.dtype), model.init(key, image)["params"], params)

  shardings = jax.tree.map(lambda old: old.sharding if isinstance(old, jax.Array) else None, params)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
