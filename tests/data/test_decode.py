"""Every kind of image becomes uint8 RGB; what cannot is named."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures
from vit_jax.data.decode import BadImage, decode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pictures.make_mixed_folder(tmp_path_factory.mktemp("mixed") / "root")


@pytest.mark.parametrize("name", pictures.GOOD)
def test_good_files_become_rgb(folder, name):
  path = folder / "good" / "deeper" / name
  pixels = decode(path.read_bytes(), name)
  assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
  np.testing.assert_array_equal(decode(path, name), pixels)  # from a path as from bytes


@pytest.mark.parametrize("name", pictures.BAD)
def test_bad_files_are_named(folder, name):
  with pytest.raises(BadImage, match=name) as caught:
    decode((folder / "bad" / name).read_bytes(), name)
  assert caught.value.reason


@pytest.mark.parametrize(
  ("name", "reason"), [("empty.jpg", "empty"), ("one_pixel.png", "1 x 1"), ("truncated.jpg", "truncated")]
)
def test_the_reason_says_what_is_wrong(folder, name, reason):
  with pytest.raises(BadImage, match=reason):
    decode((folder / "bad" / name).read_bytes(), name)


def test_a_vanished_file_is_bad(tmp_path):
  with pytest.raises(BadImage, match="gone.jpg.*FileNotFoundError"):
    decode(tmp_path / "gone.jpg", "gone.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
  bomb = (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
  )
  with pytest.raises(BadImage, match="bomb.png"):
    decode(bomb, "bomb.png")


def test_a_bad_image_keeps_its_name_between_processes():
  error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty")))
  assert (error.name, error.reason, str(error)) == ("a.jpg", "is empty", "a.jpg: is empty")


def test_lossless_files_are_exact():
  pixels = pictures.smooth(21, 34)
  for format in ("PNG", "BMP", "TIFF"):
    np.testing.assert_array_equal(decode(pictures.encoded(pixels, format)), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
  upright = pictures.smooth(24, 40)
  undo = {  # how a camera stores a picture that a viewer must turn back
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
  }
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = np.ascontiguousarray(undo[orientation](upright))
  np.testing.assert_array_equal(decode(pictures.encoded(stored, "PNG", exif=exif)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_spoil_the_picture():
  data = pictures.encoded(pictures.smooth(24, 40), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
  assert decode(data).shape == (24, 40, 3)


@pytest.mark.parametrize(("enough", "side"), [(None, 320), (200, 320), (160, 160), (50, 80), (10, 40)])
def test_a_large_jpeg_is_decoded_small_where_that_is_enough(enough, side):
  pixels = pictures.smooth(320, 480)
  small = decode(pictures.encoded(pixels, "JPEG", quality=95), enough=enough)
  assert small.shape == (side, side * 3 // 2, 3)
  expected = np.asarray(Image.fromarray(pixels).resize((side * 3 // 2, side), Image.Resampling.BOX))
  assert np.abs(small.astype(int) - expected).mean() < 3


def test_transparent_pixels_are_white():
  pixels = decode(pictures.encoded(pictures.transparent(), "PNG"))
  assert (pixels[:, :20] == (255, 0, 0)).all()
  assert (pixels[:, 20:] == 255).all()


def test_a_transparent_palette_colour_is_white():
  image = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
  image.putpalette([0, 0, 255] * 256)
  assert (decode(pictures.encoded(image, "PNG", transparency=0)) == 255).all()


def test_grey_has_three_equal_channels_and_cmyk_keeps_its_colours():
  picture = pictures.smooth(40, 56)
  grey = decode(pictures.encoded(Image.fromarray(picture).convert("L"), "PNG"))
  assert (grey == grey[:, :, :1]).all()
  cmyk = decode(pictures.encoded(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=100))
  assert np.abs(cmyk.astype(int) - picture).mean() < 4  # JPEG, not inverted


def test_16_bit_files_keep_their_high_byte():
  deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
  for format in ("PNG", "TIFF"):
    pixels = decode(pictures.encoded(Image.fromarray(deep), format))
    np.testing.assert_array_equal(pixels[:, :, 0], deep >> 8)


def test_saved_arrays_are_decoded_as_arrays():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  for array in (levels, levels.astype(np.uint16) * 257, (levels / 255.0).astype(np.float32)):
    file = io.BytesIO()
    np.save(file, array)
    np.testing.assert_array_equal(decode(file.getvalue())[:, :, 0], levels)
  for spoilt in (file.getvalue()[:300], file.getvalue()[:9]):
    with pytest.raises(BadImage, match="half.npy.*cannot be decoded"):
      decode(spoilt, "half.npy")


def test_floating_point_tiff_and_16_bit_colour():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  image = Image.fromarray((levels / 255.0).astype(np.float32))
  np.testing.assert_array_equal(decode(pictures.encoded(image, "TIFF"))[:, :, 1], levels)
  colour = np.stack([levels, levels.T, 255 - levels], -1)
  deep = (colour.astype(">u2") * 257).tobytes()  # of PNG: big-endian, a filter byte of 0 before each row
  rows = b"".join(b"\0" + deep[i : i + 96] for i in range(0, len(deep), 96))

  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
  file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  np.testing.assert_array_equal(decode(file), colour)


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_arrays_of_any_channels_become_rgb(channels):
  shape = (10, 12) if channels is None else (10, 12, channels)
  array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  pixels = decode(array)
  assert pixels.shape == (10, 12, 3) and pixels.dtype == np.uint8
  if channels == 3:
    np.testing.assert_array_equal(pixels, array)


def test_arrays_of_other_types_are_scaled():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  for array in (levels.astype(np.uint16) * 257, levels / 255.0, (levels / 255.0).astype(np.float32)):
    np.testing.assert_array_equal(decode(array)[:, :, 0], levels)


def test_an_array_that_is_no_image_is_named():
  with pytest.raises(BadImage, match="volume.*shape"):
    decode(np.zeros((4, 5, 6, 7), np.uint8), "volume")


def _png_with_transparent_colour(bits: int, colour: tuple[int, ...], other: tuple[int, ...]) -> bytes:
  """Two rows of one pixel of `colour`, which the file calls transparent, and one of another."""

  def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

  row = b"\0" + struct.pack(f">{2 * len(colour)}{'H' if bits == 16 else 'B'}", *colour, *other)
  header = struct.pack(">IIBBBBB", 2, 2, bits, 2 if len(colour) == 3 else 0, 0, 0, 0)
  chunks = chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IDAT", zlib.compress(2 * row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value_range", [None, (0, 65535)])
@pytest.mark.parametrize(
  ("bits", "colour", "other"),
  [(8, (7,), (200,)), (8, (1, 2, 3), (200, 100, 50)), (16, (1000,), (51400,)), (16, (1, 2, 3), (51400, 25700, 12850))],
)
def test_a_colour_that_stands_for_transparency_is_seen_on_white(bits, colour, other, value_range):
  found = decode(_png_with_transparent_colour(bits, colour, other), value_range=value_range)
  expected = np.broadcast_to(np.array(other) // (257 if bits == 16 else 1), 3)
  np.testing.assert_array_equal(found[0], [[255, 255, 255], expected])
