"""Starting from runs and weight files: what is taken, what stays fresh, what is refused."""

from __future__ import annotations

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from tests.weights.torch_pickle import save_distributed
from vit_jax import config as configs
from vit_jax import weights
from vit_jax.checkpoints import Checkpoints
from vit_jax.methods.architecture import attributes, config_keys
from vit_jax.methods.dino import dinov3
from vit_jax.methods.settings import build_backbone
from vit_jax.models import MODELS, create_model
from vit_jax.train import dry_run, loop, setup, starting
from vit_jax.weights.pth import read_pth, write_pth


def tiny(**overrides):
  c = configs.load("configs/tiny.py")
  c.mesh.fsdp, c.mesh.data, c.batch_size, c.loss_group_size = 2, 4, 8, 1
  c.koleo.loss_weight = 0.0
  c.update_from_flattened_dict({"ibot.mask_probability": 0.5} | overrides)
  return c


@functools.cache
def trained():
  """Parameters that differ from any fresh ones, and between student and teacher."""
  config = configs.resolve(tiny(), num_examples=64)
  shapes = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  rng = np.random.default_rng(0)
  fill = lambda tree: jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), tree)  # noqa: E731
  state = shapes.replace(student=fill(shapes.student), teacher=fill(shapes.teacher))
  qkv = state.teacher["backbone"]["blocks"]["attn"]["qkv"]
  qkv["bias"] = qkv["bias"].at[:, 1].set(0)  # without effect, and not in every format
  zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)  # noqa: E731
  return config, state.replace(
    step=jnp.int32(3), opt_state=zeros(shapes.opt_state), key=jax.random.key(1), counters=zeros(shapes.counters)
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A run with two steps, of which the later one has other parameters."""
  folder = tmp_path_factory.mktemp("source") / "run"
  config, state = trained()
  later = state.replace(teacher=jax.tree.map(lambda x: x + 1, state.teacher))
  with Checkpoints(folder) as checkpoints:
    for step, saved in ((3, state), (5, later)):
      checkpoints.save(step, saved, {}, configs.to_dict(config), {})
  return folder


def started(**overrides):
  """A fresh state with what its sources give, and the report."""
  run = setup.prepare(tiny(**overrides))
  opened = starting.open_sources(run, loop.abstract_state(run))
  return starting.begin(loop.fresh_state(run), opened), starting.report(opened)


def assert_same(a, b):
  chex.assert_trees_all_equal(a, b)


def refusal(**overrides):
  run = setup.prepare(tiny(**overrides))
  with pytest.raises(configs.ConfigError) as caught:
    starting.open_sources(run, loop.abstract_state(run))
  return str(caught.value)


def test_student_and_teacher_start_from_the_average_of_the_newest_step(source):
  state, report = started(init_from=str(source))
  _, saved = trained()
  expected = jax.tree.map(lambda x: x + 1, saved.teacher)
  assert_same(state.student, expected)
  assert_same(state.teacher, expected)
  assert int(state.step) == 0 and not np.any(state.opt_state.mu["backbone"]["cls_token"])
  assert "fresh" not in report and report.count("step 5") == 3
  shardings = jax.tree.map(lambda leaf: leaf.sharding, loop.abstract_state(setup.prepare(tiny())))
  for leaf, sharding in zip(jax.tree.leaves(state.student), jax.tree.leaves(shardings.student), strict=True):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_step_is_named_by_its_folder_and_the_gram_teacher_has_a_source_of_its_own(source):
  step = source / "checkpoints" / "3"
  state, report = started(**{"init_from": str(source), "gram.source": str(step)})
  _, saved = trained()
  assert_same(state.own["gram_teacher"], saved.teacher["backbone"])
  assert_same(state.teacher["ibot_head"], jax.tree.map(lambda x: x + 1, saved.teacher["ibot_head"]))
  lines = [line for line in report.splitlines() if "gram_teacher" in line]
  assert len(lines) == 1 and "step 3" in lines[0]


def test_the_gram_teacher_of_source_init_is_the_backbone_that_the_run_starts_from(source):
  state, report = started(**{"init_from": str(source), "gram.source": "init"})
  assert_same(state.own["gram_teacher"], state.teacher["backbone"])
  assert_same(state.own["gram_teacher"]["cls_token"], trained()[1].teacher["backbone"]["cls_token"] + 1)
  assert "backbone (student, teacher, gram_teacher)" in report


def test_a_head_of_another_size_stays_fresh_and_the_report_says_why(source):
  state, report = started(**{"init_from": str(source), "ibot.prototypes": 64})
  _, saved = trained()
  assert_same(state.teacher["dino_head"], jax.tree.map(lambda x: x + 1, saved.teacher["dino_head"]))
  assert state.teacher["ibot_head"]["last_layer"]["kernel"].shape == (16, 64)
  assert_same(state.student["ibot_head"], state.teacher["ibot_head"])
  line = next(line for line in report.splitlines() if line.startswith("ibot_head"))
  assert "fresh" in line and "last_layer/kernel: [16, 32] there, [16, 64] here" in line
  assert "freeze_backbone_steps" in report


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """The trained backbone as people publish weights, and a training export with heads."""
  folder = tmp_path_factory.mktemp("files")
  config, state = trained()
  model, params = build_backbone(config), state.teacher["backbone"]
  vit_jax.save_model(folder / "hf", model, params)
  vit_jax.save_model(folder / "flat.pth", model, params, "pth")
  vit_jax.save_model(folder / "orbax", model, params, "orbax")
  export = {}
  for name, module in dinov3.modules(config)._asdict().items():
    export |= {f"{name}.{k}": v for k, v in weights.to_state_dict(state.teacher[name], module).items()}
  write_pth(folder / "export.pth", export)
  return folder


@pytest.mark.parametrize("name", ["hf", "hf/model.safetensors", "flat.pth", "orbax"])
def test_a_public_backbone_comes_without_heads(files, name):
  state, report = started(init_from=str(files / name))
  assert_same(state.student["backbone"], trained()[1].teacher["backbone"])
  assert_same(state.teacher["backbone"], trained()[1].teacher["backbone"])
  assert_same(state.student["dino_head"], state.teacher["dino_head"])
  assert f"fresh: no dino_head in {files / name}" in report


def test_a_training_export_brings_its_heads(files):
  state, report = started(init_from=str(files / "export.pth"))
  assert_same(state.teacher, trained()[1].teacher)
  assert "fresh" not in report
  state, report = started(**{"init_from": str(files / "export.pth"), "dino.prototypes": 64})
  assert state.teacher["dino_head"]["last_layer"]["kernel"].shape == (16, 64)
  assert "last_layer.weight is (32, 16), expected (64, 16)" in report


@pytest.mark.parametrize("key", ["init_from", "gram.source"])
def test_weights_that_are_not_finite_are_refused_by_name_before_anything_is_made(files, key, tmp_path):
  tensors = read_pth(files / "export.pth")
  for name, bad in (("norm.bias", np.nan), ("blocks.1.mlp.fc1.weight", np.inf)):
    values = np.array(tensors[f"backbone.{name}"])
    values.reshape(-1)[-1] = bad
    write_pth(tmp_path / "bad.pth", tensors | {f"backbone.{name}": values})
    text = refusal(**{key: str(tmp_path / "bad.pth")})
    assert text.startswith(f"{key}=") and f"NaN or infinity in {name}:" in text
    for act in (loop.train, dry_run.describe):
      with pytest.raises(configs.ConfigError, match="NaN or infinity"):
        act(tiny(**{key: str(tmp_path / "bad.pth")}), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  values = np.full_like(tensors["dino_head.mlp.0.bias"], np.nan)
  write_pth(tmp_path / "bad.pth", tensors | {"dino_head.mlp.0.bias": values})
  if key == "init_from":
    assert "NaN or infinity in mlp.0.bias" in refusal(init_from=str(tmp_path / "bad.pth"))
  else:  # of which only the backbone is taken
    started(**{key: str(tmp_path / "bad.pth")})


def test_a_run_that_is_not_finite_is_no_start(tmp_path):
  config, state = trained()
  backbone = state.teacher["backbone"]
  bad = backbone | {"final_norm": jax.tree.map(lambda leaf: leaf * np.nan, backbone["final_norm"])}
  with Checkpoints(tmp_path / "run") as saved:
    saved.save(7, state.replace(teacher=state.teacher | {"backbone": bad}), {}, configs.to_dict(config), {})
  with pytest.raises(configs.ConfigError, match=r"NaN or infinity in backbone/final_norm/\w+, backbone/final_norm/"):
    started(init_from=str(tmp_path / "run"))


def test_a_training_checkpoint_of_the_reference_is_a_start(files, tmp_path):
  tensors = read_pth(files / "export.pth")
  save_distributed(tmp_path / "3749", {f"model.model_ema.{name}": value for name, value in tensors.items()}, rows=50)
  state, report = started(init_from=str(tmp_path / "3749"))
  assert_same(state.teacher, trained()[1].teacher)
  assert "fresh" not in report


def test_what_only_training_uses_may_be_missing(files):
  state, report = started(**{"init_from": str(files / "hf"), "model.separate_local_cls_norm": True})
  np.testing.assert_array_equal(state.student["backbone"]["local_cls_norm"]["scale"], 1)
  assert_same(state.student["backbone"]["blocks"], trained()[1].teacher["backbone"]["blocks"])
  assert "local_cls_norm/scale" in report and "only used in training" in report


@pytest.mark.parametrize("key", ["init_from", "gram.source"])
@pytest.mark.parametrize("kind", ["run", "file"])
def test_another_architecture_is_refused_with_the_keys_that_would_fit(source, files, key, kind):
  path = source if kind == "run" else files / "flat.pth"
  text = refusal(**{key: str(path), "model.width": 64, "model.mlp_hidden": 128, "model.num_registers": 2})
  assert text.startswith(f"{key}={str(path)!r}: holds another backbone")
  assert "width: 32 there, 64 here" in text and "num_registers: 4 there, 2 here" in text
  assert "blocks/attn/proj/kernel: [2, 2, 16, 32] there" in text
  changes = [word.removeprefix("--config.") for word in text.split() if word.startswith("--config.")]
  assert set(changes) == {"model.width=32", "model.mlp_hidden=64", "model.num_registers=4"}


def test_other_positions_of_the_same_shapes_are_refused(source):
  text = refusal(**{"init_from": str(source), "model.rope.base": 50.0})
  assert "rope.base: 100.0 there, 50.0 here" in text and "--config.model.rope.base=100.0" in text


def test_another_epsilon_is_only_said(source):
  _, report = started(**{"init_from": str(source), "model.norm_eps": 1e-6})
  assert "norm_eps: 1e-05 there, 1e-06 here" in report


def test_what_is_not_there_is_said_with_what_could_be(tmp_path, source):
  text = refusal(init_from=str(tmp_path / "nothing"))
  assert text.startswith("init_from=") and "checkpoints" in text and ".pth" in text
  assert "step 4" in refusal(init_from=str(source / "checkpoints" / "4"))
  (tmp_path / "text.pth").write_text("no weights")
  assert "zip" in refusal(init_from=str(tmp_path / "text.pth"))
  (tmp_path / "folder").mkdir()
  assert "model.safetensors" in refusal(init_from=str(tmp_path / "folder"))


def test_a_refused_source_leaves_no_workdir(tmp_path):
  with pytest.raises(configs.ConfigError):
    loop.train(tiny(init_from=str(tmp_path / "nothing")), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_dry_run_reports_the_sources(source, tmp_path):
  overrides = {"init_from": str(source), "gram.source": "init", "gram.refresh.every": "2 steps"}
  text = dry_run.describe(tiny(**overrides), str(tmp_path / "new"))
  assert f"init from     {source}" in text and "refreshed with the EMA teacher every 2 steps" in text
  assert "backbone (student, teacher, gram_teacher)" in text
  assert "goes on from step 5" in dry_run.describe(tiny(**overrides), str(source), accept_config_change=True)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_keys_for_any_model_of_the_zoo_give_its_architecture(name):
  config = configs.load("configs/tiny.py")
  model = create_model(name)
  keys, beyond = config_keys(model, config)
  assert not beyond
  config.update_from_flattened_dict(keys)
  assert attributes(build_backbone(config)) == attributes(model)


def test_keys_that_no_config_has_are_named():
  model = create_model("dinov3_vits16", layer_scale=None)
  keys, beyond = config_keys(model, configs.load("configs/tiny.py"))
  assert "layer_scale=None" in beyond and keys["model.depth"] == 12
  assert json.dumps(keys)
