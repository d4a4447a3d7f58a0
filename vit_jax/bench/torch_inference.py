"""Frozen features of a ViT in PyTorch, the peer of `vit-jax bench inference`; run by `torch_peer.py`.

The model is that of `transformers` (DINOv3ViTModel), or of `timm`, with random weights, in evaluation mode, without
gradients, compiled if asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def transformers_model(s: dict) -> tuple[str, torch.nn.Module]:
  import transformers
  from transformers import DINOv3ViTConfig, DINOv3ViTModel

  config = DINOv3ViTConfig(
    hidden_size=s["width"],
    num_hidden_layers=s["depth"],
    num_attention_heads=s["num_heads"],
    intermediate_size=s["mlp_hidden"],
    num_register_tokens=s["num_registers"],
    patch_size=s["patch_size"],
    image_size=s["image_size"],
  )
  return f"transformers {transformers.__version__}", DINOv3ViTModel(config)


def timm_model(s: dict) -> tuple[str, torch.nn.Module]:
  import timm

  return f"timm {timm.__version__}", timm.create_model(s["timm"], pretrained=False, num_classes=0)


MODELS = {"transformers": transformers_model, "timm": timm_model}


def start(s: dict) -> tuple[str, Callable[[], None]]:
  """For `torch_peer.py`."""
  types = {"device": torch.device(s["device"]), "dtype": getattr(torch, s["dtype"])}
  try:
    name, model = MODELS[s["library"]](s)
  except (ImportError, RuntimeError) as error:  # timm raises RuntimeError for a model that it does not have yet
    raise ImportError(f"no {s['library']} with this model: {error}") from error
  model = model.eval().to(**types)
  forward = torch.compile(model) if s["compile"] else model
  images = torch.randn(s["batch_size"], 3, s["image_size"], s["image_size"], **types)

  def features() -> None:
    with torch.inference_mode():
      forward(images)

  return f"{name}, torch {torch.__version__}{', compiled' * s['compile']}", features
