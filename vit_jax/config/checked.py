"""The config that run files change: every assignment is checked where it is made, so that a mistake has a line."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, FieldReference

from vit_jax.config import schema
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import check_key, check_value
from vit_jax.config.students import SECTION


class UnknownKey(ConfigError, AttributeError, KeyError):
  """A key that no config has. Whoever expects the exceptions of a ConfigDict finds them."""

  __str__ = Exception.__str__  # a KeyError puts its message in quotes


class CheckedConfig(ConfigDict):
  """A config, or a section of one, that has the schema's keys and no others, with values of their types.

  Raises:
    UnknownKey: on reading and on setting a key that does not exist, with the nearest.
    ConfigError: on setting a value of another type.
  """

  _prefix = ""  # what comes before the keys of a section: "model.rope."

  @classmethod
  def of(cls, config: ConfigDict, prefix: str = "") -> CheckedConfig:
    """The same keys and values, checked from now on."""
    checked = cls()
    object.__setattr__(checked, "_prefix", prefix)
    for key, value in config.items(preserve_field_references=True):
      inside = isinstance(value, ConfigDict)
      super().__setitem__(checked, key, cls.of(value, f"{prefix}{key}.") if inside else value)
    return checked.lock() if config.is_locked else checked

  def __getitem__(self, key: str) -> Any:
    try:
      return super().__getitem__(key)
    except UnknownKey:  # of a section: "model.depht"
      raise
    except KeyError:
      raise self._unknown(key) from None

  def __getattr__(self, key: str) -> Any:
    return self[key]

  def __setitem__(self, key: str, value: Any) -> None:
    if "." in key:  # as it may be read
      section, _, key = key.rpartition(".")
      self[section][key] = value
      return
    name = f"{self._prefix}{key}"
    if key not in self._fields:
      raise self._unknown(key)
    if isinstance(self._fields[key], CheckedConfig):
      if not isinstance(value, dict | ConfigDict):
        inside = ", ".join(f"{name}.{inner}" for inner in self._fields[key])
        raise ConfigError(f"{name}={value!r}: is a section, not a key; its keys are {inside}")
      start = self._fields[key] if name.startswith(SECTION) else schema.default()[name]
      given, value = value, CheckedConfig.of(start, f"{name}.")
      value.update(given)
    elif not isinstance(value, FieldReference):
      value = check_value(name, value)
    super().__setitem__(key, value)

  def __setattr__(self, key: str, value: Any) -> None:
    self[key] = value

  def __delitem__(self, key: str) -> None:
    raise ConfigError(f"{self._prefix}{key}: cannot be removed: every config has all keys")

  __delattr__ = __delitem__

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, ConfigDict) and self._fields == other._fields and self.is_locked == other.is_locked

  __hash__ = None

  def copy_and_resolve_references(self, visit_map: Any = None) -> ConfigDict:
    """A copy that is not checked any more."""
    copy = ConfigDict()
    for key, value in self.items():
      copy[key] = value.copy_and_resolve_references() if isinstance(value, ConfigDict) else value
    return copy.lock() if self.is_locked else copy

  def __reduce__(self) -> Any:
    return CheckedConfig.of, (self.copy_and_resolve_references(), self._prefix)

  def _unknown(self, key: str) -> UnknownKey:
    try:
      check_key(f"{self._prefix}{key}")
    except ConfigError as error:
      return UnknownKey(str(error))
    return UnknownKey(f"{self._prefix}{key}: there is no such key here")


def default() -> CheckedConfig:
  """The schema: all keys with their defaults (a DINOv3 ViT-S/16 pretrained from scratch), for run files to change."""
  return CheckedConfig.of(schema.default())
