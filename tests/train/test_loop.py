"""Whole runs: they learn, they go on where they were stopped, they read what people have."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.train.jobs import ROOT, environment
from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.checkpoints import restore_params, steps
from vit_jax.data.groups import Unreadable
from vit_jax.data.pipeline import make_pipeline
from vit_jax.train import goodput, setup
from vit_jax.train.evaluations import Evaluations
from vit_jax.train.loop import train
from vit_jax.train.writers import read_lines


def tiny(**overrides):
  c = configs.load("configs/tiny.py")
  c.mesh.data = 1
  c.mesh.replica = 1
  c.log.pictures = False
  c.update_from_flattened_dict(overrides)
  return c


@pytest.fixture
def one_device(monkeypatch):
  """Runs see one device, as on most machines."""
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: device)


def command(workdir, *overrides):
  """A run of two resolutions, a superset of what a run of one does."""
  return [
    sys.executable, "-m", "vit_jax", "train", "--config=configs/tiny.py", f"--workdir={workdir}",
    "--config.duration=80 steps", "--config.checkpoint.every=2 steps", "--config.evaluation.every=0 steps",
    "--config.model.drop_path=0.3", "--config.log.pictures=False",
    "--config.crops.resolutions=((32,16,0,0.6),(48,24,0,0.4))", *overrides,
  ]  # fmt: skip


def run(tmp_path, workdir, *overrides):
  return subprocess.run(
    command(workdir, *overrides), cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=500
  )


def teacher_and_metrics(workdir):
  return restore_params(workdir, path=("teacher",)), (workdir / "metrics.jsonl").read_bytes()


def assert_same_end(ours, expected):
  chex.assert_trees_all_equal(ours[0], expected[0])
  assert ours[1] == expected[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  tmp_path = tmp_path_factory.mktemp("resume")
  done = run(tmp_path, tmp_path / "whole")
  assert done.returncode == 0, done.stderr
  return tmp_path, teacher_and_metrics(tmp_path / "whole")


def start_and_signal(tmp_path, workdir, number, *, after_step):
  with subprocess.Popen(command(workdir), cwd=ROOT, env=environment(tmp_path), stderr=subprocess.PIPE) as process:
    for _ in range(4000):
      if process.poll() is not None or any(step >= after_step for step in steps(workdir)):
        break
      time.sleep(0.02)
    process.send_signal(number)
    process.stderr.read()
  return process.returncode


def test_a_killed_run_goes_on_bit_for_bit(uninterrupted):
  tmp_path, expected = uninterrupted
  workdir = tmp_path / "killed"
  assert start_and_signal(tmp_path, workdir, signal.SIGKILL, after_step=2) == -signal.SIGKILL
  done = run(tmp_path, workdir)
  assert done.returncode == 0, done.stderr
  assert_same_end(teacher_and_metrics(workdir), expected)
  first, second = goodput.read(workdir)
  assert first["first"] == 0 and second["first"] >= 2 and second["last"] == 80
  assert first["seconds"]["restore"] == 0 < second["seconds"]["restore"]
  assert all(second["seconds"][part] > 0 for part in ("init", "compile", "data_wait", "step", "checkpoint"))
  assert "over 2 start(s), trained the model" in (workdir / "summary.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_first_and_goes_on_bit_for_bit(uninterrupted, number):
  tmp_path, expected = uninterrupted
  workdir = tmp_path / f"signal{number}"
  assert start_and_signal(tmp_path, workdir, number, after_step=2) == (75 if number == signal.SIGTERM else 130)
  done = run(tmp_path, workdir)
  assert done.returncode == 0, done.stderr
  assert_same_end(teacher_and_metrics(workdir), expected)


def test_every_resolution_is_compiled_trained_and_named(uninterrupted):
  tmp_path, _ = uninterrupted
  lines, timing = (read_lines(tmp_path / "whole" / name) for name in ("metrics.jsonl", "timing.jsonl"))
  sizes = [(line["global_size"], line["local_size"]) for line in lines]
  assert len(sizes) == 80 and set(sizes) == {(32, 16), (48, 24)}
  assert 31 <= sizes.count((32, 16)) <= 65  # 48 expected; four standard deviations
  compiled = {key for line in timing for key in line if key.startswith("compile_seconds")}
  assert compiled == {"compile_seconds/32/16", "compile_seconds/48/24"}


def test_running_again_says_that_it_is_complete(uninterrupted):
  tmp_path, _ = uninterrupted
  done = run(tmp_path, tmp_path / "whole")
  assert done.returncode == 0 and "complete" in done.stderr


def test_another_config_is_refused_with_its_differences_until_accepted(uninterrupted):
  tmp_path, _ = uninterrupted
  done = run(tmp_path, tmp_path / "whole", "--config.optim.clip=1.5")
  assert done.returncode == 2
  assert "optim.clip" in done.stderr and "--accept_config_change" in done.stderr
  accepted = run(tmp_path, tmp_path / "whole", "--config.optim.clip=1.5", "--accept_config_change")
  assert accepted.returncode == 0, accepted.stderr


def test_load_model_gives_the_teacher(uninterrupted):
  tmp_path, (teacher, _) = uninterrupted
  model, params = vit_jax.load_model(tmp_path / "whole")
  np.testing.assert_array_equal(params["cls_token"], teacher["backbone"]["cls_token"])
  features = model.apply({"params": params}, np.zeros((2, 32, 32, 3), np.float32))
  assert features.cls.shape == (2, 32) and features.patches.shape == (2, 16, 32)


@pytest.fixture
def photos(tmp_path):
  """A folder as people have them: formats, modes, sizes, sub-folders, and some files that are broken."""
  folder, rng = tmp_path / "photos", np.random.default_rng(0)
  for name in ("cats/deep", "dogs"):
    (folder / name).mkdir(parents=True)
  image = lambda mode, size=(48, 40): Image.fromarray(  # noqa: E731
    rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  ).convert(mode)
  for i in range(3):
    image("RGB").save(folder / f"cats/a{i}.jpg")
    image("RGB").save(folder / f"dogs/b{i}.png")
    image("RGB").save(folder / f"cats/deep/c{i}.webp")
  image("L").save(folder / "dogs/grey.png")
  image("RGBA").save(folder / "dogs/alpha.png")
  image("CMYK").save(folder / "dogs/print.jpg")
  image("P").save(folder / "dogs/palette.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  image("RGB").save(folder / "cats/rotated.jpg", exif=exif)
  image("RGB", (1, 1)).save(folder / "cats/pixel.png")
  (folder / "cats/empty.jpg").write_bytes(b"")
  (folder / "dogs/text.png").write_bytes(b"no image at all")
  whole = (folder / "cats/a0.jpg").read_bytes()
  (folder / "dogs/cut.jpg").write_bytes(whole[: len(whole) // 2])
  return folder


def test_a_folder_of_mixed_images_trains_and_names_the_broken_ones(photos, tmp_path, one_device):
  workdir = tmp_path / "run"
  config = tiny(**{"data.source": f"folder:{photos}", "data.max_bad_fraction": 0.5, "evaluation.every": "0 steps"})
  state = train(config, str(workdir))
  assert int(state.step) == 4
  bad = [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]
  named = " ".join(str(record) for record in bad)
  assert "empty.jpg" in named and "text.png" in named
  losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert np.all(np.isfinite(losses)) and len(losses) == 4


def test_a_batch_of_more_images_than_there_are_is_warned_of_once(photos, one_device, caplog):
  setup.prepare(tiny(**{"data.source": f"folder:{photos}", "batch_size": 64}))
  (line,) = [record.getMessage() for record in caplog.records if "batch_size" in record.getMessage()]
  images = len(setup.open_source(f"folder:{photos}"))
  assert line.startswith(f"batch_size=64: is more than the {images} images of data.source")
  assert "KoLeo" in line and "Sinkhorn-Knopp" in line
  caplog.clear()
  setup.prepare(tiny())
  assert "batch_size" not in caplog.text


def test_pictures_of_images_that_cannot_be_read_end_in_words(tmp_path, one_device):
  for i in range(3):
    (tmp_path / f"{i}.jpg").write_bytes(b"junk")
  evaluations = Evaluations(setup.prepare(tiny(**{"data.source": f"folder:{tmp_path}"})))
  with pytest.raises(Unreadable, match=r"none of the 3 images.*0\.jpg, can be read.*data\.source"):
    evaluations.pictures(None)


def test_the_loss_falls(tmp_path, one_device):
  overrides = {
    "duration": "60 steps", "model.layer_scale": 1.0, "schedules.lr.peak": 3e-2, "schedules.lr.warmup": "5 steps",
    "schedules.teacher_temperature.start": 0.01, "schedules.teacher_temperature.peak": 0.01,
    "schedules.teacher_temperature.end": 0.01, "optim.freeze_last_layer": "0 steps", "optim.layerwise_decay": 1.0,
    "evaluation.every": "0 steps", "checkpoint.every": "60 steps",
  }  # fmt: skip
  train(tiny(**overrides), str(tmp_path))
  values = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  first, last = (np.mean([v["dino_local"] + v["ibot"] for v in part]) for part in (values[:10], values[-10:]))
  assert last < first - 0.05


def test_scores_baselines_pictures_and_summary_are_written(tmp_path, one_device):
  train(tiny(**{"log.pictures": True, "evaluation.tasks": ("knn", "linear")}), str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  scored = [line["step"] for line in lines if "knn/top1" in line]
  assert scored == [0, 2, 4]
  assert {"linear/top1", "baseline/pixels/knn/top1", "baseline/histogram/knn/top1"} <= set(lines[0])
  names = {path.name.split("_")[0] for path in (tmp_path / "pictures").glob("*.png")}
  assert {"batch", "pca"} <= names
  assert (tmp_path / "summary.md").exists() and (tmp_path / "summary.png").exists()


def test_a_labelled_folder_without_a_test_split_is_scored_on_held_out_images(tmp_path, one_device, caplog):
  for name in ("cats", "dogs"):
    (tmp_path / "photos" / name).mkdir(parents=True)
    for i in range(12):
      pixels = np.random.default_rng([i, len(name), ord(name[0])]).integers(0, 256, (36, 36, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / f"photos/{name}/{i}.png")
  spec = f"folder:{tmp_path / 'photos'}"
  with caplog.at_level("INFO"):
    run = setup.prepare(tiny(**{"data.source": spec}))
    evaluations = Evaluations(run)
  assert run.evaluation_sources == (spec, None)
  assert f"tested on 2 held-out images of {spec}" in caplog.text
  names = [[part.describe(i) for i in range(len(part))] for part in evaluations._sources]
  assert [len(part) for part in names] == [22, 2] and len({*names[0], *names[1]}) == 24


def test_few_labelled_images_are_not_scored(photos, one_device, caplog):
  with caplog.at_level("INFO"):
    assert setup.prepare(tiny(**{"data.source": f"folder:{photos}"})).evaluation_sources is None
  assert "No evaluation during training" in caplog.text and "evaluation.test_source" in caplog.text


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"crops.global_size": 30}, ["crops.global_size", "30", "patch_size", "32"]),
    ({"crops.resolutions": ((32, 16, 0, 0.5), (44, 16, 0, 0.5))}, ["crops.resolutions", "44", "patch_size", "48"]),
    ({"crops.gram_size": 44}, ["crops.gram_size=44", "patch_size", "48"]),
    ({"data.source": "folder:/nowhere/at/all"}, ["/nowhere/at/all"]),
    ({"model.num_heads": 3}, ["num_heads", "3"]),
    ({"model.name": "dinov3_vits17"}, ["dinov3_vits17", "dinov3_vits16"]),
    ({"koleo.topk": 8}, ["koleo", "topk"]),
    ({"koleo.group_size": 1}, ["koleo.topk=1", "1 image(s)", "koleo.group_size"]),
    ({"batch_size": 1}, ["koleo.topk=1", "1 image(s)", "batch_size"]),
    ({"ibot.mask_ratio": (0.1, 1.5)}, ["ibot.mask_ratio=(0.1, 1.5)", "0 <= low <= high <= 1"]),
    ({"ibot.mask_ratio": (0.01, 0.02)}, ["ibot.mask_ratio=(0.01, 0.02)", "none of the 4 x 4 patches"]),
    ({"crops.global_size": 4}, ["crops.global_size=4", "multiple of 8", "for example 8"]),
    ({"crops.local_size": 4}, ["crops.local_size=4", "multiple of 8", "for example 8"]),
    (
      {"evaluation.train_source": "embedded:textures?size=32", "evaluation.test_source": "embedded:textures/train"},
      ["evaluation.test_source='embedded:textures/train'", "evaluation.train_source", "nearest neighbour"],
    ),
    ({"evaluation.image_size": 4}, ["evaluation.image_size=4", "smaller than a patch", "8 pixels"]),
    ({"evaluation.image_size": 37}, ["evaluation.image_size=37", "multiple of 8", "32 or 40"]),
    ({"micro_batches": 3}, ["micro_batches=3", "batch_size=8", "choose micro_batches=2"]),
    ({"mesh.data": 3}, ["mesh.data=3"]),
    ({"evaluation.tasks": ("knm",)}, ["knm", "knn"]),
  ],
)
def test_what_cannot_work_is_said_before_anything_is_compiled(overrides, words, tmp_path, one_device):
  start = time.monotonic()
  with pytest.raises(configs.UserError) as error:
    train(tiny(**overrides), str(tmp_path / "run"))
  assert all(word in str(error.value) for word in words), str(error.value)
  assert time.monotonic() - start < 20
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_crops_made_on_the_device_are_those_of_the_host_and_train(tmp_path, one_device):
  crops = {}
  for where in ("host", "device"):
    run = setup.prepare(tiny(**{"data.augment": where}))
    with make_pipeline(run.source, run.views, batch_size=run.config.batch_size, seed=0, workers=0) as batches:
      crops[where] = run.views.on_device(jax.device_put(next(batches)), run.mesh, parallel.BATCH_AXES)
  assert crops["host"].keys() == crops["device"].keys()
  for name, ours in crops["device"].items():
    difference = np.abs(np.asarray(ours, np.float32) - np.asarray(crops["host"][name], np.float32))
    assert difference.mean() <= (0.5 if name.endswith("crops") else 0), name
  c = tiny(**{"data.augment": "device", "duration": "2 steps", "evaluation.every": "0 steps", "log.pictures": True})
  train(c, str(tmp_path))
  assert np.isfinite([line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]).all()
  assert (tmp_path / "pictures").is_dir()
