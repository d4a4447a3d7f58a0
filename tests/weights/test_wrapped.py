"""Checkpoints of training as people have them: whatever is wrapped around a backbone, it opens, and what was taken off
is said; or the error is one line with the way out."""

from __future__ import annotations

import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import vit_jax
from tests.weights.test_broken_files import CONVNEXT, DINOV2, DINOV3, VIT, random_params
from tests.weights.torch_pickle import Raw, Tensor, call, made, name, pickled, save, save_distributed, save_old
from vit_jax import hub, weights
from vit_jax.models import ProjectionHead
from vit_jax.weights import WeightsError
from vit_jax.weights.distributed import open_distributed
from vit_jax.weights.files import SINGLE, read_safetensors
from vit_jax.weights.opening import open_weights

DATA = pathlib.Path(__file__).parent / "data"
MODELS = {"dinov3": DINOV3, "dinov2": DINOV2, "timm": VIT, "convnext": CONVNEXT}
HEAD = {"mlp.0.weight": np.ones((8, 32), np.float32), "mlp.0.bias": np.zeros(8, np.float32)}
WEIGHT_NORM = HEAD | {"last_layer.weight_g": np.ones((9, 1), np.float32)}
NAMESPACE = made(name("argparse", "Namespace"), {"arch": "vit_small", "lr": 0.1})
NUMPY = call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), "f8"), "12345678")
PATH = call(name("pathlib", "PosixPath"), "/", "data")
OMEGACONF = made(name("omegaconf.dictconfig", "DictConfig"), {"_content": {"a": 1}})




def numpy_array(values: np.ndarray) -> Raw:
  """An array as numpy pickles it in protocol 2, where bytes are text."""
  kind = call(name("numpy", "dtype"), values.dtype.str[1:], False, True)
  kind = Raw(kind + pickled((3, "<", None, None, None, -1, -1, 0)) + b"b")
  data = call(name("_codecs", "encode"), values.tobytes().decode("latin-1"), "latin1")
  array = call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), (0,), "b")
  return Raw(array + pickled((1, values.shape, kind, False, data)) + b"b")


def own_dict(items: dict[str, Any]) -> Raw:
  """A dict of a class of its own."""
  return Raw(name("easydict", "EasyDict") + b")\x81" + pickled(items).removeprefix(b"}"))


@functools.cache
def state(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
  """The tensors of a backbone by their names in a file of the kind; another seed, another of the same sizes."""
  model = MODELS[kind]
  layout = {"convnext": "dinov3"}.get(kind, kind)
  tensors = weights.to_state_dict(jax.tree.map(lambda leaf: leaf + seed, random_params(model)), model, layout)
  fixed = ("rope_embed.periods", "bias_mask")
  plain = weights.to_state_dict(random_params(model), model, layout)
  return {key: plain[key] if key.endswith(fixed) else value for key, value in tensors.items()}


def under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
  return {prefix + key: Tensor(value) for key, value in tensors.items()}


def chunked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Names of blocks as DINOv2 shards them: two blocks in the first chunk, one in the second."""
  return {key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 2}.") if key.startswith("blocks.") else key: value
          for key, value in tensors.items()}  # fmt: skip


def inside(wrapper: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """With what torch puts into the names of blocks."""
  return {".".join([*key.split(".")[:2], wrapper, *key.split(".")[2:]]) if key.startswith("blocks.") else key: value
          for key, value in tensors.items()}  # fmt: skip


def wrapped(kind: str) -> dict[str, tuple[dict, str]]:
  """Contents of files that hold the backbone `state(kind)`, and what the log says of each."""
  b, other = state(kind), state(kind, 1)
  cases = {
    "flat": (under("", b), ""),
    "ddp": (under("module.", b), "'module.' taken off"),
    "compiled": (under("_orig_mod.", b), "_orig_mod. taken out"),
    "compiled_ddp": (under("module._orig_mod.backbone.", b), "'module.backbone.' taken off the names; _orig_mod."),
    "backbone": (under("backbone.", b), "'backbone.' taken off"),
    "fsdp": (under("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module", b)), "_fsdp_wrapped_module. taken out"),
    "recomputed": ({"model": under("", inside("_checkpoint_wrapped_module", b))}, "_checkpoint_wrapped_module. taken"),
    "dinov2_teacher": (
      {"teacher": under("backbone.", b) | under("dino_head.", WEIGHT_NORM) | under("ibot_head.", WEIGHT_NORM)},
      "not loaded: teacher.dino_head, teacher.ibot_head",
    ),
    "dinov2_final": (
      {"model": under("student.backbone.", other) | under("teacher.backbone.", b) | under("student.head.", HEAD),
       "optimizer": {"state": {0: {"step": 3, "exp_avg": Tensor(HEAD["mlp.0.bias"])}}, "param_groups": [{"lr": 0.1}]},
       "iteration": 9},
      "not loaded: model.student, optimizer",
    ),
    "dinov1": (
      {"student": under("module.backbone.", other), "teacher": under("backbone.", b) | under("head.", WEIGHT_NORM),
       "epoch": 1, "args": NAMESPACE},
      "not loaded: student, teacher.head, args (argparse.Namespace)",
    ),
    "teacher_ddp": ({"teacher": under("module.backbone.", b)}, "'teacher.module.backbone.' taken off"),
    "model": ({"model": under("", b), "epoch": 3, "scaler": {"scale": 1.0}}, "'model.' taken off"),
    "lightning": (
      {"state_dict": under("model.backbone.", b) | under("criterion.", {"center": np.ones(3, np.float32)}),
       "epoch": 3, "callbacks": {}, "hyper_parameters": OMEGACONF},
      "not loaded: state_dict.criterion, hyper_parameters (omegaconf.dictconfig.DictConfig)",
    ),
    "scalars": ({"teacher": under("backbone.", b), "best": NUMPY, "from": PATH},
                "not loaded: best (numpy.core.multiarray.scalar), from (pathlib.PosixPath)"),
    "timm_ema": ({"state_dict": under("", other), "state_dict_ema": under("", b), "args": NAMESPACE},
                 "'state_dict_ema.' taken off"),
    "deit_ema": ({"model": under("", other), "model_ema": under("", b)}, "not loaded: model"),
    "module_ema": ({"model": under("module.", other), "ema": under("module.", b)}, "'ema.module.' taken off"),
    "distilled": (
      {"model": under("student.backbone.", other) | under("model_ema.backbone.", b) | under("teacher.backbone.", other),
       "iteration": 9},
      "'model.model_ema.backbone.' taken off",
    ),
    "words": ({"state_dict": under("student_net.vit.", other) | under("teacher_net.vit.", b)},
              "'state_dict.teacher_net.vit.' taken off"),
    "gram": (
      {"teacher": under("backbone.", b), "gram_teacher": under("backbone.", other)},
      "not loaded: gram_teacher",
    ),
    "pair": ({"nets": [under("", b), {}]}, "'nets.0.' taken off"),
  }  # fmt: skip
  if kind != "convnext":
    cases["chunks"] = ({"teacher": under("backbone.", chunked(b))}, "chunks of blocks taken out of the names")
  return cases


def check(path: pathlib.Path, kind: str, **given: Any) -> None:
  """The file opens as the backbone of its kind, exactly."""
  known = {} if kind in ("dinov3", "convnext") else {"num_heads": 2}
  _, found = vit_jax.load_model(path, **known, **given)
  jax.tree.map(np.testing.assert_array_equal, found, random_params(MODELS[kind]))


@pytest.mark.parametrize("case", wrapped("dinov2"))
def test_a_wrapped_backbone_opens_and_the_log_says_what_was_taken_off(
  case: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  content, said = wrapped("dinov2")[case]
  with caplog.at_level(logging.INFO):
    check(save(tmp_path / "x.pth", content), "dinov2")
  assert said in caplog.text
  assert ("taking the backbone" in caplog.text) == (case != "flat")


def test_arrays_of_numpy_are_read_alone_and_in_dicts_of_any_class_and_lists(tmp_path: pathlib.Path):
  arrays = {key: numpy_array(value) for key, value in state("dinov2").items()}
  for number, content in enumerate((arrays, own_dict({"model": own_dict(arrays)}), [arrays, {"epoch": 3}])):
    check(save(tmp_path / f"{number}.pth", content), "dinov2")
  cut = numpy_array(np.zeros(3, np.float32)).replace(pickled((3,)), pickled((4,)))  # more than its bytes
  with pytest.raises(WeightsError, match=r"holds no tensors, but x \(numpy._core.multiarray._reconstruct\)"):
    vit_jax.load_model(save(tmp_path / "cut.pth", {"x": Raw(cut)}))


@pytest.mark.parametrize("kind", ["dinov3", "timm", "convnext"])
@pytest.mark.parametrize("case", ["compiled_ddp", "dinov2_final", "lightning", "chunks"])
def test_the_other_families_are_found_in_the_same_way(kind: str, case: str, tmp_path: pathlib.Path):
  if case in wrapped(kind):
    check(save(tmp_path / "x.ckpt", wrapped(kind)[case][0]), kind)


@pytest.mark.parametrize("file", ["x.pt", "x.bin", "x.ckpt", "x", "x.pth.tar"])
@pytest.mark.parametrize("write", [save, save_old])
def test_files_of_torch_are_known_by_their_content(file: str, write: Any, tmp_path: pathlib.Path):
  check(write(tmp_path / file, {"teacher": under("backbone.", state("dinov2"))}), "dinov2")
  assert hub.load_preprocessing(tmp_path / file).image_size == 224


def test_safetensors_are_known_by_their_content_and_wrapped_ones_open(tmp_path: pathlib.Path):
  tensors = {f"teacher.backbone.{key}": value for key, value in state("dinov2").items()}
  weights.files.write_safetensors(tmp_path / "x.ckpt", tensors)
  check(tmp_path / "x.ckpt", "dinov2")


def test_an_older_file_of_torch_with_views_is_read(tmp_path: pathlib.Path):
  values = np.arange(12, dtype=np.float32)
  content = {"a": Tensor(values, key="k", shape=(3, 4), stride=(4, 1)),
             "b": Tensor(values, key="k", shape=(4, 3), stride=(1, 4)), "half": Tensor(np.arange(3, dtype=np.float16))}
  again = weights.pth.read_pth(save_old(tmp_path / "x.pth", content))
  np.testing.assert_array_equal(again["a"], values.reshape(3, 4))
  np.testing.assert_array_equal(again["b"], values.reshape(3, 4).T)
  assert again["half"].dtype == np.float16 and again["half"].tolist() == [0, 1, 2]


def test_of_several_backbones_the_address_says_which(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  b, other = state("dinov2"), state("dinov2", 1)
  content = {"state_dict": under("module.momentum_encoder.", b) | under("module.base_encoder.", other)}
  path = save(tmp_path / "moco.pth", content)
  with pytest.raises(WeightsError) as caught:
    vit_jax.load_model(path)
  message = str(caught.value)
  assert "it holds 2 backbones: 'state_dict.module.momentum_encoder', 'state_dict.module.base_encoder'" in message
  assert "\n" not in message and "FILE#state_dict.module.momentum_encoder" in message
  check(pathlib.Path(f"{path}#state_dict.module.momentum_encoder"), "dinov2")
  with pytest.raises(WeightsError, match="no backbone under 'encoder'; there is 'state_dict.module.mom"):
    vit_jax.load_model(f"{path}#encoder")
  teacher = save(tmp_path / "a#b.pth", {"student": under("backbone.", b), "teacher": under("backbone.", other)})
  check(pathlib.Path(f"{teacher}#student"), "dinov2")  # against what is taken otherwise
  assert hub.load_preprocessing(f"{teacher}#student").image_size == 224


def test_blocks_that_are_numbered_anew_in_every_chunk_are_not_guessed(tmp_path: pathlib.Path):
  places = {"0": "0.0", "1": "0.1", "2": "1.0"}
  anew = {}
  for key, value in state("dinov2").items():
    first, _, rest = key.removeprefix("blocks.").partition(".")
    anew[f"blocks.{places[first]}.{rest}" if key.startswith("blocks.") else key] = value
  with pytest.raises(WeightsError, match="number their blocks from 0 on"):
    vit_jax.load_model(save(tmp_path / "x.pth", under("", anew)))


def test_heads_of_a_training_export_come_with_the_backbone_that_is_taken(tmp_path: pathlib.Path):
  head = ProjectionHead(hidden=8, bottleneck=4, prototypes=5)
  shapes = jax.eval_shape(head.init, jax.random.key(0), np.zeros((1, 32), np.float32))["params"]
  tensors = weights.to_state_dict(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes), head)
  state_dict = {"model": under("student.backbone.", state("dinov3", 1)) | under("student.dino_head.", HEAD)
                | under("model_ema.backbone.", state("dinov3")) | under("model_ema.dino_head.", tensors)}  # fmt: skip
  opened = open_weights(save(tmp_path / "x.pth", state_dict))
  assert set(opened.tensors) == {"backbone", "dino_head"}
  assert set(opened.tensors["dino_head"]) == set(tensors)


def test_a_folder_with_pytorch_model_bin_opens_as_one_with_safetensors(tmp_path: pathlib.Path):
  vit_jax.save_model(tmp_path / "m", DINOV3, random_params(DINOV3))
  model, params = vit_jax.load_model(tmp_path / "m")
  tensors = read_safetensors(tmp_path / "m")
  (tmp_path / "m" / SINGLE).unlink()
  save(tmp_path / "m" / "pytorch_model.bin", under("", tensors))
  places = {"whole": tmp_path / "m", "file": tmp_path / "m" / "pytorch_model.bin"}
  for path in places.values():
    again, found = vit_jax.load_model(path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, params)
  (tmp_path / "m" / "pytorch_model.bin").unlink()
  names = sorted(tensors)
  files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
  for file, part in files.items():
    save(tmp_path / "m" / file, under("", {key: tensors[key] for key in part}))
  index = {"weight_map": {key: file for file, part in files.items() for key in part}}
  (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(weights.files.json.dumps(index))
  jax.tree.map(np.testing.assert_array_equal, vit_jax.load_model(tmp_path / "m")[1], params)
  (tmp_path / "m" / next(iter(files))).unlink()
  with pytest.raises(WeightsError, match="lacks 1 of the 2 files of its index: pytorch_model-00001"):
    vit_jax.load_model(tmp_path / "m")


def test_the_mask_token_of_a_hugging_face_vit_is_said_and_left(caplog: pytest.LogCaptureFixture):
  params = random_params(VIT)
  tensors = weights.to_state_dict(params, VIT, "hf_vit") | {"embeddings.mask_token": np.ones((1, 1, VIT.width))}
  with caplog.at_level(logging.INFO):
    found = weights.from_state_dict(tensors, VIT, "hf_vit")
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert "not loaded: embeddings.mask_token" in caplog.text


def test_hugging_face_names_without_a_configuration_say_what_is_missing(tmp_path: pathlib.Path):
  vit_jax.save_model(tmp_path / "m", DINOV3, random_params(DINOV3))
  (tmp_path / "m" / "config.json").unlink()
  for path in (tmp_path / "m", tmp_path / "m" / SINGLE):
    with pytest.raises(WeightsError, match=r"names of a Hugging Face model, of which config\.json says"):
      vit_jax.load_model(path)


def test_tensors_of_two_processes_are_put_together_as_torch_saved_them():
  found = open_distributed(DATA / "distributed")
  matrix = np.arange(15.0).reshape(5, 3)
  expected = {"rows": matrix, "columns": matrix, "half": np.arange(6.0), "one": np.ones(1)}
  for key, values in expected.items():
    np.testing.assert_array_equal(np.asarray(found[f"model.student.{key}"]), values)
  np.testing.assert_array_equal(found["model.whole"], [[0, 1], [2, 3]])
  assert np.asarray(found["model.scalar"]) == 2.5
  assert str(found["model.student.half"].dtype) == "bfloat16"


def test_a_step_of_the_reference_opens_from_its_folder(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  """As the reference saves it: model.student, model.teacher and its alias model_ema, and the optimizer's state."""
  b, other = state("dinov3"), state("dinov3", 1)
  tensors = {f"model.student.backbone.{key}": value for key, value in other.items()}
  for average in ("teacher", "model_ema"):
    tensors |= {f"model.{average}.backbone.{key}": value for key, value in b.items()}
  tensors |= {f"optimizer.state.student.backbone.{key}.exp_avg": value for key, value in other.items()}
  step = tmp_path / "run" / "ckpt" / "3749"
  step.parent.mkdir(parents=True)
  save_distributed(step, tensors, rows=40)
  with caplog.at_level(logging.INFO):
    check(step, "dinov3")
  assert "'model.model_ema.backbone.' taken off the names" in caplog.text
  assert "not loaded: model.student, model.teacher, optimizer" in caplog.text
  for piece in (".metadata", "__0_0.distcp"):
    with pytest.raises(WeightsError, match=r"is a piece of a checkpoint .* give its folder, .*3749\.$"):
      vit_jax.load_model(step / piece)
  with pytest.raises(hub.UnknownModel, match=r"has ckpt\. .*newest step in it is .*/run/ckpt/3749") as caught:
    vit_jax.load_model(tmp_path / "run")
  assert "\n" not in str(caught.value)
  (tmp_path / "run" / "ckpt").rename(tmp_path / "run" / "checkpoints")  # a name that our runs have, too
  check(tmp_path / "run" / "checkpoints" / "3749", "dinov3")


def test_torch_itself_saves_what_opens(tmp_path: pathlib.Path):
  torch = pytest.importorskip("torch")
  import torch.distributed.checkpoint as distributed

  b = {key: torch.from_numpy(np.array(value)) for key, value in state("dinov3").items()}
  model = {f"model_ema.backbone.{key}": value for key, value in b.items()}
  distributed.save({"model": model, "iteration": 3}, checkpoint_id=tmp_path / "step")
  check(tmp_path / "step", "dinov3")
  module = torch.nn.Linear(2, 2)
  content = {"model": model, "args": pathlib.PurePosixPath("x"), "best": np.float64(0.1), "module": module}
  torch.save(content, tmp_path / "x.pth")
  torch.save(content, tmp_path / "y.pth", _use_new_zipfile_serialization=False)
  halved = {key: torch.nn.Parameter(value.double()) for key, value in b.items()}
  torch.save(halved, tmp_path / "z.pth")
  for file in ("x.pth", "y.pth", "z.pth"):
    check(tmp_path / file, "dinov3")


def test_weights_that_are_not_finite_are_named_when_they_are_loaded(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  b = state("dinov2")
  for key, bad in (("norm.weight", np.nan), ("blocks.1.attn.qkv.weight", np.inf), ("pos_embed", -np.inf)):
    values = np.array(b[key])
    values.reshape(-1)[5] = bad
    caplog.clear()
    vit_jax.load_model(save(tmp_path / "x.pth", under("", b | {key: values})))
    warnings = [record.getMessage() for record in caplog.records if "infinity" in record.getMessage()]
    assert len(warnings) == 1 and f"infinity in {key}:" in warnings[0]
  large = {key: np.full_like(value, 3e38) for key, value in b.items()}  # whose sums are not finite
  caplog.clear()
  vit_jax.load_model(save(tmp_path / "x.pth", under("", large)))
  assert "infinity" not in caplog.text
