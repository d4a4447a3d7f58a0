"""Shards and tables with damage anywhere: a line at the start, or single records that cannot be read; never more."""

import random

import pytest

from tests.data import pictures
from tests.data.test_tar_members import packed
from vit_jax.data.array_records import write_array_record
from vit_jax.data.decode import BadImage
from vit_jax.data.sources import open_source

PNG = [pictures.encoded(pictures.smooth(9, 9, i), "PNG") for i in range(8)]


def tar(path):
  said = [((f"{i}.cls", b"%d" % i), (f"{i}.json", b'{"label": %d}' % i)) for i in range(8)]
  path.write_bytes(packed(*(one for i, labels in enumerate(said) for one in ((f"{i}.png", PNG[i]), *labels))))


def parquet(path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  images = [{"bytes": png, "path": "x.png"} for png in PNG]
  pq.write_table(pa.table({"image": images, "label": [f"c{i % 3}" for i in range(8)]}), path, row_group_size=3)


def array_record(path):
  write_array_record(path, [(png, 10**i, str(i)) for i, png in enumerate(PNG)])


@pytest.mark.parametrize("write", [tar, parquet, array_record])
def test_damage_anywhere_is_an_error_of_a_line_or_of_records(tmp_path, write, caplog):
  path = tmp_path / f"x.{write.__name__}"
  write(path)
  whole, opened = path.read_bytes(), 0
  for seed in range(150):
    rng, data = random.Random(seed), bytearray(whole)
    for _ in range(rng.choice([1, 2, 8])):
      place = rng.randrange(len(data))
      match rng.choice(["change", "change", "change", "take out", "cut off"]):
        case "change":
          data[place] = rng.randrange(256)
        case "take out":
          del data[place : place + rng.choice([1, 100, 512])]
        case "cut off":
          del data[max(1, place) :]
    path.write_bytes(data)
    try:
      source = open_source(f"{write.__name__}:{path}", cache_dir=tmp_path)
    except ValueError as error:
      assert "x." in str(error) and str(error).isprintable()
      continue
    opened += 1
    for i in range(len(source)):
      assert source.describe(i).isprintable()
      try:
        label = source[i]["label"]
      except BadImage:
        continue
      assert -1 <= label < source.num_classes
  assert 20 < opened < 150
