"""Labels and the classes that they mean: the same in every source."""

import decimal
import io
import json
import pickle
import tarfile
import unicodedata

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data import record_labels
from vit_jax.data.array_records import write_array_record
from vit_jax.data.classes import NoClass, class_names, classes_of, text_of
from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.groups import LossGroups
from vit_jax.data.sources import open_source
from vit_jax.data.views import MultiCrop

PNG = [pictures.encoded(pictures.smooth(9, 9, i), "PNG") for i in range(4)]


@pytest.mark.parametrize(
  ("label", "text"),
  [
    (3, "3"), (np.int64(3), "3"), (np.array(3, np.int32), "3"), (20240101123, "20240101123"), (2**80, str(2**80)),
    (3.0, "3"), (np.float32(2), "2"), (decimal.Decimal("2.0"), "2"), (True, "True"), (np.bool_(False), "False"),
    ("007", "007"), (" cat\n", "cat"), (b"cat", "cat"), ("-2", "-2"), (-2, "-2"), ("1.5", "1.5"),
    (None, None), (-1, None), (-1.0, None), ("-1", None), ("-1.0", None), ("", None), (b" ", None),
    (float("nan"), None), (np.float16("nan"), None), ("nan", None), (decimal.Decimal("nan"), None),
  ],
)  # fmt: skip
def test_text_of_a_label(label, text):
  assert text_of(label) == text


@pytest.mark.parametrize(
  "label",
  [0.5, float("inf"), decimal.Decimal("0.1"), [1], {"a": 1}, b"\xff\xfe", "x" * 1001, b"x" * 9999, "a\nb", "\x1b[2J",
   np.zeros(3), 10**2000, object(), 1j],
  ids=lambda label: type(label).__name__,
)  # fmt: skip
def test_what_can_mean_no_class(label):
  with pytest.raises(NoClass):
    text_of(label)
  assert classes_of({"1"}).number(label) == -1


@pytest.mark.parametrize(
  ("labels", "names", "expected", "numbers"),
  [
    ("0 1 2", "", "0 1 2", [0, 1, 2]),  # dense numbers stay as they are
    ("10 9 2 0", "", "0 2 9 10", [3, 2, 1, 0]),
    ("0 1 900000", "", "0 1 900000", [0, 1, 2]),
    ("1.0 2 2.00", "", "1 2", [0, 1, 1]),
    ("007 7", "", "007 7", [0, 1]),
    ("1.0 1.10", "", "1.0 1.10", [0, 1]),
    ("3 dog", "", "3 dog", [0, 1]),
    ("0 2", "a b c", "a b c", [0, 2]),
    ("0 7 5", "a b c", "a b c 5 7", [0, 4, 3]),  # a list of fewer names than labels
    ("b c", "c b a", "c b a", [1, 0]),
    ("b z", "a b", "a b z", [1, 2]),
    ("x y", "a b", "x y", [0, 1]),  # names of something else
    ("b 0 7", "a b", "a b 7", [1, 0, 2]),  # names and numbers of the same classes, from two files
    ("x 0", "a b", "a b x", [2, 0]),
    ("10 20", "10 20 30", "10 20 30", [0, 1]),  # no numbers of three names
    ("1 2", "2 1 0", "2 1 0", [1, 2]),  # numbers: that is what a list is for
    ("", "a b", "a b", []),
    ("", "", "", []),
  ],
)
def test_classes_of_labels(labels, names, expected, numbers):
  classes = classes_of(labels.split(), names.split())
  assert classes.names == tuple(expected.split())
  assert [classes.number(label) for label in labels.split()] == numbers
  assert classes.number("nothing of this") == -1
  assert pickle.loads(pickle.dumps(classes)).names == classes.names


def test_many_ids_cost_what_they_are_and_not_what_they_reach():
  ids = np.random.default_rng(0).integers(0, 2**62, 50_000).tolist()
  classes = classes_of({str(one) for one in ids})
  assert len(classes.names) == len(set(ids)) and classes.names[classes.number(ids[7])] == str(ids[7])


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ('["cat", "dog"]', ["cat", "dog"]),
    ("[10, 20]", ["10", "20"]),
    ('{"0": "cat", "1": "dog"}', ["cat", "dog"]),
    ('{"dog": 1, "cat": 0}', ["cat", "dog"]),
    ('["a\\u001b[2J"]', ["a\\x1b[2J"]),
    ("[]", []),
  ],
)
def test_lists_of_class_names(tmp_path, text, names):
  (tmp_path / "classes.json").write_text(text)
  assert class_names(str(tmp_path / "classes.json")) == names
  assert class_names(str(tmp_path / "none.json")) == []


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ('["cat",\n"do', ", line 2: is no whole JSON"),
    ("", "line 1: is no whole JSON"),
    ("[" * 100_000, "no list of class names"),
    ("3", "a int, not a list"),
    ('{"cat": 0, "dog": 5}', "numbers are not 0, 1, 2"),
    ('{"cat": 0, "dog": 0}', "two names have one number"),
    ('["cat", ["dog"]]', "an entry is a list"),
    ("\xff", "no list of class names|no whole JSON"),
  ],
)
def test_what_is_no_list_of_class_names_is_told_in_a_line(tmp_path, text, says):
  (tmp_path / "classes.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=f"(?s)classes.json.*{says}.*mend it, or delete it") as caught:
    class_names(str(tmp_path / "classes.json"))
  assert "\n" not in str(caught.value)


def test_a_list_of_class_names_that_is_no_file_is_told(tmp_path):
  (tmp_path / "classes.json").mkdir()
  with pytest.raises(ValueError, match="classes.json cannot be read .*mend it, or delete it"):
    class_names(str(tmp_path / "classes.json"))


LABELS = [20240101123, 3, -1, 3]


def as_tar_cls(folder):
  return as_tar(folder, [(f"{i}.cls", f"{label}\n".encode()) for i, label in enumerate(LABELS)])


def as_tar_json(folder):
  return as_tar(folder, [(f"{i}.json", json.dumps({"label": label}).encode()) for i, label in enumerate(LABELS)])


def as_tar(folder, members):
  with tarfile.open(folder / "a.tar", "w") as tar:
    for name, data in [*((f"{i}.png", png) for i, png in enumerate(PNG)), *members]:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return f"tar:{folder}/a.tar"


def as_array_record(folder):
  write_array_record(folder / "a.array_record", [(png, label, "") for png, label in zip(PNG, LABELS, strict=True)])
  return f"array_record:{folder}/a.array_record"


def as_parquet(folder):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  pq.write_table(pa.table({"image": PNG, "label": LABELS}), folder / "a.parquet")
  return f"parquet:{folder}/a.parquet"


def as_tfds(folder):
  tfds = pytest.importorskip("tensorflow_datasets")

  class Ids(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
      features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i, label in enumerate(LABELS):
        yield i, {"image": io.BytesIO(PNG[i]), "label": label}

  Ids(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return f"tfds:ids/train?data_dir={folder}"


@pytest.mark.parametrize("store", [as_tar_cls, as_tar_json, as_array_record, as_parquet, as_tfds])
def test_ids_are_the_same_classes_in_every_source_and_train_and_evaluate(tmp_path, store):
  source = open_source(store(tmp_path), cache_dir=tmp_path / "cache")
  found = {source[i]["image"]: source[i]["label"] for i in range(4)}
  assert [found[png] for png in PNG] == [1, 0, -1, 0]
  assert source.class_names == ("3", "20240101123") and source.num_classes == 2
  group = LossGroups(source, MultiCrop(global_size=8, local_size=8, local_number=1), 0, 4)[0]
  assert group["label"].dtype == np.int32 and sorted(group["label"]) == [-1, 0, 0, 1]
  batch = next(evaluation_batches(source, image_size=8, batch_size=4, max_examples=9))
  assert batch["label"].dtype == np.int32 and sorted(batch["label"]) == [-1, 0, 0, 1]
  mixture = open_source(f"1 {store(tmp_path)} + 1 {store(tmp_path)}", cache_dir=tmp_path / "cache")
  assert mixture.class_names == source.class_names and sorted({mixture[i]["label"] for i in range(8)}) == [-1, 0, 1]


def test_numbered_classes_of_a_mixture_keep_their_order(tmp_path):
  for name, labels in (("a", range(0, 12)), ("b", range(5, 15))):
    write_array_record(tmp_path / f"{name}.array_record", [(PNG[0], label, "") for label in labels])
  source = open_source(f"1 array_record:{tmp_path}/a.array_record + 1 array_record:{tmp_path}/b.array_record")
  assert source.class_names == tuple(map(str, range(15)))
  assert [source[i]["label"] for i in range(22)] == [*range(12), *range(5, 15)]


def test_labels_of_many_records_are_looked_for_once_or_not_at_all(tmp_path, monkeypatch):
  monkeypatch.setattr(record_labels, "_FEW", 3)
  reads, path = [], tmp_path / "a.array_record"
  original = record_labels._labels
  monkeypatch.setattr(record_labels, "_labels", lambda read, which: reads.append(len(which)) or original(read, which))

  def classes_when(labels, names=(), record=lambda png, label: (png, label, "")):
    reads.clear()
    write_array_record(path, [record(png, label) for png, label in zip(PNG, labels, strict=True)], names)
    return [open_source(f"array_record:{path}", cache_dir=tmp_path / "cache").class_names for _ in range(2)]

  assert classes_when([5, 9, 5, 9]) == [("5", "9")] * 2 and reads == [64, 4, 64]  # then from the cache
  assert classes_when([5, 9, 5, 7]) == [("5", "7", "9")] * 2 and reads == [64, 4, 64]  # another file
  assert classes_when([0, 1, 1, 0], ["cat", "dog"]) == [("cat", "dog")] * 2 and reads == [64, 64]
  assert classes_when([0, 1, 1, 2], ["cat", "dog"]) == [("cat", "dog", "2")] * 2
  (tmp_path / "classes.json").unlink()
  assert classes_when([-1] * 4) == [()] * 2 and reads == [64, 64]


def test_a_label_too_large_for_a_record_is_refused(tmp_path):
  with pytest.raises(ValueError, match="the label 18446744073709551616 does not fit into 8 bytes"):
    write_array_record(tmp_path / "a.array_record", [(PNG[0], 2**64, "")])


def test_a_name_is_the_same_in_every_form_of_unicode(tmp_path):
  for form in ("NFC", "NFD"):  # as Linux and as macOS write it
    name = unicodedata.normalize(form, "café")
    assert text_of(name) == text_of(name.encode()) == "café"
    folder = tmp_path / form / name
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(pictures.encoded(pictures.smooth(8, 8), "PNG"))
    assert open_source(f"folder:{tmp_path / form}").class_names == ("café",)
