"""Configs that differ from the default."""

from __future__ import annotations

from ml_collections import ConfigDict

from vit_jax.config import default
from vit_jax.config.fields import assign


def changed(**values) -> ConfigDict:
  """The default config with values by dotted key, written with __ for the dots."""
  config = default()
  for key, value in values.items():
    assign(config, key.replace("__", "."), value)
  return config
