"""Which images are trained and tested on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.batches import coloured
from vit_jax.data.sources import open_source
from vit_jax.data.subsets import Subset
from vit_jax.evaluation import EvaluationError, UnlabelledError, open_splits

TEXTURES = "embedded:textures/train?size=16&count=60"


def folder(root, num, *, seed=0, classes=4):
  """A folder of `num` PNG files in one sub-folder per class."""
  images, labels = coloured(num, seed=seed, classes=classes)
  for index, (image, label) in enumerate(zip(images, labels, strict=True)):
    (root / f"class{label}").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / f"class{label}" / f"{index:03}.png")
  return f"folder:{root}"


def records(source):
  return {source.describe(index) for index in range(len(source))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return folder(tmp_path_factory.mktemp("photos"), 50)


def test_embedded_data_is_tested_on_its_test_split(tmp_path, monkeypatch):
  opened = []

  def small(spec, cache_dir, limits):
    opened.append(spec)
    return open_source(spec + ("" if "count" in spec else "&count=20"), cache_dir=cache_dir)

  monkeypatch.setattr("vit_jax.evaluation.splits.open_source", small)
  splits = open_splits(TEXTURES, cache_dir=tmp_path)
  assert opened == [TEXTURES, "embedded:textures/test?size=16"]
  assert splits.names == tuple(opened)
  assert (len(splits.train), len(splits.test), splits.num_classes) == (60, 20, 20)


def test_a_test_split_that_is_named_is_used(tmp_path):
  splits = open_splits(TEXTURES, "embedded:textures/test?size=16&count=10", cache_dir=tmp_path)
  assert splits.test_name == "embedded:textures/test?size=16&count=10"
  assert len(splits.test) == 10


def test_the_val_folder_beside_a_train_folder_is_found(tmp_path):
  train, test = folder(tmp_path / "train", 30), folder(tmp_path / "val", 20, seed=1)
  splits = open_splits(train)
  assert splits.names == (train, test)
  assert (len(splits.train), len(splits.test)) == (30, 20)


def test_otherwise_a_tenth_is_held_out_and_not_trained_on(photos):
  splits = open_splits(photos)
  assert (len(splits.train), len(splits.test)) == (45, 5)
  assert not records(splits.train) & records(splits.test)
  assert splits.test_name == f"5 held-out images of {photos}"
  again = open_splits(photos)
  assert records(again.test) == records(splits.test)


def test_training_on_a_test_split_does_not_test_on_the_same_images(tmp_path):
  splits = open_splits("embedded:textures/test?size=16&count=40", cache_dir=tmp_path)
  assert (len(splits.train), len(splits.test)) == (36, 4)
  assert not records(splits.train) & records(splits.test)


def test_images_that_are_learned_from_are_not_tested_on(photos, tmp_path, monkeypatch):
  path = photos.removeprefix("folder:")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "link").symlink_to(path)
  for test in (photos, f"{photos}/", "folder:link", f"0.5 folder:{tmp_path} + 0.5 {photos}"):
    with pytest.raises(EvaluationError, match="its own nearest neighbour.*--test_data"):
      open_splits(photos, test)
  with pytest.raises(EvaluationError, match="its own nearest neighbour.*--test_data"):
    open_splits("embedded:textures?size=16&count=60", "embedded:textures/train?size=32")


def test_fewer_examples_are_drawn_from_all_classes(photos, tmp_path):
  splits = open_splits(photos, folder(tmp_path, 50, seed=1), max_examples=20)
  assert len(splits.train) == len(splits.test) == 20
  labels = {splits.train[index]["label"] for index in range(20)}
  assert labels == {0, 1, 2, 3}  # the folder is sorted by class: its first 20 images are of two


def test_fewer_examples_of_an_embedded_set_are_made_without_the_rest(tmp_path):
  spec = "embedded:textures/train?size=16&count=60"
  chosen = np.sort(np.random.default_rng(0).permutation(60)[:7])  # as ever: scores of older versions stay comparable
  splits = open_splits(spec, "embedded:textures/test?size=16&count=5", max_examples=7, cache_dir=tmp_path)
  splits.keep()
  kept = sorted((tmp_path / "embedded").glob("*.npy"))
  assert [len(np.load(path)) for path in kept] == [5, 7]
  whole = open_source(spec, cache_dir=tmp_path)
  for place, index in enumerate(chosen):
    assert splits.train.describe(place) == whole.describe(index)
    np.testing.assert_array_equal(splits.train[place]["image"], whole[index]["image"])


def test_batches_are_those_of_the_splits(photos):
  splits = open_splits(photos)
  train, test = (list(batches) for batches in splits.batches(image_size=16, batch_size=10))
  assert sum(int(batch["valid"].sum()) for batch in train) == 45
  assert sum(int(batch["valid"].sum()) for batch in test) == 5
  assert all(batch["images"].shape == (10, 16, 16, 3) for batch in train + test)


def test_subset_is_a_source(photos):
  source = open_source(photos)
  subset = Subset(source, [7, 3])
  assert len(subset) == 2
  assert subset.describe(0) == source.describe(7)
  assert subset[1] == source[3]
  assert (subset.num_classes, subset.class_names) == (source.num_classes, source.class_names)


def test_one_class_is_too_few(tmp_path):
  with pytest.raises(UnlabelledError, match="at least 2.*evaluation.train_source"):
    open_splits(folder(tmp_path, 5, classes=1))


def labels(source):
  return [source[index]["label"] for index in range(len(source))]


def files(root, counts, *, start=0):
  """A folder of images, `counts` of them for each class."""
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for index in range(start, start + count):
      Image.fromarray(np.full((16, 16, 3), index, np.uint8)).save(root / name / f"{index}.png")
  return f"folder:{root}"


def test_classes_are_compared_by_name(tmp_path, caplog):
  """Each folder numbers the classes that it has: c is 2 of the one and 1 of the other."""
  train = files(tmp_path / "train", {"a": 2, "b": 2, "c": 2, "d": 2})
  test = files(tmp_path / "val", {"c": 2, "a": 1, "d": 0, "e": 1}, start=50)  # b is not there, d empty, e new
  splits = open_splits(train)
  assert splits.train.class_names == splits.test.class_names == ("a", "b", "c", "d", "e")
  assert splits.num_classes == 5
  assert labels(splits.train) == [0, 0, 1, 1, 2, 2, 3, 3]
  assert labels(splits.test) == [0, 2, 2, 4]
  assert splits.shared_classes == {0: "a", 2: "c"}
  assert f"{test} has no images of: b, d. It is scored on its other 2 classes." in caplog.text
  assert f"{test} has classes that {train} does not have: e." in caplog.text
  few = open_splits(train, max_examples=2)
  assert {(few.test.describe(i), few.test[i]["label"]) for i in range(2)} < {
    (splits.test.describe(i), splits.test[i]["label"]) for i in range(4)
  }


def test_the_same_classes_keep_their_numbers_without_a_word(photos, tmp_path, caplog):
  splits = open_splits(photos, folder(tmp_path, 20, seed=1))
  assert splits.shared_classes == {i: f"class{i}" for i in range(4)}
  assert not [record for record in caplog.records if record.levelname == "WARNING"]


class Numbered:
  """A source whose labels have no names, or these."""

  def __init__(self, labels, num_classes, class_names=()):
    self.labels, self.num_classes, self.class_names = labels, num_classes, class_names

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {"image": np.zeros((4, 4, 3), np.uint8), "label": self.labels[index]}

  def describe(self, index):
    return f"record {index}"


@pytest.fixture
def opened(monkeypatch):
  """Two sources that are opened by any specifications, first of all those to train on."""

  def use(*sources):
    waiting = list(sources)
    monkeypatch.setattr("vit_jax.evaluation.splits.open_source", lambda spec, cache_dir, limits: waiting.pop(0))
    return open_splits("tar:/train.tar", "tar:/val.tar")

  return use


def test_numbers_without_names_are_the_names(opened):
  splits = opened(Numbered([0, 5, 9], 10), Numbered([0, 7], 8))  # the highest classes have no test image
  assert splits.num_classes == 10
  assert labels(splits.test) == [0, 7]


def test_ids_are_compared_as_such(opened):
  splits = opened(Numbered([0, 1, 2], 3, ("10", "20", "900000")), Numbered([1, 0, -1, 5], 2, ("900000", "10")))
  assert labels(splits.test) == [0, 2, -1, 3]  # -1: no label; 5: no class, which is said when it is read


def test_two_classes_of_one_name_stay_two(opened):
  splits = opened(Numbered([0, 1, 2], 3, ("crane", "crane", "owl")), Numbered([0, 1], 2, ("crane", "crane")))
  assert labels(splits.test) == [0, 1]
  assert splits.num_classes == 3


def test_very_many_classes_take_no_time(opened):
  names = tuple(map(str, range(300_000)))
  splits = opened(Numbered([0], 300_000, names), Numbered([0, 299_998], 299_999, names[1:]))
  assert labels(splits.test) == [1, 299_999]


def test_a_test_source_without_labels_is_named(opened):
  with pytest.raises(UnlabelledError, match=r"^tar:/val.tar has no labels\. Put the images"):
    opened(Numbered([0, 1], 2), Numbered([-1, -1], 0))


def test_sources_without_a_common_class_are_refused(photos, tmp_path):
  other = files(tmp_path, {"cat": 1, "dog": 1})
  with pytest.raises(EvaluationError, match="no class in common.*class0, class1.*cat, dog.*by name"):
    open_splits(photos, other)
