"""DINOv3 ViT-7B/16, stage 1 of 3: pretraining, one million steps of 4,096 images.

    vit-jax train --config=configs/dinov3/vit7b16_pretrain.py --workdir=runs/7b/pretrain \\
      --config.data.source=folder:/images

All values are those of `dinov3_vit7b16_pretrain.yaml`; a loss group is the 16 images that one of its GPUs held.
Stages 2 and 3: vit7b16_gram_anchor.py and vit7b16_high_res.py. The reference's fp8 matrix products are
`--config.model.quantization=fp8`; the default is bfloat16.
Hardware: the reference's was 256 H100. Wall time: not measured. Expected: not measured.
Planned by `vit-jax plan`, not run, for each device (memory; step by roofline, from all overlapping to no overlap of the
network): h100:256 33.6 of 74.5 GiB, 0.49 to 0.67 s, with fp8 half the bytes gathered; v5p:4x4x8 69.1 of 95.7 GiB, 2.12
to 2.35 s, with `--config.model.remat=blocks` about 21 GiB, 2.64 to 2.87 s. On a v5p:4x4x4, remat="dots" does not fit.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.duration = "1000 epochs"
  c.epoch_steps = 1000
  c.batch_size = 4096
  c.loss_group_size = 16
  c.mesh.fsdp = -1
  c.mesh.data = 1

  c.model.name = "dinov3_vit7b16"
  c.model.drop_path = 0.4
  c.model.dtype = "bfloat16"
  c.model.rope.dtype = "bfloat16"  # the released code does so whatever its yaml says
  c.model.remat = "dots"

  c.dino.prototypes, c.dino.hidden, c.dino.bottleneck = 262144, 8192, 512
  c.ibot.prototypes, c.ibot.hidden, c.ibot.bottleneck = 98304, 4096, 384

  c.schedules.lr.update(start=0.0, peak=5e-5, end=5e-5, warmup="100 epochs")
  c.schedules.weight_decay.end = 0.04
  c.schedules.teacher_temperature.warmup = "100 epochs"
  c.schedules.momentum.update(start=0.994, peak=0.994, end=0.994)
  c.optim.b2 = 0.99
  c.optim.clip = 30.0
  c.optim.layerwise_decay = 0.98
  c.optim.freeze_last_layer = "5 epochs"

  c.crops.global_size = 256
  c.crops.local_size = 112
  c.crops.flip = 0.0

  c.evaluation.every = "12500 steps"
  c.checkpoint.every = "1000 steps"
  c.checkpoint.keep_every = "50000 steps"
  return c
