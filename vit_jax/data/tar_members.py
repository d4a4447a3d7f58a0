"""What a tar file holds: where its images begin, their labels, and what is left out and why.

Nothing in one member can end the reading of a shard: headers, labels and metadata are bounded before they are read.
Behind a damaged header the next whole one is looked for; archives one behind the other, as `cat` joins them, are one.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from vit_jax.data import hints, storage
from vit_jax.data.classes import FIELDS, LONGEST, NoClass, text_of
from vit_jax.data.formats import START
from vit_jax.data.left_out import LeftOut

_BLOCK = tarfile.BLOCKSIZE
_LARGEST = {".cls": 4 * LONGEST, ".json": 1 << 20}  # bytes of a label's member
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_MOST_EXTENDED = 8  # headers that extend one
_MOST_HEADER = 1 << 20  # bytes of a long name or of the extended header of one member
_CHUNK = 1 << 20  # bytes looked through at once for the next header
_BEGINNING = 16 << 20  # bytes in which there must be a header, if the file is a tar file at all
_COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5\x2f": "zstandard"}
# Images that are no photographs but say something about one: the part before the ending, as in 001.seg.png.
_MAP = re.compile(
  r"\.(seg|segm|segmentation|mask|masks|semseg|semantic|instance|instances|panoptic|depth|disparity|normals?|flow|edges?"
  r"|labels?|labelids|matte|alpha|gt|groundtruth)\d*$",
  re.IGNORECASE,
)


class Image(NamedTuple):
  """A member that is an image: `label` as `classes.text_of` gives it, None: it has none."""

  name: str
  offset: int
  size: int
  label: str | None


class NoShard(ValueError):
  """A file that is no tar file, or a compressed one; the message says which, as in "is empty"."""


def read_shard(path: str) -> tuple[list[Image], LeftOut]:
  """(the images of a tar file in the order of its members, what is left out), from its headers and labels.

  Raises:
    NoShard: if it is no tar file or compressed.
    OSError: if it cannot be read.
  """
  left_out = LeftOut()
  with storage.open_file(path) as file:
    start = file.read(3)
    if start in _COMPRESSED:
      raise NoShard(
        f"is compressed ({_COMPRESSED[start]}), which leaves no random access to its images; decompress it (images "
        "hardly shrink)"
      )
    members = _Members(file, left_out)
    for header in _headers(file, path, left_out):
      members.add(header)
  members.follow_links()
  return members.labelled(), left_out


class _Header(tarfile.TarInfo):
  """A header whose sizes are checked before they are believed."""

  def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:
    extended = self.type in _EXTENDED
    tar.extended = tar.extended + 1 if extended else 0
    if self.size < 0 or (extended and self.size > _MOST_HEADER) or tar.extended > _MOST_EXTENDED:
      raise tarfile.InvalidHeaderError("absurd")
    return super()._proc_member(tar)


class _Tar(tarfile.TarFile):
  tarinfo = _Header
  extended = 0  # headers so far that only extend the next one: tarfile calls itself for each


class _Archive:
  """The headers from a place in a file up to the end of an archive, or to what is no header; `end`: where that is."""

  def __init__(self, file: BinaryIO, start: int):
    self._file, self.end = file, start

  def __iter__(self) -> Iterator[tarfile.TarInfo]:
    self._file.seek(self.end)
    try:
      tar = _Tar(fileobj=self._file, encoding="utf-8", errors="surrogateescape")
      while (header := tar.next()) is not None:
        self.end = tar.offset
        tar.members = []  # it would keep them all
        yield header
    except OSError:
      raise
    except Exception:  # tarfile raises almost anything on a damaged header
      return


def _headers(file: BinaryIO, path: str, left_out: LeftOut) -> Iterator[tarfile.TarInfo]:
  """The headers of all members of a file; where it is damaged or cut off is counted.

  Raises:
    NoShard: if there is none.
  """
  size, at, found = file.seek(0, 2), 0, 0
  if not size:
    raise NoShard("is empty")
  while at < size:
    archive = _Archive(file, at)
    for header in archive:
      found += 1
      yield header
    end = archive.end
    if end > size:
      return  # inside the last member, which is counted itself
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
      if block.strip(b"\0") or not block:
        left_out.add("shard without an end: cut off, or never finished", f"{path}: at byte {end:,}")
      return
    marker = not block.strip(b"\0")
    begin = _not_zero(file, end + _BLOCK, size) if marker else end
    first = begin if marker else end + _BLOCK  # a header that is refused is no next one
    at = _next_header(file, first, size if found or marker else min(size, _BEGINNING))
    if not found and not marker and at >= min(size, _BEGINNING):
      raise NoShard("is no whole tar file")
    if at > begin:
      at = min(at, size)
      reason = "stretch behind the end of a shard" if marker else "damaged stretch of a shard"
      left_out.add(f"{reason}, with what it holds", f"{path}: bytes {begin:,} to {at:,}")


def _not_zero(file: BinaryIO, at: int, size: int) -> int:
  """The first block from `at` on that is not all zeros; `size` if there is none."""
  while (at := _behind_hole(file, at, size)) < size:
    file.seek(at)
    chunk = file.read(_CHUNK)
    if rest := chunk.lstrip(b"\0"):
      return at + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
    if not chunk:
      return size
    at += len(chunk)
  return size


def _next_header(file: BinaryIO, at: int, size: int) -> int:
  """Where the first whole header from `at` on begins, in steps of a block; `size` if there is none."""
  while (at := _behind_hole(file, at, size)) < size:
    file.seek(at)
    chunk = file.read(_CHUNK)
    for place in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
      if chunk[place + 257 : place + 262] == b"ustar" and _is_header(chunk[place : place + _BLOCK]):
        return at + place
    if len(chunk) < _CHUNK:
      return size
    at += len(chunk)
  return size


def _behind_hole(file: BinaryIO, at: int, size: int) -> int:
  """The block from `at` on at which a file that is mostly holes goes on; terabytes of them take no place on a disk."""
  try:
    number = file.fileno()
    before = os.lseek(number, 0, os.SEEK_CUR)
  except (OSError, AttributeError):  # a file of an object store
    return at
  try:
    return at + (os.lseek(number, at, os.SEEK_DATA) - at) // _BLOCK * _BLOCK
  except OSError as error:
    return size if error.errno == errno.ENXIO else at  # ENXIO: nothing but holes
  except AttributeError:  # not known to this system
    return at
  finally:
    os.lseek(number, before, os.SEEK_SET)  # where `file` believes it to be


def _is_header(block: bytes) -> bool:
  try:
    return tarfile.nti(block[148:156]) in tarfile.calc_chksums(block)
  except tarfile.HeaderError:
    return False


class _Member(NamedTuple):
  """An image, or the label of some.

  Attributes:
    key: its name without its ending.
    turn: how many members of the same name come before it.
    place: (offset, size) of an image.
    label: that a member says.
  """

  name: str
  key: str
  turn: int
  place: tuple[int, int] = (0, 0)
  label: str | None = None


class _Members:
  """The images and labels of a shard."""

  def __init__(self, file: BinaryIO, left_out: LeftOut):
    self._file, self._left_out = file, left_out
    self._size = file.seek(0, 2)
    self._turns: collections.Counter[str] = collections.Counter()
    self._images: list[_Member] = []
    self._labels: list[_Member] = []
    self._links: list[tuple[str, str]] = []  # (name, what it links to)

  def add(self, header: tarfile.TarInfo) -> None:
    """Takes a member for what it is."""
    name = header.name
    if header.isdir():
      return
    if posixpath.basename(name).startswith("."):
      self._left_out.add("hidden", name, expected=True)
    elif header.issym():
      self._links.append((name, posixpath.join(posixpath.dirname(name), header.linkname)))
    elif header.islnk():
      self._links.append((name, header.linkname))
    elif not header.isreg():
      self._left_out.add("pipe, device or other special member", name)
    elif header.issparse():
      self._left_out.add("sparse member", name)
    elif header.offset_data + header.size > self._size:
      self._left_out.add("member cut off by the end of its shard", name)
    else:
      self._add_file(name, header.offset_data, header.size)

  def _add_file(self, name: str, offset: int, size: int) -> None:
    folder, slash, base = name.rpartition("/")
    stem, ending = posixpath.splitext(base)
    turn = self._turns[name]
    self._turns[name] += 1
    if ending.lower() in _LARGEST:
      self._add_label(_Member(name, folder + slash + stem, turn), ending.lower(), offset, size)
    elif hints.is_image(base):
      if match := _MAP.search(stem):
        self._left_out.add(f"label map {match[0]}{ending}, no photograph", name)
      else:
        self._images.append(_Member(name, folder + slash + stem, turn, (offset, size)))
    elif hints.may_be_image(base) and hints.told_by(self._read(offset, min(START, size))):
      self._images.append(_Member(name, name, turn, (offset, size)))
    else:
      reason, expected = hints.reason(base)
      self._left_out.add(reason, name, expected=expected)

  def _add_label(self, member: _Member, ending: str, offset: int, size: int) -> None:
    if size > _LARGEST[ending]:
      self._left_out.add(f"{ending} of more than {_LARGEST[ending]:,} bytes", member.name)
      return
    try:
      found = _label(self._read(offset, size), ending)
    except NoClass as error:
      self._left_out.add(f"label that is {error}", member.name)
      return
    if found is _SAYS_NONE:
      self._left_out.add(_UNLABELLED, member.name, expected=True)
    else:
      self._labels.append(member._replace(label=found))

  def _read(self, offset: int, size: int) -> bytes:
    self._file.seek(offset)
    return self._file.read(size)

  def follow_links(self) -> None:
    """Links to images of the shard become images, too."""
    places = {posixpath.normpath(image.name): image.place for image in self._images} if self._links else {}
    for name, target in self._links:
      place = places.get(posixpath.normpath(target))
      if place is None or not hints.is_image(name):
        self._left_out.add("link that leads to no image of its shard", name)
      else:
        self._images.append(_Member(name, posixpath.splitext(name)[0], 0, place))

  def labelled(self) -> list[Image]:
    """The images with their labels: those of their own name, or else of their sample."""
    said: dict[str, list[_Said]] = {}  # key -> what is said of the first image of that name, of the second, …
    for label in self._labels:
      turns = said.setdefault(label.key, [])
      while len(turns) <= label.turn:
        turns.append(_Said())
      turns[label.turn].add(label, self._left_out)
    keys = {image.key for image in self._images}
    images = [Image(image.name, *image.place, self._find(image, said, keys)) for image in self._images]
    for label in self._labels:
      if not said[label.key][label.turn].used:
        self._left_out.add("label without an image", label.name)
    return images

  def _find(self, image: _Member, said: dict[str, list[_Said]], keys: set[str]) -> str | None:
    """The label of an image: x/1.left.png is labelled by x/1.left.cls or, as a part of sample x/1, by x/1.cls.

    What stands between, as x/1.a.cls for x/1.a.b.png, is its label unless it is that of an image x/1.a.png.
    """
    key = image.key
    while key not in said or ("." in posixpath.basename(key) and key != image.key and key in keys):
      folder, slash, base = key.rpartition("/")
      if "." not in base:
        return None
      key = folder + slash + base.rpartition(".")[0]
    turns = said[key]
    if len(turns) > 1 and image.turn >= len(turns):
      self._left_out.add("image of a name that others have, too, of which not all have a label", image.name)
      return None
    found = turns[min(image.turn, len(turns) - 1)]
    found.used = True
    return found.label


class _Said:
  """What the labels of one sample say: the last of them counts."""

  def __init__(self):
    self.label: str | None = None
    self.used = False
    self._name = ""

  def add(self, member: _Member, left_out: LeftOut) -> None:
    """Takes in one more label; one that it contradicts is left out."""
    if member.label is None:
      return
    if self.label is not None and self.label != member.label:
      left_out.add("label that another of its sample contradicts", self._name)
    self.label, self._name = member.label, member.name


_SAYS_NONE = object()
_UNLABELLED = f".json with none of {', '.join(FIELDS)}"


def _label(data: bytes, ending: str) -> str | None | object:
  """The label in a .cls or .json member; `_SAYS_NONE`: it is of something else.

  Raises:
    NoClass: if it can mean no class.
  """
  if ending == ".cls":
    return text_of(data)
  try:
    fields = json.loads(data.decode("utf-8-sig"))
  except RecursionError:
    raise NoClass("nested too deeply") from None
  except ValueError:
    raise NoClass("no whole JSON") from None
  if not isinstance(fields, dict) or not (given := [fields[name] for name in FIELDS if fields.get(name) is not None]):
    return _SAYS_NONE
  failure = None
  for value in given:
    try:
      return text_of(value)
    except NoClass as error:
      failure = failure or error
  raise failure
