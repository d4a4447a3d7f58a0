"""`tar:/glob`: WebDataset shards, uncompressed tar files, with random access to their members.

Files of a shard that share their path up to the first dot of the name are one sample: `a/001.jpg` with `a/001.cls` or
`a/001.json`. The image is the member that ends in .jpg, .png, …; the label is what `.cls` holds, or "label", "cls" or
"class" of `.json`: a number, or a class's name. The names of numbered classes are in `classes.json` beside the shards,
if there is one. Where every image begins in its shard is found once and kept as an index in the cache, which is made
again when a shard has changed.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_jax.data import storage
from vit_jax.data.array_records import CLASSES
from vit_jax.data.decode import BadImage
from vit_jax.data.formats import EXTENSIONS
from vit_jax.data.index import Names, index_path, read_index, write_index
from vit_jax.data.limits import DEFAULT

log = logging.getLogger(__name__)

_LABELS = ("label", "cls", "class", "class_id")  # fields of a sample's .json
_THREADS = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}  # by their first bytes


class _Sample(NamedTuple):
  name: str
  offset: int
  size: int
  label: str  # as written; "": none


class TarSource:
  """The images of some tar files, in the order of the files' names and of their members."""

  def __init__(self, index: Path | None, about: dict, arrays: dict[str, np.ndarray]):
    self._index = index
    self._about, self._arrays = about, arrays
    self._names = Names(arrays["names"], arrays["name_ends"])
    self._shards = about["shards"]
    self.class_names = tuple(about["classes"])
    self.num_classes = int(about["num_classes"])
    self.remote = storage.is_remote(self._shards[0])
    self.limits = DEFAULT

  def __reduce__(self):
    if self._index is not None:
      return (_from_index, (self._index,), {"limits": self.limits})
    return (TarSource, (None, self._about, self._arrays), {"limits": self.limits})

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    shard = self._shards[int(self._arrays["shard"][index])]
    size = int(self._arrays["size"][index])
    self.limits.check_bytes(size, self.describe(index))
    data = storage.read_range(shard, int(self._arrays["offset"][index]), size)
    if len(data) < size:
      raise BadImage(self.describe(index), f"the shard ends after {len(data)} of its {size} bytes")
    return {"image": data, "label": int(self._arrays["label"][index])}

  def describe(self, index: int) -> str:
    return f"{self._names[index]} in {self._shards[int(self._arrays['shard'][index])]}"


def open_tar(pattern: str, spec: str, *, cache_dir: str | os.PathLike | None = None, rescan: bool = False) -> TarSource:
  """Opens the shards that match a pattern (with {000..127}, if that is how they are numbered).

  Args:
    pattern: of the shards' paths.
    spec: the specification that it comes from, for messages.
    cache_dir: where the index is kept.
    rescan: read the shards again though the index holds.

  Raises:
    ValueError: if no file matches, one is no tar file or compressed, or they hold no image.
  """
  shards = storage.matches(pattern)
  if not shards:
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {storage.contents(pattern)}.")
  with ThreadPoolExecutor(_THREADS) as pool:
    versions = [list(version) for version in pool.map(storage.version, shards)]
  place = index_path("tar", "\n".join(shards), cache_dir)
  if not rescan and place.exists():
    try:
      if read_index(place)[0]["versions"] == versions:
        return _from_index(place)
      log.info("shards of %s have changed: reading where their images are again", spec)
    except (OSError, ValueError, KeyError) as error:
      log.warning("the index %s cannot be read (%s): making it again", place, error)
  about, arrays = _scan(shards, spec)
  try:
    write_index(place, {**about, "versions": versions}, arrays)
  except OSError as error:
    log.warning("cannot keep the index of %s in %s (%s): it is made at every start", spec, place, error)
    return TarSource(None, about, arrays)
  return _from_index(place)


def _from_index(place: Path) -> TarSource:
  return TarSource(place, *read_index(place))


def _scan(shards: list[str], spec: str) -> tuple[dict, dict[str, np.ndarray]]:
  """(about, arrays) of an index of these shards."""
  begun = time.monotonic()
  with ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(lambda shard: _samples(shard, spec), shards))
  samples = [sample for _, some, _ in found for sample in some]
  missing = sum(count for *_, count in found)
  if not samples:
    kinds = sorted(set().union(*(endings for endings, *_ in found)))
    raise ValueError(
      f"data.source = {spec!r}: the {len(shards)} matching files hold no image, only members that end in "
      f"{', '.join(kinds) or 'nothing'}; images are {', '.join(EXTENSIONS)}."
    )
  if missing:
    log.warning("%s: %d samples without an image were left out", spec, missing)
  labels, classes, number = _classes((sample.label for sample in samples), storage.local(shards[0]))
  names = Names.of(sample.name for sample in samples)
  arrays = {
    "names": names.text,
    "name_ends": names.ends,
    "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(some) for _, some, _ in found]),
    "offset": np.array([sample.offset for sample in samples], np.int64),
    "size": np.array([sample.size for sample in samples], np.int64),
    "label": labels,
  }
  seconds = time.monotonic() - begun
  log.info("%s: %d images found in %d shards in %.1f s", spec, len(samples), len(shards), seconds)
  return {"shards": shards, "classes": classes, "num_classes": number}, arrays


def _samples(shard: str, spec: str) -> tuple[set[str], list[_Sample], int]:
  """(the members' endings, the samples with an image, number of samples without one) of a shard."""
  images: dict[str, tuple[str, int, int]] = {}
  labels: dict[str, str] = {}
  endings: set[str] = set()
  with storage.open_file(shard) as file:
    start = file.read(2)
    if start in _COMPRESSED:
      raise ValueError(
        f"data.source = {spec!r}: {shard} is compressed ({_COMPRESSED[start]}), which leaves no random access to its "
        "images; decompress it (images hardly shrink)."
      )
    file.seek(0)
    try:
      with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
          folder, _, name = member.name.rpartition("/")
          stem, dot, ending = name.partition(".")
          if not member.isfile() or not stem:
            continue
          key, ending = f"{folder}/{stem}", (dot + ending).lower()
          endings.add(ending)
          if ending in EXTENSIONS:
            images.setdefault(key, (member.name, member.offset_data, member.size))
          elif ending in (".cls", ".json"):
            label = _label(tar.extractfile(member).read(), ending)
            labels[key] = label or labels.get(key, "")
        file.seek(tar.offset)  # where tarfile saw the end: a damaged header counts as one
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
          log.warning(
            "%s is damaged at byte %d: only the %d images before that are used", shard, tar.offset, len(images)
          )
    except tarfile.TarError as error:
      if not images:
        raise ValueError(f"data.source = {spec!r}: {shard} is no whole tar file: {error}") from error
      log.warning("%s is damaged (%s): only the %d images before that are used", shard, error, len(images))
  samples = [_Sample(*image, labels.get(key, "")) for key, image in images.items()]
  return endings, samples, len(labels.keys() - images.keys())


def _label(data: bytes, ending: str) -> str:
  """The label in a .cls or .json member, as text; "": none."""
  text = data.decode("utf-8", "replace").strip()
  if ending == ".cls":
    return text
  try:
    fields = json.loads(text)
  except json.JSONDecodeError:
    return ""
  if not isinstance(fields, dict):
    return ""
  return next((str(fields[name]) for name in _LABELS if isinstance(fields.get(name), int | str)), "")


def _classes(written: Iterable[str], shard: str) -> tuple[np.ndarray, list[str], int]:
  """(labels int32 [N], class names, number of classes) of labels as they are written: numbers, or else names."""
  written = list(written)
  path = shard.rpartition("/")[0] + "/" + CLASSES
  names = json.loads(storage.read(path)) if storage.exists(path) else []
  if all(label.isdecimal() for label in written if label):
    labels = np.array([int(label) if label else -1 for label in written], np.int32)
    return labels, names, max(len(names), int(labels.max()) + 1)
  names = sorted(set(written) - {""})
  numbers = {name: i for i, name in enumerate(names)} | {"": -1}
  return np.array([numbers[label] for label in written], np.int32), names, len(names)
