"""What is saved can be read by Orbax alone, without vit_jax: in the words of the documentation."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import vit_jax
from tests.test_hub import MODELS, random_params
from vit_jax.checkpoints import Checkpoints

SNIPPET = """
import jax
import numpy as np
import orbax.checkpoint as ocp

with ocp.PyTreeCheckpointer() as checkpointer:
  tree = checkpointer.metadata(path).item_metadata.tree
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
"""


@pytest.mark.parametrize("what", ["run", "export"])
def test_orbax_restores_without_vit_jax(tmp_path: pathlib.Path, what: str):
  model = MODELS["vits"]
  params = random_params(model)
  if what == "run":
    with Checkpoints(tmp_path / "run") as saved:
      saved.save(7, {"teacher": {"backbone": params}}, {}, {}, {})
    path, inside = tmp_path / "run" / "checkpoints" / "7" / "state", 'state["teacher"]["backbone"]'
  else:
    vit_jax.save_model(tmp_path / "m", model, params, "orbax")
    path, inside = tmp_path / "m" / "params", "state"
    assert json.loads((tmp_path / "m" / "model.json").read_text())["attributes"]["width"] == model.width
  program = (
    f"import sys\nsys.modules['vit_jax'] = None\npath = {str(path)!r}\n{SNIPPET}\nparams = {inside}\n"
    f"np.save({str(tmp_path / 'kernel.npy')!r}, params['blocks']['mlp']['fc1']['kernel'])\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(np.load(tmp_path / "kernel.npy"), params["blocks"]["mlp"]["fc1"]["kernel"])
