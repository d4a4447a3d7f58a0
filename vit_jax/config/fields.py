"""The types of the schema's keys: reading override texts, checking values, naming the nearest key."""

from __future__ import annotations

import ast
import difflib
import functools
import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax.config.errors import ConfigError
from vit_jax.config.schema import default
from vit_jax.config.students import is_own, split_key

# Elements of the tuples whose default is empty, None, or of another length than a value may be.
_ELEMENTS = {
  "data.canvas": int,
  "data.value_range": float,
  "augment.mean": float,
  "augment.std": float,
  "crops.resolutions": (int, int, int, float),
  "distillation.students": str,
  "model.depths": int,
  "model.widths": int,
}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


class Field(NamedTuple):
  """The type of one key, read off its default."""

  kind: type  # int, float, bool, str or tuple
  optional: bool  # a placeholder: None is a value
  element: type | tuple[type, ...] | None = None  # of a tuple; several: its elements are rows of these
  length: int | None = None  # of a tuple; None: any

  def __str__(self) -> str:
    if self.kind is not tuple:
      text = _NAMES[self.kind]
    elif isinstance(self.element, tuple):
      row = f"({','.join('0.5' if kind is float else '96' for kind in self.element)})"
      text = f"rows of {len(self.element)} numbers such as ({row},{row})"
    elif self.length is None and self.element is not str:
      text = f"numbers such as ({'0.5' if self.element is float else '2'},)"
    elif self.length is None:
      text = 'names such as "(knn,linear)"'
    else:
      text = f"{self.length} numbers such as ({','.join(['0.5'] * self.length)})"
    return text + (" or None" if self.optional else "")


def flatten(config: ConfigDict) -> dict[str, Any]:
  """The values of a config by dotted key, in alphabetical order."""
  flat = {}
  for key in sorted(config):
    value = config[key]
    if isinstance(value, ConfigDict):
      flat |= {f"{key}.{rest}": inner for rest, inner in flatten(value).items()}
    else:
      flat[key] = value
  return flat


@functools.cache
def fields() -> dict[str, Field]:
  """The type of every key of the schema."""
  schema = default()
  result = {}
  for key, value in flatten(schema).items():
    section, name = _locate(schema, key)
    if key in _ELEMENTS:
      result[key] = Field(tuple, value is None, _ELEMENTS[key])
    elif isinstance(value, tuple):
      element = type(value[0])
      result[key] = Field(tuple, False, element, None if element is str else len(value))
    else:
      result[key] = Field(section.get_type(name), value is None)
  return result


def check_key(key: str, *, where: str = "") -> None:
  """Raises ConfigError, naming the nearest keys, unless `key` is a key of the schema; `where` opens the message."""
  known = fields()
  student, rest = split_key(key)
  if student is not None:
    check_key(rest, where=f"{where}{key[: -len(rest)]}")
    if not is_own(rest):
      raise ConfigError(f"{where}{key}: is common to all students: set {rest} itself")
    return
  if key in known:
    return
  inside = [k for k in known if k.startswith(key + ".")]
  if inside:
    raise ConfigError(f"{where}{key}: is a section, not a key; its keys are {', '.join(inside)}")
  near = _nearest_keys(key, [*known, *_sections(known)])
  hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_siblings(key, known))}"
  raise ConfigError(f"{where}{key}: no such key; {hint}")


def check_value(key: str, value: Any, *, where: str = "") -> Any:
  """`value` as the type of `key`: an int is a float, a list a tuple.

  Raises:
    ConfigError: naming key, value and expected type.
  """
  field = _field(key)
  try:
    return _convert(value, field)
  except (TypeError, ValueError):
    raise ConfigError(f"{where}{key}={value!r}: must be {field}") from None


def parse_value(key: str, text: str, *, where: str = "") -> Any:
  """The value that an override text means for `key`: "None" empties a placeholder, "(1,2)" and "1,2" are tuples.

  Raises:
    ConfigError: naming key, text and expected type.
  """
  field = _field(key)
  try:
    return _parse(text.strip(), field)
  except ValueError:
    raise ConfigError(f"{where}{key}={text}: must be {field}") from None


def assign(config: ConfigDict, key: str, value: Any) -> None:
  """Sets a dotted key of a config to a value already checked; the section of a student is made if it is missing."""
  student, _ = split_key(key)
  if student is not None and student not in config.students:
    with config.unlocked():
      config.students[student] = _own_default()
  section, name = _locate(config, key)
  section[name] = value


def defaults_of(config: ConfigDict) -> ConfigDict:
  """The schema with a section of defaults for every student that `config` has: what to compare it with."""
  defaults = default()
  for name in config.students:
    defaults.students[name] = _own_default()
  return defaults


def did_you_mean(value: str, choices: Iterable[str]) -> str:
  """Brackets that ask for the nearest of the choices, to append to a message; nothing if none is near."""
  near = difflib.get_close_matches(value, list(choices), n=1)
  return f" (did you mean {near[0]!r}?)" if near else ""


def key_meant(text: str) -> str | None:
  """The override that a mistyped one ("batch_size=3", "confg.batch_size=3") may stand for; None where none is near."""
  key, equals, value = text.partition("=")
  first, _, rest = key.partition(".")
  for name in (rest, key) if difflib.get_close_matches(first, ["config"]) else (key,):
    near = [name] if name in fields() else _nearest_keys(name, fields())
    if near:
      return near[0] + equals + value
  return None


def _field(key: str) -> Field:
  return fields()[split_key(key)[1]]


def _own_default() -> ConfigDict:
  """The sections of a student's own keys, with their defaults."""

  def cut(section: ConfigDict, prefix: str) -> ConfigDict:
    for name, value in list(section.items(preserve_field_references=True)):
      inside = cut(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else is_own(prefix + name)
      if not inside:
        del section[name]
    return section

  return cut(default(), "")


def _locate(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  *path, name = key.split(".")
  for part in path:
    config = config[part]
  return config, name


def _nearest_keys(key: str, known: Iterable[str]) -> list[str]:
  """Up to three keys that look like `key` as a whole or in their last part."""
  last = {k: k.rsplit(".", 1)[-1] for k in known}
  similar_last = difflib.get_close_matches(key.rsplit(".", 1)[-1], set(last.values()), n=2, cutoff=0.75)
  near = difflib.get_close_matches(key, list(known), n=2, cutoff=0.75)
  near += [k for k in known if last[k] in similar_last and k not in near]
  return near[:3]


def _sections(known: Iterable[str]) -> list[str]:
  """The sections of the keys and the sections within these."""
  parts = [key.split(".") for key in known]
  return list(dict.fromkeys(".".join(path[:depth]) for path in parts for depth in range(1, len(path))))


def _siblings(key: str, known: Iterable[str]) -> list[str]:
  """The keys and sections next to where `key` would be."""
  section = key.rsplit(".", 1)[0] + "." if "." in key else ""
  inside = [k for k in known if k.startswith(section)]
  if not inside:
    section, inside = "", list(known)
  return list(dict.fromkeys(section + k[len(section) :].split(".")[0] for k in inside))


def _convert(value: Any, field: Field) -> Any:
  if value is None and field.optional:
    return None
  if field.kind is tuple:
    if not isinstance(value, list | tuple) or (field.length is not None and len(value) != field.length):
      raise TypeError
    return tuple(_convert_element(v, field.element) for v in value)
  if field.kind is bool or isinstance(value, bool):
    wanted = bool if field.kind is bool else ()
  else:
    wanted = {int: numbers.Integral, float: numbers.Real, str: str}[field.kind]
  if not isinstance(value, wanted) or (field.kind is float and not math.isfinite(value)):
    raise TypeError
  return field.kind(value)


def _convert_element(value: Any, element: type | tuple[type, ...]) -> Any:
  if not isinstance(element, tuple):
    return _convert(value, Field(element, False))
  if not isinstance(value, list | tuple) or len(value) != len(element):
    raise TypeError
  return tuple(_convert(v, Field(kind, False)) for v, kind in zip(value, element, strict=True))


def _parse(text: str, field: Field) -> Any:
  if text == "None":
    if field.optional:
      return None
    raise ValueError
  if field.kind is tuple and isinstance(field.element, tuple):
    try:
      return _convert(ast.literal_eval(text), field)
    except (SyntaxError, TypeError) as error:
      raise ValueError from error
  if field.kind is tuple:
    bare = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    items = [item.strip().strip("\"'") for item in bare.split(",")]
    if items[-1] == "":  # "(1,)" and "()"
      items.pop()
    if field.length is not None and len(items) != field.length:
      raise ValueError
    return tuple(_parse(item, Field(field.element, False)) for item in items)
  if field.kind is bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
      raise ValueError
    return values[text.lower()]
  value = field.kind(text)
  if field.kind is float and not math.isfinite(value):
    raise ValueError
  return value
