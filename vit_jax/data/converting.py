"""`vit-jax data convert`: writes a source as ArrayRecord shards, which are read fast and in any order.

`conversion.jsonl` beside the shards says what was asked for (its first line) and which shards are complete, with their
sizes and what was left out of them. A conversion that was interrupted goes on after these; one that asks for something
else is refused. A shard is read back and compared before it counts as complete.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import levels
from vit_jax.data.array_records import ArrayRecords, write_array_record
from vit_jax.data.classes import CLASSES
from vit_jax.data.decode import BadImage, OtherChannels, Samples, read_samples, scaled
from vit_jax.data.limits import DEFAULT, Limits, limits_of
from vit_jax.data.sources import Source

PROGRESS = "conversion.jsonl"
BAD_RECORDS = "bad_records.jsonl"
_JPEG_QUALITY = 95


def convert(
  source: Source,
  spec: str,
  folder: str | os.PathLike,
  *,
  records_per_shard: int = 10_000,
  max_side: int | None = None,
  workers: int | None = None,
  progress: Callable[[int], Any],
) -> dict[str, int]:
  """Writes every readable record of a source, with its label and its name, into shards in a folder.

  Images are kept byte for byte, except arrays, which become PNG, and those with a longer side than `max_side`.

  Args:
    source: what to convert.
    spec: its specification.
    folder: where `data-00000-of-00012.array_record`, … are written, with the class names in `classes.json` and what
      could not be read in `bad_records.jsonl`.
    records_per_shard: records of the source that go into one shard.
    max_side: larger images are resized so that their longer side has this many pixels, and encoded as JPEG.
    workers: threads; None: one for each core.
    progress: is called with the number of records done since the last call.

  Returns:
    {"records", "left_out", "bytes", "shards", "records_before", "shards_before"}; the last two: those of the first and
    of the fourth that were there already.

  Raises:
    ValueError: if the folder holds another conversion, or other shards.
    RuntimeError: if a shard that was written reads differently.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  plan = {"source": spec, "records": len(source), "records_per_shard": records_per_shard, "max_side": max_side}
  done = _complete(folder, plan)
  if source.class_names:
    (folder / CLASSES).write_text(json.dumps(list(source.class_names)))
  shards = -(-len(source) // records_per_shard)
  before = {"records_before": sum(entry["records"] for entry in done.values()), "shards_before": len(done)}
  with ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="convert") as pool:
    for shard in range(shards):
      records = range(shard * records_per_shard, min(len(source), (shard + 1) * records_per_shard))
      if shard in done:
        progress(len(records))
        continue
      path = folder / f"data-{shard:05}-of-{shards:05}.array_record"
      done[shard] = {"shard": shard, "file": path.name, **_write_shard(source, path, records, max_side, pool, progress)}
      with open(folder / PROGRESS, "a") as file:
        file.write(json.dumps(done[shard]) + "\n")
        file.flush()
        os.fsync(file.fileno())
  bad = [entry for shard in range(shards) for entry in done[shard]["bad"]]
  if bad:
    (folder / BAD_RECORDS).write_text("".join(json.dumps(entry) + "\n" for entry in bad))
  total = {name: sum(entry[name] for entry in done.values()) for name in ("records", "bytes")}
  return {**total, "left_out": len(bad), "shards": shards, **before}


def _complete(folder: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
  """The shards of this conversion that are there; the folder is made ready for the others."""
  path = folder / PROGRESS
  if not path.exists():
    if others := sorted(folder.glob("*.array_record")):
      raise ValueError(
        f"{folder} holds {others[0].name}, which is of no conversion that can go on; use an empty folder."
      )
    path.write_text(json.dumps(plan) + "\n")
    return {}
  first, *rest = path.read_text().splitlines() or [""]
  begun = _parsed(first) or {}
  if begun != plan:
    changed = [f"{key}: {begun.get(key)} -> {plan[key]}" for key in plan if begun.get(key) != plan[key]]
    raise ValueError(f"{folder} holds another conversion ({'; '.join(changed)}); use another folder, or delete it.")
  whole = [entry for entry in map(_parsed, rest) if entry is not None]  # the last line may have been cut off
  path.write_text("".join(json.dumps(line) + "\n" for line in [plan, *whole]))
  return {entry["shard"]: entry for entry in whole if _size(folder / entry["file"]) == entry["bytes"]}


def _parsed(line: str) -> dict[str, Any] | None:
  try:
    return json.loads(line)
  except json.JSONDecodeError:
    return None


def _size(path: Path) -> int | None:
  return path.stat().st_size if path.exists() else None


def _write_shard(
  source: Source,
  path: Path,
  records: range,
  max_side: int | None,
  pool: ThreadPoolExecutor,
  progress: Callable[[int], Any],
) -> dict[str, Any]:
  """Writes one shard under a temporary name, compares it with what was meant, and renames it."""
  bad: list[dict[str, Any]] = []
  digests: list[bytes] = []

  def rows() -> Iterator[tuple[bytes, int, str]]:
    for record, made in zip(records, _ahead(lambda i: _made(source, i, max_side), records, pool), strict=True):
      progress(1)
      if isinstance(made, BadImage):
        bad.append({"record": record, "name": made.name, "reason": made.reason})
        continue
      digests.append(_digest(made[0], made[1]))
      yield made

  part = path.with_suffix(".part")
  write_array_record(part, rows())
  if digests:
    _compare(part, digests)
  os.replace(part, path)
  return {"records": len(digests), "bytes": path.stat().st_size, "bad": bad}


def _compare(path: Path, digests: list[bytes]) -> None:
  """Raises RuntimeError if the records of a shard are not those of which these are the digests."""
  written = ArrayRecords([str(path)])
  if len(written) != len(digests):
    raise RuntimeError(
      f"{path} holds {len(written)} records, not the {len(digests)} that were written: is the disk full?"
    )
  for i, digest in enumerate(digests):
    label, _, image = written.read(i)
    if _digest(image, label) != digest:
      raise RuntimeError(f"record {i} of {path} reads differently from what was written: check the disk.")


def _digest(image: bytes, label: int) -> bytes:
  return hashlib.blake2b(image + label.to_bytes(4, "little", signed=True), digest_size=16).digest()


def _ahead(make: Callable[[int], Any], records: range, pool: ThreadPoolExecutor) -> Iterator[Any]:
  """make(record) of all records, in order, a bounded number of them ahead."""
  remaining, waiting = iter(records), []
  window = 8 * (os.cpu_count() or 1)
  waiting = [pool.submit(make, record) for record in itertools.islice(remaining, window)]
  waiting.reverse()
  while waiting:
    yield waiting.pop().result()
    for record in itertools.islice(remaining, 1):
      waiting.insert(0, pool.submit(make, record))


def _made(source: Source, record: int, max_side: int | None) -> tuple[bytes, int, str] | BadImage:
  """(encoded image, label, name), or why there is none."""
  name = source.describe(record)
  try:
    entry = source[record]
    return _encoded(entry["image"], name, max_side, limits_of(source)), int(entry["label"]), name
  except BadImage as error:
    return BadImage(name, error.reason)
  except OSError as error:
    return BadImage(name, f"cannot be read ({error})")


def _encoded(data: bytes | np.ndarray, name: str, max_side: int | None, limits: Limits = DEFAULT) -> bytes:
  """The image as it is stored.

  Raises:
    BadImage: if it cannot be decoded.
  """
  try:
    samples = read_samples(data, name, enough=max_side, limits=limits, deep=False)  # also a test of what is kept
    _check(samples, name)
  except OtherChannels as error:
    if error.fewest is None:
      raise
    _check(read_samples(data, name, channels=error.fewest, limits=limits), name)
    return data if isinstance(data, bytes) else _saved_array(data)  # never shrunk: there is no JPEG of these
  if max_side is None or max(samples.size) <= max_side:
    if isinstance(data, bytes):
      return data
    if data.dtype != np.uint8:
      return _saved_array(data)
    return _saved(Image.fromarray(scaled(samples, name)), "PNG")
  pixels = scaled(samples, name)
  image = Image.fromarray(pixels)
  scale = max_side / max(image.size)
  if scale < 1:
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
  return _saved(image, "JPEG", quality=_JPEG_QUALITY)


def _check(samples: Samples, name: str) -> None:
  if samples.array.dtype.kind == "f":
    levels.check_floats(samples.array, name)


def _saved_array(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def _saved(image: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()
