"""Batches for evaluation: every chosen image once, in order, resized and centre-cropped, the last batch padded."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from vit_jax.data.bands import image_channels
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.framing import CROP_RATIO, Framing, standard
from vit_jax.data.limits import limits_of
from vit_jax.data.sources import Source
from vit_jax.data.subsets import at_most

log = logging.getLogger(__name__)

_LOOKED_AT = 8  # images that say of which size those of a source are


def evaluation_batches(
  source: Source,
  *,
  image_size: int,
  batch_size: int,
  max_examples: int,
  channels: int = 3,
  value_range: tuple[float, float] | None = None,
  crop_ratio: float | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields {"images" uint8 [b, S, S, C], "label" int32 [b] (-1: none), "valid" bool [b] (False: padding)}.

  All batches have `batch_size` rows. Unreadable images are left out, with a warning. A source larger than
  `max_examples` is represented by a fixed random choice, so that a source sorted by class keeps all its classes.

  Args:
    source: the split to go through.
    image_size: S, the side of the square images.
    batch_size: b.
    max_examples: images used at most.
    channels: of the images of a model: C, but 3 for 1, as RGB serves a model of grey values.
    value_range: see `decode.decode`.
    crop_ratio: side of the centre crop over the short side of the resized image; None: see `resize_and_crop`.
  """
  channels = image_channels(channels)
  source = at_most(source, max_examples)
  make = functools.partial(
    _load, source, framed=framed(image_size, crop_ratio), channels=channels, value_range=value_range
  )
  readable = (entry for entry in _in_threads(make, range(len(source))) if entry is not None)
  while chunk := list(itertools.islice(readable, batch_size)):
    images = np.zeros((batch_size, image_size, image_size, channels), np.uint8)
    label = np.full(batch_size, -1, np.int32)
    for row, (pixels, class_) in enumerate(chunk):
      images[row], label[row] = pixels, class_
    yield {"images": images, "label": label, "valid": np.arange(batch_size) < len(chunk)}


def framed(size: int, crop_ratio: float | None = None) -> Callable[[np.ndarray], np.ndarray]:
  """What makes an image of any shape one of size x size: with a given ratio for all images alike, else as they are."""
  return functools.partial(resize_and_crop, size=size) if crop_ratio is None else standard(size, crop_ratio)


def resize_and_crop(pixels: UInt8[np.ndarray, "H W C"], size: int) -> UInt8[np.ndarray, "S S C"]:
  """Short side to 256 / 224 x size (bicubic, antialiased), then the centre; not resized if it has `size` already."""
  if min(pixels.shape[:2]) == size:
    return Framing(None, (size, size))(pixels)
  return standard(size)(pixels)


def fitting_crop_ratio(
  source: Source, size: int, *, channels: int = 3, value_range: tuple[float, float] | None = None
) -> float:
  """The ratio that suits all images of a source: 1 where a few of them, spread over it, have the size already.

  So that images that were made for a model (tiles, thumbnails) are not enlarged and cut; else that of evaluations.
  """
  kind = {"channels": image_channels(channels), "value_range": value_range, "limits": limits_of(source)}
  sides = []
  for record in sorted({round(i * (len(source) - 1) / (_LOOKED_AT - 1)) for i in range(_LOOKED_AT)}):
    try:
      sides.append(min(decode(source[record]["image"], source.describe(record), **kind).shape[:2]))
    except (BadImage, OSError):
      continue  # who uses it names it
  return 1.0 if sides and set(sides) == {size} else CROP_RATIO


def _in_threads(
  make: Callable[[int], tuple[np.ndarray, int] | None], records: range
) -> Iterator[tuple[np.ndarray, int] | None]:
  """The images of `records` in order, made a few ahead by threads; None where one cannot be read."""
  threads = min(8, os.cpu_count() or 1)
  ahead: collections.deque[Future] = collections.deque()
  pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluation-batches")
  try:
    for record in records:
      ahead.append(pool.submit(make, record))
      if len(ahead) > 4 * threads:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
  finally:  # given up in the middle, nobody waits for a read that may hang
    pool.shutdown(wait=not ahead, cancel_futures=True)


def _load(
  source: Source,
  record: int,
  *,
  framed: Callable[[np.ndarray], np.ndarray],
  channels: int,
  value_range: tuple[float, float] | None,
) -> tuple[np.ndarray, int] | None:
  try:
    entry = source[record]
    pixels = decode(
      entry["image"], source.describe(record), channels=channels, value_range=value_range, limits=limits_of(source)
    )
    return framed(pixels), int(entry["label"])
  except (BadImage, OSError) as error:
    log.warning("left out of the evaluation: %s: %s", source.describe(record), getattr(error, "reason", error))
    return None
