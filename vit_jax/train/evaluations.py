"""What a run looks at besides its losses: scores of the frozen teacher, and pictures of its features and data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax import evaluation, methods, parallel
from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.groups import Unreadable
from vit_jax.data.subsets import at_most, keep
from vit_jax.evaluation.features import FeatureFn
from vit_jax.evaluation.splits import open_splits
from vit_jax.inspect import pictures
from vit_jax.methods import State
from vit_jax.train import setup
from vit_jax.train.setup import Run

log = logging.getLogger(__name__)

NUM_PICTURED = 8
Check = Callable[[], None]


class Evaluations:
  """Scores and pictures of the exported model, on images that are read once and kept.

  Args:
    run: the run.
  """

  def __init__(self, run: Run):
    self._run = run
    self._settings = run.config.evaluation
    self._size = self._settings.image_size or run.config.crops.global_size
    self._sources, self._pictured_source = None, run.source
    if run.evaluation_sources is not None:
      splits = open_splits(
        *run.evaluation_sources, cache_dir=run.config.data.cache_dir, limits=setup.limits(run.config)
      )
      self._names, self._pictured_source = splits.names, splits.test
      self._shared_classes = splits.shared_classes
      self._sources = tuple(at_most(part, self._settings.max_examples) for part in (splits.train, splits.test))
    self._pictured: np.ndarray | None = None

  def scores(self, state: State, *, baselines: bool, check: Check = lambda: None) -> dict[str, float]:
    """The tasks' scores; with `baselines`, also those of pixels and colour histograms of the same images.

    A task that cannot be scored on these features is named in a warning, and left out.

    The scores of several students begin with their names; a frozen teacher is a further baseline.

    Args:
      state: of the run; it is only read.
      baselines: whether to score these, too.
      check: called after every batch; what it raises ends the evaluation.
    """
    if self._sources is None:
      return {}
    config, results = self._run.config, {}
    train, test = self._sources
    for source in self._sources:
      keep(source)  # they are read at every evaluation
    for name, exported in methods.exports(self._run.method, state, config).items():
      further = {}
      if baselines and not results:  # they are the same for all students
        further = dict(evaluation.BASELINES)
        if state.frozen is not None:
          teacher = methods.frozen_teacher(config).modules.backbone
          further["teacher"] = self._feature_fn(teacher, state.frozen["backbone"])
      try:
        scores = evaluation.evaluate(
          self._feature_fn(*exported),
          self._batches(train),
          self._batches(test),
          tasks=self._settings.tasks,
          num_classes=train.num_classes,
          shared_classes=self._shared_classes if baselines and not results else None,
          baselines=further or None,
          names=self._names,
          seed=config.seed,
          progress=lambda _: check(),
        )
      except evaluation.Incomplete as error:  # no reason to stop training
        scores = error.results
        log.warning("evaluation%s: %s", f" of {name}" if name else "", "; ".join(str(error).splitlines()))
      results |= {
        f"{name}/{key}" if name and not key.startswith("baseline/") else key: value for key, value in scores.items()
      }
    return results

  def _feature_fn(self, model: Any, params: Any) -> FeatureFn:
    augment = self._run.config.augment
    sharding = parallel.batch_sharding(self._run.mesh) if self._run.mesh.size > 1 else None
    return evaluation.make_feature_fn(model, params, mean=augment.mean, std=augment.std, sharding=sharding)

  def pictures(self, state: State, *, check: Check = lambda: None) -> dict[str, np.ndarray]:
    """The principal components of the teacher's patches on a few images; `check` as for the scores."""
    if self._pictured is None:
      source = self._pictured_source
      batch = next(self._batches(source, batch_size=NUM_PICTURED, max_examples=NUM_PICTURED), None)
      if batch is None:
        raise Unreadable(
          f"none of the {min(NUM_PICTURED, len(source))} images to show in pictures, such as {source.describe(0)}, can "
          "be read. Check data.source (and evaluation.test_source, if set), or set log.pictures=false."
        )
      self._pictured = batch["images"][batch["valid"]]
    augment, mesh = self._run.config.augment, self._run.mesh
    sheets = {}
    for name, (model, params) in methods.exports(self._run.method, state, self._run.config).items():
      check()
      sheets[f"{name}/pca" if name else "pca"] = pictures.feature_sheet(
        model, params, self._pictured, mean=augment.mean, std=augment.std, mesh=mesh
      )
    return sheets

  def _batches(self, source: Any, **numbers: int) -> Iterator[Mapping[str, Any]]:
    """All images of a source, or `numbers` of them."""
    numbers = {"batch_size": self._settings.batch_size, "max_examples": len(source)} | numbers
    return evaluation_batches(
      source,
      image_size=self._size,
      channels=self._run.config.model.in_channels,
      value_range=self._run.config.data.value_range,
      crop_ratio=self._settings.crop_ratio,
      **numbers,
    )
