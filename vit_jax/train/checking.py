"""Whether a config can be trained, as far as that shows without its data and its workdir, and without compiling."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from vit_jax import checkpoints, methods
from vit_jax import config as configs
from vit_jax.config import ConfigError, UserError
from vit_jax.config.students import SECTION
from vit_jax.data.sources import open_source
from vit_jax.train import setup, starting

# Numbers of images that data may have: what depends on it is refused only if it is wrong for all of them.
_NUM_EXAMPLES = (setup.IMAGENET, 1, 10**12)


def check(config: ConfigDict) -> list[str]:
  """Makes the checks of a run (`setup.fit`) and matches what it starts from; gives what could not be checked.

  Raises:
    ConfigError: whatever `vit-jax train` would refuse, in its words.
    UserError: if JAX finds no devices, such as those of a TPU that a run is using.
  """
  configs.validate(config)
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where none of several JAX_PLATFORMS is there
    why = (str(error) or "none of JAX_PLATFORMS").splitlines()[0]
    raise UserError(f"JAX finds no devices ({why}); with JAX_PLATFORMS=cpu the config is checked for a CPU") from error
  left_out = [] if _is_made(config) else [f"data.source={config.data.source}: was not opened"]
  if _teacher_is_missing(config):
    teacher = config.distillation.teacher
    left_out.append(f"distillation.teacher={teacher}: is not there, so whether the students fit it was not checked")
    _check_students(config)
  else:
    _check_one(config)
  return left_out


def _check_one(config: ConfigDict) -> None:
  run = _fit(config)
  starting.open_sources(run, setup.abstract_state(run))


def _fit(config: ConfigDict) -> setup.Run:
  refused: list[ConfigError] = []
  for num in (_number_made(config),) if _is_made(config) else _NUM_EXAMPLES:
    try:
      return setup.fit(config, num)
    except ConfigError as error:
      refused.append(error)
  raise refused[0]


def _is_made(config: ConfigDict) -> bool:
  """Whether the images of a config are made by this package, so that opening their source reads nothing of a user's."""
  return config.data.source.startswith(("embedded:", "synthetic:"))


def _number_made(config: ConfigDict) -> int:
  try:
    return len(open_source(config.data.source, cache_dir=config.data.cache_dir, limits=setup.limits(config)))
  except (ValueError, ImportError) as error:
    raise ConfigError(str(error)) from error


def _teacher_is_missing(config: ConfigDict) -> bool:
  if config.distillation.teacher is None:
    return False
  path = Path(config.distillation.teacher).expanduser()
  return checkpoints.find(path) is None and not path.exists()


def _check_students(config: ConfigDict) -> None:
  """What there is to check of a distillation without its teacher: the students, together and one by one."""
  try:
    methods.get(config.method).views(config)
  except ValueError as error:
    if not str(error).startswith("distillation.teacher="):
      raise ConfigError(str(error)) from error
  for name, alone in methods.each_student(config).items():
    try:
      _check_one(_without_teacher(alone))
    except ConfigError as error:
      raise ConfigError(f"{SECTION}.{name}.{error}" if name else str(error)) from error


def _without_teacher(config: ConfigDict) -> ConfigDict:
  """The config of a student with its own average for a teacher: its modules, crops and groups are the same."""
  alone = config.copy_and_resolve_references()
  alone.method = "dinov3"
  alone.distillation.update(configs.default().distillation)
  if alone.gram.source == "teacher":
    alone.gram.source = "ema"
  return alone
