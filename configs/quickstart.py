"""The quick start: a small ViT on 20 procedural texture classes, with the full stage-1 objective (DINO, iBOT, KoLeo).

    vit-jax train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Wall time: 5 to 6 minutes. Expected: k-NN top-1 61.1 % (untrained network 13.1 %,
colour histogram 9.5 %, pixels 8.1 %).

What differs from a run at scale, and why: a run of minutes has to leave the uniform assignment quickly. So weights
start at a size that suits narrow layers (init_std) and the layer scale at 1, where 1e-5 takes thousands of steps to
grow; the prototypes start at a length of about 1 and stay (freeze_last_layer), or the first, unpredictable targets
would teach the student to shrink them; the teacher follows fast at first (momentum). Hue and saturation are jittered
more, because colours would otherwise be the easiest thing to match; nothing is blurred, as a blur of these sizes erases
a texture of 64 pixels.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.duration = "500 steps"
  c.batch_size = 64

  c.model.name = "vit_small"
  c.model.patch_size = 8
  c.model.width = 128
  c.model.depth = 4
  c.model.num_heads = 4
  c.model.mlp_hidden = 512
  c.model.layer_scale = 1.0
  c.model.init_std = 0.09
  for head in (c.dino, c.ibot):
    head.prototypes = 512
    head.hidden = 256
    head.bottleneck = 64
    head.init_std = 0.09
  c.ibot.loss_weight = 0.5

  c.schedules.lr.peak = 2e-3
  c.schedules.weight_decay.end = 0.04
  c.schedules.momentum.start = c.schedules.momentum.peak = 0.8
  c.schedules.momentum.end = 0.99
  for part in ("start", "peak", "end"):
    c.schedules.teacher_temperature[part] = 0.04
  c.optim.layerwise_decay = 1.0
  c.optim.patch_embed_lr = 1.0
  c.optim.freeze_last_layer = "100 %"

  c.data.source = "embedded:textures?size=64"
  c.crops.global_size = 40
  c.crops.global_scale = (0.25, 0.7)
  c.crops.local_size = 24
  c.crops.local_scale = (0.08, 0.25)
  c.crops.local_number = 4
  c.augment.saturation = 0.8
  c.augment.hue = 0.5
  c.augment.grayscale = 0.3
  c.augment.blur = (0.0, 0.0, 0.0)
  c.augment.solarize = (0.0, 0.0, 0.0)

  c.evaluation.every = "20 %"
  c.evaluation.image_size = 64
  c.checkpoint.every = "100 steps"
  return c
