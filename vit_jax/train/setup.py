"""Everything a run needs before the first compile: data, resolved config, method, mesh, all checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import checkpoints, methods, parallel
from vit_jax import config as configs
from vit_jax.config import ConfigError
from vit_jax.config.fields import assign
from vit_jax.data import levels
from vit_jax.data.bands import image_channels
from vit_jax.data.decode import BadImage, NeedsPackage, OtherChannels, UnknownRange, read_samples, scaled
from vit_jax.data.evaluation_batches import fitting_crop_ratio
from vit_jax.data.left_out import left_out_of
from vit_jax.data.levels import Spread
from vit_jax.data.limits import Limits
from vit_jax.data.pipeline import Pipeline, make_pipeline
from vit_jax.data.sources import Source, open_source, share_images, split_specs
from vit_jax.data.subsets import keep
from vit_jax.data.views import Views
from vit_jax.data.views.multi_crop.masks import masked_patches
from vit_jax.evaluation import EvaluationError, check_image_size
from vit_jax.methods import State
from vit_jax.methods.dino import gram
from vit_jax.methods.dino.views import RGB_ONLY
from vit_jax.methods.settings import slow_quantization
from vit_jax.parallel import ending, processes

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# Keys that may change when a run goes on: they decide how it runs and what is kept, not what is learned.
FREE = ("mesh.", "checkpoint.", "log.", "data.workers", "data.prefetch", "data.timeout", "data.cache_dir",
        "compilation_cache", "evaluation.crop_ratio")  # fmt: skip
IMAGENET = 1_281_167  # images of ImageNet-1k, where the data are not there to be counted
_TRIED = 8  # images that are looked at before the first compile
MIN_LABELLED = 20  # images of which a tenth is worth a score


@dataclasses.dataclass(frozen=True)
class Run:
  """A checked run.

  Attributes:
    config: resolved: all durations in steps.
    method: the module of vit_jax.methods that trains.
    views: the crops and masks it asks for.
    source: the training images; None where nothing is read of them.
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
  with _config_errors():
    methods.get(config.method).views(config)  # what is wrong with the crops is said before the data are opened
    source = open_source(config.data.source, cache_dir=config.data.cache_dir, limits=limits(config))
    run = fit(config, len(source))
    resolved = run.config
    for alone in methods.each_student(resolved).values():
      _check_channels(alone, source)
      _report_quantization(alone)
    _report_repeats(resolved, len(source))
    sources = _evaluation_sources(resolved, source)
    if resolved.evaluation.crop_ratio is None:
      resolved.evaluation.crop_ratio = _crop_ratio(resolved, source)
  return dataclasses.replace(run, source=source, evaluation_sources=sources)


def fit(
  config: ConfigDict, num_examples: int, devices: Sequence[Any] | None = None, *, platform: str | None = None
) -> Run:
  """The run without its data: the model, crops, masks and groups that fit each other and the devices.

  Args:
    config: of the run, not resolved.
    num_examples: images in its data.
    devices: to train on (default: all).
    platform: what they are (default: the backend of this process).

  Raises:
    ConfigError: for whatever cannot work; one line that names the key.
  """
  configs.validate(config)
  with _config_errors():
    method = methods.get(config.method)
    method.views(config)
    mesh = parallel.make_mesh(config.mesh, devices)
    resolved = configs.resolve(config, num_examples, parallel.batch_shards(mesh))
    views = placed(resolved, method.views(resolved), platform or jax.default_backend())
    if "gram" in views.variants()[0].sizes and not any(map(gram.enabled, methods.each_student(resolved).values())):
      log.warning("The gram crops are for Gram anchoring, which is off: set gram.source or gram.load_at.")
    sizes = {key: resolved[key] for key in ("batch_size", "loss_group_size")}
    for alone in methods.each_student(resolved).values():
      parallel.check_batch(mesh, **sizes, micro_batches=alone.micro_batches)
      _check_koleo(alone)
    _check_masks(resolved, views)
    _check_evaluation_size(resolved, views)
    _given_sources(resolved)
    return Run(resolved, method, views, source=None, evaluation_sources=None, mesh=mesh)


def abstract_state(run: Run) -> State:
  """The state's shapes, dtypes and shardings; nothing is allocated.

  Raises:
    MeshError: if the mesh leaves parameters whole that it should spread.
  """
  shapes = jax.eval_shape(lambda: run.init(jax.random.key(run.config.seed)))  # not even the key takes a device
  parallel.check_spread(shapes, run.mesh)
  shardings = parallel.state_shardings(shapes, run.mesh, zero=run.config.mesh.zero)
  return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
  """What the rooms below say of a value, as errors of the config that has it."""
  try:
    yield
  except (ValueError, ImportError, FileNotFoundError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(str(error)) from error


def limits(config: ConfigDict) -> Limits:
  """The bounds on the images of all sources of a run."""
  return Limits(config.data.max_pixels, config.data.max_file_bytes)


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


def placed(config: ConfigDict, views: Views, platform: str) -> Views:
  """The views, made on the host or on a device of the platform, as `data.augment` says."""
  where = config.data.augment
  if where == "auto":  # a CPU makes crops faster with the host's libraries than as a device
    where = "host" if platform == "cpu" else "device"
  return views.made_on(where, config.data.canvas)


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


def _crop_ratio(config: ConfigDict, source: Source) -> float:
  """That which suits the images that are scored, or trained on where none are."""
  if config.evaluation.train_source:
    source = open_source(config.evaluation.train_source, cache_dir=config.data.cache_dir, limits=limits(config))
  size = config.evaluation.image_size or config.crops.global_size
  return fitting_crop_ratio(source, size, channels=config.model.in_channels, value_range=config.data.value_range)


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
  """Says what is not applied to images of so many channels, and whether the images of the source have them."""
  channels = image_channels(config.model.in_channels)
  unused = [f"augment.{key}={config.augment[key]}" for key in RGB_ONLY if config.augment[key]]
  if channels != 3 and unused:
    log.info("Not applied to images of %d channels, as they are for RGB: %s.", channels, ", ".join(unused))
  if getattr(source, "remote", False):
    return  # it may not answer; training waits for it, and says so
  _check_images(config, source, channels)


def _check_images(config: ConfigDict, source: Source, channels: int) -> None:
  """Tries a few images: what most of them lack, which the config can give, is said now and not as unreadable images.

  A few others among many are unreadable images like any (`data.max_bad_fraction`).
  """
  refused: list[BadImage] = []
  seen: dict[str, Spread] = {}
  last = getattr(source, "blocks", (0, len(source)))[1] - 1  # where to read one record is to read its block: of one
  records = np.unique(np.linspace(0, last, _TRIED).astype(np.int64)).tolist()
  for record in records:
    try:
      name = source.describe(record)
      samples = read_samples(
        source[record]["image"],
        name,
        enough=1,
        channels=channels,
        deep=config.data.value_range is not None,
        limits=limits(config),
      )
      if samples.array.dtype.kind in "iuf" and samples.array.dtype != np.uint8:
        spread = levels.spread(samples.array, samples.bits)
        seen[spread.kind] = seen[spread.kind] | spread if spread.kind in seen else spread
      scaled(samples, name, channels=channels, value_range=config.data.value_range)
    except (OtherChannels, UnknownRange, NeedsPackage) as error:
      refused.append(error)
    except (BadImage, OSError):
      pass  # met again, and reported, in training
  if 2 * len(refused) > len(records):
    raise _lacking(config, refused[0], seen)
  if config.data.value_range is None:
    for spread in seen.values():
      if (suggested := levels.advice(spread)) and not refused:
        log.warning(
          "The images that were tried have %s values from %s: %s. Set data.value_range=%s if the others have such "
          "values, too (`vit-jax data scan` looks at all).",
          spread.kind, spread.text, levels.fate(spread), suggested,
        )  # fmt: skip


def _lacking(config: ConfigDict, error: BadImage, seen: dict[str, Spread]) -> ConfigError:
  """What most images lack, with the key to set."""
  if isinstance(error, OtherChannels):
    return ConfigError(
      f"model.in_channels={config.model.in_channels}: {error}; set it to the channels of the images in "
      f"data.source={config.data.source} (3: RGB), and augment.mean and augment.std with it"
    )
  if isinstance(error, UnknownRange):
    suggested = ", ".join(f"{levels.advice(spread)} for the {spread.kind} tried" for spread in seen.values())
    return ConfigError(f"data.value_range=None: {error} (here: {suggested})")
  return ConfigError(f"data.source={config.data.source}: {error}")


def _evaluation_sources(config: ConfigDict, source: Source) -> tuple[str, str | None] | None:
  """The labelled sources to score on: as configured, the splits of the training source, or parts of itself."""
  if not int(config.evaluation.every.split()[0]):
    return None
  if given := _given_sources(config):
    return given
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


def _given_sources(config: ConfigDict) -> tuple[str, str] | None:
  """The sources to score on that a config names; None: it names none."""
  train, test = config.evaluation.train_source, config.evaluation.test_source
  if not int(config.evaluation.every.split()[0]) or not (train or test):
    return None
  if not (train and test):
    given = "train_source" if train else "test_source"
    raise ConfigError(f"evaluation.{given}={train or test!r}: give both evaluation.train_source and test_source")
  if share_images(train, test):
    raise ConfigError(
      f"evaluation.test_source={test!r}: holds images of evaluation.train_source={train!r}, each of which would be "
      "its own nearest neighbour; name other images, or leave both None"
    )
  return train, test


def check_unchanged(config: ConfigDict, workdir: Path, *, accept_change: bool) -> list[str] | None:
  """Compares the resolved config with that of the run in the workdir.

  Returns:
    What changed; None: there is no run.

  Raises:
    ConfigError: listing the differences, if the run was started with another config; keys of FREE are not refused.
  """
  begun, problem = begun_with(workdir)
  if problem and jax.process_index() == 0:
    log.warning("%s", problem)
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
  """Saves the resolved config in the workdir, unless it is there, whole.

  Raises:
    ConfigError: as `check_unchanged`.
  """
  check_unchanged(config, workdir, accept_change=accept_change)
  if jax.process_index() != 0:
    return
  saved = {workdir / CONFIG_FILE: config}
  for name, alone in methods.each_student(config).items():
    if name:  # what distils this student alone; and its folder is its address for `load_model`
      saved[workdir / checkpoints.STUDENTS / name / CONFIG_FILE] = alone
  for path, content in saved.items():
    if not _holds(path, content):
      configs.save(content, path)


def _holds(path: Path, config: ConfigDict) -> bool:
  try:
    return not configs.difference(configs.read(path), config)
  except ConfigError:  # none is there, or another's; or it is damaged
    return False


def compare_checkpoint(config: ConfigDict, saved: dict[str, Any], step: int) -> None:
  """Says where a checkpoint is of another config than its run: by a change that was accepted, or as another's link."""
  try:
    changes = configs.difference(configs.from_dict(saved), config)
  except ConfigError:
    return  # saved by another version, which knew other keys
  changes = [change for change in changes if not change.startswith((*FREE, "distillation.teacher:"))]
  if changes and jax.process_index() == 0:
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    log.warning("Checkpoint %d was saved with another config: %s%s.", step, "; ".join(changes[:5]), more)


def grouped_as_begun(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The config with the group sizes of the run in the workdir, where it leaves them to the devices of the beginning."""
  begun, _ = begun_with(workdir)
  if begun is None or config.loss_group_size is not None or config.batch_size != begun.batch_size:
    return config
  config, given = config.copy_and_resolve_references(), configs.flatten(config)
  for key, value in configs.flatten(begun).items():
    if key.rpartition(".")[2] in ("loss_group_size", "group_size") and given.get(key) is None:
      assign(config, key, value)
  return config


def begun_with(workdir: Path) -> tuple[ConfigDict | None, str]:
  """The config of the run in a workdir: of its file or, where that is missing or damaged, of its newest checkpoint.

  Returns:
    The config, None where there is no run; and what is wrong with the file, for people, empty if nothing.
  """
  path, problem = workdir / CONFIG_FILE, ""
  if path.exists():
    try:
      return configs.read(path), ""
    except configs.DamagedConfig as error:
      problem = str(error.__cause__)
  if checkpoints.latest(workdir) is None:
    return None, f"{problem}; no step was saved, so the run begins with the config given, and writes it" * bool(problem)
  meta = checkpoints.read_meta(workdir)
  problem = problem or f"{path}: is missing"
  return (
    configs.from_dict(meta["config"], where=f"checkpoint {meta['step']}: "),
    f"{problem}; going on with the config that checkpoint {meta['step']} holds, and writing the file again",
  )


def _own_part(run: Run) -> str | None:
  """What this process reads of a batch; None for a process that is alone."""
  if jax.process_count() == 1:
    return None
  rows = parallel.LocalBatch(parallel.batch_sharding(run.mesh)).parts(run.config.batch_size)
  devices = jax.local_device_count()
  return (
    f"{len(rows)} images of a batch (rows {ending.ranges(rows)}) for {devices} device{'s' if devices > 1 else ''}"
  )


def describe(run: Run) -> dict[str, Any]:
  """What will happen, in a few facts for people."""
  starts = {}
  for name, alone in methods.each_student(run.config).items():
    own = {"init from": alone.init_from, "gram teacher": gram.describe(alone)}
    starts |= {f"{name} {fact}" if name else fact: value for fact, value in own.items()}
  num, views = run.config.micro_batches, run.views.facts()
  facts = {
    "images": len(run.source),
    "left out": left_out_of(run.source).text() if left_out_of(run.source) else None,
    "steps": run.steps("duration"),
    "batch": f"{run.config.batch_size}" + (f" in {num} micro-batches" if num > 1 else ""),
    "crops": views.pop("crops"),
    "read here": _own_part(run),
    **views,
    "loss groups": f"{run.config.batch_size // run.config.loss_group_size} of {run.config.loss_group_size} images",
    "processes": processes.describe(),
    "devices": f"{run.mesh.size} {jax.devices()[0].device_kind} as "
    + " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1 or run.mesh.size == 1),
    "teacher": run.config.distillation.teacher,
    **starts,
  }
  return {name: value for name, value in facts.items() if value is not None}
