"""The resolved configuration as plain values: saving, reading back exactly, comparing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import files
from vit_jax.config.errors import ConfigError, DamagedConfig
from vit_jax.config.fields import assign, check_key, check_value, flatten
from vit_jax.config.schema import default


def conform(flat: Mapping[str, Any], *, where: str = "") -> ConfigDict:
  """A locked config with exactly the schema's keys from values by dotted key; keys not given keep their default.

  Raises:
    ConfigError: opening with `where`, for an unknown key or a wrong type.
  """
  config = default()
  for key, value in flat.items():
    check_key(key, where=where)
    assign(config, key, check_value(key, value, where=where))
  return config.lock()


def to_dict(config: ConfigDict) -> dict[str, Any]:
  """The config as nested dictionaries of JSON values (tuples become lists)."""
  return {
    key: to_dict(value) if isinstance(value, ConfigDict) else _lists(value) for key, value in sorted(config.items())
  }


def from_dict(values: Mapping[str, Any], *, where: str = "") -> ConfigDict:
  """The config that `to_dict` wrote: `from_dict(to_dict(config)) == config`, with tuples and placeholders.

  A key added to the schema since then takes its default, which must therefore mean what was done before.

  Raises:
    ConfigError: opening with `where`, if a key is unknown to this version or a value has the wrong type.
  """
  return conform(_flatten_dict(values), where=where)


def save(config: ConfigDict, path: str | os.PathLike) -> None:
  """Writes the config as JSON, atomically: a reader sees the old file or the new one, never a part."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, to_dict(config), indent=2)


def read(path: str | os.PathLike) -> ConfigDict:
  """Reads what `save` wrote.

  Raises:
    DamagedConfig: if the file is no JSON, or none of a config.
    ConfigError: if it is missing, or has a key or a type that this version does not know.
  """
  try:
    values = files.read_json(path, kind=dict)
    if not values.keys() & default().keys():
      raise files.DamagedFile(path, "has no key of a config")
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such file") from None
  except files.DamagedFile as error:
    raise DamagedConfig(f"{error}; it was a saved config: restore it from a copy") from error
  return from_dict(values, where=f"{path} (saved by another version of vit_jax?): ")


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Every key whose value differs, as "key: old -> new"."""
  before, after = flatten(old), flatten(new)
  return [
    f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
    for key in sorted(before.keys() | after.keys())
    if before.get(key) != after.get(key)
  ]


def config_hash(config: ConfigDict) -> str:
  """Twelve hexadecimal digits that are the same exactly for the same values."""
  return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def _lists(value: Any) -> Any:
  return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _flatten_dict(values: Mapping[str, Any]) -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= {f"{key}.{rest}": inner for rest, inner in _flatten_dict(value).items()}
    else:
      flat[key] = value
  return flat
