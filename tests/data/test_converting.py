"""`vit-jax data convert`: shards that hold what the source held, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data import converting
from vit_jax.data.converting import convert
from vit_jax.data.decode import decode
from vit_jax.data.sources import open_source


def converted(spec, folder, **options):
  done = []
  source = open_source(spec)
  totals = convert(source, spec, folder, progress=done.append, **options)
  assert sum(done) == len(source)
  return totals


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  return pictures.make_mixed_folder(tmp_path_factory.mktemp("mixed") / "root")


def test_images_labels_names_and_classes_are_kept(mixed, tmp_path):
  totals = converted(f"folder:{mixed}", tmp_path / "out", records_per_shard=4, workers=2)
  assert (totals["records"], totals["left_out"], totals["shards"]) == (len(pictures.GOOD), len(pictures.BAD), 4)
  before, after = open_source(f"folder:{mixed}"), open_source(f"array_record:{tmp_path}/out/*.array_record")
  assert after.class_names == before.class_names == ("bad", "good")
  good = [i for i in range(len(before)) if "/good/" in before.describe(i)]
  assert [after[i] for i in range(len(after))] == [before[i] for i in good]  # byte for byte
  assert all(before.describe(i) in after.describe(k) for k, i in enumerate(good))
  bad = [json.loads(line)["name"] for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
  assert {name.rpartition("/")[2] for name in bad} == set(pictures.BAD)


def test_larger_images_are_shrunk_and_others_left_alone(tmp_path):
  big, small = pictures.smooth(60, 100), pictures.smooth(30, 20)
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "big.png").write_bytes(pictures.encoded(big, "PNG"))
  (tmp_path / "in" / "small.png").write_bytes(pictures.encoded(small, "PNG"))
  converted(f"folder:{tmp_path}/in", tmp_path / "out", max_side=50)
  source = open_source(f"array_record:{tmp_path}/out/*.array_record")
  shrunk = decode(source[0]["image"])
  assert shrunk.shape == (30, 50, 3) and source[0]["image"].startswith(b"\xff\xd8")
  assert np.abs(shrunk.astype(int) - big.reshape(30, 2, 50, 2, 3).mean((1, 3))).mean() < 3
  assert source[1]["image"] == pictures.encoded(small, "PNG")


def test_arrays_become_png(tmp_path):
  spec = "synthetic:noise?size=8&count=3&format=none&classes=3"
  converted(spec, tmp_path / "out")
  source = open_source(f"array_record:{tmp_path}/out/*.array_record")
  np.testing.assert_array_equal(decode(source[2]["image"]), open_source(spec)[2]["image"])
  assert source[2]["label"] == 2


def content(folder):
  return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def test_complete_shards_are_kept_and_damaged_ones_made_again(tmp_path):
  spec, folder = "synthetic:noise?size=8&count=10&format=png", tmp_path / "out"
  assert converted(spec, folder, records_per_shard=3)["shards_before"] == 0
  whole = content(folder)
  stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
  (folder / "data-00001-of-00004.array_record").write_bytes(b"cut off")
  (folder / "data-00002-of-00004.array_record").unlink()
  with open(folder / converting.PROGRESS, "a") as file:
    file.write('{"shard": 3, "fi')  # cut off as it was written
  assert converted(spec, folder, records_per_shard=3)["shards_before"] == 2
  assert content(folder) == whole
  after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
  assert {name for name in whole if after[name] != stamps[name]} == {
    f"data-0000{i}-of-00004.array_record" for i in (1, 2)
  }
  assert converted(spec, folder, records_per_shard=3)["shards_before"] == 4


def test_a_killed_conversion_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
  spec = "synthetic:photo?size=160x120&count=300&format=jpeg&distinct=50&classes=7"
  script = (
    "import sys\nfrom vit_jax.data.converting import convert\nfrom vit_jax.data.sources import open_source\n"
    f"spec = {spec!r}\nconvert(open_source(spec), spec, sys.argv[1], records_per_shard=20, progress=lambda n: None)"
  )
  command = [sys.executable, "-c", script, str(tmp_path / "killed")]
  process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
  deadline = time.monotonic() + 60
  while len(content(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert len(content(tmp_path / "killed")) >= 3
  totals = converted(spec, tmp_path / "killed", records_per_shard=20)
  assert totals["shards_before"] >= 2 and totals["records"] == 300
  converted(spec, tmp_path / "whole", records_per_shard=20)
  assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_another_conversion_in_the_same_folder_is_refused(tmp_path):
  spec = "synthetic:noise?size=8&count=10"
  converted(spec, tmp_path / "out")
  with pytest.raises(ValueError, match="holds another conversion .max_side: None -> 99."):
    converted(spec, tmp_path / "out", max_side=99)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "x.array_record").touch()
  with pytest.raises(ValueError, match="x.array_record, which is of no conversion"):
    converted(spec, tmp_path / "other")


def test_a_disk_that_keeps_something_else_is_noticed(tmp_path, monkeypatch):
  original = converting.write_array_record

  def spoil(path, records):
    return original(path, [(image[:-1] + b"x", label, name) for image, label, name in records])

  monkeypatch.setattr(converting, "write_array_record", spoil)
  with pytest.raises(RuntimeError, match="reads differently"):
    converted("synthetic:noise?size=8&count=3", tmp_path / "out")
  assert content(tmp_path / "out") == {}
