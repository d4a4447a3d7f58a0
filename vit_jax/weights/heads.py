"""Training exports {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}: a backbone with its projection heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.models import ProjectionHead
from vit_jax.weights import infer
from vit_jax.weights.convert import from_state_dict, select
from vit_jax.weights.errors import WeightsError

HEADS = ("dino_head", "ibot_head")


class NoHeads(WeightsError):
  """Weights of a backbone alone, where its projection heads are needed, too."""


def read_training_export(state_dict: Mapping[str, Any]) -> tuple[dict[str, nn.Module], dict[str, Any]]:
  """The modules of a training export and their parameters, by sub-module: backbone, dino_head, ibot_head.

  Args:
    state_dict: the content of the file, with or without the level "teacher".

  Raises:
    NoHeads: if a head is missing: the published files are backbones.
    WeightMismatch, WeightsError: if a tensor does not fit.
  """
  if "teacher" in state_dict:
    state_dict = select(state_dict, "teacher")
  missing = [head for head in HEADS if not any(name.startswith(f"{head}.") for name in state_dict)]
  if missing:
    raise NoHeads(f"it has no {' and no '.join(missing)}")
  backbone = select(state_dict, "backbone.")
  found = infer.recognise(backbone)
  modules: dict[str, nn.Module] = {"backbone": found.module(**found.attributes)}
  params = {"backbone": from_state_dict(backbone, modules["backbone"], found.layout)}
  for head in HEADS:
    tensors = select(state_dict, f"{head}.")
    modules[head] = infer_head(tensors)
    params[head] = from_state_dict(tensors, modules[head])
  return modules, params


def infer_head(state_dict: Mapping[str, np.ndarray]) -> ProjectionHead:
  """The head that a state dict of the DINOv3 repository's names was saved from.

  Raises:
    WeightsError: if the names are not those of a head.
  """
  if "last_layer.weight" not in state_dict:
    begin = ", ".join(sorted(state_dict)[:5])
    raise WeightsError(
      f"not the state dict of a DINOv3 projection head: it lacks last_layer.weight; it has {begin}, … (heads of DINO "
      "and DINOv2, whose last layer is weight-normalised, are other heads)."
    )
  kernels = [name for name in state_dict if name.startswith("mlp.") and name.endswith("weight")]
  prototypes, bottleneck = np.shape(state_dict["last_layer.weight"])
  first = "mlp.weight" if kernels == ["mlp.weight"] else "mlp.0.weight"
  return ProjectionHead(
    hidden=np.shape(state_dict[first])[0] if first in state_dict else bottleneck,
    bottleneck=bottleneck,
    prototypes=prototypes,
    num_layers=len(kernels),
    mlp_bias=any(name.startswith("mlp.") and name.endswith("bias") for name in state_dict),
  )
