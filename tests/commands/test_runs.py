"""Every sub-command on a real run: train, resume, describe, evaluate, export, inspect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import cli

RUN_FILE = Path(__file__).parents[2] / "configs" / "tiny.py"
TINY = [f"--config={RUN_FILE}", "--config.batch_size=16", "--config.loss_group_size=2"]  # a group for each of 8 devices


SOURCE = "--data=embedded:textures?size=32&count=64"


def run(capsys: pytest.CaptureFixture, *argv: str) -> str:
  """What a command line that succeeds prints."""
  assert cli.main(argv) == 0
  return capsys.readouterr().out


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A complete run, in its folder."""
  path = tmp_path_factory.mktemp("runs") / "tiny"
  assert cli.main(["train", *TINY, f"--workdir={path}"]) == 0
  return path


@pytest.fixture
def in_runs(workdir, monkeypatch):
  """The folder beside the run as the current one: paths in commands are relative."""
  monkeypatch.chdir(workdir.parent)
  return workdir.parent


def metrics(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_metrics_scores_and_a_summary(workdir):
  lines = metrics(workdir)
  losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
  assert sorted(losses) == [1, 2, 3, 4]
  assert all(np.isfinite(loss) for loss in losses.values())
  assert {line["step"] for line in lines if "knn/top1" in line} == {0, 2, 4}
  assert (workdir / "summary.md").exists()


def test_a_run_is_shown_as_it_is_now_and_left_as_it_is(in_runs, capsys):
  before = {path: path.stat().st_mtime_ns for path in (in_runs / "tiny").rglob("*")}
  out = run(capsys, "inspect", "run", "tiny")
  assert "last recorded step: 4 of 4" in out and "k-NN top-1 (k = 10)" in out and "with depth=2" in out
  assert {path: path.stat().st_mtime_ns for path in (in_runs / "tiny").rglob("*")} == before
  assert cli.main(["inspect", "run", "none"]) == 2
  assert "none: no run is there" in capsys.readouterr().err


def test_the_same_command_again_says_that_the_run_is_complete(workdir, caplog):
  before = metrics(workdir)
  with caplog.at_level("INFO", "vit_jax"):
    assert cli.main(["train", *TINY, f"--workdir={workdir}"]) == 0
  assert "The run is complete" in caplog.text
  assert metrics(workdir) == before


def test_another_config_is_refused_with_its_differences(workdir, capsys):
  for flags in ([], ["--dry_run"]):
    assert cli.main(["train", *TINY, f"--workdir={workdir}", "--config.seed=3", *flags]) == 2
    out, error = capsys.readouterr()
    assert "seed: 0 -> 3" in error and not out
  run(capsys, "train", *TINY, f"--workdir={workdir}", "--config.seed=3", "--dry_run", "--accept_config_change")


def test_dry_run_shows_the_plan_and_writes_nothing(capsys, tmp_path):
  out = run(capsys, "train", *TINY, f"--workdir={tmp_path}/new", "--dry_run", "--config.duration=8 steps")
  for part in ("'8 steps'", "steps         8", "training step, per image", "devices       8"):
    assert part in out
  assert not (tmp_path / "new").exists()


def test_all_resolutions_are_shown(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rows = "--config.crops.resolutions=((32,16,48,0.75),(64,16,96,0.25))"
  out = run(capsys, "train", *TINY, f"--workdir={tmp_path}/new", "--dry_run", rows)
  assert "global/local/gram of 32/16/48 pixels (75.0%), 64/16/96 pixels (25.0%)" in out
  assert "training step at 64/16/96 (25.0% of the steps), per image" in out
  heights = []
  for name, overrides in (("one", ["--config.crops.gram_size=48"]), ("several", [rows])):
    run(capsys, "inspect", "batch", *TINY, f"--output={name}.png", *overrides)
    heights.append(np.asarray(Image.open(f"{name}.png")).shape[0])
  assert heights[1] > heights[0]


def test_evaluate_prints_and_writes_scores(in_runs, capsys):
  source = "--data=embedded:textures?size=32&count=64"
  out = run(capsys, "evaluate", "--model=tiny", "--tasks=knn", source, "--max_examples=32", "--json=s.json")
  assert "knn/top1" in out
  assert "knn/top1" in (in_runs / "s.json").read_text()


def test_scores_are_printed_though_their_file_cannot_be_written(in_runs, capsys):
  arguments = ["evaluate", "--model=tiny", SOURCE, "--max_examples=32", "--json=/dev/full"]
  assert cli.main(arguments) == 2
  out, error = capsys.readouterr()
  assert "knn/top1" in out
  assert error.endswith("vit-jax: /dev/full: the scores cannot be written there: No space left on device.\n")


def test_a_task_that_fails_leaves_the_scores_of_the_others_and_an_exit_code(in_runs, capsys, tmp_path):
  for name, image in (("a", 0), ("b", 90), ("c", 200)):  # one image of each class: none to choose the probe's rate on
    for split in ("train", "test"):
      (tmp_path / split / name).mkdir(parents=True)
      Image.new("RGB", (32, 32), (image, image, 255 - image)).save(tmp_path / split / name / f"{split}.png")
  file = tmp_path / "scores.json"
  data = f"--data=folder:{tmp_path}/train"
  assert cli.main(["evaluate", "--model=tiny", data, "--tasks=linear,knn", f"--json={file}"]) == 1
  out, error = capsys.readouterr()
  assert "knn/top1" in out and "linear" not in out
  assert "vit-jax: not scored: linear, baseline/untrained/linear" in error and "one image only" in error
  written = json.loads(file.read_text())
  assert {"knn/top1", "baseline/majority/knn/top1"} < set(written["results"])
  assert "one image only" in written["failed"]["linear"]


def test_export_keeps_the_features_in_every_format(in_runs, capsys):
  image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)

  def features(path: str) -> np.ndarray:
    model, params = vit_jax.load_model(path)
    return np.asarray(model.apply({"params": params}, image).cls)

  expected = features("tiny")
  for format, path in {"safetensors": "a", "pth": "b.pth", "orbax": "c"}.items():
    out = run(capsys, "export", "--model=tiny", f"--to={path}", f"--format={format}")
    assert out.startswith(f"wrote {path} ({format})\n\n# vit_jax\nimport vit_jax\n")
    np.testing.assert_allclose(features(path), expected, rtol=1e-6, atol=1e-6)


def test_convert_goes_from_any_format_to_any(in_runs, capsys):
  image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)

  def features(path: str) -> np.ndarray:
    model, params = vit_jax.load_model(path)
    return np.asarray(model.apply({"params": params}, image).cls)

  expected, source = features("tiny"), "tiny"
  for format, path in {"safetensors": "1", "pth": "2.pth", "orbax": "3"}.items():
    out = run(capsys, "convert", f"--from={source}", f"--to={path}", f"--format={format}")
    assert out.startswith(f"wrote {path} ({format})\n\n# vit_jax\nimport vit_jax\n")
    np.testing.assert_allclose(features(path), expected, rtol=1e-6, atol=1e-6)
    source = path


def test_export_says_how_images_were_prepared(in_runs, capsys):
  run(capsys, "export", "--model=tiny/checkpoints/2", "--to=two")
  assert vit_jax.hub.load_preprocessing("two") == vit_jax.hub.load_preprocessing("tiny")
  assert vit_jax.hub.load_preprocessing("two").image_size == 32


def test_inspect_config_marks_what_the_run_file_changes(capsys):
  lines = run(capsys, "inspect", "config", *TINY).splitlines()
  assert any(line.split()[:3] == ["*", "batch_size", "16"] for line in lines)
  assert any(line.split() == ["koleo.topk", "1"] for line in lines)


def test_inspect_model_is_printed_or_written(capsys, tmp_path):
  out = run(capsys, "inspect", "model", *TINY)
  assert "parameters" in out
  assert run(capsys, "inspect", "model", *TINY, f"--output={tmp_path}/t.txt") == f"wrote {tmp_path}/t.txt\n"
  assert (tmp_path / "t.txt").read_text() == out


def test_inspect_pictures_say_where_they_are(in_runs, capsys):
  assert run(capsys, "inspect", "batch", *TINY, "--output=b.png") == "wrote b.png\n"
  source = "--data=embedded:textures/test?size=32&count=8"
  out = run(capsys, "inspect", "features", "--model=tiny", source, "--image_size=48", "--images=3", "--output=f.png")
  assert out == "wrote f.png\n"
  for name in ("b.png", "f.png"):
    assert np.asarray(Image.open(name)).std() > 10  # a picture of something


@pytest.mark.parametrize(
  ("command", "message"),
  [
    (
      "evaluate --image_size=37",
      "--image_size=37: must be a multiple of 8, the pixels of a patch of the model: 32 or 40",
    ),
    ("evaluate --tasks=foo", "--tasks: there is no task 'foo'; valid: knn, linear."),
    ("evaluate --tasks=", "--tasks: there is no task ''; valid: knn, linear."),
    ("evaluate --image_size=4", "--image_size=4: is smaller than a patch of the model, 8 pixels"),
    ("inspect features --image_size=50", "--image_size=50: must be a multiple of 8"),
    ("evaluate --test_data=embedded:textures/train", "learned from: each would be its own nearest neighbour"),
    ("evaluate --data=synthetic:noise?count=9", "or name labelled sources in --data and --test_data"),
    ("inspect features --output=x.foo", "--output=x.foo: pictures are written as .png, "),
  ],
)
def test_options_that_do_not_fit_are_refused(in_runs, capsys, command, message):
  assert cli.main([*command.split(), "--model=tiny", *[SOURCE] * ("--data=" not in command)]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_grey_model_without_class_token_trains_is_scored_and_exported(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  grey = ["--config.model.in_channels=1", "--config.augment.mean=0.45", "--config.augment.std=0.22"]
  other = ["--config.model.positions=learned", "--config.model.class_token=false", "--config.model.pool=avg"]
  other += ["--config.model.mask_k_bias=false"]  # of which timm knows nothing
  assert cli.main(["train", *TINY, "--workdir=run", *grey, *other]) == 0
  lines = metrics(Path("run"))
  assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
  assert {line["step"] for line in lines if "knn/top1" in line} == {0, 2, 4}
  source = "--data=embedded:textures?size=32&count=64"
  for format, path in {"timm": "m.safetensors", "orbax": "m"}.items():
    run(capsys, "export", "--model=run", f"--to={path}", f"--format={format}")
    model, params = vit_jax.load_model(path, num_heads=2)
    assert (model.in_channels, model.pool, model.class_token) == (1, "avg", False)
    assert "knn/top1" in run(capsys, "evaluate", f"--model={path}", source, "--max_examples=32")
  assert cli.main(["train", *TINY, "--workdir=other", "--config.model.in_channels=4", *(
    f"--config.augment.{key}=(0.5,0.5,0.5,0.5)" for key in ("mean", "std")
  )]) == 2  # fmt: skip
  said = capsys.readouterr().err
  assert "model.in_channels=4: embedded:textures" in said and "data.source=embedded:textures" in said
