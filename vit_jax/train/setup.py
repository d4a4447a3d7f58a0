"""Everything a run needs before the first compile: data, resolved config, method, mesh, all checked."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import checkpoints, methods, parallel
from vit_jax import config as configs
from vit_jax.config import ConfigError
from vit_jax.config.fields import assign
from vit_jax.data.decode import BadImage, OtherChannels, decode
from vit_jax.data.masks import masked_patches
from vit_jax.data.pipeline import Pipeline, make_pipeline
from vit_jax.data.sources import Source, open_source, share_images, split_specs
from vit_jax.data.subsets import keep
from vit_jax.data.views import Views, image_channels
from vit_jax.evaluation import EvaluationError, check_image_size
from vit_jax.methods import State, gram
from vit_jax.methods.settings import RGB_ONLY, slow_quantization
from vit_jax.parallel import lifeline, processes

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# Keys that may change when a run goes on: they decide how it runs and what is kept, not what is learned.
FREE = ("mesh.", "checkpoint.", "log.", "data.workers", "data.prefetch", "data.timeout", "data.cache_dir",
        "compilation_cache")  # fmt: skip
MIN_LABELLED = 20  # images of which a tenth is worth a score


@dataclasses.dataclass(frozen=True)
class Run:
  """A checked run.

  Attributes:
    config: resolved: all durations in steps.
    method: the module of vit_jax.methods that trains.
    views: the crops and masks it asks for.
    source: the training images; None where a step is only made again.
    evaluation_sources: what is scored on, (train, test) specifications; test None: images held out from train;
      None: nothing, as configured or for want of labels.
    mesh: the devices.
  """

  config: ConfigDict
  method: ModuleType
  views: Views
  source: Source | None
  evaluation_sources: tuple[str, str | None] | None
  mesh: Mesh

  @functools.cached_property
  def init(self) -> Callable[[jax.Array], State]:
    """A fresh state from a key; traced once, however often its shapes are asked for."""
    return jax.jit(functools.partial(self.method.init, self.config))

  def steps(self, key: str) -> int:
    """A duration of the resolved config in steps."""
    value = self.config
    for part in key.split("."):
      value = value[part]
    return int(value.split()[0])


def prepare(config: ConfigDict) -> Run:
  """Opens the data and checks everything that can be checked without compiling.

  Raises:
    ConfigError: for whatever cannot work; one line that names the key.
  """
  configs.validate(config)
  try:
    method = methods.get(config.method)
    method.views(config)  # what is wrong with the crops is said before the data are opened
    source = open_source(config.data.source, cache_dir=config.data.cache_dir)
    mesh = parallel.make_mesh(config.mesh)
    resolved = configs.resolve(config, len(source), parallel.batch_shards(mesh))
    views = with_canvas(resolved, method.views(resolved), jax.default_backend())
    if views.variants()[0].gram_size and not any(map(gram.enabled, methods.each_student(resolved).values())):
      log.warning("The gram crops are for Gram anchoring, which is off: set gram.source or gram.load_at.")
    sizes = {key: resolved[key] for key in ("batch_size", "loss_group_size")}
    for alone in methods.each_student(resolved).values():
      parallel.check_batch(mesh, **sizes, micro_batches=alone.micro_batches)
      _check_koleo(alone)
      _check_channels(alone, source)
      _report_quantization(alone)
    _report_repeats(resolved, len(source))
    _check_masks(resolved, views)
    _check_evaluation_size(resolved, views)
    sources = _evaluation_sources(resolved, source)
  except (ValueError, ImportError, FileNotFoundError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(str(error)) from error
  return Run(resolved, method, views, source, sources, mesh)


def open_pipeline(run: Run, local: parallel.LocalBatch, *, bad_records: Path | None = None) -> Pipeline:
  """The batches of a run, from its first; not started yet.

  Args:
    run: with a source.
    local: which rows of a batch this process reads.
    bad_records: where unreadable images are listed; None: nowhere.
  """
  config, data = run.config, run.config.data
  keep(run.source)  # its images are read in every epoch
  return make_pipeline(
    run.source,
    run.views,
    batch_size=config.batch_size,
    seed=config.seed,
    workers=data.workers,
    local_groups=local.parts(config.batch_size // config.loss_group_size),
    bad_records=bad_records,
    max_bad_fraction=data.max_bad_fraction,
    timeout=data.timeout or None,
  )


def with_canvas(config: ConfigDict, views: Views, platform: str) -> Views:
  """The views as the data are to deliver them: crops, or images for crops that a device of the platform makes."""
  where = config.data.augment
  if where == "auto":  # a CPU makes crops faster with the host's libraries than as a device
    where = "host" if platform == "cpu" else "device"
  if where == "host":
    return views
  return dataclasses.replace(views, canvas=config.data.canvas or views.enough_canvas)


def _check_masks(config: ConfigDict, views: Views) -> None:
  """iBOT needs a masked patch: rounded down, the share of a coarse grid may be none."""
  if not config.ibot.loss_weight:
    return
  for variant in views.variants():
    grid, ratio = variant.mask_grid, config.ibot.mask_ratio
    if not masked_patches(config.loss_group_size, grid, config.ibot.mask_probability, ratio):
      raise ConfigError(
        f"ibot.mask_ratio={ratio}: rounded down, masks none of the {grid[0]} x {grid[1]} patches of a global crop; "
        "raise it or crops.global_size, or set ibot.loss_weight=0"
      )


def _check_evaluation_size(config: ConfigDict, views: Views) -> None:
  size = config.evaluation.image_size
  if size is None:
    return
  try:
    check_image_size(size, views.stride, "evaluation.image_size")
  except EvaluationError as error:
    raise ConfigError(f"{error}; None takes crops.global_size={config.crops.global_size}") from None


def _check_koleo(config: ConfigDict) -> None:
  group, topk = config.koleo.group_size, config.koleo.topk
  if config.koleo.loss_weight and group <= topk:
    raise ConfigError(
      f"koleo.group_size={group}: must be larger than koleo.topk={topk}; raise batch_size or loss_group_size, or set "
      "koleo.loss_weight=0"
    )


def _report_quantization(config: ConfigDict) -> None:
  if why := slow_quantization(config):
    log.warning("model.quantization=%s: %s: it is emulated, and slower than none.", config.model.quantization, why)


def _report_repeats(config: ConfigDict, images: int) -> None:
  if config.batch_size > images:
    log.warning(
      "batch_size=%d: is more than the %d images of data.source, and each comes about %.1f times in a batch: KoLeo "
      "pushes the crops of one image apart, and Sinkhorn-Knopp spreads them over the prototypes, as if they were of "
      "different images. Lower batch_size or add images.",
      config.batch_size,
      images,
      config.batch_size / images,
    )


def _check_channels(config: ConfigDict, source: Source) -> None:
  """Tries one image: where it has other channels, so have all, which would be as many unreadable images."""
  channels = image_channels(config.model.in_channels)
  unused = [f"augment.{key}={config.augment[key]}" for key in RGB_ONLY if config.augment[key]]
  if channels != 3 and unused:
    log.info("Not applied to images of %d channels, as they are for RGB: %s.", channels, ", ".join(unused))
  if getattr(source, "remote", False):
    return  # it may not answer; training waits for it, and says so
  try:
    decode(source[0]["image"], source.describe(0), channels=channels, value_range=config.data.value_range)
  except OtherChannels as error:
    raise ConfigError(
      f"model.in_channels={config.model.in_channels}: {error}; set it to the channels of the images in "
      f"data.source={config.data.source} (3: RGB), and augment.mean and augment.std with it"
    ) from error
  except (BadImage, OSError):
    pass  # met again, and reported, in training


def _evaluation_sources(config: ConfigDict, source: Source) -> tuple[str, str | None] | None:
  """The labelled sources to score on: as configured, the splits of the training source, or parts of itself."""
  if not int(config.evaluation.every.split()[0]):
    return None
  train, test = config.evaluation.train_source, config.evaluation.test_source
  if train and test:
    if share_images(train, test):
      raise ConfigError(
        f"evaluation.test_source={test!r}: holds images of evaluation.train_source={train!r}, each of which would be "
        "its own nearest neighbour; name other images, or leave both None"
      )
    return train, test
  if train or test:
    given = "train_source" if train else "test_source"
    raise ConfigError(f"evaluation.{given}={train or test!r}: give both evaluation.train_source and test_source")
  spec = config.data.source
  splits = split_specs(spec)
  held_out = next((splits[name] for name in ("test", "validation", "val") if name in splits), None)
  if "train" in splits and held_out:
    return splits["train"], held_out
  if source.num_classes >= 2 and len(source) >= MIN_LABELLED:
    return spec, None  # evaluation.splits chooses, and says what
  log.info(
    "No evaluation during training: %s has %d images of %d class(es) and no test split; set evaluation.train_source "
    "and evaluation.test_source to score on other images.",
    spec,
    len(source),
    source.num_classes,
  )
  return None


def check_unchanged(config: ConfigDict, workdir: Path, *, accept_change: bool) -> list[str] | None:
  """Compares the resolved config with that of the run in the workdir.

  Returns:
    What changed; None: there is no run.

  Raises:
    ConfigError: listing the differences, if the run was started with another config; keys of FREE are not refused.
  """
  begun = _begun_with(workdir)
  if begun is None:
    return None
  changes = configs.difference(begun, config)
  if begun.distillation.fingerprint and begun.distillation.fingerprint == config.distillation.fingerprint:
    begun.distillation.teacher = config.distillation.teacher  # the same parameters in another place
  refused = [change for change in configs.difference(begun, config) if not change.startswith(FREE)]
  if refused and not accept_change:
    listed = "\n".join(f"  {change}" for change in refused)
    raise ConfigError(
      f"{workdir} was started with another config:\n{listed}\n"
      "use another --workdir, or --accept_config_change to go on with the new values"
    )
  for change in changes:
    log.warning("config changed: %s", change)
  return changes


def remember(config: ConfigDict, workdir: Path, *, accept_change: bool) -> None:
  """Saves the resolved config in the workdir, unless it is there.

  Raises:
    ConfigError: as `check_unchanged`.
  """
  changes = check_unchanged(config, workdir, accept_change=accept_change)
  if changes == [] and (workdir / CONFIG_FILE).exists():
    return
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    configs.save(config, workdir / CONFIG_FILE)
    for name, alone in methods.each_student(config).items():
      if name:  # what distils this student alone; and its folder is its address for `load_model`
        configs.save(alone, workdir / checkpoints.STUDENTS / name / CONFIG_FILE)


def grouped_as_begun(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The config with the group sizes of the run in the workdir, where it leaves them to the devices of the beginning."""
  begun = _begun_with(workdir)
  if begun is None or config.loss_group_size is not None or config.batch_size != begun.batch_size:
    return config
  config, given = config.copy_and_resolve_references(), configs.flatten(config)
  for key, value in configs.flatten(begun).items():
    if key.rpartition(".")[2] in ("loss_group_size", "group_size") and given.get(key) is None:
      assign(config, key, value)
  return config


def _begun_with(workdir: Path) -> ConfigDict | None:
  """The config of the run in a workdir: of its file or, where that is missing, of its newest checkpoint."""
  if (workdir / CONFIG_FILE).exists():
    return configs.read(workdir / CONFIG_FILE)
  if checkpoints.latest(workdir) is None:
    return None
  meta = checkpoints.read_meta(workdir)
  return configs.from_dict(meta["config"], where=f"checkpoint {meta['step']}: ")


def _own_part(run: Run) -> str | None:
  """What this process reads of a batch; None for a process that is alone."""
  if jax.process_count() == 1:
    return None
  rows = parallel.LocalBatch(parallel.batch_sharding(run.mesh)).parts(run.config.batch_size)
  devices = jax.local_device_count()
  return (
    f"{len(rows)} images of a batch (rows {lifeline.ranges(rows)}) for {devices} device{'s' if devices > 1 else ''}"
  )


def describe(run: Run) -> dict[str, Any]:
  """What will happen, in a few facts for people."""
  starts = {}
  for name, alone in methods.each_student(run.config).items():
    own = {"init from": alone.init_from, "gram teacher": gram.describe(alone)}
    starts |= {f"{name} {fact}" if name else fact: value for fact, value in own.items()}
  sizes, num = run.views.resolutions, run.config.micro_batches
  crops = [f"{v.name} pixels" for v in run.views.variants()]
  if sizes:
    total = sum(size.probability for size in sizes)
    crops = [f"{crop} ({size.probability / total:.1%})" for crop, size in zip(crops, sizes, strict=True)]
  facts = {
    "images": len(run.source),
    "steps": run.steps("duration"),
    "batch": f"{run.config.batch_size}" + (f" in {num} micro-batches" if num > 1 else ""),
    "crops": f"{'global/local/gram' if run.views.variants()[0].gram_size else 'global/local'} of {', '.join(crops)}",
    "read here": _own_part(run),
    "augmentation": f"on the device, from canvases of {' x '.join(map(str, run.views.canvas))} pixels"
    if run.views.canvas
    else "on the host",
    "loss groups": f"{run.config.batch_size // run.config.loss_group_size} of {run.config.loss_group_size} images",
    "processes": processes.describe(),
    "devices": f"{run.mesh.size} {jax.devices()[0].device_kind} as "
    + " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1 or run.mesh.size == 1),
    "teacher": run.config.distillation.teacher,
    **starts,
  }
  return {name: value for name, value in facts.items() if value is not None}
