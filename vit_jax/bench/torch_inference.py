"""Frozen features of a ViT in PyTorch, the peer of `vit-jax bench inference`; it speaks with `peer.py`.

The model is that of `transformers` (DINOv3ViTModel), or of `timm`, with random weights, in evaluation mode, without
gradients, compiled if asked for. It imports nothing of vit_jax.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would starve their neighbours

import torch  # noqa: E402


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


def main() -> None:
  s = json.loads(sys.stdin.readline())
  torch.set_num_threads(s["threads"])
  torch.set_float32_matmul_precision("high" if s["dtype"] == "bfloat16" else "highest")
  device = torch.device(s["device"])
  try:
    name, model = MODELS[s["library"]](s)
  except (ImportError, RuntimeError) as error:  # timm raises RuntimeError for a model that it does not have yet
    print(json.dumps({"missing": f"no {s['library']} with this model: {error}"}), flush=True)
    return
  model = model.eval().to(device, dtype=getattr(torch, s["dtype"]))
  forward = torch.compile(model) if s["compile"] else model
  images = torch.randn(
    s["batch_size"], 3, s["image_size"], s["image_size"], device=device, dtype=getattr(torch, s["dtype"])
  )
  print(json.dumps({"name": f"{name}, torch {torch.__version__}{', compiled' * s['compile']}"}), flush=True)
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      start = time.perf_counter()
      with torch.inference_mode():
        forward(images)
      if device.type == "cuda":
        torch.cuda.synchronize()
      seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
  main()
