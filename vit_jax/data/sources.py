"""Sources: where images come from. `open_source("folder:/my/photos")` gives random access to records.

folder:/path                          any depth of sub-folders; the formats of `formats.py`
tfds:name/split                       a prepared TensorFlow dataset (?data_dir=/path), read without TensorFlow
array_record:/path/*.array_record     ArrayRecord shards of encoded images, with or without labels; or their folder
parquet:/path/*.parquet               tables with a column of images, as Hugging Face has them (?image=…&label=…)
tar:/path/{000..127}.tar              WebDataset shards: images with .cls or .json beside them
embedded:name/split                   data made by this package (?size=64&count=6000)
synthetic:photo                       images made on the spot (?size=500x375&count=10000&format=jpeg)
0.7 folder:/a + 0.3 tar:/b/*.tar      several of them, with weights

folder, parquet and tar also read object stores, as in folder:gs://bucket/photos, with the store's driver for fsspec.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, urlencode

import numpy as np

from vit_jax.data import hints
from vit_jax.data.left_out import left_out_of
from vit_jax.data.limits import DEFAULT, Limits

log = logging.getLogger(__name__)


class Source(Protocol):
  """Random access to the records of one split; can be sent to worker processes.

  Attributes:
    num_classes: classes of the labels; 0: no labels.
    class_names: their names, one for each; a class without a name is called by its label, as in "17".

  Some have more attributes: `left_out`, what of their files, members and labels they do not use and why
  (`left_out.LeftOut`); `remote`, whether what they read may come over a network; `limits`, bounds on the bytes and
  pixels of each image (`limits.py`); what decides about the order of their records (`order.py`).
  """

  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    """Number of records."""

  def __getitem__(self, index: int) -> dict[str, bytes | np.ndarray | int]:
    """{"image": an encoded image or an array as `decode.decode` takes it, "label": the number of its class, -1: none}.

    Raises:
      OSError, BadImage: if this one record cannot be read.
    """

  def describe(self, index: int) -> str:
    """What record `index` is, for messages: a file's path, a record's number."""


def open_source(spec: str, *, cache_dir: str | os.PathLike | None = None, limits: Limits = DEFAULT) -> Source:
  """Opens a source by its specification, `scheme:rest` (see the top of this file).

  Args:
    spec: the specification.
    cache_dir: where embedded data is kept; None: the default place.
    limits: bounds on the bytes and pixels of each image.

  Raises:
    ValueError: for a specification that is malformed or names nothing; it says what there is.
  """
  from vit_jax.data import mixture

  if mixture.is_mixture(spec):
    return mixture.open_mixture(spec, cache_dir=cache_dir, limits=limits)
  scheme, rest = _parse(spec)
  source = _within(limits, _OPENERS[scheme](rest, spec, cache_dir))
  if left_out := left_out_of(source):
    level = logging.INFO if left_out.expected else logging.WARNING
    log.log(level, "%s: beside %d images, %d left out: %s", spec, len(source), left_out.total, left_out.text())
  return source


def _within(limits: Limits, source: Source) -> Source:
  source.limits = limits
  return source


def rescan(
  spec: str, *, cache_dir: str | os.PathLike | None = None, beside: bool = False, limits: Limits = DEFAULT
) -> Source:
  """Opens a source and makes its index anew, where it is of a kind that has one (folder, tar).

  Args:
    spec: the specification.
    cache_dir: where indices are kept.
    beside: put the index of a folder beside it, as PATH.vit_jax_index, so that other machines find it, too.
    limits: bounds on the bytes and pixels of each image.

  Raises:
    ValueError: as `open_source`.
  """
  scheme, _, rest = spec.partition(":")
  if scheme == "folder" and rest:
    from vit_jax.data.folder import open_folder

    return _within(limits, open_folder(rest, spec, cache_dir=cache_dir, index="beside" if beside else "cache"))
  if beside:
    raise ValueError(f"data.source = {spec!r}: only the index of a folder can lie beside it.")
  if scheme == "tar" and rest:
    from vit_jax.data.tar import open_tar

    return _within(limits, open_tar(rest, spec, cache_dir=cache_dir, rescan=True))
  return open_source(spec, cache_dir=cache_dir, limits=limits)


def split_specs(spec: str) -> dict[str, str]:
  """The splits beside the given one, by name, each as a specification: what evaluation can train and test on.

  embedded: its train and test; tfds: every prepared split; folder: the folders train, val, validation, test beside
  /path if /path is one of them. Empty where the source knows of no other split.
  """
  from vit_jax.data import mixture

  if mixture.is_mixture(spec):
    return {}
  scheme, rest = _parse(spec)
  body, options = split_options(rest)
  if scheme == "embedded":
    options.pop("count", None)  # each split has its own default
    name = body.partition("/")[0]
    return {split: f"embedded:{name}/{split}" + _options_text(options) for split in ("train", "test")}
  if scheme == "folder":
    path = Path(rest).expanduser()
    beside = [path.with_name(name) for name in _SPLIT_FOLDERS] if path.name in _SPLIT_FOLDERS else []
    return {folder.name: f"folder:{folder}" for folder in beside if folder.is_dir()}
  if scheme == "tfds":
    from vit_jax.data.tfds_source import prepared_splits

    name = body.rpartition("/")[0]
    return {split: f"tfds:{name}/{split}" + _options_text(options) for split in prepared_splits(rest, spec)}
  return {}


def share_images(one: str, other: str) -> bool:
  """Whether two specifications name the same split of the same data, or mixtures that do, however they are written."""
  return not _splits_of(one).isdisjoint(_splits_of(other))


def split_options(rest: str) -> tuple[str, dict[str, str]]:
  """ "body?key=value&…" -> (body, {key: value})."""
  body, _, query = rest.partition("?")
  return body, dict(parse_qsl(query, keep_blank_values=True))


def _splits_of(spec: str) -> set[tuple[str, ...]]:
  """What tells the splits in a specification from others; options only where they choose other images."""
  from vit_jax.data import mixture

  if mixture.is_mixture(spec):
    return set().union(*(_splits_of(part) for _, part in mixture.mixture_parts(spec)))
  scheme, rest = _parse(spec)
  body, options = split_options(rest)
  if scheme == "embedded":
    name, _, split = body.partition("/")
    return {(scheme, name, split or "train")}
  if scheme in ("tfds", "synthetic"):
    return {(scheme, body, *map("=".join, sorted(options.items())))}
  path = rest if scheme in ("folder", "array_record") else body
  if scheme == "array_record" and os.path.isdir(os.path.expanduser(path)):
    path = os.path.join(path, "*.array_record")
  return {(scheme, path.rstrip("/") if "://" in path else os.path.realpath(os.path.expanduser(path)))}


_SPLIT_FOLDERS = ("train", "val", "validation", "test")


def _options_text(options: dict[str, str]) -> str:
  return f"?{urlencode(options, safe='/')}" if options else ""


def _parse(spec: str) -> tuple[str, str]:
  scheme, colon, rest = spec.partition(":")
  known = ", ".join(f"{name}:{form}" for name, form in _FORMS.items())
  if not colon or len(scheme) == 1:  # one letter: a drive of Windows
    if os.path.exists(os.path.expanduser(spec)):
      hint = f" Did you mean {hints.spec_of_path(spec)}?"
    else:
      hint = f" There is no file or folder {spec} either." if os.sep in spec else ""
    raise ValueError(f"data.source = {spec!r} has no scheme.{hint} Valid: {known}.")
  if scheme not in _OPENERS:
    near = difflib.get_close_matches(scheme, _OPENERS, 1)
    hint = f" Did you mean {near[0]}:{rest}?" if near else ""
    raise ValueError(f"data.source = {spec!r}: there is no scheme {scheme!r}.{hint} Valid: {known}.")
  if not rest:
    raise ValueError(f"data.source = {spec!r} names nothing after the colon: {scheme}:{_FORMS[scheme]}.")
  return scheme, rest


def _open_folder(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.folder import open_folder

  return open_folder(rest, spec, cache_dir=cache_dir)


def _open_tfds(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.tfds_source import open_tfds

  return open_tfds(rest, spec, cache_dir=cache_dir)


def _open_array_record(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.array_records import open_array_record

  return open_array_record(rest, spec, cache_dir=cache_dir)


def _open_embedded(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.embedded import open_embedded

  return open_embedded(spec, cache_dir=cache_dir)


def _open_parquet(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.parquet import open_parquet

  return open_parquet(rest, spec)


def _open_tar(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.tar import open_tar

  return open_tar(rest, spec, cache_dir=cache_dir)


def _open_synthetic(rest: str, spec: str, cache_dir: str | os.PathLike | None) -> Source:
  from vit_jax.data.synthetic import open_synthetic

  return open_synthetic(rest, spec)


_FORMS = {
  "folder": "/path",
  "tfds": "name/split",
  "array_record": "/path/*.array_record",
  "parquet": "/path/*.parquet",
  "tar": "/path/*.tar",
  "embedded": "name/split",
  "synthetic": "photo",
}
_OPENERS: dict[str, Callable[[str, str, str | os.PathLike | None], Source]] = {
  "folder": _open_folder,
  "tfds": _open_tfds,
  "array_record": _open_array_record,
  "parquet": _open_parquet,
  "tar": _open_tar,
  "embedded": _open_embedded,
  "synthetic": _open_synthetic,
}
