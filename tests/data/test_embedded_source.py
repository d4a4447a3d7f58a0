"""open_embedded: specifications, errors, determinism, and the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vit_jax.data import embedded
from vit_jax.data.embedded import open_embedded, source, textures
from vit_jax.data.sources import open_source
from vit_jax.data.subsets import keep, take

NAMES = ("textures", "shapes")


@pytest.mark.parametrize("name", NAMES)
def test_record_has_image_and_label(name, tmp_path):
  data = open_embedded(f"embedded:{name}?count=5&size=32", cache_dir=tmp_path)
  assert len(data) == 5
  record = data[3]
  assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
  assert isinstance(record["label"], int) and 0 <= record["label"] < data.num_classes
  np.testing.assert_array_equal(record["image"], data.images[3])
  assert data.class_names[record["label"]] in data.describe(3) and "image 3" in data.describe(3)
  assert [item["label"] for item in data] == data.labels.tolist()  # iteration ends at the last record


@pytest.mark.parametrize("name", NAMES)
def test_image_is_the_same_whatever_the_count(name, tmp_path):
  few = open_embedded(f"embedded:{name}?count=4&size=32", cache_dir=tmp_path)
  many = open_embedded(f"embedded:{name}/train?size=32&count=9", cache_dir=tmp_path)
  np.testing.assert_array_equal(few.images, many.images[:4])
  np.testing.assert_array_equal(few.labels, many.labels[:4])


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_image(name, tmp_path):
  train = open_embedded(f"embedded:{name}/train?count=60&size=16", cache_dir=tmp_path)
  test = open_embedded(f"embedded:{name}/test?count=60&size=16", cache_dir=tmp_path)
  assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_another_process_makes_the_same_images(tmp_path):
  specs = [f"embedded:{name}/test?count=20&size=32" for name in NAMES]
  digests = [hashlib.sha256(open_embedded(spec, cache_dir=tmp_path / "here").images.tobytes()).hexdigest()
             for spec in specs]  # fmt: skip
  code = (
    "import hashlib, sys; from vit_jax.data.embedded import open_embedded\n"
    "for spec in sys.argv[2:]:\n"
    "  print(hashlib.sha256(open_embedded(spec, cache_dir=sys.argv[1]).images.tobytes()).hexdigest())"
  )
  command = [sys.executable, "-c", code, str(tmp_path / "there"), *specs]
  environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  assert done.stdout.split() == digests


def test_second_opening_reads_the_cache(tmp_path, monkeypatch):
  first = open_embedded("embedded:textures?count=3&size=16", cache_dir=tmp_path)
  first.keep()
  monkeypatch.setattr(source, "_write", lambda *_: pytest.fail("made the images again"))
  second = open_embedded("embedded:textures?count=3&size=16", cache_dir=tmp_path)
  np.testing.assert_array_equal(first.images, second.images)
  assert not list(tmp_path.rglob("*.part"))


def test_cache_follows_the_environment_when_no_folder_is_given(tmp_path, monkeypatch):
  monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "env"))
  open_embedded("embedded:textures?count=1&size=16").keep()
  assert len(list((tmp_path / "env").rglob("*.npy"))) == 1


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[: len(whole) // 2],
                                    lambda whole: b"", lambda whole: b"x" * len(whole)])  # fmt: skip
def test_damaged_cache_file_is_made_again(damage, tmp_path):
  spec = "embedded:textures?count=3&size=16"
  images = np.array(open_embedded(spec, cache_dir=tmp_path).images)
  (path,) = tmp_path.rglob("*.npy")
  path.write_bytes(damage(path.read_bytes()))
  np.testing.assert_array_equal(open_embedded(spec, cache_dir=tmp_path).images, images)
  np.testing.assert_array_equal(np.load(path)["image"], images)


def test_folder_that_cannot_be_written_is_reported_and_survived(tmp_path, caplog):
  blocked = tmp_path / "file"
  blocked.write_text("not a folder")
  data = open_embedded("embedded:textures?count=2&size=16", cache_dir=blocked)
  data.keep()
  assert len(data) == 2
  assert "data.cache_dir" in caplog.text and str(blocked) in caplog.text
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).images, data.images)


def test_pickled_source_carries_no_pixels(tmp_path):
  data = open_embedded("embedded:textures?count=10&size=32", cache_dir=tmp_path)
  data.keep()
  carried = pickle.dumps(data)
  assert len(carried) < 2000
  copy = pickle.loads(carried)
  np.testing.assert_array_equal(copy.images, data.images)
  assert copy.describe(4) == data.describe(4)


def test_pickled_part_is_the_same_part(tmp_path):
  whole = open_embedded("embedded:textures?count=10&size=16", cache_dir=tmp_path)
  part = take(whole, np.array([2, 6]))
  copy = pickle.loads(pickle.dumps(part))
  assert copy.describe(1) == whole.describe(6)
  np.testing.assert_array_equal(copy[1]["image"], whole[6]["image"])
  copy.keep()
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(copy)).images, part.images)


def test_returned_image_may_be_changed(tmp_path):
  data = open_embedded("embedded:textures?count=2&size=16", cache_dir=tmp_path)
  before = data[0]["image"].copy()
  data[0]["image"][:] = 0
  np.testing.assert_array_equal(data[0]["image"], before)


@pytest.fixture
def made(monkeypatch):
  """The indices of the images that are made, as they are."""
  indices = []

  def example(split, index, **options):
    indices.append(index)
    return textures.example(split, index, **options)

  recipe = dataclasses.replace(embedded._SETS["textures"], example=example)
  monkeypatch.setitem(embedded._SETS, "textures", recipe)
  return indices


def test_only_the_images_that_are_read_are_made(tmp_path, made):
  data = open_embedded("embedded:textures?count=100&size=16", cache_dir=tmp_path)
  assert len(data) == 100
  names = [data.describe(index) for index in (7, -1)]
  images = [data[index] for index in (7, -1)]
  assert set(made) == {0, 7, 99} and len(made) == 3  # the first: to try the options
  assert not list(tmp_path.rglob("*.npy"))
  with pytest.raises(IndexError):
    data[100]
  data.keep()
  assert [data.describe(index) for index in (7, -1)] == names
  for index, image in zip((7, -1), images, strict=True):
    np.testing.assert_array_equal(data[index]["image"], image["image"])
    assert data[index]["label"] == image["label"]


def test_a_part_is_made_and_kept_without_the_rest(tmp_path, made):
  whole = open_embedded("embedded:textures?count=100&size=16", cache_dir=tmp_path)
  part = take(whole, np.array([3, 50, 51]))
  part.keep()
  assert set(made) == {0, 3, 50, 51}
  assert [part.describe(index) for index in range(3)] == [whole.describe(index) for index in (3, 50, 51)]
  np.testing.assert_array_equal(take(part, np.array([2]))[0]["image"], whole[51]["image"])
  made.clear()
  again = take(open_embedded("embedded:textures?count=100&size=16", cache_dir=tmp_path), np.array([3, 50, 51]))
  np.testing.assert_array_equal(again.images, part.images)
  other = take(whole, np.array([3, 50, 52]))
  np.testing.assert_array_equal(other[2]["image"], whole[52]["image"])
  assert set(made) == {0, 52}


def test_a_part_of_what_is_kept_reads_the_kept(tmp_path, made):
  whole = open_embedded("embedded:textures?count=10&size=16", cache_dir=tmp_path)
  whole.keep()
  made.clear()
  part = take(whole, np.array([3, 5]))
  keep(part)
  np.testing.assert_array_equal(part[1]["image"], whole.images[5])
  assert not made and len(list(tmp_path.rglob("*.npy"))) == 1


def test_a_mixture_keeps_its_embedded_parts(tmp_path, made):
  mixed = open_source("0.5 embedded:textures?count=4&size=16 + 0.5 synthetic:photo?count=4", cache_dir=tmp_path)
  keep(mixed)
  assert set(made) == {0, 1, 2, 3}


@pytest.mark.parametrize(("spec", "expected"), [
  ("embedded:texture", ("'texture'", "textures, shapes, photos")),
  ("embedded:", ("textures, shapes, photos",)),
  ("embedded:textures/validation", ("'validation'", "train, test")),
  ("embedded:textures?seed=3", ("'seed'", "size, count")),
  ("embedded:textures?size=abc", ("size='abc'", "whole number")),
  ("embedded:textures?size=0", ("size='0'", "above 0")),
  ("embedded:textures?count=-5", ("count='-5'", "above 0")),
  ("embedded:textures?size=", ("size=''", "whole number")),
  ("embedded:shapes?background=sky", ("background=sky", "noise, photo")),
  ("embedded:shapes?objects=99", ("99", "1 to 20")),
])  # fmt: skip
def test_errors_name_what_would_be_right(spec, expected, tmp_path):
  with pytest.raises(ValueError) as caught:
    open_embedded(spec, cache_dir=tmp_path)
  for words in (spec, *expected):
    assert words in str(caught.value)
  assert not list(tmp_path.rglob("*.npy"))


def test_defaults_are_six_thousand_train_and_one_thousand_test():
  for name in NAMES:
    assert embedded._SETS[name].counts == {"train": 6000, "test": 1000}
