"""Parquet tables: rows that name files, damaged pages, labels of every type."""

import decimal
import http.server
import json
import os
import pickle
import threading

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.decode import BadImage
from vit_jax.data.groups import LossGroups
from vit_jax.data.sources import open_source
from vit_jax.data.views import MultiCrop

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PNG = [pictures.encoded(pictures.smooth(9, 9, i), "PNG") for i in range(12)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, images, label=None, *, type=None, rows=None, names=None, **options):
  columns = {"image": images if isinstance(images, pa.Array) else pa.array(images)}
  if label is not None:
    columns["label"] = label if isinstance(label, pa.Array) else pa.array(label, type)
  table = pa.table(columns)
  if names is not None:
    described = {"info": {"features": {"label": {"names": names}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
  pq.write_table(table, path, row_group_size=rows, **options)
  return path


def named(paths):
  return pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)


@pytest.fixture
def beside(tmp_path):
  """A folder of tables with images beside them, and a secret elsewhere."""
  (tmp_path / "tables/images").mkdir(parents=True)
  (tmp_path / "tables/images/1.png").write_bytes(PNG[1])
  (tmp_path / "secret.png").write_bytes(PNG[0])
  (tmp_path / "tables/images/out.png").symlink_to(tmp_path / "secret.png")
  (tmp_path / "tables/up").symlink_to(tmp_path)
  os.mkfifo(tmp_path / "tables/images/pipe.png")
  return tmp_path / "tables"


def test_rows_that_name_files_are_refused_unless_asked_for(beside):
  write(beside / "a.parquet", named(["images/1.png"] * 3))
  with pytest.raises(ValueError, match="the first rows hold no images; .* Add .paths=below to read those"):
    open_source(f"parquet:{beside}/a.parquet")
  mixed = pa.array([{"bytes": PNG[2], "path": "x.png"}, {"bytes": None, "path": "images/1.png"}], IMAGE)
  write(beside / "b.parquet", mixed)
  source = open_source(f"parquet:{beside}/b.parquet")
  assert source[0]["image"] == PNG[2]
  with pytest.raises(BadImage, match="row 1 of row group 0 of .*names the file images/1.png .*add .paths=below"):
    source[1]
  source = open_source(f"parquet:{beside}/b.parquet?paths=below")
  assert [source[i]["image"] for i in range(2)] == [PNG[2], PNG[1]]
  assert pickle.loads(pickle.dumps(source))[1]["image"] == PNG[1]
  with pytest.raises(ValueError, match="paths=all must be one of refuse, below"):
    open_source(f"parquet:{beside}/b.parquet?paths=all")


@pytest.mark.parametrize(
  "path",
  ["{root}/secret.png", "../secret.png", "images/../../secret.png", "images/out.png", "up/secret.png", "/etc/passwd",
   "file://{root}/secret.png", "FILE:{root}/secret.png", "s3://bucket/x.png", "memory://x.png", "images/pipe.png",
   "images", "images/none.png", "images/1.png\0", "~/x.png", "x" * 5000, ""],
)  # fmt: skip
def test_only_files_below_the_table_are_read(beside, path):
  path = path.format(root=beside.parent)
  write(beside / "a.parquet", named([path, "images/1.png", f"{beside}/images/1.png"]))
  source = open_source(f"parquet:{beside}/a.parquet?paths=below")
  with pytest.raises((BadImage, OSError)) as caught:
    source[0]
  assert isinstance(caught.value, BadImage), caught.value
  assert source[1]["image"] == source[2]["image"] == PNG[1]


def test_no_request_leaves_for_an_url_in_a_row(beside):
  asked = []

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      self.send_error(404)

    do_HEAD = do_GET

  server = http.server.HTTPServer(("127.0.0.1", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  write(beside / "a.parquet", named([f"http://127.0.0.1:{server.server_port}/1.png"] * 2))
  source = open_source(f"parquet:{beside}/a.parquet?paths=below")
  with pytest.raises(BadImage, match="is no path below the folder"):
    source[0]
  server.shutdown()
  assert asked == []


def test_a_column_of_paths_as_text_is_read_when_both_are_asked_for(beside):
  pq.write_table(pa.table({"file": ["images/1.png"], "label": ["cat"]}), beside / "a.parquet")
  source = open_source(f"parquet:{beside}/a.parquet?image=file&paths=below")
  assert source[0] == {"image": PNG[1], "label": 0} and source.class_names == ("cat",)


@pytest.mark.parametrize("column", ["struct", "binary", "large", "view", "dictionary"])
def test_every_column_of_bytes_is_one_of_images(tmp_path, column):
  images = {
    "struct": pa.array([{"bytes": png, "path": None} for png in PNG[:3]]),
    "binary": pa.array(PNG[:3], pa.binary()),
    "large": pa.array(PNG[:3], pa.large_binary()),
    "view": pa.array(PNG[:3], pa.binary_view()),
    "dictionary": pa.array(PNG[:3], pa.binary()).dictionary_encode(),
  }[column]
  source = open_source(f"parquet:{write(tmp_path / 'a.parquet', images)}")
  assert [source[i]["image"] for i in range(3)] == PNG[:3]


def test_a_row_without_an_image_is_named(tmp_path):
  write(tmp_path / "a.parquet", pa.array([PNG[0], None], pa.binary()))
  source = open_source(f"parquet:{tmp_path}/a.parquet")
  with pytest.raises(BadImage, match="row 1 of row group 0 of .*the column 'image' is empty"):
    source[1]


def spoil(path, group, column):
  """Overwrites the pages of a column in one row group."""
  chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
  start = min(x for x in (chunk.data_page_offset, chunk.dictionary_page_offset) if x)
  data = bytearray(path.read_bytes())
  data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
  path.write_bytes(data)


def test_a_damaged_label_page_costs_its_labels_only(tmp_path, caplog):
  path = write(tmp_path / "a.parquet", PNG[:9], [f"c{i % 3}" for i in range(9)], rows=3)
  spoil(path, 1, 1)
  source = open_source(f"parquet:{path}")
  assert [source[i]["image"] for i in range(9)] == PNG[:9]
  assert [source[i]["label"] for i in range(9)] == [0, 1, 2, -1, -1, -1, 0, 1, 2]
  assert source.left_out["row group whose labels cannot be read"].examples == (f"row group 1 of {path}",)
  assert "row group 1 of" in caplog.text


def test_a_row_group_that_cannot_be_read_is_named_and_training_goes_on(tmp_path, caplog):
  path = write(tmp_path / "a.parquet", PNG[:12] * 4, rows=12)
  spoil(path, 1, 0)
  source = open_source(f"parquet:{path}")
  good = [i for i in range(48) if not 12 <= i < 24]
  assert [source[i]["image"] for i in good] == [PNG[i % 12] for i in good]
  for _ in range(2):
    with pytest.raises(BadImage, match=r"row group 1 of .*a.parquet \(12 rows\): cannot be read"):
      source[15]
  assert caplog.text.count("row group 1 of") == 1  # it is read once
  source.window = 1  # what replaces a record is then of its row group first, all of which is damaged
  groups = LossGroups(source, MultiCrop(global_size=8, local_size=8, local_number=1), 0, 12)
  for number in range(8):
    assert groups[number]["global_crops"].shape == (12, 2, 8, 8, 3)


@pytest.mark.parametrize(
  ("labels", "type", "names", "numbers"),
  [
    ([20240101123, 7, 20240101123], pa.int64(), ("7", "20240101123"), [1, 0, 1]),
    ([2**64 - 1, 0, 3], pa.uint64(), ("0", "3", "18446744073709551615"), [2, 0, 1]),
    ([-(2**62), -1, 5], pa.int64(), ("-4611686018427387904", "5"), [0, -1, 1]),
    ([0, 1, 900_000], pa.int32(), ("0", "1", "900000"), [0, 1, 2]),
    ([1.0, 2.0, float("nan")], pa.float64(), ("1", "2"), [0, 1, -1]),
    ([1.0, 2.0, 0.5], pa.float32(), ("1", "2"), [0, 1, -1]),
    ([True, False, None], pa.bool_(), ("False", "True"), [1, 0, -1]),
    (["007", "7", "-1"], pa.string(), ("007", "7"), [0, 1, -1]),
    (["2", "10", ""], pa.string(), ("2", "10"), [0, 1, -1]),
    (["b", "a", " "], pa.large_string(), ("a", "b"), [1, 0, -1]),
    (["b", "a", None], pa.string_view(), ("a", "b"), [1, 0, -1]),
    ([b"b", b"a", b"\xff\xfe"], pa.binary(), ("a", "b"), [1, 0, -1]),
    ([decimal.Decimal("3"), decimal.Decimal("1"), None], pa.decimal128(5), ("1", "3"), [1, 0, -1]),
    (["b", "a", "b"], pa.dictionary(pa.int8(), pa.string()), ("a", "b"), [1, 0, 1]),
    ([5, 900_000, 5], pa.dictionary(pa.int8(), pa.int64()), ("5", "900000"), [0, 1, 0]),
    ([[1], [2], [3]], pa.list_(pa.int64()), (), [-1, -1, -1]),
    (["x" * 2000, "a", "b"], pa.string(), ("a", "b"), [-1, 0, 1]),
  ],
  ids=str,
)
def test_labels_of_every_type(tmp_path, labels, type, names, numbers):
  source = open_source(f"parquet:{write(tmp_path / 'a.parquet', PNG[:3], pa.array(labels, type), rows=2)}")
  assert source.class_names == names and source.num_classes == len(names)
  assert [source[i]["label"] for i in range(3)] == numbers
  unknown = sum(found.count for found in source.left_out.values())
  missing = (None, "", " ", "-1", -1)
  assert unknown == sum(number < 0 and label not in missing and label == label
                        for label, number in zip(labels, numbers, strict=True))  # fmt: skip


def test_text_that_is_none_costs_its_own_label_only(tmp_path):
  offsets = np.array([0, 1, 3, 4], np.int32).tobytes()
  labels = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xff\xfeb")])
  source = open_source(f"parquet:{write(tmp_path / 'a.parquet', PNG[:3], labels)}")
  assert source.class_names == ("a", "b") and [source[i]["label"] for i in range(3)] == [0, -1, 1]


@pytest.mark.parametrize(
  ("labels", "names", "expected", "numbers"),
  [
    ([0, 1, 1], ["cat", "dog"], ("cat", "dog"), [0, 1, 1]),
    ([0, 5, 1], ["cat", "dog"], ("cat", "dog", "5"), [0, 2, 1]),
    ([0, -1, 1], ["3", "4"], ("3", "4"), [0, -1, 1]),
    ([0, 1, 1], {"0": "cat", "1": "dog"}, ("cat", "dog"), [0, 1, 1]),
    ([0, 1, 1], 7, ("0", "1"), [0, 1, 1]),
    ([0, 1, 1], [[], 3], ("0", "1"), [0, 1, 1]),
  ],
)
def test_names_of_hugging_face(tmp_path, labels, names, expected, numbers):
  for statistics in (True, False):
    path = write(tmp_path / "a.parquet", PNG[:3], labels, names=names, write_statistics=statistics)
    source = open_source(f"parquet:{path}")
    assert source.class_names == expected and [source[i]["label"] for i in range(3)] == numbers


def test_metadata_that_is_no_json_is_told_and_left(tmp_path, caplog):
  for text in ("{", "[" * 100_000, "3", '{"info": null}'):
    table = pa.table({"image": PNG[:2], "label": [0, 1]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_source(f"parquet:{tmp_path}/a.parquet").class_names == ("0", "1")


def described(path, column, names, values):
  """A table whose metadata describe a column of class labels."""
  info = json.dumps({"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}})
  table = pa.table({"image": PNG[: len(values)], column: values})
  pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)
  return path


def test_the_column_of_labels_is_found_by_its_name_or_its_description(tmp_path):
  pq.write_table(pa.table({"jpg": PNG[:2], "cls": [1, 0], "key": [5, 6]}), tmp_path / "a.parquet")
  assert [open_source(f"parquet:{tmp_path}/a.parquet")[i]["label"] for i in range(2)] == [1, 0]
  source = open_source(f"parquet:{described(tmp_path / 'b.parquet', 'breed', ['pug', 'poodle'], [1, 0])}")
  assert source.class_names == ("pug", "poodle") and source[0]["label"] == 1


def test_files_that_number_classes_differently_are_refused_and_read_as_a_mixture(tmp_path):
  one = described(tmp_path / "a.parquet", "label", ["cat", "dog"], [0, 1])
  other = described(tmp_path / "b.parquet", "label", ["dog", "cat", "eel"], [0, 2])
  with pytest.raises(ValueError, match="class 0 is 'cat' in .*a.parquet and 'dog' in .*b.parquet; .* a mixture"):
    open_source(f"parquet:{tmp_path}/*.parquet")
  mixture = open_source(f"parquet:{one} + parquet:{other}")
  assert [mixture.class_names[mixture[i]["label"]] for i in range(4)] == ["cat", "dog", "dog", "eel"]
  described(other, "label", ["cat", "dog", "eel"], [0, 2])  # a longer list of the same
  source = open_source(f"parquet:{tmp_path}/*.parquet")
  assert [source.class_names[source[i]["label"]] for i in range(4)] == ["cat", "dog", "cat", "eel"]


def test_which_of_several_columns_of_images_is_taken_is_said_and_another_type_is_refused(tmp_path, caplog):
  pq.write_table(pa.table({"left": PNG[:2], "right": PNG[2:4]}), tmp_path / "a.parquet")
  assert open_source(f"parquet:{tmp_path}/a.parquet")[0]["image"] == PNG[0]
  assert "of the columns left and right, left is taken; ?image=COLUMN chooses" in caplog.text
  pq.write_table(pa.table({"left": [1, 2]}), tmp_path / "b.parquet")
  with pytest.raises(ValueError, match="the column 'left' of .*b.parquet is of the type int64, not of images"):
    open_source(f"parquet:{tmp_path}/*.parquet")
