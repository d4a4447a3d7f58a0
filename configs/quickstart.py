"""The quick start: a small ViT on 20 procedural texture classes, with the full stage-1 objective.

    vit-jax train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Wall time: not measured. Expected: k-NN top-1 not measured.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.duration = "600 steps"
  c.batch_size = 64

  c.model.patch_size = 8
  c.model.width = 192
  c.model.depth = 6
  c.model.num_heads = 3
  c.model.mlp_hidden = 768
  for head in (c.dino, c.ibot):
    head.prototypes = 1024
    head.hidden = 512
    head.bottleneck = 128

  c.data.source = "embedded:textures?size=64"
  c.crops.global_size = 48
  c.crops.local_size = 24
  c.crops.local_number = 4

  c.evaluation.every = "25 %"
  c.evaluation.image_size = 64
  c.checkpoint.every = "100 steps"
  return c
