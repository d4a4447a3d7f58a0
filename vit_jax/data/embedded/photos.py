"""`embedded:photos`: tiles of the photographs that the scikit-image and scikit-learn packages carry.

For looking (attention maps, feature pictures, backgrounds of scenes), not for scores: the label is the photograph a
tile was cut from, and colour alone gives it away. Tiles of train and test alternate like the squares of a chessboard;
those that show nothing (sky, the dark around a retina) are left out.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

VERSION = 1

_SKIMAGE = (
  "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
  "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
_FILES = tuple(("skimage", "data", name) for name in _SKIMAGE) + tuple(
  ("sklearn", "datasets/images", name) for name in _SKLEARN
)
CLASS_NAMES = tuple(Path(name).stem for _, _, name in _FILES)

HALVED = 800  # photographs whose shorter side is longer than this are halved: the others' objects are about this large
FLAT = 5.0  # standard deviation of a tile that shows nothing


def _path(package: str, folder: str, name: str) -> Path:
  """Where a photograph lies; finds the package without importing it (which takes seconds)."""
  spec = importlib.util.find_spec(package)
  path = None if spec is None or spec.origin is None else Path(spec.origin).parent / folder / name
  if path is None or not path.exists():
    raise ImportError(
      f"embedded photographs are read from the scikit-image and scikit-learn packages, and {package}/{folder}/{name} "
      'was not found: pip install "vit-jax[photos]", or choose embedded data that needs none ("embedded:textures", '
      '"embedded:shapes" with background=noise).'
    )
  return path


@functools.cache
def load() -> dict[str, np.ndarray]:
  """Every photograph by name, uint8 [H, W, 3].

  Raises:
    ImportError: if scikit-image or scikit-learn is not installed; the message says how to install them.
  """
  from PIL import Image

  paths = [_path(*file) for file in _FILES]
  images = (np.asarray(Image.open(path, formats=("JPEG", "PNG", "TIFF")).convert("RGB")) for path in paths)
  return {name: _halve(image) for name, image in zip(CLASS_NAMES, images, strict=True)}


def _halve(image: np.ndarray) -> np.ndarray:
  if min(image.shape[:2]) <= HALVED:
    return image
  return shrink(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2], 2)


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
  """Means of factor x factor pixels of an image whose sides are multiples of `factor`, uint8."""
  h, w = image.shape[0] // factor, image.shape[1] // factor
  mean = image.reshape(h, factor, w, factor, 3).mean((1, 3), dtype=np.float32)
  return (mean + 0.5).astype(np.uint8)


def crop(rng: np.random.Generator, size: int) -> np.ndarray:
  """A random square of a random photograph at a random whole-number reduction, uint8 [size, size, 3].

  Raises:
    ImportError: if the photographs are not installed.
    ValueError: if no photograph is that large.
  """
  large = [photo for photo in load().values() if min(photo.shape[:2]) >= size]
  if not large:
    limit = max(min(photo.shape[:2]) for photo in load().values())
    raise ValueError(f"photo backgrounds go up to size {limit}, got size={size}: lower size or use background=noise.")
  photo = large[rng.integers(len(large))]
  factor = int(rng.integers(1, min(photo.shape[:2]) // size + 1))
  side = size * factor
  y, x = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
  return shrink(photo[y : y + side, x : x + side], factor)


@functools.lru_cache(maxsize=4)
def tiles(split: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """The tiles of one split in a fixed shuffled order, so that any first few of them mix the photographs.

  Args:
    split: 0 for train (chessboard squares of one colour), 1 for test (the other).
    size: side of a tile.

  Returns:
    images uint8 [N, size, size, 3] and labels int32 [N], an index into CLASS_NAMES.

  Raises:
    ImportError: if the photographs are not installed.
  """
  found, labels = [], []
  for label, photo in enumerate(load().values()):
    for row in range(photo.shape[0] // size):
      for column in range(photo.shape[1] // size):
        tile = photo[row * size : (row + 1) * size, column * size : (column + 1) * size]
        if (row + column) % 2 == split and tile.std() > FLAT:
          found.append(tile)
          labels.append(label)
  order = np.random.default_rng([split, size]).permutation(len(found))
  images = np.stack([found[i] for i in order]) if found else np.zeros((0, size, size, 3), np.uint8)
  return images, np.array(labels, np.int32)[order]


def available(split: int, *, size: int) -> int:
  """How many tiles a split has."""
  return len(tiles(split, size)[0])


def example(split: int, index: int, *, size: int) -> tuple[np.ndarray, int]:
  """Tile `index` of a split, uint8 [size, size, 3], and its label; the same whatever the count."""
  images, labels = tiles(split, size)
  return images[index], int(labels[index])
