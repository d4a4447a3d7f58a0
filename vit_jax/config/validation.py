"""What the values of a configuration must be, as far as the configuration alone shows it.

Checks that need the model (a crop that is no multiple of the patch) or the devices (a mesh they cannot fill) are made
where those are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.durations import parse_duration
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import did_you_mean, flatten
from vit_jax.config.schema import loss_group_size
from vit_jax.config.students import SECTION, split_entry, split_key, student_config, student_names

SOURCES = {  # by prefix: how it is written, what it reads
  "folder": ("folder:/path", "a folder of images (JPEG, PNG, WebP, TIFF, BMP, .npy); names of sub-folders are labels"),
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
  "model.remat": ("none", "dots", "attention", "blocks", "offload"),
  "gram.tokens": ("all", "masked", "unmasked"),
  "gram.remove_negative": ("both", "teacher", "teacher_only"),
  "gram.resize": ("bicubic", "bilinear"),
  "schedules.version": (1, 2),
  "mesh.zero": (1, 3),
  "optim.lr_scaling": ("sqrt_1024", "linear_256", "none"),
  "evaluation.tasks": ("knn", "linear"),
}

_ROUNDED = 1e-3  # what probabilities may lack to 1, as in (0.333, 0.333, 0.333); they are normalised

_Rule = tuple[str, Callable[[Any], bool], str]
_RANGES: tuple[_Rule, ...] = (  # what is right, its test, the keys (of tuples: every element); None passes
  (
    "must be at least 1",
    lambda v: v >= 1,
    "epoch_steps batch_size micro_batches loss_group_size model.patch_size model.width model.depth model.num_heads "
    "model.mlp_hidden model.in_channels model.depths model.widths model.position_table.image_size "
    "model.rope.jitter model.rope.rescale model.unroll dino.hidden dino.bottleneck dino.num_layers ibot.hidden "
    "ibot.bottleneck ibot.num_layers koleo.topk koleo.group_size crops.global_size crops.local_size crops.local_number "
    "crops.gram_size data.prefetch evaluation.image_size evaluation.batch_size evaluation.max_examples checkpoint.keep "
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
    "data.timeout model.num_registers model.rope.shift dino.loss_weight ibot.loss_weight koleo.loss_weight optim.clip "
    "optim.patch_embed_lr augment.brightness augment.contrast augment.saturation schedules.lr.start schedules.lr.peak "
    "schedules.lr.end schedules.weight_decay.start schedules.weight_decay.peak schedules.weight_decay.end "
    "schedules.local_loss_weight.start schedules.local_loss_weight.peak schedules.local_loss_weight.end "
    "schedules.gram_loss_weight.start schedules.gram_loss_weight.peak schedules.gram_loss_weight.end "
    "schedules.truncate",
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
  ("must be more than 0 and at most 1", lambda v: 0 < v <= 1, "optim.layerwise_decay"),
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


def validate(config: ConfigDict) -> None:
  """Checks everything that the configuration alone can show to be impossible; imports no jax.

  Raises:
    ConfigError: every problem found, one a line: the key, its value, what would be right.
  """
  problems = [*_problems(config), *_distillation(config)]
  if not problems:  # what is common is right: what is left to say is of the students themselves
    for name in student_names(config):
      problems += [f"{SECTION}.{name}.{problem}" for problem in _problems(student_config(config, name))]
  if problems:
    raise ConfigError("\n".join(problems))


def _problems(config: ConfigDict) -> list[str]:
  values = {key: value for key, value in flatten(config).items() if split_key(key)[0] is None}
  problems = [*_single_values(values), *_durations(values)]
  if not problems:  # combinations are checked among values that make sense by themselves
    problems = [
      *_groups(config),
      *_mesh(config),
      *_crops(config),
      *_model(config),
      *_losses(config),
      *_gram(config),
      *_schedules(config),
    ]
  return problems


def _wrong(values: dict[str, Any] | ConfigDict, key: str, right: str) -> str:
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
  if kind not in SOURCES or not rest:
    yield _wrong(
      values, key, f"must be like {', '.join(form for form, _ in SOURCES.values())}{did_you_mean(kind, SOURCES)}"
    )
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


def _groups(config: ConfigDict) -> Iterator[str]:
  batch, group = config.batch_size, loss_group_size(config)
  if batch % config.micro_batches:
    yield _micro_batches(config, 1)
    return
  if batch % group:
    near = max(d for d in range(1, min(group, batch) + 1) if batch % d == 0)
    yield f"loss_group_size={group}: must divide batch_size={batch}; the largest that does and is no larger is {near}"
    return
  if (batch // group) % config.micro_batches:
    yield _micro_batches(config, group)
    return
  koleo = config.koleo.group_size or group
  if batch % koleo or (koleo % group and group % koleo):
    yield (
      f"koleo.group_size={koleo}: must divide batch_size={batch} and be a multiple or a divisor of "
      f"loss_group_size={group}"
    )
  elif config.koleo.loss_weight and config.koleo.topk >= koleo:
    yield (
      f"koleo.topk={config.koleo.topk}: must be smaller than the {koleo} image(s) among which neighbours are searched: "
      "raise batch_size (or koleo.group_size), or set koleo.loss_weight=0"
    )
  if config.ibot.loss_weight and int(2 * group * config.ibot.mask_probability) == 0:
    yield (
      f"ibot.mask_probability={config.ibot.mask_probability}: masks none of the {2 * group} global crops of a loss "
      "group: raise it or loss_group_size, or set ibot.loss_weight=0"
    )


def _micro_batches(config: ConfigDict, group: int) -> str:
  batch, num = config.batch_size, config.micro_batches
  groups = f"whole loss groups of loss_group_size={group}" if group > 1 else "equal parts"
  wrong = f"micro_batches={num}: must cut batch_size={batch} into {groups}"
  possible = [n for n in range(1, batch // group + 1) if (batch // group) % n == 0]
  near = f"micro_batches={min(possible, key=lambda n: (abs(n - num), n))}"
  if batch % num:
    return f"{wrong}; choose {near}, or a batch_size that is a multiple of {num}"
  return f"{wrong}; choose {near}, or a loss_group_size that divides the {batch // num} images of a micro-batch"


def _crops(config: ConfigDict) -> Iterator[str]:
  crops = config.crops
  if crops.local_inside_global and crops.local_number % 2:
    yield (
      f"crops.local_number={crops.local_number}: must be even with crops.local_inside_global=True: half of the local "
      "crops lie inside each global crop"
    )
  sizes = crops.resolutions or ((crops.global_size, crops.local_size, 0, 1.0),)
  for whole, part, *_ in sizes:
    if crops.local_inside_global and part > whole:
      key = "resolutions" if crops.resolutions else "local_size"
      yield (
        f"crops.{key}={crops[key]}: with crops.local_inside_global=True a local crop of {part} pixels must lie inside "
        f"a global crop of {whole}: make it smaller"
      )
  if crops.resolutions:
    yield from _resolutions(config)


def _resolutions(config: ConfigDict) -> Iterator[str]:
  key, rows = f"crops.resolutions={config.crops.resolutions}", config.crops.resolutions
  for *sizes, probability in rows:
    if min(sizes[:2]) < 1 or sizes[2] < 0 or probability <= 0:
      yield f"{key}: {(*sizes, probability)} must be (global, local, gram or 0, probability), positive numbers"
      return
  if len({row[:3] for row in rows}) < len(rows):
    yield f"{key}: gives the same sizes twice: add up their probabilities"
  if len({row[2] == 0 for row in rows}) > 1:
    yield f"{key}: must give a size of gram crops (the third number) in all rows or in none"
  if config.crops.gram_size is not None:
    yield (
      f"crops.gram_size={config.crops.gram_size}: with crops.resolutions the size of the gram crops is the third "
      "number of its rows: set it there, and leave this None"
    )
  total = sum(row[3] for row in rows)
  if abs(total - 1) > _ROUNDED:
    yield f"{key}: the probabilities must add up to 1, not {total:.4g}: divide them by that"


def _mesh(config: ConfigDict) -> Iterator[str]:
  axes = {axis: size for axis, size in config.mesh.items() if axis != "zero"}
  if list(axes.values()).count(-1) > 1:
    yield f"mesh={axes}: at most one axis may be -1"
  sharded = {axis: axes[axis] for axis in ("replica", "data", "fsdp") if axes[axis] != -1}
  devices = 1
  for size in sharded.values():
    devices *= size
  if config.batch_size % devices:
    product = " x ".join(f"mesh.{axis}={size}" for axis, size in sharded.items())
    yield f"batch_size={config.batch_size}: must be a multiple of {product} = {devices}, over which it is divided"


def _model(config: ConfigDict) -> Iterator[str]:
  model, rope = config.model, config.model.rope
  for key in ("mean", "std"):
    values = config.augment[key]
    if len(values) != model.in_channels:
      yield (
        f"augment.{key}={values}: must have {model.in_channels} entries, one for each of the channels that "
        f"model.in_channels={model.in_channels} says"
      )
  yield from _positions(model)
  if (
    model.positions in (None, "rope")
    and None not in (model.width, model.num_heads)
    and (model.width % (4 * model.num_heads))
  ):
    yield (
      f"model.width={model.width}: must be a multiple of 4 x model.num_heads = {4 * model.num_heads} (rotary positions "
      "take a quarter of a head each)"
    )
  if rope.base is not None and (rope.min_period is not None or rope.max_period is not None):
    yield f"model.rope.base={rope.base}: give either base, or min_period and max_period"
  if rope.min_period is not None and rope.max_period is not None and rope.min_period >= rope.max_period:
    yield f"model.rope.min_period={rope.min_period}: must be less than model.rope.max_period={rope.max_period}"


def _positions(model: ConfigDict) -> Iterator[str]:
  """Settings of positions of a kind that the model does not get."""
  for section, kind in (("rope", "rope"), ("position_table", "learned")):
    given = [key for key, value in model[section].items() if value is not None]
    if given and model.positions not in (None, kind):
      yield (
        f"model.{section}.{given[0]}={model[section][given[0]]!r}: has no meaning with "
        f"model.positions={model.positions!r}"
      )


def _losses(config: ConfigDict) -> Iterator[str]:
  if not (config.dino.loss_weight or config.ibot.loss_weight):
    yield "dino.loss_weight=0.0: with ibot.loss_weight=0.0 nothing ties the student to the teacher: raise one of them"
  if config.ibot.loss_weight and config.ibot.mask_ratio[1] == 0:
    yield f"ibot.mask_ratio={config.ibot.mask_ratio}: masks no patch: raise it, or set ibot.loss_weight=0"


def _distillation(config: ConfigDict) -> Iterator[str]:
  values = flatten(config.distillation)
  if config.method != "distillation":
    for key, value in values.items():
      if value:
        yield f"distillation.{key}={value!r}: has a meaning for method='distillation' only, this is {config.method!r}"
    return
  if not config.distillation.teacher:
    yield (
      "distillation.teacher=None: must be the frozen teacher: a run, one of its steps, or a .pth training export with "
      "both heads"
    )
  for key in ("init_from", "gram.source", "gram.load_at"):
    if config.distillation.students and (value := flatten(config)[key]) is not None:
      yield f"{key}={value!r}: is each student's own where there are several: set {SECTION}.NAME.{key}"
  seen: set[str] = set()
  for entry in config.distillation.students:
    found = split_entry(entry)
    if found is None:
      yield f"distillation.students={entry!r}: must be name=file.py[:argument], the name of letters, digits, _ and -"
    elif found[0] in seen:
      yield f"distillation.students={entry!r}: there is already a student {found[0]!r}"
    elif found[0] not in config.students:
      yield f"distillation.students={entry!r}: its run file has not been read: load the config with vit_jax.config.load"
    seen.add(found[0] if found else "")


def _gram(config: ConfigDict) -> Iterator[str]:
  gram, refresh = config.gram, config.gram.refresh
  if gram.source == "teacher" and config.method != "distillation":
    yield (
      f"gram.source='teacher': means the frozen teacher of a distillation, this is method={config.method!r}; 'ema' is "
      "the average of the student"
    )
  if gram.tokens != "all" and gram.per_image:
    yield (
      f"gram.tokens={gram.tokens!r}: the crops differ in how many patches are {gram.tokens}, so there is no matrix per "
      "image: set gram.per_image=False"
    )
  if gram.tokens == "masked" and not int(2 * loss_group_size(config) * config.ibot.mask_probability):
    yield "gram.tokens='masked': no patch is masked: raise ibot.mask_probability or loss_group_size"
  for key, value in (("load_at", gram.load_at), ("refresh.every", refresh.every)):
    if gram.source in ("ema", "teacher") and value is not None:
      yield (
        f"gram.{key}={value!r}: with gram.source={gram.source!r} there is no gram teacher to copy to: remove one of "
        "the two"
      )
  gram_crops = config.crops.gram_size is not None or any(row[2] for row in config.crops.resolutions)
  if gram.source in ("ema", "teacher") and gram_crops:
    yield (
      f"gram.source={gram.source!r}: that teacher sees the global crops only: leave out the gram crops "
      "(crops.gram_size, or the third number of the rows of crops.resolutions)"
    )
  for key in ("first", "max"):
    if refresh[key] is not None and refresh.every is None:
      yield f"gram.refresh.{key}={refresh[key]!r}: needs gram.refresh.every, the steps from one refresh to the next"
  if refresh.every is not None and gram.source is None and gram.load_at is None:
    yield (
      f"gram.refresh.every={refresh.every!r}: there is no gram teacher to refresh: set gram.source, or gram.load_at to "
      "take the teacher at a step"
    )


def _schedules(config: ConfigDict) -> Iterator[str]:
  """Warm-ups (and given cosines) longer than the run, where both can be told in one unit; a truncation of no effect."""
  if config.schedules.truncate and config.schedules.version != 1:
    yield f"schedules.truncate={config.schedules.truncate}: is an option of schedules.version=1"
  for name, schedule in config.schedules.items():
    if not isinstance(schedule, ConfigDict):
      continue
    key = f"schedules.{name}.warmup"
    warmup = _share_of_run(config, schedule.warmup)
    if warmup is None:
      continue
    cosine = _share_of_run(config, schedule.cosine) if schedule.cosine is not None else 0
    if warmup > 1:
      yield f"{key}={schedule.warmup!r}: is longer than the run, duration={config.duration!r}"
    elif cosine is not None and warmup + cosine > 1:
      yield (
        f"{key}={schedule.warmup!r}: with schedules.{name}.cosine={schedule.cosine!r} is longer than the run, "
        f"duration={config.duration!r}"
      )


def _share_of_run(config: ConfigDict, text: str) -> Fraction | None:
  """A duration as a share of the run; None where that takes the number of images."""
  part, whole = parse_duration(text), parse_duration(config.duration)
  if part.number == 0:
    return Fraction(0)
  if part.unit == "%":
    return part.number / 100
  if part.unit == whole.unit:
    return part.number / whole.number
  steps = {"steps": Fraction(1), "examples": Fraction(1, config.batch_size)}
  if config.epoch_steps is not None:
    steps["epochs"] = Fraction(config.epoch_steps)
  if part.unit not in steps or whole.unit not in steps:
    return None
  return part.number * steps[part.unit] / (whole.number * steps[whole.unit])
