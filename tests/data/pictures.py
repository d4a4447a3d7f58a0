"""Pictures for tests: a folder of every kind of file that users have, good and bad."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = ("jpeg.jpg", "png.png", "webp.webp", "grey.jpg", "rgba.png", "cmyk.jpg", "palette.png", "exif.jpg", "deep.png")
BAD = ("corrupt.jpg", "empty.jpg", "one_pixel.png", "text.jpg", "truncated.jpg")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
  """A smooth random picture, uint8 [height, width, 3]: lossy formats keep it nearly as it is."""
  coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
  image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def make_mixed_folder(root: Path) -> Path:
  """Writes `GOOD` and `BAD` files below two class folders of `root`."""
  picture = Image.fromarray(smooth(40, 56))
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  jpeg = encoded(smooth(40, 56, 1), "JPEG", quality=95)
  broken = bytearray(jpeg)
  broken[2:200] = b"\0" * 198
  contents = {
    "jpeg.jpg": jpeg,
    "png.png": encoded(picture, "PNG"),
    "webp.webp": encoded(picture, "WEBP", quality=95),
    "grey.jpg": encoded(picture.convert("L"), "JPEG", quality=95),
    "rgba.png": encoded(transparent(), "PNG"),
    "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG", quality=95),
    "palette.png": encoded(picture.quantize(64), "PNG"),
    "exif.jpg": encoded(picture, "JPEG", quality=95, exif=exif),
    "deep.png": encoded(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "PNG"),
    "corrupt.jpg": bytes(broken),
    "empty.jpg": b"",
    "one_pixel.png": encoded(smooth(1, 1), "PNG"),
    "text.jpg": b"this is no picture",
    "truncated.jpg": jpeg[: len(jpeg) // 2],
  }
  for place, names in (("good/deeper", GOOD), ("bad", BAD)):
    (root / place).mkdir(parents=True)
    for name in names:
      (root / place / name).write_bytes(contents[name])
  (root / "notes.txt").write_text("not an image")
  return root


def transparent() -> Image.Image:
  """Red where opaque (left half); noise under full transparency (right half)."""
  pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 4), dtype=np.uint8)
  pixels[:, :20] = (255, 0, 0, 255)
  pixels[:, 20:, 3] = 0
  return Image.fromarray(pixels)
