"""Data that needs no download: made by NumPy from seeds, or cut from photographs that other packages carry.

    open_embedded("embedded:textures")                               6,000 training images of 20 textures, 64 px
    open_embedded("embedded:textures/test?size=96&count=500")        images of the same classes, none of them in train
    open_embedded("embedded:shapes/train?objects=4")                 scenes of shapes; label: shape of the largest
    open_embedded("embedded:photos")                                 tiles of real photographs; label: which photograph

Image i of a generated split is the same whatever the count and the process that makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import numpy as np

from vit_jax.data.embedded import photos, shapes, textures
from vit_jax.data.embedded.shapes import Object, Scene, scene
from vit_jax.data.embedded.source import EmbeddedSource, cached, pack
from vit_jax.data.index import cache_root

__all__ = ["EmbeddedSource", "Object", "Scene", "open_embedded", "scene"]

PREFIX = "embedded:"
SPLITS = {"train": 0, "test": 1}  # the first word of every seed: the splits share no random stream


@dataclass(frozen=True)
class _Set:
  """One embedded data set: `make(split, count, **options)` gives its images [N, H, W, 3] and labels [N]."""

  make: Callable[..., tuple[np.ndarray, np.ndarray]]
  version: int
  class_names: tuple[str, ...]
  counts: Mapping[str, int | None]  # split -> images unless told; None: all there are
  options: Mapping[str, int | str]
  choices: Mapping[str, Iterable[str]] = field(default_factory=dict)  # options that are one of a few words


def _one_by_one(example: Callable[..., tuple[np.ndarray, int]]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
  """`make` of a generator that gives any image by its index."""

  def make(split: int, count: int, **options) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(example(split, index, **options) for index in range(count)), strict=True)
    return np.stack(images), np.array(labels, np.int32)

  return make


_GENERATED = {"train": 6000, "test": 1000}
_SETS = {
  "textures": _Set(
    _one_by_one(textures.example), textures.VERSION, textures.CLASS_NAMES, _GENERATED, {"size": 64}
  ),
  "shapes": _Set(
    _one_by_one(shapes.example), shapes.VERSION, shapes.CLASS_NAMES, _GENERATED,
    {"size": 64, "objects": 3, "background": "noise"}, {"background": shapes.BACKGROUNDS},
  ),
  "photos": _Set(
    photos.make, photos.VERSION, photos.CLASS_NAMES, {"train": None, "test": None}, {"size": 64}
  ),
}  # fmt: skip


def open_embedded(spec: str, *, cache_dir: str | os.PathLike | None = None) -> EmbeddedSource:
  """Opens an embedded data set, making its images first if the cache has none.

  Args:
    spec: "embedded:NAME[/SPLIT][?option=value&...]"; SPLIT is train (the default) or test.
    cache_dir: where the arrays are kept; None: $VIT_JAX_CACHE, or ~/.cache/vit_jax.

  Raises:
    ValueError: for a name, split, option or value that does not exist; the message lists those that do.
    ImportError: for photographs whose packages are not installed; the message says how to install them.
  """
  name, split, given = _parse(spec)
  recipe = _SETS[name]
  options = _options(spec, given, {**recipe.options, "count": recipe.counts[split]}, recipe.choices)
  written = {key: "all" if value is None else value for key, value in options.items()}
  file = "-".join([name, split, *(f"{key}{value}" for key, value in written.items()), f"v{recipe.version}"])
  full = f"{PREFIX}{name}/{split}?" + "&".join(f"{key}={value}" for key, value in written.items())

  def make() -> np.ndarray:
    try:
      return pack(*recipe.make(SPLITS[split], options.pop("count"), **options))
    except ValueError as error:
      raise ValueError(f"data source {spec!r}: {error}") from error

  path = cache_root(cache_dir) / "embedded" / f"{file}.npy"
  return cached(path, make, class_names=recipe.class_names, spec=full)


def _parse(spec: str) -> tuple[str, str, list[tuple[str, str]]]:
  """Splits "embedded:NAME[/SPLIT][?OPTIONS]" and checks name and split."""
  body, _, query = spec.removeprefix(PREFIX).partition("?")
  name, _, split = body.partition("/")
  split = split or "train"
  if name not in _SETS:
    raise ValueError(f"data source {spec!r}: no embedded data named {name!r}; there are {', '.join(_SETS)}.")
  if split not in SPLITS:
    raise ValueError(f"data source {spec!r}: embedded data has no split {split!r}; it has {', '.join(SPLITS)}.")
  return name, split, parse_qsl(query, keep_blank_values=True)


def _options(
  spec: str,
  given: list[tuple[str, str]],
  defaults: Mapping[str, int | str | None],
  choices: Mapping[str, Iterable[str]],
) -> dict[str, int | str | None]:
  """The defaults with the given options put in, each checked."""
  options = dict(defaults)
  for key, text in given:
    if key not in defaults:
      raise ValueError(f"data source {spec!r}: no option {key!r}; the options are {', '.join(defaults)}.")
    if key in choices:
      if text not in choices[key]:
        raise ValueError(f"data source {spec!r}: {key}={text} is not one of {', '.join(choices[key])}.")
      options[key] = text
    elif text.isdecimal() and int(text) >= 1:
      options[key] = int(text)
    else:
      raise ValueError(f"data source {spec!r}: {key}={text!r} must be a whole number above 0, for example {key}=64.")
  return options
