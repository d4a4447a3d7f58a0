"""Data that needs no download: made by NumPy from seeds, or cut from photographs that other packages carry.

    open_embedded("embedded:textures")                               6,000 training images of 20 textures, 64 px
    open_embedded("embedded:textures/test?size=96&count=500")        images of the same classes, none of them in train
    open_embedded("embedded:shapes/train?objects=4")                 scenes of shapes; label: shape of the largest
    open_embedded("embedded:photos")                                 tiles of real photographs; label: which photograph

Image i of a generated split is the same whatever the count and the process that makes it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import numpy as np

from vit_jax.data.embedded import photos, shapes, textures
from vit_jax.data.embedded.shapes import Object, Scene, scene
from vit_jax.data.embedded.source import EmbeddedSource, read_kept
from vit_jax.data.index import cache_root

__all__ = ["EmbeddedSource", "Object", "Scene", "open_embedded", "scene"]

PREFIX = "embedded:"
SPLITS = {"train": 0, "test": 1}  # the first word of every seed: the splits share no random stream


@dataclass(frozen=True)
class _Set:
  """One embedded data set: `example(split, index, **options)` gives an image [H, W, 3] and its label."""

  example: Callable[..., tuple[np.ndarray, int]]
  version: int
  class_names: tuple[str, ...]
  counts: Mapping[str, int | None]  # split -> images unless told; None: all there are
  options: Mapping[str, int | str]
  choices: Mapping[str, Iterable[str]] = field(default_factory=dict)  # options that are one of a few words
  available: Callable[..., int] | None = None  # `available(split, **options)`: images there are; None: without end


_GENERATED = {"train": 6000, "test": 1000}
_SETS = {
  "textures": _Set(textures.example, textures.VERSION, textures.CLASS_NAMES, _GENERATED, {"size": 64}),
  "shapes": _Set(
    shapes.example, shapes.VERSION, shapes.CLASS_NAMES, _GENERATED,
    {"size": 64, "objects": 3, "background": "noise"}, {"background": shapes.BACKGROUNDS},
  ),
  "photos": _Set(
    photos.example, photos.VERSION, photos.CLASS_NAMES, {"train": None, "test": None}, {"size": 64},
    available=photos.available,
  ),
}  # fmt: skip


def open_embedded(spec: str, *, cache_dir: str | os.PathLike | None = None) -> EmbeddedSource:
  """Opens an embedded data set. Its images are made when they are read, unless the cache has them.

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
  path = cache_root(cache_dir) / "embedded" / f"{file}.npy"
  count = options.pop("count")
  example = functools.partial(recipe.example, SPLITS[split], **options)
  records = read_kept(path, full)
  try:
    if records is not None:
      count = len(records)
    elif recipe.available is not None:
      count = _of_those_there(recipe.available(SPLITS[split], **options), count, options["size"])
    known = dict(class_names=recipe.class_names, spec=full, path=path, records=records)
    source = EmbeddedSource(example, range(count), **known)
    source[0]  # what is wrong with the options shows now, not when the first image is read
  except ValueError as error:
    raise ValueError(f"data source {spec!r}: {error}") from error
  return source


def _of_those_there(there: int, count: int | None, size: int) -> int:
  if not there or (count or 0) > there:
    raise ValueError(f"there are {there} tiles of size={size} in this split, not {count or 1}: lower size or count.")
  return count or there


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
