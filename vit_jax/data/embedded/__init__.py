"""Data that needs no download: made by NumPy from seeds, or cut from photographs that other packages carry.

    open_embedded("embedded:textures")                               6,000 training images of 20 textures, 64 px
    open_embedded("embedded:textures/test?size=96&count=500")        images of the same classes, none of them in train
    open_embedded("embedded:shapes/train?objects=4")                 scenes of shapes; label: shape of the largest
    open_embedded("embedded:photos")                                 tiles of real photographs; label: which photograph

Image i of a generated split is the same whatever the count, the process and the machine's number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from vit_jax.data.embedded import textures
from vit_jax.data.embedded.source import EmbeddedSource, cached, pack

__all__ = ["EmbeddedSource", "open_embedded"]

SPLITS = {"train": 0, "test": 1}  # first word of every seed: the splits share no random stream
PREFIX = "embedded:"


@dataclass(frozen=True)
class _Set:
  """How one embedded data set is made: `example(seed, index, **options)` for each index."""

  version: int
  options: Mapping[str, Any]                # option -> default, whose type is the option's
  class_names: tuple[str, ...]
  example: Callable[..., tuple[np.ndarray, int]]
  choices: Mapping[str, tuple[str, ...]]    # options that take one of a few words


def _sets() -> dict[str, _Set]:
  return {
    "textures": _Set(textures.VERSION, {"size": 64}, textures.CLASS_NAMES, textures.example, {}),
  }


COUNTS = {"train": 6000, "test": 1000}


def open_embedded(spec: str, *, cache_dir: str | os.PathLike | None = None) -> EmbeddedSource:
  """Opens an embedded data set, making its images first if the cache has none.

  Args:
    spec: "embedded:NAME[/SPLIT][?option=value&...]"; SPLIT is train (the default) or test.
    cache_dir: where the arrays are kept; None: $VIT_JAX_CACHE, or ~/.cache/vit_jax.

  Raises:
    ValueError: for a name, split, option or value that does not exist; the message lists those that do.
  """
  name, split, given = _parse(spec)
  recipe = _sets()[name]
  options = _options(spec, given, {**recipe.options, "count": COUNTS[split]}, recipe.choices)
  written = "&".join(f"{key}={value}" for key, value in options.items())
  file = f"{name}-{split}-{written.replace('=', '').replace('&', '-')}-v{recipe.version}.npy"
  count = options.pop("count")

  def make() -> np.ndarray:
    examples = (recipe.example((SPLITS[split],), index, **options) for index in range(count))
    images, labels = zip(*examples, strict=True)
    return pack(np.stack(images), np.array(labels, np.int32))

  path = _cache_root(cache_dir) / "embedded" / file
  return cached(path, make, class_names=recipe.class_names, spec=f"{PREFIX}{name}/{split}?{written}")


def _parse(spec: str) -> tuple[str, str, list[tuple[str, str]]]:
  """Splits "embedded:NAME[/SPLIT][?OPTIONS]" and checks name and split."""
  body, _, query = spec.removeprefix(PREFIX).partition("?")
  name, _, split = body.partition("/")
  split = split or "train"
  if name not in _sets():
    raise ValueError(f"data source {spec!r}: no embedded data named {name!r}; there are {_list(_sets())}.")
  if split not in SPLITS:
    raise ValueError(f"data source {spec!r}: embedded data has no split {split!r}; it has {_list(SPLITS)}.")
  return name, split, parse_qsl(query, keep_blank_values=True)


def _options(
  spec: str, given: list[tuple[str, str]], defaults: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
  """The defaults with the given options put in, each checked."""
  options = dict(defaults)
  for key, text in given:
    if key not in defaults:
      raise ValueError(f"data source {spec!r}: no option {key!r}; the options are {_list(defaults)}.")
    if key in choices:
      if text not in choices[key]:
        raise ValueError(f"data source {spec!r}: {key}={text} is not one of {_list(choices[key])}.")
      options[key] = text
    elif not text.isdecimal() or int(text) < 1:
      raise ValueError(f"data source {spec!r}: {key}={text} must be a whole number above 0, as in {key}={defaults[key]}.")
    else:
      options[key] = int(text)
  return options


def _list(words) -> str:
  return ", ".join(words)


def _cache_root(cache_dir: str | os.PathLike | None) -> Path:
  return Path(cache_dir or os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()
