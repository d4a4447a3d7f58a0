"""What a file is, its content says: only the promised formats are read, each by its own decoder."""

import ast
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.data import pictures
from vit_jax.data import formats
from vit_jax.data.decode import BadImage, NeedsPackage, decode
from vit_jax.data.sources import open_source

PICTURE = pictures.smooth(40, 56)
LOSSY = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jp2", "HEIF": "heic"}
LOSSLESS = {"PNG": "png", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def heif():
  pytest.importorskip("pillow_heif").register_heif_opener()


@pytest.mark.parametrize("format", [*LOSSY, *LOSSLESS])
@pytest.mark.parametrize("ending", [None, ".jpg", ".npy"])
def test_every_format_is_read_whatever_its_name(format, ending, tmp_path):
  if format == "HEIF":
    heif()
  path = tmp_path / f"picture{ending or '.' + (LOSSY | LOSSLESS)[format]}"
  assert path.suffix in formats.EXTENSIONS
  path.write_bytes(pictures.encoded(PICTURE, format))
  pixels = decode(open_source(f"folder:{tmp_path}")[0]["image"])
  np.testing.assert_allclose(pixels.astype(int), PICTURE, atol=0 if format in LOSSLESS else 40)
  assert np.abs(pixels.astype(int) - PICTURE).mean() < (1e-9 if format in LOSSLESS else 5)


def test_of_several_pictures_the_first_counts():
  for format in ("GIF", "WEBP", "PNG", "AVIF", "MPO", "TIFF"):
    later = [Image.fromarray(255 - PICTURE) for _ in range(3)]
    pixels = decode(pictures.encoded(PICTURE, format, save_all=True, append_images=later))
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 12, format


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "WEBP", "PNG", "TIFF", "JPEG"])
def test_the_orientation_of_every_format_is_applied(format):
  if format == "HEIF":
    heif()
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees to the right
  pixels = decode(pictures.encoded(PICTURE, format, exif=exif.tobytes())).astype(int)
  assert np.abs(pixels - np.rot90(PICTURE, -1)).mean() < 5


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "PostScript"),
    (b"%PDF-1.7\n", "PDF"),
    (b"8BPS\0\1", "a Photoshop document"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    (b"\n<!DOCTYPE html><html>", "an HTML page"),
    (b"\0\0\0\x20ftypisom\0\0\0\0isomiso2", "a video"),
    (b"\0\0\0\x0cftyp", "a video"),
    (b"no picture at all", "no image of a known format"),
    (b"\xff", "no image of a known format"),
  ],
)
def test_what_is_no_image_is_named(content, what):
  with pytest.raises(BadImage, match=f"^holiday.jpg: is {what}.*"):
    decode(content, "holiday.jpg")


def test_postscript_under_the_name_of_a_photograph_starts_nothing(tmp_path, monkeypatch):
  ghostscript, started = tmp_path / "gs", tmp_path / "started"
  ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
  ghostscript.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
  data = pictures.encoded(PICTURE, "EPS")
  with pytest.raises(BadImage, match="PostScript"):
    decode(data, "holiday.jpg")
  assert not started.exists()
  with Image.open(io.BytesIO(data)) as image, pytest.raises(Exception):  # noqa: B017 - it can: the test could fail
    image.load()
  assert started.exists()


@pytest.mark.parametrize("format", ["PCX", "TGA", "ICO", "SGI", "DDS"])
def test_other_formats_of_pillow_are_not_tried(format):
  with pytest.raises(BadImage, match="no image of a known format"):
    decode(pictures.encoded(PICTURE, format), "a.png")


def test_a_missing_package_makes_a_bad_image_with_the_way_out(monkeypatch):
  heif()
  data = pictures.encoded(PICTURE, "HEIF")
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  with pytest.raises(NeedsPackage, match=r'is a HEIC image.*pip install "vit-jax\[heic\]"'):
    decode(data, "phone.heic")
  tifffile = pytest.importorskip("tifffile")
  file = io.BytesIO()
  tifffile.imwrite(file, np.zeros((8, 8, 5), np.uint16), photometric="minisblack")
  monkeypatch.setitem(sys.modules, "tifffile", None)
  with pytest.raises(NeedsPackage, match=r'pip install "vit-jax\[tiff\]"'):
    decode(file.getvalue(), channels=5)


def test_pillow_is_told_the_formats_wherever_it_opens_a_file():
  opened = 0
  for path in Path(vit_jax.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
        opened += 1
        assert "formats" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"
  assert opened
