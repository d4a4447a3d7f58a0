"""The configuration of a run: one documented schema, loading with overrides, validation, saving.

    config = load("configs/quickstart.py", ["--config.batch_size=32"])    # run file, then overrides
    validate(config)                                                     # every problem, one line each
    save(config, "runs/mine/config.json")

`schema.py` holds every key that exists. Nothing here imports jax, so that a mistake in a config is answered at once.
"""

from vit_jax.config.checked import default
from vit_jax.config.durations import parse_duration, resolve_duration
from vit_jax.config.errors import ConfigError, DamagedConfig, UserError
from vit_jax.config.fields import defaults_of, flatten
from vit_jax.config.loading import load
from vit_jax.config.resolving import resolve
from vit_jax.config.run_file import check_argument
from vit_jax.config.saving import config_hash, difference, from_dict, read, save, to_dict
from vit_jax.config.schema import loss_group_size
from vit_jax.config.validation import validate
from vit_jax.config.values import choices

__all__ = [
  "ConfigError",
  "DamagedConfig",
  "UserError",
  "check_argument",
  "choices",
  "config_hash",
  "default",
  "defaults_of",
  "difference",
  "flatten",
  "from_dict",
  "load",
  "loss_group_size",
  "parse_duration",
  "read",
  "resolve",
  "resolve_duration",
  "save",
  "to_dict",
  "validate",
]
