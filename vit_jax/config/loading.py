"""Loading a run file and applying overrides.

ml_collections' ConfigDict holds the values; absl's config flags are not used. They answer a mistyped key or a bad
file argument with a traceback, take `--config.key=None` for the text "None", and put the configuration into a global
flag object that must be parsed once per process, also in data workers and tests. The parser here is a few lines over
the schema's own types, has no state, and every error is one line that names the nearest key or the expected type.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import assign, check_key, did_you_mean, flatten, parse_value
from vit_jax.config.saving import conform, read
from vit_jax.config.students import SECTION, is_own, split_entry, split_key

PREFIX = "--config."


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """The configuration of a run: the schema's defaults, changed by a run file, changed by overrides.

  Args:
    spec: "configs/NAME.py" or "configs/NAME.py:argument" (the argument goes to the file's `get_config`), or a saved
      "config.json".
    overrides: "--config.key.name=value" (the prefix may be left out). "None" empties a key that may be empty,
      "(0.3,1.0)" or "0.3,1.0" is a tuple.

  Returns:
    A locked ConfigDict that has exactly the schema's keys. It is not validated yet: see `validate`.

  Raises:
    ConfigError: in one line: no such file, no `get_config`, wrong argument, unknown key, wrong type.
  """
  config = read(spec) if spec.endswith(".json") else _run_file(spec)
  texts = dict(map(_split, overrides))
  of_students = {key for key in texts if split_key(key)[0] is not None}
  loaded = config.distillation.students if spec.endswith(".json") else ()
  for key, text in texts.items():
    if key not in of_students:
      assign(config, key, parse_value(key, text, where=PREFIX))
  _load_students(config, loaded)
  for key in sorted(of_students):
    name = split_key(key)[0]
    if name not in config.students:
      raise ConfigError(f"{PREFIX}{key}: no such student; {_students_there(config, name)}")
    assign(config, key, parse_value(key, texts[key], where=PREFIX))
  return config


def _split(override: str) -> tuple[str, str]:
  """The key, which exists, and the text of an override."""
  key, equals, text = override.removeprefix(PREFIX).partition("=")
  if not equals:
    raise ConfigError(f"{PREFIX}{key}: needs a value, as {PREFIX}{key}=VALUE")
  check_key(key, where=PREFIX)
  return key, text


def _load_students(config: ConfigDict, loaded: tuple[str, ...]) -> None:
  """Fills the section of every student from its run file, unless it is one of the entries that are `loaded` already."""
  entries = config.distillation.students
  split = [split_entry(entry) for entry in entries]
  with config.unlocked():
    for name in set(config.students) - {found[0] for found in split if found}:
      del config.students[name]
  for entry, found in zip(entries, split, strict=True):
    if found is None or entry in loaded:  # what is no entry is for `validate` to say
      continue
    name, spec = found
    try:
      values = flatten(_run_file(spec))
    except ConfigError as error:
      raise ConfigError(f"distillation.students: {name}: {error}") from None
    for key, value in values.items():
      if is_own(key):
        assign(config, f"{SECTION}.{name}.{key}", value)


def _students_there(config: ConfigDict, name: str) -> str:
  there = sorted(config.students)
  return f"there are {', '.join(there)}{did_you_mean(name, there)}" if there else "distillation.students names none"


def check_argument(arg: str | None, variants: Iterable[str]) -> None:
  """For run files: raises ConfigError unless the argument of `get_config` is None or one of `variants`."""
  if arg is not None and arg not in variants:
    names = ", ".join(f":{name}" for name in variants)
    raise ConfigError(f"no variant {arg!r}{did_you_mean(arg, variants)}; there are {names}, or none")


def _run_file(spec: str) -> ConfigDict:
  match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
  if not match:
    raise ConfigError(
      f"--config={spec}: must be a run file, as configs/NAME.py or configs/NAME.py:argument{_meant_file(spec)}"
    )
  path, arg = Path(match[1]), match[2]
  if not path.is_file():
    raise ConfigError(f"--config={spec}: no such file; {_other_files(path)}")
  get_config = _get_config(path, spec)
  takes_arg = bool(inspect.signature(get_config).parameters)
  if arg is not None and not takes_arg:
    raise ConfigError(f"--config={spec}: {path.name} takes no argument")
  try:
    result = get_config(arg) if takes_arg else get_config()
  except Exception as error:
    raise _of_run_file(error, path, spec) from error
  if not isinstance(result, ConfigDict):
    raise ConfigError(f"--config={spec}: get_config must return a config, got {type(result).__name__}")
  return conform(flatten(result), where=f"{path}: ")


def _meant_file(spec: str) -> str:
  """Brackets that ask for the config of a run whose folder is given, or for a run file with its ending."""
  path, colon, arg = spec.partition(":")
  if (Path(path) / "config.json").is_file():
    return f" (did you mean {Path(path) / 'config.json'}?)"
  return f" (did you mean {path}.py{colon}{arg}?)" if Path(f"{path}.py").is_file() else ""


def _of_run_file(error: Exception, path: Path, spec: str) -> ConfigError:
  """An exception in a run file in one line: the file, its own line, and what is wrong."""
  if isinstance(error, ConfigError):
    return ConfigError(f"--config={spec}: {error}")
  text, file = " ".join(str(error).split()), path
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
  if isinstance(error, SyntaxError) and error.filename:  # of the file itself, or of one that it imports
    text, file, lines = error.msg, error.filename, [error.lineno]
  where = f"{file}, line {lines[-1]}" if lines else file
  return ConfigError(f"--config={spec}: {where}: {type(error).__name__}: {text}")


def _get_config(path: Path, spec: str) -> Callable[..., ConfigDict]:
  found = importlib.util.spec_from_file_location("vit_jax_run_file", path)
  module = importlib.util.module_from_spec(found)
  write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ among the run files
  try:
    found.loader.exec_module(module)
  except Exception as error:
    raise _of_run_file(error, path, spec) from error
  finally:
    sys.dont_write_bytecode = write_bytecode
  if not callable(getattr(module, "get_config", None)):
    raise ConfigError(f"--config={path}: has no function get_config(arg=None) that returns the config")
  return module.get_config


def _other_files(path: Path) -> str:
  folder = path.parent if path.parent.is_dir() else Path("configs")
  names = sorted(file.name for file in folder.glob("*.py")) if folder.is_dir() else []
  if not names:
    return f"the folder {folder} has no run files"
  return f"{folder} has {', '.join(names)}{did_you_mean(path.name, names)}"
