"""What each value of a configuration must be by itself: choices, ranges, pairs, durations, sources."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from vit_jax.config.durations import parse_duration
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import did_you_mean

SOURCES = {  # by prefix: how it is written, what it reads
  "folder": ("folder:/path", "a folder of images (JPEG, PNG, WebP, AVIF, TIFF, …); names of sub-folders are labels"),
  "tfds": ("tfds:name/split", "a TensorFlow Datasets set prepared as ArrayRecord (TensorFlow is not needed)"),
  "array_record": ("array_record:/path/*.ar", "ArrayRecord files of encoded images"),
  "parquet": ("parquet:/path/*.parquet", "tables with a column of images, as those of Hugging Face (extra: parquet)"),
  "tar": ("tar:/path/{000..127}.tar", "WebDataset shards: images with .cls or .json beside them"),
  "synthetic": ("synthetic:photo", "images made on the spot (noise, gradient, photo), to measure and rehearse"),
  "embedded": ("embedded:name", "a set that this package makes itself, once, from a seed"),
}
EMBEDDED = {
  "textures": "20 procedural texture classes",
  "shapes": "scenes of textured, shaded shapes, exactly labelled",
  "photos": "tiles of the photographs in scikit-image and scikit-learn (extra: photos)",
}

_CHOICES = {
  "method": ("dinov3", "distillation"),
  "dino.centering": ("sinkhorn_knopp", "softmax"),
  "ibot.centering": ("sinkhorn_knopp", "softmax"),
  "data.augment": ("auto", "device", "host"),
  "model.mlp": ("gelu", "gelu_tanh", "swiglu"),
  "model.norm": ("layernorm", "rmsnorm"),
  "model.pool": ("cls", "avg", "map", "distilled"),
  "model.positions": ("rope", "learned", "sincos", "none"),
  "model.position_table.prefix": ("none", "cls", "all"),
  "model.rope.normalize": ("separate", "min", "max"),
  "model.rope.dtype": ("float32", "bfloat16"),
  "model.dtype": ("float32", "bfloat16"),
  "model.quantization": ("fp8", "int8"),
  "model.remat": ("none", "dots", "attention", "blocks", "offload"),
  "gram.tokens": ("all", "masked", "unmasked"),
  "gram.remove_negative": ("both", "teacher", "teacher_only"),
  "gram.resize": ("bicubic", "bilinear"),
  "schedules.version": (1, 2),
  "mesh.zero": (1, 3),
  "optim.lr_scaling": ("sqrt_1024", "linear_256", "none"),
  "evaluation.tasks": ("knn", "linear"),
  "checkpoint.keep_best_mode": ("max", "min"),
}

_Rule = tuple[str, Callable[[Any], bool], str]
_RANGES: tuple[_Rule, ...] = (  # what is right, its test, the keys (of tuples: every element); None passes
  (
    "must be at least 1",
    lambda v: v >= 1,
    "epoch_steps batch_size micro_batches loss_group_size model.patch_size model.width model.depth model.num_heads "
    "model.mlp_hidden model.in_channels model.depths model.widths model.position_table.image_size "
    "model.rope.jitter model.rope.rescale model.unroll dino.hidden dino.bottleneck dino.num_layers ibot.hidden "
    "ibot.bottleneck ibot.num_layers koleo.topk koleo.group_size crops.global_size crops.local_size "
    "crops.gram_size data.prefetch evaluation.image_size evaluation.batch_size evaluation.max_examples checkpoint.keep "
    "data.max_pixels data.max_file_bytes "
    "log.every gram.refresh.max optim.max_nonfinite losses.chunk",
  ),
  ("must be at least 2", lambda v: v >= 2, "dino.prototypes ibot.prototypes"),
  ('must be a folder, or "off"', bool, "compilation_cache"),
  (
    "must be more than 0",
    lambda v: v > 0,
    "model.norm_eps model.init_std dino.init_std ibot.init_std model.rope.base model.rope.min_period "
    "model.rope.max_period optim.eps augment.std schedules.teacher_temperature.start "
    "schedules.teacher_temperature.peak schedules.teacher_temperature.end checkpoint.minutes checkpoint.grace",
  ),
  (
    "must not be negative",
    lambda v: v >= 0,
    "data.timeout crops.local_number model.num_registers model.rope.shift dino.loss_weight ibot.loss_weight "
    "koleo.loss_weight optim.clip optim.patch_embed_lr augment.brightness augment.contrast augment.saturation "
    "schedules.lr.start schedules.lr.peak schedules.lr.end schedules.weight_decay.start "
    "schedules.weight_decay.peak schedules.weight_decay.end schedules.local_loss_weight.start "
    "schedules.local_loss_weight.peak schedules.local_loss_weight.end schedules.gram_loss_weight.start "
    "schedules.gram_loss_weight.peak schedules.gram_loss_weight.end schedules.truncate",
  ),
  (
    "must be from 0 to 1",
    lambda v: 0 <= v <= 1,
    "ibot.mask_probability crops.flip augment.jitter augment.grayscale augment.blur augment.solarize "
    "data.max_bad_fraction schedules.momentum.start schedules.momentum.peak schedules.momentum.end",
  ),
  (
    "must be at least 0 and less than 1",
    lambda v: 0 <= v < 1,
    "model.drop_path optim.b1 optim.b2 dino.center_momentum ibot.center_momentum",
  ),
  ("must be more than 0 and at most 1", lambda v: 0 < v <= 1, "optim.layerwise_decay evaluation.crop_ratio"),
  ("must be from 0 to 0.5 (a turn of the colour wheel is 1)", lambda v: 0 <= v <= 0.5, "augment.hue"),
  ("must be from 0 to 4294967295", lambda v: 0 <= v < 2**32, "seed"),
  ("must be a number of processes, or -1 to choose by the cores", lambda v: v >= -1, "data.workers"),
  (
    "must be a number of devices, or -1 for all that are left",
    lambda v: v == -1 or v >= 1,
    "mesh.replica mesh.data mesh.fsdp mesh.tensor",
  ),
)

_PAIRS = {  # (low, high) with low <= high, both within these bounds; the lower bound itself only where stated
  "ibot.mask_ratio": ("0 <= low <= high <= 1", lambda low, high: 0 <= low <= high <= 1),
  "crops.global_scale": ("0 < low <= high <= 1", lambda low, high: 0 < low <= high <= 1),
  "crops.local_scale": ("0 < low <= high <= 1", lambda low, high: 0 < low <= high <= 1),
  "augment.blur_sigma": ("0 < low <= high", lambda low, high: 0 < low <= high),
}

_DURATIONS = {  # may it be nothing?
  "duration": False,
  "init.freeze_backbone_steps": True,
  "gram.load_at": True,
  "gram.refresh.first": True,
  "gram.refresh.every": False,
  "optim.freeze_last_layer": True,
  "evaluation.every": True,
  "checkpoint.every": False,
  "checkpoint.keep_every": False,
}


def choices(key: str) -> tuple[Any, ...]:
  """The values that a key may have, of those keys that have a few."""
  return _CHOICES[key]


def check_values(values: dict[str, Any]) -> Iterator[str]:
  """What is wrong with values of a flattened configuration: the key, its value, what would be right."""
  yield from _single_values(values)
  yield from _durations(values)


def _wrong(values: dict[str, Any], key: str, right: str) -> str:
  return f"{key}={values[key]!r}: {right}"


def _elements(value: Any) -> tuple:
  """The values to check of a key: none of None, each element of a tuple."""
  if value is None:
    return ()
  return value if isinstance(value, tuple) else (value,)


def _single_values(values: dict[str, Any]) -> Iterator[str]:
  for key, choices in _CHOICES.items():
    for value in _elements(values[key]):
      if value not in choices:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        which = f"{value!r} " if isinstance(values[key], tuple) else ""
        yield _wrong(values, key, f"{which}must be one of {', '.join(map(str, choices))}{near}")
  for right, test, keys in _RANGES:
    for key in keys.split():
      if not all(map(test, _elements(values[key]))):
        yield _wrong(values, key, right)
  for key, (right, test) in _PAIRS.items():
    if not test(*values[key]):
      yield _wrong(values, key, f"must be (low, high) with {right}")
  canvas = values["data.canvas"]
  if canvas is not None and (len(canvas) != 2 or min(canvas) < 2):
    yield _wrong(values, "data.canvas", "must be (height, width), both at least 2 pixels")
  value_range = values["data.value_range"]
  if value_range is not None and (len(value_range) != 2 or value_range[0] >= value_range[1]):
    yield _wrong(values, "data.value_range", "must be (low, high) with low < high")
  for key in ("data.source", "evaluation.train_source", "evaluation.test_source"):
    if values[key] is not None:
      yield from _source(values, key)


def _source(values: dict[str, Any], key: str) -> Iterator[str]:
  for part in _parts(values[key]):
    yield from _one_source(values, key, part)


def _parts(source: str) -> list[str]:
  """The specifications in a mixture, without their weights."""
  parts = re.split(r"\s\+\s+(?=(?:[\d.]+\s*\*?\s+)?[A-Za-z_]\w+:)", source)
  return [re.sub(r"^\s*[\d.]+\s*\*?\s+", "", part) for part in parts]


def _one_source(values: dict[str, Any], key: str, source: str) -> Iterator[str]:
  kind, _, rest = source.partition(":")
  if kind in SOURCES and not rest:
    yield _wrong(values, key, f"names nothing after the colon; must be like {SOURCES[kind][0]}")
  elif kind not in SOURCES:
    near = did_you_mean(kind, SOURCES)
    if os.path.exists(os.path.expanduser(source)):
      near = f" (did you mean folder:{source}?)"
    yield _wrong(values, key, f"must be like {', '.join(form for form, _ in SOURCES.values())}{near}")
  elif kind == "embedded":
    name = rest.split("?")[0].split("/")[0]
    if name not in EMBEDDED:
      yield _wrong(values, key, f"there are embedded:{', embedded:'.join(EMBEDDED)}{did_you_mean(name, EMBEDDED)}")


def _durations(values: dict[str, Any]) -> Iterator[str]:
  of_schedules = {key: True for key in values if key.endswith((".warmup", ".cosine"))}
  for key, nothing in (_DURATIONS | of_schedules).items():
    if values[key] is None:
      continue
    try:
      number, unit = parse_duration(values[key], key=key)
    except ConfigError as error:
      yield str(error)
      continue
    if number == 0 and not nothing:
      yield _wrong(values, key, "must be more than 0")
    if unit == "%" and key == "duration":
      yield _wrong(values, key, "must be in steps, epochs or examples: percentages are of the run itself")
    if unit == "%" and number > 100:
      yield _wrong(values, key, "must be at most 100 % of the run")
