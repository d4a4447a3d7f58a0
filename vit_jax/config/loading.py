"""Loading a run file and applying overrides.

ml_collections' ConfigDict holds the values; absl's config flags are not used. They answer a mistyped key or a bad
file argument with a traceback, take `--config.key=None` for the text "None", and put the configuration into a global
flag object that must be parsed once per process, also in data workers and tests. The parser here is a few lines over
the schema's own types, has no state, and every error is one line that names the nearest key or the expected type.
"""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from vit_jax.config.checked import CheckedConfig
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import assign, check_key, did_you_mean, flatten, parse_value
from vit_jax.config.run_file import run_file
from vit_jax.config.saving import read
from vit_jax.config.students import SECTION, is_own, split_entry, split_key

PREFIX = "--config."


def load(spec: str, overrides: Iterable[str] = ()) -> CheckedConfig:
  """The configuration of a run: the schema's defaults, changed by a run file, changed by overrides.

  Args:
    spec: a run file, "my/run.py" or "my/run.py:argument" (the argument goes to the file's `get_config`); the name of
      one that comes with vit_jax, "dinov3_vits16" or "dinov3_vits16:argument"; or a saved "config.json".
    overrides: "--config.key.name=value" (the prefix may be left out). "None" empties a key that may be empty,
      "(0.3,1.0)" or "0.3,1.0" is a tuple.

  Returns:
    A locked config that has exactly the schema's keys. It is not validated yet: see `validate`.

  Raises:
    ConfigError: in one line: no such file, no `get_config`, wrong argument, unknown key, wrong type.
  """
  config = read(spec) if spec.endswith(".json") else run_file(spec)
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
  return CheckedConfig.of(config)


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
      values = flatten(run_file(spec))
    except ConfigError as error:
      raise ConfigError(f"distillation.students: {name}: {error}") from None
    for key, value in values.items():
      if is_own(key):
        assign(config, f"{SECTION}.{name}.{key}", value)


def _students_there(config: ConfigDict, name: str) -> str:
  there = sorted(config.students)
  return f"there are {', '.join(there)}{did_you_mean(name, there)}" if there else "distillation.students names none"
