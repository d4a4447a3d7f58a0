"""The persistent compilation cache: a run that starts again finds its programs compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compilation_cache"
_SETTINGS = {
  "jax_compilation_cache_dir": None,
  "jax_persistent_cache_min_compile_time_secs": 0.0,  # the many small programs of a start add up
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def caching(setting: str | None, workdir: Path) -> Iterator[None]:
  """Programs compiled inside are kept, and found again by the next start.

  Args:
    setting: `compilation_cache` of the config: a folder, here or in a bucket; None: that of the process
      (JAX_COMPILATION_CACHE_DIR) where it has one, else one in the workdir; "off": no cache at all.
    workdir: of the run.
  """
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  if setting is None and before["jax_compilation_cache_dir"]:
    yield
    return
  wanted = dict(_SETTINGS)
  if setting != "off":
    wanted["jax_compilation_cache_dir"] = str(workdir / FOLDER) if setting is None else _folder(setting)
  _apply(wanted)
  try:
    yield
  finally:
    _apply(before)


def _folder(setting: str) -> str:
  """A folder of this machine as an absolute path, one in a bucket ("gs://…") as it is."""
  return setting if "://" in setting else str(Path(setting).expanduser().absolute())


def _apply(settings: dict[str, object]) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX looks at the settings once, at its first compilation
