"""Distillation as a run: which teacher it is, what is saved, going on, what users are told."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

import vit_jax
from tests.methods.teacher import WIDTH, distilling, save_teacher
from vit_jax import cli, weights
from vit_jax import config as configs
from vit_jax.checkpoints import read_meta, restore_params, steps
from vit_jax.methods.frozen_teacher import frozen_teacher
from vit_jax.train import dry_run, loop, setup
from vit_jax.weights.pth import read_pth, write_pth

TWO = "distillation.students=(a=configs/tiny.py,b=configs/tiny.py)"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs see one device, as on most machines."""
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: device)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return save_teacher(tmp_path_factory.mktemp("big"))


def raw(teacher, *overrides):
  """An unresolved config that distils, as from the command line."""
  quiet = ("mesh.data=1", "log.pictures=False", "log.tensorboard=False", "checkpoint.every=2 steps")
  method = ("method=distillation", f"distillation.teacher={teacher}")
  return configs.load("configs/tiny.py", [*quiet, *method, *overrides])


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
  """A complete run of two students."""
  workdir = tmp_path_factory.mktemp("students") / "run"
  with pytest.MonkeyPatch.context() as patch:
    device = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: device)
    state = loop.train(raw(teacher, TWO, "students.b.model.width=16"), str(workdir))
  return workdir, jax.device_get(state.saved())


def test_checkpoints_hold_the_students_and_not_the_teacher(finished):
  workdir, state = finished
  manifest = read_meta(workdir)["manifest"]
  assert {name.split("/")[0] for name in manifest} == {"step", "student", "teacher", "opt_state", "key", "counters"}
  assert {name.split("/")[1] for name in manifest if name.startswith("student/")} == {"a", "b"}
  saved = restore_params(workdir, path=("teacher", "b", "backbone"))
  np.testing.assert_array_equal(saved["cls_token"], state.teacher["b"]["backbone"]["cls_token"])


def test_the_saved_config_names_the_teachers_step_and_fingerprint(finished, teacher):
  saved = configs.read(finished[0] / "config.json")
  assert saved.distillation.teacher == str(teacher / "checkpoints" / "4")
  assert saved.distillation.fingerprint == frozen_teacher(saved).fingerprint
  alone = configs.read(finished[0] / "students" / "b" / "config.json")
  configs.validate(alone)
  assert alone.model.width == 16 and alone.distillation.students == ()


def test_each_student_is_scored_beside_the_frozen_teacher(finished):
  lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
  assert {"a/knn/top1", "b/knn/top1", "baseline/teacher/knn/top1", "baseline/pixels/knn/top1"} <= set(lines[0])
  last = next(line for line in lines if line["step"] == 4 and "a/loss" in line)
  assert {"a/dino_local", "b/ibot", "b/lr", "b/feature_std", "teacher_entropy"} <= set(last)
  page = (finished[0] / "summary.md").read_text()
  assert "# Student a" in page and "# Student b" in page and "frozen teacher" in page
  assert (finished[0] / "summary_a.png").exists()


def test_load_model_opens_every_student_of_every_step(finished):
  workdir, state = finished
  model, params = vit_jax.load_model(workdir / "students" / "b")
  assert model.width == 16
  np.testing.assert_array_equal(params["cls_token"], state.teacher["b"]["backbone"]["cls_token"])
  assert vit_jax.load_model(workdir / "checkpoints" / "2" / "students" / "a")[0].width == 32
  for wrong in (workdir, workdir / "students" / "c"):
    with pytest.raises(vit_jax.hub.UnknownModel, match="students/a or .*students/b"):
      vit_jax.load_model(wrong)


def test_a_stopped_run_goes_on_bit_for_bit_with_the_same_teacher(finished, teacher, tmp_path):
  workdir, expected = finished
  copy, theirs = tmp_path / "run", shutil.copytree(teacher, tmp_path / "big")
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  save_teacher(theirs, step=6, seed=1)  # it has trained on since: the distillation stays with the step it began with
  config = raw(theirs, TWO, "students.b.model.width=16")
  saved = json.loads((copy / "config.json").read_text())
  saved["distillation"]["teacher"] = str(theirs / "checkpoints" / "4")
  (copy / "config.json").write_text(json.dumps(saved))
  state = loop.train(config, str(copy))
  assert steps(copy) == (2, 4)
  for a, b in zip(jax.tree.leaves(state.saved()), jax.tree.leaves(expected), strict=True):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)
  assert (copy / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_another_teacher_is_refused_and_a_moved_one_is_not(finished, teacher, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  overrides = (TWO, "students.b.model.width=16")
  other = save_teacher(tmp_path / "other", seed=1)
  with pytest.raises(configs.ConfigError, match="distillation.fingerprint: .* -> "):
    loop.train(raw(other, *overrides), str(workdir))
  moved = shutil.copytree(teacher, tmp_path / "moved")
  assert int(loop.train(raw(moved, *overrides), str(workdir)).step) == 4
  with pytest.raises(configs.ConfigError, match="distillation.fingerprint='0000'"):
    loop.train(raw(teacher, *overrides, "distillation.fingerprint=0000"), str(tmp_path / "new"))


def export_file(teacher, path, *, heads=True):
  """A training export of a teacher run, with the reference's names."""
  net, params = frozen_teacher(distilling(teacher)).modules, restore_params(teacher, path=("teacher",))
  tensors = {}
  for name in ("backbone", "dino_head", "ibot_head") if heads else ("backbone",):
    found = weights.to_state_dict(params[name], getattr(net, name))
    tensors |= {f"{name}.{key}": value for key, value in found.items()}
  write_pth(path, tensors)
  return path


def test_a_training_export_is_the_same_teacher_as_its_run(teacher, tmp_path):
  file = export_file(teacher, tmp_path / "teacher.pth")
  ours, theirs = frozen_teacher(distilling(file)), frozen_teacher(distilling(teacher))
  assert ours.fingerprint == theirs.fingerprint
  assert ours.modules.dino_head == theirs.modules.dino_head
  assert ours.modules.backbone.width == WIDTH


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["distillation.teacher=/nowhere"], "distillation.teacher='/nowhere': is neither a run"),
    (["dino.prototypes=64"], "dino.prototypes=64: must equal the 32 of the frozen teacher"),
    (["ibot.prototypes=16"], "ibot.prototypes=16: must equal the 32 .*--config.ibot.prototypes=32"),
    (["augment.mean=(0.5,0.5,0.5)"], r"augment.mean=\(0.5, 0.5, 0.5\): the frozen teacher"),
    ([TWO, "students.b.model.patch_size=16"], "distillation.students: .*a 4 x 4, b 2 x 2"),
    ([TWO, "students.b.model.num_heads=3"], "students.b.model.width=32"),
    (["distillation.students=(a)"], "must be name=file.py"),
    (["crops.global_size=36"], "crops.global_size=36: must be a multiple of 8"),
  ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(teacher, overrides, message):
  with pytest.raises(configs.ConfigError, match=message):
    setup.prepare(raw(teacher, *overrides))


def test_a_teacher_that_is_not_finite_is_refused_by_name(teacher, tmp_path):
  tensors = read_pth(export_file(teacher, tmp_path / "teacher.pth"))
  values = np.array(tensors["backbone.norm.bias"])
  values[1] = np.inf
  write_pth(tmp_path / "teacher.pth", tensors | {"backbone.norm.bias": values})
  for act in (loop.train, dry_run.describe):
    with pytest.raises(configs.ConfigError, match="^distillation.teacher=.*infinity in backbone/final_norm/bias:"):
      act(raw(tmp_path / "teacher.pth"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_teacher_without_heads_is_refused_with_what_to_do(teacher, tmp_path):
  file = export_file(teacher, tmp_path / "backbone.pth", heads=False)
  with pytest.raises(configs.ConfigError, match="no dino_head and no ibot_head.*init_from"):
    setup.prepare(raw(file))


def test_a_student_may_teach_and_must_be_named(finished):
  workdir, state = finished
  config = raw(workdir / "students" / "b")
  setup.prepare(config)
  params = frozen_teacher(config).params()
  np.testing.assert_array_equal(params["dino_head"]["fc1"]["kernel"], state.teacher["b"]["dino_head"]["fc1"]["kernel"])
  with pytest.raises(configs.ConfigError, match="several students: give .*students/a or .*students/b"):
    setup.prepare(raw(workdir))


@pytest.mark.slow
def test_pretrain_distil_into_two_students_load_and_evaluate_by_command(tmp_path, capsys):
  common = ["--config=configs/tiny.py", "--config.mesh.data=1", "--config.log.pictures=False"]
  assert cli.main(["train", *common, f"--workdir={tmp_path}/big", "--config.model.width=64"]) == 0
  distil = [
    "--config.method=distillation", f"--config.distillation.teacher={tmp_path}/big",
    "--config.distillation.students=(vit=configs/tiny.py,deep=configs/tiny.py)", "--config.students.deep.model.depth=3",
  ]  # fmt: skip
  assert cli.main(["train", *common, *distil, f"--workdir={tmp_path}/small", "--dry_run"]) == 0
  shown = capsys.readouterr().out
  assert "student deep" in shown and "frozen teacher" in shown
  assert cli.main(["train", *common, *distil, f"--workdir={tmp_path}/small"]) == 0
  for name, depth in (("vit", 2), ("deep", 3)):
    student = f"{tmp_path}/small/students/{name}"
    assert vit_jax.load_model(student)[0].depth == depth
    data = "--data=embedded:textures/train?size=32&count=64"
    scores = tmp_path / f"{name}.json"
    arguments = [f"--model={student}", data, "--max_examples=32", "--batch_size=16", f"--json={scores}"]
    assert cli.main(["evaluate", *arguments]) == 0
    assert "knn/top1" in scores.read_text()
    assert cli.main(["export", f"--model={student}", f"--to={tmp_path}/{name}"]) == 0
    assert vit_jax.load_model(tmp_path / name)[0].depth == depth
