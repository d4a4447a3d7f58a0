"""`vit-jax data scan`: goes through a source once and says what is in it, before a run meets it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from vit_jax.data import levels
from vit_jax.data.decode import BadImage, NeedsPackage, OtherChannels, Samples, read_samples, scaled
from vit_jax.data.left_out import LeftOut, left_out_of
from vit_jax.data.levels import Spread
from vit_jax.data.limits import Limits, limits_of
from vit_jax.data.sources import Source

_SHOWN = 5  # examples of broken files and of duplicates in the printed report
_KINDS_SHOWN = 12  # reasons for which images are broken
_CHUNK = 1 << 21  # pixels that are counted at a time
_STATISTICS_SIDE = 256  # a larger JPEG is decoded at a half, a quarter, … for the statistics: their means hardly change


class _Seen(NamedTuple):
  """What one record has shown."""

  digest: bytes  # of the encoded image
  nbytes: int
  label: int
  reason: str | None = None  # why it cannot be used
  kind: str = ""  # format and mode
  width: int = 0
  height: int = 0
  mean: np.ndarray | None = None  # [C], of values in [0, 1]
  square: np.ndarray | None = None  # [C], mean of their squares
  values: Spread | None = None  # of those of more than 8 bits, also of an image that cannot be used for their sake


@dataclasses.dataclass
class Scan:
  """What a source holds.

  Attributes:
    source: its specification.
    records: number of its records; `scanned` of them were looked at.
    broken: [(record, name, reason)].
    duplicates: groups of names whose files are the same, byte for byte.
    extra: records that are duplicates of another.
    channels: {number: images}, 3 for all that become RGB.
    mean, std: of each channel over all images of as many channels as most have, each image weighing the same, for
      augment.mean and augment.std.
    values: for each type of values of more than 8 bits: their range in all images.
    per_class: {class name: images}; "none" for those without a label.
    only_broken: classes none of whose images can be used.
    left_out: what the source does not use: {reason: (count, names of some, whether it is usual)}.
  """

  source: str
  records: int
  scanned: int = 0
  nbytes: int = 0
  broken: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
  duplicates: list[list[str]] = dataclasses.field(default_factory=list)
  extra: int = 0
  kinds: dict[str, int] = dataclasses.field(default_factory=dict)
  widths: tuple[int, int, int] = (0, 0, 0)  # least, median, greatest
  heights: tuple[int, int, int] = (0, 0, 0)
  short_sides: tuple[int, int, int] = (0, 0, 0)
  channels: dict[int, int] = dataclasses.field(default_factory=dict)
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  values: list[Spread] = dataclasses.field(default_factory=list)
  value_range: tuple[float, float] | None = None
  per_class: dict[str, int] = dataclasses.field(default_factory=dict)
  only_broken: list[str] = dataclasses.field(default_factory=list)
  left_out: LeftOut = dataclasses.field(default_factory=LeftOut)

  def report(self) -> str:
    """The scan as a page of text."""
    readable = self.scanned - len(self.broken)
    lines = [f"source       {self.source}", f"records      {self.records:,}" + self._part()]
    lines.append(
      f"size         {self.nbytes / 1e9:,.2f} GB, {self.nbytes / max(1, self.scanned) / 1e3:,.1f} kB an image"
    )
    if readable:
      for name, sizes in (("width", self.widths), ("height", self.heights), ("short side", self.short_sides)):
        lines.append(f"{name:<13}{sizes[0]} to {sizes[2]} pixels, median {sizes[1]}")
      lines.append("kinds        " + ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items()))
      lines.append(f"{'channels':<13}{self._channels()}")
      for name, values in (("mean", self.mean), ("std", self.std)):
        lines.append(f"{name:<13}--config.augment.{name}=({','.join(f'{value:.4f}' for value in values)})")
    lines += self._values()
    lines.append(f"classes      {self._classes()}")
    if self.only_broken:
      more = ", …" if len(self.only_broken) > _SHOWN else ""
      lines.append(f"  {len(self.only_broken)} without a readable image: {', '.join(self.only_broken[:_SHOWN])}{more}")
    lines.append(
      f"broken       {len(self.broken):,}" + (f" ({len(self.broken) / self.scanned:.2%})" if self.broken else "")
    )
    lines += self._broken()
    lines.append(f"duplicates   {self.extra:,} images are the same as another, byte for byte")
    lines += ["  " + " = ".join(names[:_SHOWN]) for names in self.duplicates[:_SHOWN]]
    if self.left_out:
      lines.append(f"left out     {self.left_out.total:,}, no records of this source")
      lines += [f"  {line}" for line in self.left_out.lines()]
    return "\n".join(lines)

  def write(self, path: str | os.PathLike) -> None:
    """Everything as JSON, with all broken records and all duplicates."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    values = [
      {name: x if x not in (math.inf, -math.inf) else None for name, x in seen._asdict().items()}
      | {"value_range": levels.advice(seen)}
      for seen in self.values
    ]
    found = dataclasses.asdict(self) | {"values": values, "left_out": self.left_out.to_json()}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")

  def _part(self) -> str:
    return "" if self.scanned == self.records else f", {self.scanned:,} of them looked at"

  def _channels(self) -> str:
    most = len(self.mean)
    if len(self.channels) == 1:
      return f"{most} (RGB)" if most == 3 else f"--config.model.in_channels={most}"
    return ", ".join(f"{count:,} images of {channels}" for channels, count in self.channels.items()) + (
      f": a run takes images of one number; mean and std are of those of {most}"
    )

  def _broken(self) -> list[str]:
    """Some of the broken records: of each kind of reason at least one."""
    kinds: dict[str, list[tuple[int, str, str]]] = {}
    for entry in self.broken:
      kinds.setdefault(re.sub(r"[\d.,]+", "#", entry[2]), []).append(entry)
    each = 1 + max(0, _SHOWN - len(kinds)) // max(1, len(kinds))
    lines = []
    for entries in itertools.islice(kinds.values(), _KINDS_SHOWN):
      lines += [f"  {name}: {reason}" for _, name, reason in entries[:each]]
      if len(entries) > each:
        lines.append(f"    and {len(entries) - each:,} more for such a reason")
    if len(kinds) > _KINDS_SHOWN:
      lines.append(f"  and {len(kinds) - _KINDS_SHOWN} other reasons, in the file of --json")
    return lines

  def _values(self) -> list[str]:
    """What the values of more than 8 bits reach, what becomes of them, and the key to set."""
    lines, asked = [], [levels.advice(seen) for seen in self.values]
    for seen, suggested in zip(self.values, asked, strict=True):
      line = f"{'values':<13}{seen.kind}{f' of {seen.bits} bits' if seen.bits else ''}: {seen.text}"
      if self.value_range is not None:
        low, high = self.value_range
        if seen.high <= low + (high - low) / 4:
          line += f"; they become at most {max(0.0, seen.high - low) / (high - low) * 255:.0f} of 255"
        if seen.low < low or seen.high > high:
          line += f"; what is not from {levels.number(low)} to {levels.number(high)} is cut off"
      elif suggested is not None:
        line += f"; {levels.fate(seen)}: --config.data.value_range={suggested}"
      if seen.missing:
        line += f"; {seen.missing / seen.size:.2%} missing (NaN), read as 0"
      lines.append(line)
    if self.value_range is None and len(set(asked)) > 1:
      lines.append(f"{'':<13}one range is for all images of more than 8 bits: convert those that it does not fit")
    return lines

  def _classes(self) -> str:
    named = {name: count for name, count in self.per_class.items() if name != "none"}
    if not named:
      return "no labels"
    least, most = min(named, key=named.get), max(named, key=named.get)
    without = f", {self.per_class['none']:,} without a label" if "none" in self.per_class else ""
    return f"{len(named)}, from {_images(named[least])} ({least}) to {named[most]:,} ({most}){without}"


def _images(count: int) -> str:
  return f"{count:,} image{'' if count == 1 else 's'}"


def scan(
  source: Source,
  spec: str,
  *,
  workers: int | None = None,
  limit: int | None = None,
  channels: int | None = None,
  value_range: tuple[float, float] | None = None,
  progress: Callable[[int], Any],
) -> Scan:
  """Reads and decodes every record of a source.

  Args:
    source: what to scan.
    spec: its specification, for the report.
    workers: threads; None: one for each core (reading, hashing and decoding let each other run).
    limit: look at this many records only, evenly spread.
    channels: that all images should have; None: those of each: 3 for what becomes RGB, all of arrays of five or more.
    value_range: see `decode.decode`.
    progress: is called with the number of records done since the last call.
  """
  records = range(len(source))
  if limit is not None and limit < len(records):
    records = np.linspace(0, len(source) - 1, limit).astype(np.int64).tolist()
  found = Scan(spec, len(source), scanned=len(records), value_range=value_range, left_out=left_out_of(source))
  digests = np.zeros(len(records), "V16")
  sizes = np.zeros((len(records), 2), np.int32)
  kinds: collections.Counter[str] = collections.Counter()
  classes: collections.Counter[int] = collections.Counter()
  usable: set[int] = {-1}  # classes that have an image
  bands: dict[int, np.ndarray] = {}  # by number of channels: sums [2, C] of means and mean squares
  counts: collections.Counter[int] = collections.Counter()
  values: dict[tuple[str, int | None], Spread] = {}
  look = functools.partial(_look, source, channels=channels, value_range=value_range)
  for i, seen in enumerate(_in_threads(look, records, workers)):
    digests[i] = np.void(seen.digest)
    found.nbytes += seen.nbytes
    classes[seen.label] += 1
    if seen.values is not None:
      key = seen.values.kind, seen.values.bits
      values[key] = values[key] | seen.values if key in values else seen.values
    if seen.reason is not None:
      found.broken.append((records[i], source.describe(records[i]), seen.reason))
    else:
      kinds[seen.kind] += 1
      usable.add(seen.label)
      sizes[i] = seen.width, seen.height
      number = len(seen.mean)
      counts[number] += 1
      bands[number] = bands.get(number, 0) + np.stack([seen.mean, seen.square])
    progress(1)
  readable = len(records) - len(found.broken)
  if readable:
    sizes = sizes[sizes[:, 0] > 0]
    found.widths, found.heights = _spread(sizes[:, 0]), _spread(sizes[:, 1])
    found.short_sides = _spread(sizes.min(axis=1))
    found.channels = dict(counts.most_common())
    (number, images), *_ = counts.most_common()
    mean, square = bands[number] / images
    found.mean = tuple(mean.tolist())
    found.std = tuple(np.sqrt(np.maximum(square - mean**2, 0.0)).tolist())
  found.values = list(values.values())
  found.kinds = dict(kinds.most_common())
  names = [*source.class_names, "none"]  # that of -1
  found.per_class = {}
  for label, count in sorted(classes.items()):
    found.per_class[names[label]] = found.per_class.get(names[label], 0) + count  # two classes may have one name
  found.only_broken = [names[label] for label in sorted(classes.keys() - usable)]
  found.duplicates = [[source.describe(records[i]) for i in group] for group in _equal(digests)]
  found.extra = sum(len(group) - 1 for group in found.duplicates)
  return found


def _look(source: Source, record: int, *, channels: int | None, value_range: tuple[float, float] | None) -> _Seen:
  try:
    entry = source[record]
  except BadImage as error:
    return _Seen(_unlike_any(record), 0, -1, error.reason)
  except OSError as error:
    return _Seen(_unlike_any(record), 0, -1, f"cannot be read ({error})")
  data, label = entry["image"], int(entry["label"])
  raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
  digest = hashlib.blake2b(raw, digest_size=16).digest()
  values = None
  try:
    samples = _samples(data, channels, value_range, limits_of(source))
    if samples.array.dtype.kind in "iuf" and samples.array.dtype != np.uint8:
      values = levels.spread(samples.array, samples.bits)
    number = channels or (samples.array.shape[2] if samples.array.shape[2] > 4 else 3)
    pixels = scaled(samples, channels=number, value_range=value_range).reshape(-1, number)  # [H W, C]
  except BadImage as error:
    return _Seen(digest if raw else _unlike_any(record), len(raw), label, error.reason, values=values)
  occurs, shades = _occurrences(pixels), np.arange(256) / 255.0
  return _Seen(
    digest, len(raw), label, None, samples.kind, *samples.size,
    occurs @ shades / len(pixels), occurs @ shades**2 / len(pixels), values,
  )  # fmt: skip


def _samples(
  data: bytes | np.ndarray, channels: int | None, value_range: tuple[float, float] | None, limits: Limits
) -> Samples:
  """An image with all its bits; as many channels as it has, where no number is asked for and it cannot be RGB."""
  read = functools.partial(read_samples, data, enough=_STATISTICS_SIDE, limits=limits)
  try:
    return read(channels=channels or 3)
  except OtherChannels as error:
    if channels is not None or error.fewest is None:
      raise
    return read(channels=error.fewest)
  except NeedsPackage:  # as training, which needs all bits only where a range is given, would read it
    return read(channels=channels or 3, deep=value_range is not None)


def _occurrences(pixels: UInt8[np.ndarray, "N C"]) -> Int64[np.ndarray, "C 256"]:
  """How often each value occurs in each channel: exact, and faster than floating-point sums."""
  number = pixels.shape[1]
  counts = np.zeros(256 * number, np.int64)
  for start in range(0, len(pixels), _CHUNK):
    apart = pixels[start : start + _CHUNK] + (np.arange(number, dtype=np.uint32) << 8)
    counts += np.bincount(apart.ravel(), minlength=256 * number)
  return counts.reshape(number, 256)


def _unlike_any(record: int) -> bytes:
  """A digest for what was not read: no two of them are duplicates."""
  return b"\0" * 8 + record.to_bytes(8, "little")


def _spread(values: np.ndarray) -> tuple[int, int, int]:
  return int(values.min()), int(np.median(values)), int(values.max())


def _equal(digests: np.ndarray) -> list[list[int]]:
  """The places of each digest that occurs more than once."""
  order = np.argsort(digests, kind="stable")
  same = digests[order][1:] == digests[order][:-1]
  groups: list[list[int]] = []
  for i in np.flatnonzero(same).tolist():
    if groups and groups[-1][-1] == order[i]:
      groups[-1].append(int(order[i + 1]))
    else:
      groups.append([int(order[i]), int(order[i + 1])])
  return sorted(groups)


def _in_threads(look: Callable[[int], _Seen], records: range | list[int], workers: int | None) -> Iterator[_Seen]:
  """What is seen of the records, in their order, some ahead."""
  threads = workers or os.cpu_count() or 1
  with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
    ahead: collections.deque = collections.deque()
    remaining = iter(records)
    for record in itertools.islice(remaining, 8 * threads):
      ahead.append(pool.submit(look, record))
    while ahead:
      yield ahead.popleft().result()
      for record in itertools.islice(remaining, 1):
        ahead.append(pool.submit(look, record))
