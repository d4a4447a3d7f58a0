"""Sources: what each gives, and what it says when there is nothing to give."""

import io
import json
import os
import pickle
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.array_records import write_array_record
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.sources import open_source, split_specs


@pytest.mark.parametrize(
  ("spec", "says"),
  [
    ("foldr:/x", "Did you mean folder:/x"),
    ("tfd:mnist/train", "Did you mean tfds:mnist/train"),
    ("nonsense:/x", "folder:/path, tfds:name/split, array_record:"),
    ("textures", "no scheme"),
    ("/no/such/photos", "no scheme. There is no file or folder /no/such/photos either."),
    ("folder:", "names nothing"),
    ("/tmp", "Did you mean folder:/tmp"),
  ],
)
def test_a_malformed_specification_is_explained(spec, says):
  with pytest.raises(ValueError, match=says):
    open_source(spec)


class TestFolder:
  def test_images_at_any_depth_in_sorted_order_with_the_first_folder_as_class(self, tmp_path):
    for name in ("b/2.png", "b/x/y/1.PNG", "a/3.jpeg", "0.png", ".hidden/4.png", "b/notes.txt"):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_bytes(pictures.encoded(pictures.smooth(8, 8), "JPEG" if "jpeg" in name else "PNG"))
    source = open_source(f"folder:{tmp_path}")
    names = [os.path.relpath(source.describe(i), tmp_path) for i in range(len(source))]
    assert names == ["0.png", "a/3.jpeg", "b/2.png", "b/x/y/1.PNG"]
    assert [source[i]["label"] for i in range(len(source))] == [-1, 0, 1, 1]
    assert source.class_names == ("a", "b") and source.num_classes == 2
    assert decode(source[1]["image"]).shape == (8, 8, 3)

  def test_without_sub_folders_there_are_no_labels(self, tmp_path):
    (tmp_path / "1.png").write_bytes(pictures.encoded(pictures.smooth(8, 8), "PNG"))
    source = open_source(f"folder:{tmp_path}")
    assert source.num_classes == 0 and source[0]["label"] == -1

  def test_a_missing_folder_is_told_with_what_is_there(self, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"there is no .*photo; .* holds photos/"):
      open_source(f"folder:{tmp_path}/photo")

  def test_an_empty_folder_is_told(self, tmp_path):
    with pytest.raises(ValueError, match="no files at all"):
      open_source(f"folder:{tmp_path}")

  def test_a_folder_without_images_is_told_with_what_it_holds(self, tmp_path):
    for name in ("a.csv", "b.csv", "c.txt", "README"):
      (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"2 x \.csv.*1 x no extension.*1 x \.txt"):
      open_source(f"folder:{tmp_path}")

  def test_a_file_is_not_a_folder(self, tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="is a file"):
      open_source(f"folder:{tmp_path}/a.png")

  def test_a_folder_that_links_to_itself_ends(self, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(pictures.encoded(pictures.smooth(8, 8), "PNG"))
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_source(f"folder:{tmp_path}")) == 1

  def test_neighbouring_split_folders_are_the_splits(self, tmp_path):
    for name in ("train", "val"):
      (tmp_path / name).mkdir()
    splits = {"train": f"folder:{tmp_path}/train", "val": f"folder:{tmp_path}/val"}
    assert split_specs(f"folder:{tmp_path}/train") == splits
    assert split_specs(f"folder:{tmp_path}") == {}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  folder = tmp_path_factory.mktemp("records")
  for shard in range(2):
    rows = [(pictures.encoded(pictures.smooth(9, 9, 4 * shard + i), "PNG"), i % 2, f"{shard}-{i}") for i in range(4)]
    assert write_array_record(folder / f"part-{shard}.array_record", rows, ["cat", "dog"]) == 4
  return folder


class TestArrayRecord:
  def test_records_come_back_with_label_and_name(self, shards):
    source = open_source(f"array_record:{shards}/*.array_record")
    assert len(source) == 8 and source.class_names == ("cat", "dog") and source.num_classes == 2
    assert [source[i]["label"] for i in range(8)] == [0, 1] * 4
    np.testing.assert_array_equal(decode(source[6]["image"]), pictures.smooth(9, 9, 6))
    assert "1-2" in source.describe(6)

  def test_it_travels_to_another_process(self, shards):
    source = pickle.loads(pickle.dumps(open_source(f"array_record:{shards}/*.array_record")))
    assert len(source) == 8 and source[1]["label"] == 1

  def test_plain_encoded_images_are_records_without_labels(self, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "plain.array_record"), "group_size:1")
    writer.write(pictures.encoded(pictures.smooth(9, 9), "JPEG"))
    writer.close()
    source = open_source(f"array_record:{tmp_path}/plain.array_record")
    assert source[0]["label"] == -1 and source.num_classes == 0 and decode(source[0]["image"]).shape == (9, 9, 3)

  def test_no_match_and_no_shard_are_told(self, shards, tmp_path):
    with pytest.raises(ValueError, match=r"no file matches .*part-0\.array_record"):
      open_source(f"array_record:{shards}/*.arrayrecord")
    (tmp_path / "x.array_record").write_bytes(b"not a shard at all" * 10)
    with pytest.raises(ValueError, match="x.array_record|whole ArrayRecord"):
      open_source(f"array_record:{tmp_path}/*.array_record")

  def test_a_flipped_byte_spoils_one_record_only(self, tmp_path):
    path = tmp_path / "a.array_record"
    rows = [(pictures.encoded(pictures.smooth(40, 40, i), "PNG"), 0, str(i)) for i in range(5)]
    write_array_record(path, rows)
    data = bytearray(path.read_bytes())
    data[data.index(rows[2][0]) + 50] ^= 0xFF
    path.write_bytes(data)
    source = open_source(f"array_record:{path}")

    def readable(index):
      try:
        decode(source[index]["image"])
      except BadImage:
        return False
      return True

    assert [readable(i) for i in range(5)] == [True, True, False, True, True]
    assert "record 2" in source.describe(2)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  tfds = pytest.importorskip("tensorflow_datasets")

  class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # it has no files of its own beside its code

    def _info(self):
      features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
      for i in range(count):
        yield i, {"image": io.BytesIO(pictures.encoded(pictures.smooth(9 + i, 12, i), "PNG")), "label": i % 2}

  folder = tmp_path_factory.mktemp("tfds")
  TinyPictures(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return folder


class TestTfds:
  def test_records_are_encoded_images_with_labels(self, tfds_dir):
    source = open_source(f"tfds:tiny_pictures/train?data_dir={tfds_dir}")
    assert len(source) == 6 and source.class_names == ("cat", "dog")
    heights = {decode(source[i]["image"]).shape[0]: source[i]["label"] for i in range(6)}
    assert heights == {9 + i: i % 2 for i in range(6)}
    assert "train" in source.describe(0)

  def test_a_prepared_folder_serves_as_a_name(self, tfds_dir):
    assert len(open_source(f"tfds:{tfds_dir}/tiny_pictures/1.0.0/test")) == 2

  def test_splits_are_listed(self, tfds_dir):
    splits = split_specs(f"tfds:tiny_pictures/train?data_dir={tfds_dir}")
    assert set(splits) == {"train", "test"}
    assert len(open_source(splits["test"])) == 2

  def test_it_travels_to_another_process(self, tfds_dir):
    source = cloudpickle.loads(cloudpickle.dumps(open_source(f"tfds:tiny_pictures/train?data_dir={tfds_dir}")))
    assert len(source) == 6 and source[0]["label"] in (0, 1)

  def test_a_set_that_is_not_prepared_says_how(self, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=r"is not prepared; .*tfds.builder\('cifar10', data_dir=.*'array_record'\)"):
      open_source(f"tfds:cifar10/train?data_dir={tmp_path}")

  def test_unknown_split_dataset_and_option_are_told_with_what_there_is(self, tfds_dir):
    with pytest.raises(ValueError, match="no split 'val'; its splits: train, test"):
      open_source(f"tfds:tiny_pictures/val?data_dir={tfds_dir}")
    with pytest.raises(ValueError, match="no dataset 'tiny_picture'; .* holds tiny_pictures"):
      open_source(f"tfds:tiny_picture/train?data_dir={tfds_dir}")
    with pytest.raises(ValueError, match="unknown option dir"):
      open_source(f"tfds:tiny_pictures/train?dir={tfds_dir}")
    with pytest.raises(ValueError, match="must be tfds:name/split"):
      open_source("tfds:tiny_pictures")

  def test_a_dataset_stored_without_random_access_is_told(self, tfds_dir, tmp_path):
    root = tmp_path / "tiny_pictures" / "1.0.0"
    root.mkdir(parents=True)
    for file in (tfds_dir / "tiny_pictures" / "1.0.0").iterdir():
      (root / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
    info = json.loads((root / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (root / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="tfrecord.*prepare it again with file_format='array_record'"):
      open_source(f"tfds:tiny_pictures/train?data_dir={tmp_path}")

  def test_tensorflow_is_not_imported(self, tfds_dir):
    spec = f"tfds:tiny_pictures/train?data_dir={tfds_dir}"
    script = (
      "import sys\nfrom vit_jax.data.sources import open_source\n"
      f"open_source({spec!r})[0]\nassert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_embedded_splits_keep_their_options():
  assert split_specs("embedded:textures?size=32&count=50") == {
    "train": "embedded:textures/train?size=32",
    "test": "embedded:textures/test?size=32",
  }
