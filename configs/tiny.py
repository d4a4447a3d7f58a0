"""A few steps of a tiny model on a few textures: to see every part of a run work, and for tests. It learns nothing.

    vit-jax train --config=configs/tiny.py --workdir=runs/tiny

Hardware: any. Wall time: not measured. Expected: nothing.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.duration = "4 steps"
  c.batch_size = 8

  c.model.patch_size = 8
  c.model.width = 32
  c.model.depth = 2
  c.model.num_heads = 2
  c.model.mlp_hidden = 64
  for head in (c.dino, c.ibot):
    head.prototypes = 32
    head.hidden = 32
    head.bottleneck = 16

  c.data.source = "embedded:textures?size=32&count=64"
  c.data.workers = 0
  c.crops.global_size = 32
  c.crops.local_size = 16
  c.crops.local_number = 2

  c.evaluation.every = "50 %"
  c.evaluation.max_examples = 32
  c.evaluation.batch_size = 16
  c.checkpoint.every = "2 steps"
  c.log.every = 1
  return c
