"""`tar:/glob`: WebDataset shards, uncompressed tar files, with random access to their members.

Every member that is an image is a record. Its label is that of the `.cls` or `.json` of the same name (`a/001.cls` for
`a/001.jpg`, `a/001.v2.cls` for `a/001.v2.jpg`) or else of its sample, whose name ends at the first dot (`a/001.cls` for
`a/001.left.jpg`): what `.cls` holds, or "label", "cls", "class" or "class_id" of `.json`, by the rules of `classes.py`.
The names of numbered classes are in `classes.json` beside the shards, if there is one. Where every image begins in its
shard is found once and kept as an index in the cache, which is made again when a shard has changed.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.data import hints, storage
from vit_jax.data.classes import CLASSES, class_names, classes_of
from vit_jax.data.decode import BadImage
from vit_jax.data.formats import EXTENSIONS
from vit_jax.data.index import Names, index_path, read_index, write_index
from vit_jax.data.left_out import LeftOut, printable
from vit_jax.data.limits import DEFAULT
from vit_jax.data.tar_members import Image, NoShard, read_shard

log = logging.getLogger(__name__)

_THREADS = 8
_FORM = 3  # of the index; one of another form is made again


class TarSource:
  """The images of some tar files, in the order of the files' names and of their members."""

  def __init__(self, index: Path | None, about: dict, arrays: dict[str, np.ndarray]):
    self._index = index
    self._about, self._arrays = about, arrays
    self._names = Names(arrays["names"], arrays["name_ends"])
    self._shards = about["shards"]
    self.class_names = tuple(about["classes"])
    self.num_classes = len(self.class_names)
    self.left_out = LeftOut(about["left_out"])
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
    return printable(f"{self._names[index]} in {self._shards[int(self._arrays['shard'][index])]}")


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
  left_out = LeftOut()
  shards = storage.matches(pattern, left_out)
  if not shards:
    found = f"{storage.contents(pattern)}.{hints.no_match(pattern)}"
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {found}")
  known = {"form": _FORM, "missing": left_out.to_json(), "versions": _versions(shards)}
  place = index_path("tar", "\n".join(shards), cache_dir)
  if not rescan and place.exists():
    try:
      about = read_index(place)[0]
      if all(about.get(key) == value for key, value in known.items()):
        return _from_index(place)
      log.info("shards of %s have changed: reading where their images are again", spec)
    except (OSError, ValueError, KeyError) as error:
      log.warning("the index %s cannot be read (%s): making it again", place, error)
  about, arrays = _scan(shards, spec, left_out)
  try:
    write_index(place, {**about, **known}, arrays)
  except OSError as error:
    log.warning("cannot keep the index of %s in %s (%s): it is made at every start", spec, place, error)
    return TarSource(None, about, arrays)
  return _from_index(place)


def _versions(shards: list[str]) -> list[list[int | str]]:
  """What changes when one of the shards or the list of class names is written again."""
  with ThreadPoolExecutor(_THREADS) as pool:
    versions = [list(version) for version in pool.map(storage.version, shards)]
  names = _class_file(shards)
  return versions + ([list(storage.version(names))] if storage.exists(names) else [])


def _class_file(shards: list[str]) -> str:
  return storage.local(shards[0]).rpartition("/")[0] + "/" + CLASSES


def _from_index(place: Path) -> TarSource:
  return TarSource(place, *read_index(place))


def _scan(shards: list[str], spec: str, left_out: LeftOut) -> tuple[dict, dict[str, np.ndarray]]:
  """(about, arrays) of an index of these shards."""
  begun = time.monotonic()
  with ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(lambda shard: _read(shard, spec), shards))
  images = [image for some, _ in found for image in some]
  for _, others in found:
    left_out.merge(others)
  if not images:
    files = "the matching file holds" if len(shards) == 1 else f"the {len(shards)} matching files hold"
    what = f"no image, only what is left out: {left_out.text()}" if left_out else "nothing at all"
    raise ValueError(f"data.source = {spec!r}: {files} {what}; images are {', '.join(EXTENSIONS)}.")
  classes = classes_of({image.label for image in images} - {None}, class_names(_class_file(shards)))
  names = Names.of(image.name for image in images)
  arrays = {
    "names": names.text,
    "name_ends": names.ends,
    "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(some) for some, _ in found]),
    "offset": np.array([image.offset for image in images], np.int64),
    "size": np.array([image.size for image in images], np.int64),
    "label": np.array([classes.number(image.label) for image in images], np.int32),
  }
  seconds = time.monotonic() - begun
  log.info("%s: %d images found in %d shards in %.1f s", spec, len(images), len(shards), seconds)
  return {"shards": shards, "classes": classes.names, "left_out": left_out.to_json()}, arrays


def _read(shard: str, spec: str) -> tuple[list[Image], LeftOut]:
  try:
    return read_shard(shard)
  except NoShard as error:
    raise ValueError(f"data.source = {spec!r}: {shard} {error}.") from error
