"""`vit-jax data scan`: what it finds."""

import json

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.scanning import scan
from vit_jax.data.sources import open_source


def scanned(spec, **options):
  done = []
  found = scan(open_source(spec), spec, progress=done.append, **options)
  assert sum(done) == found.scanned
  return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  root = pictures.make_mixed_folder(tmp_path_factory.mktemp("mixed") / "root")
  for name in ("copy.jpg", "copy2.jpg"):
    (root / "good" / name).write_bytes((root / "good" / "deeper" / "jpeg.jpg").read_bytes())
  return root


def test_every_broken_file_and_every_duplicate_is_named(mixed):
  found = scanned(f"folder:{mixed}", workers=2)
  assert {name.rpartition("/")[2] for _, name, _ in found.broken} == set(pictures.BAD)
  assert found.duplicates == [[str(mixed / "good" / name) for name in ("copy.jpg", "copy2.jpg", "deeper/jpeg.jpg")]]
  assert found.extra == 2
  assert found.records == found.scanned == len(pictures.GOOD) + len(pictures.BAD) + 2
  assert found.per_class == {"bad": len(pictures.BAD), "good": len(pictures.GOOD) + 2}
  assert sum(found.kinds.values()) == len(pictures.GOOD) + 2 and found.kinds["JPEG RGB"] >= 4
  assert found.nbytes == sum(path.stat().st_size for path in (mixed).rglob("*.*") if path.suffix != ".txt")
  assert found.only_broken == ["bad"]
  text = found.report()
  for part in (
    "1 without a readable image: bad", "broken       5 (31.25%)", "empty.jpg: the file is empty",
    "2 images are the same", "JPEG CMYK",
  ):  # fmt: skip
    assert part in text


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
  images = [pictures.smooth(10 + i, 20, i) for i in range(3)]
  for i, image in enumerate(images):
    (tmp_path / f"{i}.png").write_bytes(pictures.encoded(image, "PNG"))
  found = scanned(f"folder:{tmp_path}")
  means = np.mean([image.reshape(-1, 3).mean(0) for image in images], axis=0) / 255
  squares = np.mean([(image.reshape(-1, 3) / 255.0).__pow__(2).mean(0) for image in images], axis=0)
  np.testing.assert_allclose(found.mean, means, atol=1e-9)
  np.testing.assert_allclose(found.std, np.sqrt(squares - means**2), atol=1e-9)
  assert found.widths == (20, 20, 20) and found.heights == (10, 11, 12) and found.short_sides == (10, 11, 12)
  assert "--config.augment.mean=(" in found.report()


def test_everything_is_written_as_json(mixed, tmp_path):
  scanned(f"folder:{mixed}").write(tmp_path / "x" / "scan.json")
  read = json.loads((tmp_path / "x" / "scan.json").read_text())
  assert len(read["broken"]) == len(pictures.BAD) and len(read["mean"]) == 3


def test_a_limit_takes_an_even_sample():
  found = scanned("synthetic:photo?size=32&count=1000&classes=2&distinct=1", limit=11)
  assert (found.records, found.scanned, found.extra) == (1000, 11, 10)
  assert "1,000, 11 of them looked at" in found.report()


def test_arrays_are_images_too():
  found = scanned("synthetic:noise?size=8x6&count=5&format=none")
  assert found.kinds == {"array uint8 x 3": 5} and found.widths == (8, 8, 8) and found.nbytes == 5 * 8 * 6 * 3
  assert found.per_class == {"none": 5} and "no labels" in found.report()


def test_a_source_of_broken_files_only_is_reported(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"")
  (tmp_path / "b.jpg").write_bytes(b"")
  found = scanned(f"folder:{tmp_path}")
  assert len(found.broken) == 2 and "broken       2 (100.00%)" in found.report()
