"""Which configurations make sense, as far as the configuration alone shows it: values that must fit each other.

What each value must be by itself is in `values.py`. Checks that need the model (a crop that is no multiple of the
patch) or the devices (a mesh they cannot fill) are made where those are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from ml_collections import ConfigDict

from vit_jax.config.durations import parse_duration
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import flatten
from vit_jax.config.schema import loss_group_size
from vit_jax.config.students import SECTION, split_entry, split_key, student_config, student_names
from vit_jax.config.values import check_values

_ROUNDED = 1e-3  # what probabilities may lack to 1, as in (0.333, 0.333, 0.333); they are normalised


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
  problems = list(check_values(values))
  if not problems:  # combinations are checked among values that make sense by themselves
    problems = [
      *_groups(config),
      *_mesh(config),
      *_crops(config),
      *_model(config),
      *_losses(config),
      *_gram(config),
      *_schedules(config),
      *_keep_best(config),
    ]
  return problems


def _keep_best(config: ConfigDict) -> Iterator[str]:
  wanted, tasks = config.checkpoint.keep_best, config.evaluation.tasks
  if wanted in (None, "off"):
    return
  parts = wanted.split("/")
  if parts[0] in student_names(config):
    parts = parts[1:]
  if len(parts) < 2 or parts[0] not in tasks:
    scores = ", ".join(f"{task}/top1" for task in tasks)
    yield f'checkpoint.keep_best={wanted!r}: must be a score of evaluation.tasks, such as {scores}, or "off"'
  elif parse_duration(config.evaluation.every, key="evaluation.every")[0] == 0:
    yield f"checkpoint.keep_best={wanted!r}: needs evaluations; evaluation.every={config.evaluation.every!r} makes none"


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
