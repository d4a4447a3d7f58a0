"""Exports of format "orbax": what is there is the model that model.json describes, bit for bit, or an error says so."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

import vit_jax
from tests.weights.test_broken_files import DINOV3, random_params
from vit_jax import checkpoints, parallel
from vit_jax.checkpoints import trees
from vit_jax.weights import WeightMismatch, WeightsError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("exports") / "m"
  vit_jax.save_model(path, DINOV3, random_params(DINOV3), format="orbax")
  return path


@pytest.fixture
def copied(exported: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(exported, tmp_path / "m"))


def change(path: pathlib.Path, **attributes: object) -> None:
  record = json.loads((path / "model.json").read_text())
  record["attributes"] |= attributes
  (path / "model.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
  ("attributes", "message"),
  [
    ({"width": 64}, r"m: \d+ arrays are not those of the VisionTransformer that model\.json describes(.|\n)*"
                    r"shape: cls_token is \(32,\), expected \(64,\)"),
    ({"depth": 4}, r"shape: blocks/norm1/scale is \(3, 32\), expected \(4, 32\)"),
    ({"num_registers": 0}, r"extra: registers \(2, 32\)"),
    ({"separate_cls_norm": True}, r"missing: cls_norm/scale \(32,\)"),
  ],
)  # fmt: skip
def test_arrays_of_another_model_are_a_mismatch(copied: pathlib.Path, attributes: dict, message: str):
  change(copied, **attributes)
  with pytest.raises(WeightMismatch, match=message):
    vit_jax.load_model(copied)


@pytest.mark.parametrize(
  ("attributes", "message"),
  [
    ({"width": 10**9}, "width=1000000000: cannot be"),
    ({"depth": 10**9}, "depth=1000000000: cannot be"),
    ({"width": "32"}, "width='32': must be a whole number"),
    ({"num_heads": 5}, "num_heads=5: must divide width=32"),
    ({"num_heads": 0}, "num_heads=0: must be a whole number"),
    ({"colour": 1}, "describes no model that this version of vit_jax knows"),
  ],
)
def test_a_record_that_describes_no_model_is_one_line(copied: pathlib.Path, attributes: dict, message: str):
  change(copied, **attributes)
  with pytest.raises(WeightsError, match=message) as caught:
    vit_jax.load_model(copied)
  assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_an_attribute_that_no_array_tells_is_sealed(copied: pathlib.Path):
  change(copied, norm_eps=1e-3)
  with pytest.raises(checkpoints.Damaged, match="description of the model was changed after the export"):
    vit_jax.load_model(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"module": [1]}', "[" * 100_000, "\x00"])
def test_a_broken_record_is_one_line(copied: pathlib.Path, text: str):
  (copied / "model.json").write_text(text)
  with pytest.raises(WeightsError, match="model.json") as caught:
    vit_jax.load_model(copied)
  assert "\n" not in str(caught.value)


def test_a_changed_bit_is_seen_wherever_it_is(copied: pathlib.Path):
  """In any file of the arrays: either the model is not opened, or it is exactly the one that was exported."""
  params, seen = random_params(DINOV3), 0
  files = [file for file in (copied / "params").rglob("*") if file.is_file() and file.stat().st_size > 100]
  for file in files:
    whole = file.read_bytes()
    for at in range(5, len(whole), max(len(whole) // 6, 1)):
      file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
      try:
        jax.tree.map(np.testing.assert_array_equal, vit_jax.load_model(copied)[1], params)
      except (checkpoints.Damaged, WeightMismatch) as error:
        seen += 1
        assert "m" in str(error)
    file.write_bytes(whole)
  assert seen > 5
  vit_jax.load_model(copied)


def test_other_values_of_the_same_shapes_are_named(copied: pathlib.Path):
  """As a bit that changed where nothing but the fingerprint sees it."""
  params = random_params(DINOV3)
  params["blocks"]["norm1"]["scale"].view(np.uint32)[1, 3] ^= 1
  shutil.rmtree(copied / "params")
  seal = (copied / trees.SEAL).read_text()
  trees.write_tree(copied / "params", params)
  (copied / trees.SEAL).write_text(seal)
  with pytest.raises(checkpoints.Damaged, match=r"m: arrays are not what was exported.*: blocks/norm1/scale"):
    vit_jax.load_model(copied)
  mesh = parallel.make_mesh({"replica": 1, "data": 1, "fsdp": 8, "tensor": 1})
  with pytest.raises(checkpoints.Damaged, match="blocks/norm1/scale"):
    vit_jax.load_model(copied, mesh=mesh)


def test_an_older_export_without_fingerprints_opens_and_says_so(
  copied: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  (copied / trees.SEAL).unlink()
  with caplog.at_level(logging.WARNING):
    model, params = vit_jax.load_model(copied)
  assert model == DINOV3 and "not checked for changed bits" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, params, random_params(DINOV3))
  for damaged in ("", "{}", "[]", '{"arrays": 1, "sha256": 1}'):
    (copied / trees.SEAL).write_text(damaged)
    with pytest.raises(checkpoints.Damaged, match="fingerprints.json is damaged|changed after"):
      vit_jax.load_model(copied)


def test_a_lost_folder_of_arrays_is_damage(copied: pathlib.Path):
  shutil.rmtree(copied / "params")
  with pytest.raises(checkpoints.Damaged, match="params cannot be read"):
    vit_jax.load_model(copied)


def test_a_lost_list_of_arrays_is_damage_in_words(copied: pathlib.Path):
  (copied / "params" / "manifest.ocdbt").unlink()
  with pytest.raises(checkpoints.Damaged, match="say which arrays are in it are damaged, or some are lost"):
    vit_jax.load_model(copied)


def test_parameters_of_another_model_are_not_exported(tmp_path: pathlib.Path):
  with pytest.raises(WeightMismatch, match=r"shape: cls_token is \(32,\), expected \(64,\)"):
    vit_jax.save_model(tmp_path / "m", DINOV3.clone(width=64), random_params(DINOV3), format="orbax")
  assert not list(tmp_path.iterdir())
