"""`vit-jax data …`: scan, convert and preview, as a user runs them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures
from vit_jax import cli

RUN_FILE = Path(__file__).parents[2] / "configs" / "tiny.py"
TINY = [f"--config={RUN_FILE}", "--config.batch_size=16", "--config.loss_group_size=2"]  # a group for each of 8 devices


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path):
  return pictures.make_mixed_folder(tmp_path / "photos")


def run(capsys, *argv: str) -> str:
  assert cli.main(argv) == 0
  return capsys.readouterr().out


def test_scan_reports_writes_json_and_the_index(photos, tmp_path, capsys):
  out = run(capsys, "data", "scan", "photos", "--json=scan.json", "--workers=2")
  for part in ("source       folder:photos", "broken       5", "--config.augment.mean=(", "wrote scan.json"):
    assert part in out
  assert "truncated.jpg" in Path("scan.json").read_text()
  assert len(list((tmp_path / "cache" / "indices").iterdir())) == 1
  assert run(capsys, "data", "scan", f"folder:{photos}", "--index_only", "--beside") == (
    "14 images, 2 classes\n1 left out: 1 x .txt (notes.txt)\n"
  )
  assert (tmp_path / "photos.vit_jax_index").exists()


def test_convert_says_what_it_wrote_and_how_to_use_it(photos, capsys):
  out = run(capsys, "data", "convert", "folder:photos", "array_record:shards", "--records_per_shard=5")
  assert "wrote 9 images" in out and "5 unreadable images left out" in out
  spec = out.split("--config.data.source='")[1].split("'")[0]
  assert "9" in run(capsys, "data", "scan", spec).split("records")[1].splitlines()[0]
  assert (
    run(capsys, "data", "scan", "array_record:shards").splitlines()[1:]
    == run(capsys, "data", "scan", spec).splitlines()[1:]
  )
  again = ["data", "convert", "photos", "array_record:shards", "--records_per_shard=5"]
  out = run(capsys, *again)
  assert out.startswith("wrote nothing: 9 images (0.00 GB) in 3 shards were there already; 5 unreadable")
  Path("shards/data-00002-of-00003.array_record").unlink()
  out = run(capsys, *again)
  assert "in 1 shard, read back and compared, beside" in out and "in 2 shards that were there already" in out


def test_what_is_no_image_is_counted_and_named_wherever_a_source_is_looked_at(tmp_path, capsys):
  def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))

  png = pictures.encoded(pictures.smooth(40, 40), "PNG")
  with tarfile.open("a.tar", "w") as tar:
    for i in range(6):
      for name, data in (("png", png), ("cls", b"20240101%d" % (i % 2)), ("txt", b"a caption"), ("mp4", b"film")):
        add(tar, f"{i}.{name}", data)
    add(tar, "bad.png", b"no image")
    add(tar, "6.json", b"[" * 99_999)
  lines = ["6 x .txt (0.txt, 1.txt, 2.txt, …)", "6 x .mp4: videos are not read: write their frames as images (0.mp4, ",
           "1 x label that is nested too deeply (6.json)"]  # fmt: skip
  out = run(capsys, "data", "scan", "a.tar", "--json=scan.json")
  assert "left out     13, no records of this source" in out and all(f"\n  {line}" in out for line in lines)
  assert "classes      2, from 3 images (202401010) to 3 (202401010), 1 without a label" in out
  assert json.loads(Path("scan.json").read_text())["left_out"][".txt"] == [6, [f"{i}.txt" for i in range(6)], True]
  out = run(capsys, "data", "convert", "tar:a.tar", "array_record:shards")
  assert "wrote 6 images" in out
  assert "; 1 unreadable image left out\nbeside the images of tar:a.tar, 13 left out: " in out
  assert all(line in out for line in lines)
  assert "classes      2, from 3 images (202401010) to 3" in run(capsys, "data", "scan", "array_record:shards")
  data = ["--config.data.source=tar:a.tar + tar:a.tar", "--config.evaluation.every=0 steps"]
  out = run(capsys, "train", *TINY, "--workdir=w", "--dry_run", *data)
  assert "left out      12 x .txt (" in out


def test_a_conversion_of_nothing_readable_fails(capsys):
  Path("photos").mkdir()
  np.save("photos/missing.npy", np.full((8, 8), np.nan))  # whatever the range
  Path("photos/empty.jpg").touch()
  assert cli.main(["data", "convert", "photos", "array_record:shards"]) == 2
  out, err = capsys.readouterr()
  assert "wrote 0 images in 1 shard" in out and "2 unreadable images left out" in out
  assert "folder:photos: none of its images can be read; shards/bad_records.jsonl says why" in err
  assert "missing (NaN)" in Path("shards/bad_records.jsonl").read_text()


@pytest.mark.parametrize(
  "extra",
  [[], ["--config.data.augment=device"], ["--config.augment.share_color_jitter=true", "--config.crops.gram_size=48"]],
)
def test_preview_writes_a_sheet_of_a_step(capsys, extra):
  assert run(capsys, "data", "preview", *TINY, "--images=2", "--step=3", "--output=p.png", *extra) == "wrote p.png\n"
  sheet = np.asarray(Image.open("p.png"))
  assert sheet.std() > 10 and sheet.shape[0] > 300


@pytest.mark.parametrize(
  ("command", "message"),
  [
    ("data scan nowhere", "has no scheme"),
    ("data scan folder:nowhere", "/nowhere; "),
    ("data scan synthetic:noise --beside", "only the index of a folder"),
    ("replay nowhere", "nowhere: there is no such folder; give WORKDIR/nonfinite/STEP"),
    ("data convert synthetic:noise shards", "must be array_record:FOLDER"),
    ("data convert synthetic:noise?count=3 array_record:/proc/x", "cannot be written"),
    ("data preview --config=no.py --output=x.foo", "--output=x.foo: pictures are written as .png, "),
    (f"data preview {' '.join(TINY)} --step=4", "--step=4: the run has 4 steps, from 0"),
    (f"data preview {' '.join(TINY)} --images=3", "a step is shown by its first loss group, loss_group_size=2 images"),
    (f"train {TINY[0]} --workdir=w --config.data.source=parquett:/x", "did you mean 'parquet'"),
  ],
)
def test_mistakes_are_one_line(command, message, capsys):
  assert cli.main(command.split()) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_a_run_trains_on_a_mixture(tmp_path, capsys):
  spec = "0.75 embedded:textures?size=32&count=64 + 0.25 synthetic:noise?size=40&count=16&classes=2"
  override = f"--config.data.source={spec}"
  argv = ["train", *TINY, f"--workdir={tmp_path}/new", "--dry_run", override, "--config.duration=2 steps"]
  assert "0.25 synthetic" in run(capsys, *argv)
