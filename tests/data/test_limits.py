"""Bounds on one image, checked before memory is taken; whatever decoders raise is a bad record, by construction."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures
from vit_jax import config
from vit_jax.data import decode as decoding
from vit_jax.data import storage
from vit_jax.data.arrays import saved_array
from vit_jax.data.converting import convert
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.evaluation_batches import evaluation_batches, resize_and_crop
from vit_jax.data.groups import LossGroups
from vit_jax.data.limits import Limits, limits_of
from vit_jax.data.scanning import scan
from vit_jax.data.sources import open_source
from vit_jax.data.views import MultiCrop

SMALL = Limits(max_pixels=40 * 56, max_file_bytes=100_000)
PICTURE = pictures.smooth(40, 56)


def chunk(kind, body):
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks):
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def webp(width, height):
  """A lossless WebP of 30 bytes that claims a size."""
  payload = b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + bytes(5)
  return b"RIFF" + struct.pack("<I", 12 + len(payload)) + b"WEBPVP8L" + struct.pack("<I", len(payload)) + payload


def npy(header, content=b""):
  text = header.encode().ljust(117) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def saved(array):
  file = io.BytesIO()
  np.save(file, array, allow_pickle=True)
  return file.getvalue()


def tiff(fields, content=b""):
  """A TIFF file of one directory with these fields (tag, number of values, value or place), all of 32 bits."""
  entries = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in sorted(fields))
  return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4) + content


def claimed_jpeg(width, height):
  data = bytearray(pictures.encoded(PICTURE, "JPEG"))
  start = data.find(b"\xff\xc0") + 5
  data[start : start + 4] = struct.pack(">HH", height, width)
  return bytes(data)


GREY = [(256, 1, 64), (257, 1, 64), (258, 1, 8), (259, 1, 1), (262, 1, 1), (278, 1, 64), (279, 1, 64)]
HOSTILE = {  # what it is: (the file, words of the reason)
  "webp.webp": (webp(13377, 13377), "13377 x 13377 pixels in 30 bytes"),
  "large.webp": (webp(16383, 16383), "more than 178,956,970 are refused"),
  "large.jpg": (claimed_jpeg(65500, 65500), "data.max_pixels"),
  "empty.jpg": (claimed_jpeg(13000, 13000), "no picture is so empty"),
  "large.png": (png(13000, 13000, chunk(b"IDAT", zlib.compress(bytes(1000)))), "cannot hold the pixels"),
  "empty.gif": (b"GIF89a" + struct.pack("<HH", 13000, 13000) + pictures.encoded(PICTURE, "GIF")[10:], "so empty"),
  "profile.png": (png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(20_000_000)))), "cannot be decoded"),
  "text.png": (png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000)))), "cannot be decoded"),
  "large.bmp": (b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHH24x", 40, 90000, 90000, 1, 24), ""),
  "large.pgm": (b"P5 999999999 999999999 65535\n", "data.max_pixels"),
  "large.gif": (b"GIF89a\xff\xff\xff\xff" + pictures.encoded(PICTURE, "GIF")[10:], "data.max_pixels"),
  "large.tif": (tiff([(256, 1, 1 << 31), (257, 1, 1 << 31), *GREY[2:], (273, 1, 8)]), "data.max_pixels"),
  "strips.tif": (tiff([*GREY, (273, 0xFFFFFFFF, 8)]), "4,294,967,295 strips"),
  "tiles.tif": (tiff([*GREY, (322, 1, 60000), (323, 1, 60000), (324, 1, 8)]), "tiles of more than data.max_pixels"),
  "pages.tif": (b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8), "pages in a circle"),
  "claims.npy": (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (120000, 125000), }"), "120,000,000,000 bytes"),
  "absurd.npy": (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (%s, 8), }" % ("9" * 40)), "any memory"),
  "negative.npy": (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8), }", bytes(64)), "cannot be"),
  "nested.npy": (npy("(" * 3000 + ")" * 3000), "cannot be decoded"),
  "code.npy": (npy("__import__('os').abort()"), "cannot be decoded"),
  "complex.npy": (saved(np.zeros((8, 8), np.complex64)), "of type complex64"),
  "text.npy": (saved(np.full((8, 8), "abc")), "of type <U3"),
  "bytes.npy": (saved(np.full((8, 8), b"abc")), "of type"),
  "fields.npy": (saved(np.zeros((8, 8), [("r", "u1"), ("g", "u1")])), "of type"),
  "dates.npy": (saved(np.zeros((8, 8), "M8[s]")), "of type datetime64"),
  "objects.npy": (saved(np.full((8, 8), {}, object)), "Python objects"),
  "torn.npy": (saved(np.zeros((8, 8), np.uint8))[:30], "cannot be decoded"),
  "half.npy": (saved(np.zeros((80, 80), np.uint8))[:900], "6,400 bytes, of which 772 are there"),
  "none.npy": (saved(np.zeros((0, 8, 3), np.uint8)), "8 x 0 pixels"),
  "scalar.npy": (saved(np.uint8(3)), "shape"),
  "five.npy": (saved(np.zeros((2, 3, 4, 5, 6), np.uint8)), "shape"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_claims_too_much_is_refused_before_memory_is_taken(name):
  data, reason = HOSTILE[name]
  tracemalloc.start()
  try:
    with pytest.raises(BadImage, match=f"^{name}: ") as caught:
      decode(data, name)
    assert tracemalloc.get_traced_memory()[1] < 64e6
  finally:
    tracemalloc.stop()
  assert reason in caught.value.reason and "\n" not in caught.value.reason and len(caught.value.reason) < 400


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  root = tmp_path_factory.mktemp("hostile")
  for name, (data, _) in HOSTILE.items():
    (root / name).write_bytes(data)
  for i in range(len(HOSTILE) + 1):
    (root / f"good{i}.png").write_bytes(pictures.encoded(pictures.smooth(40, 56, i), "PNG"))
  return root


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_nothing_that_reads_a_source_ends_by_one_file(mixed, tmp_path):
  source, bad = open_source(f"folder:{mixed}"), set(HOSTILE)
  found = scan(source, "x", workers=1, progress=lambda count: None)
  assert {name.rpartition("/")[2] for _, name, _ in found.broken} == bad
  found.report()
  done = convert(source, "x", tmp_path / "out", progress=lambda count: None)
  assert (done["records"], done["left_out"]) == (len(HOSTILE) + 1, len(HOSTILE))
  batches = list(evaluation_batches(source, image_size=16, batch_size=8, max_examples=len(source)))
  assert sum(batch["valid"].sum() for batch in batches) == len(HOSTILE) + 1
  group = LossGroups(source, MultiCrop(global_size=16, local_size=8, mask_grid=None), 0, len(source))[0]
  assert group["bad_records"].count('"reason"') >= len(HOSTILE)


@pytest.mark.parametrize(
  "error",
  [MemoryError(), RecursionError("deep"), OverflowError("x"), ZeroDivisionError(), AssertionError(), SyntaxError("x"),
   struct.error("x"), Image.DecompressionBombError("x"), zlib.error("x"), KeyError("x"), UserWarning("x"), EOFError()],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_bad_image(error, monkeypatch):
  def failing(*args, **options):
    raise error

  monkeypatch.setattr(decoding, "open_image", failing)
  with pytest.raises(BadImage, match=rf"^a.png: cannot be decoded \({type(error).__name__}"):
    decode(pictures.encoded(PICTURE, "PNG"), "a.png")


def test_a_warning_that_is_an_error_is_a_bad_image():
  data = claimed_jpeg(13000, 13000)
  with warnings.catch_warnings(), pytest.raises(BadImage, match="DecompressionBombWarning"):
    warnings.simplefilter("error")
    decode(data)


def test_what_a_decoder_quotes_is_one_printable_line(monkeypatch):
  def failing(*args, **options):
    raise ValueError("\x1b[31m" + "bad\n" * 1000)

  monkeypatch.setattr(decoding, "open_image", failing)
  with pytest.raises(BadImage) as caught:
    decode(pictures.encoded(PICTURE, "PNG"))
  assert caught.value.reason.isprintable() and len(caught.value.reason) < 300


def test_what_is_no_image_at_all_is_named():
  for thing in (None, "text.jpg", 3, [1, 2]):
    with pytest.raises(BadImage, match=type(thing).__name__):
      decode(thing)


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<u2", ">f4", "<f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_byte_order_and_layout(dtype, order):
  array = np.asarray(np.arange(24).reshape(4, 2, 3) % 2, dtype, order=order)
  file = io.BytesIO()
  np.save(file, array)
  np.testing.assert_array_equal(saved_array(file.getvalue(), "a"), array)
  np.testing.assert_array_equal(decode(file.getvalue()), decode(np.ascontiguousarray(array)))
  for version in ((1, 0), (2, 0), (3, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    np.testing.assert_array_equal(saved_array(file.getvalue(), "a"), array)


def test_the_bounds_are_those_of_the_config_and_can_be_raised(monkeypatch):
  data = config.default().data
  assert Limits() == (data.max_pixels, data.max_file_bytes)
  with pytest.raises(BadImage, match=r"a: is 56 x 41 pixels: more than 2,240 are refused \(data.max_pixels=2,240\)"):
    decode(pictures.smooth(41, 56), "a", limits=SMALL)
  with pytest.raises(BadImage, match=r"has 100,001 bytes: more than data.max_file_bytes=100,000 are refused"):
    decode(bytes(100_001), limits=SMALL)
  assert decode(pictures.encoded(PICTURE, "PNG"), limits=SMALL).shape == (40, 56, 3)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
  with pytest.raises(BadImage):  # Pillow's own bound, which a program may have lowered
    decode(pictures.encoded(PICTURE, "PNG"), limits=Limits(max_pixels=1000))
  assert decode(pictures.encoded(PICTURE, "PNG"), limits=Limits(max_pixels=3000)).shape == (40, 56, 3)


def test_values_of_many_bytes_count_for_more():
  array = np.zeros((40, 56, 13), np.uint16)
  with pytest.raises(BadImage, match="40 pixels of 26 bytes each: more than 689 are refused"):
    decode(array, channels=13, limits=SMALL)


@pytest.mark.parametrize("spec", ["folder:{0}", "tar:{0}/a.tar", "1 folder:{0} + 1 tar:{0}/a.tar"])
def test_a_source_reads_no_more_than_its_bounds(spec, tmp_path):
  import tarfile

  data = pictures.encoded(PICTURE, "BMP")
  (tmp_path / "a.bmp").write_bytes(data)
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    tar.add(tmp_path / "a.bmp", "a.bmp")
  limits = Limits(max_file_bytes=len(data) - 1)
  source = pickle.loads(pickle.dumps(open_source(spec.format(tmp_path), limits=limits)))  # as for a worker
  assert limits_of(source) == limits
  with pytest.raises(BadImage, match="data.max_file_bytes"):
    source[0]
  assert open_source(spec.format(tmp_path))[0]["image"] == data


def test_files_without_an_end_are_not_read(tmp_path):
  with open(tmp_path / "sparse.png", "wb") as file:
    file.truncate(1_500_000_000)
  tracemalloc.start()
  with pytest.raises(BadImage, match=r"has 1,500,000,000 bytes: more than data.max_file_bytes=536,870,912"):
    storage.read(tmp_path / "sparse.png")
  (tmp_path / "zero.png").symlink_to("/dev/zero")
  os.mkfifo(tmp_path / "fifo.png")
  for name in ("zero.png", "fifo.png"):
    with pytest.raises(BadImage, match="is no regular file"):
      storage.read(tmp_path / name)
    with pytest.raises(BadImage, match="is no regular file"):
      decode(tmp_path / name)
  assert tracemalloc.get_traced_memory()[1] < 10e6
  tracemalloc.stop()
  with pytest.raises(IsADirectoryError):
    storage.read(tmp_path)


def test_no_more_than_a_byte_beyond_the_bound_is_read_of_a_store():
  import fsspec

  store = fsspec.filesystem("memory")
  for name, content in (("large", bytes(1000)), ("right", bytes(100)), ("empty", b"")):
    store.pipe(f"/limits/{name}", content)
  limits = Limits(max_file_bytes=100)
  with pytest.raises(BadImage, match="has 101 bytes"):
    storage.read("memory://limits/large", limits)
  assert storage.read("memory://limits/right", limits) == bytes(100)
  assert storage.read("memory://limits/empty", limits) == b""


def test_a_jpeg_of_endless_scans_is_refused():
  data = pictures.encoded(np.zeros((2000, 2000, 3), np.uint8), "JPEG", progressive=True)
  scan = data[data.rfind(b"\xff\xda") : -2]
  with pytest.raises(BadImage, match="is a JPEG of 1,.* scans"):
    decode(data[:-2] + scan * 1000 + data[-2:])


def test_a_very_long_image_is_evaluated_by_its_middle():
  pixels = np.zeros((60_000, 2, 3), np.uint8)
  pixels[29_000:31_000] = 200
  assert (resize_and_crop(pixels, 32) == 200).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "npy"])
def test_damaged_files_give_an_image_or_a_bad_one(format):
  rng = np.random.default_rng(len(format))
  whole = saved(PICTURE) if format == "npy" else pictures.encoded(PICTURE, format)
  outcomes = {True: 0, False: 0}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for i in range(60):
      data = bytearray(whole[: rng.integers(1, len(whole))] if i % 4 == 0 else whole)
      for place in rng.integers(0, min(len(data), (64, 300, len(data))[i % 3]), rng.integers(1, 6)):
        data[place] = rng.integers(0, 256)
      try:
        pixels = decode(bytes(data), "a", value_range=None if i % 2 else (0, 1000))
        outcomes[pixels.dtype == np.uint8 and pixels.shape[2] == 3] += 1
      except BadImage as error:
        outcomes[error.name == "a" and bool(error.reason)] += 1
  assert outcomes == {True: 60, False: 0}
