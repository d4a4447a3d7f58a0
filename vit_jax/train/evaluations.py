"""What a run looks at besides its losses: scores of the frozen teacher, and pictures of its features and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax import evaluation, parallel
from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.evaluation.splits import open_splits
from vit_jax.inspect import pictures
from vit_jax.methods import State
from vit_jax.train.setup import Run

NUM_PICTURED = 8


class Evaluations:
  """Scores and pictures of the exported model, on images that are read once and kept.

  Args:
    run: the run.
  """

  def __init__(self, run: Run):
    self._run = run
    self._settings = run.config.evaluation
    self._size = self._settings.image_size or run.config.crops.global_size
    self._sources = None
    if run.evaluation_sources is not None:
      splits = open_splits(*run.evaluation_sources, cache_dir=run.config.data.cache_dir)
      self._sources, self._names = (splits.train, splits.test), splits.names
    self._pictured: np.ndarray | None = None

  def scores(self, state: State, *, baselines: bool) -> dict[str, float]:
    """The tasks' scores; with `baselines`, also those of pixels and colour histograms of the same images."""
    if self._sources is None:
      return {}
    model, params = self._run.method.export(state)
    config = self._run.config
    sharding = parallel.batch_sharding(self._run.mesh) if self._run.mesh.size > 1 else None
    feature_fn = evaluation.make_feature_fn(
      model, params, mean=config.augment.mean, std=config.augment.std, sharding=sharding
    )
    train, test = self._sources
    return evaluation.evaluate(
      feature_fn,
      self._batches(train),
      self._batches(test),
      tasks=self._settings.tasks,
      num_classes=train.num_classes,
      baselines=evaluation.BASELINES if baselines else None,
      names=self._names,
      seed=config.seed,
    )

  def pictures(self, state: State) -> dict[str, np.ndarray]:
    """The principal components of the teacher's patches on a few images."""
    if self._pictured is None:
      source = self._sources[1] if self._sources else self._run.source
      few = {"batch_size": NUM_PICTURED, "max_examples": NUM_PICTURED}
      batch = next(evaluation_batches(source, image_size=self._size, **few))
      self._pictured = batch["images"][batch["valid"]]
    model, params = self._run.method.export(state)
    augment = self._run.config.augment
    return {"pca": pictures.feature_sheet(model, params, self._pictured, mean=augment.mean, std=augment.std)}

  def _batches(self, source: Any) -> Iterator[Mapping[str, Any]]:
    return evaluation_batches(
      source,
      image_size=self._size,
      batch_size=self._settings.batch_size,
      max_examples=self._settings.max_examples,
    )
