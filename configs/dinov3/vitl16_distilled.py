"""DINOv3 ViT-L/16 distilled from the 7B teacher: 25,000 steps of 1,920 images.

    vit-jax train --config=configs/dinov3/vitl16_distilled.py --workdir=runs/vitl16_distilled \\
      --config.distillation.teacher=runs/7b/gram --config.data.source=folder:/images

Values of `dinov3_vitl16_lvd1689m_distilled.yaml`, which is the last stage of the published distillation: give the
student that it starts from as `--config.init_from=PATH`. The reference trains S, S+, B and L in one job, on 48, 48, 80
and 120 of 296 GPUs, 16 images of the last on each; to do so, see `distillation.students`.
Hardware: the reference's was 296 H100 for all four. Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.method = "distillation"
  c.distillation.teacher = "runs/7b/gram"
  c.duration = "20 epochs"
  c.epoch_steps = 1250
  c.batch_size = 1920
  c.loss_group_size = 16
  c.mesh.fsdp = -1
  c.mesh.data = 1

  c.model.name = "dinov3_vitl16"
  c.model.dtype = "bfloat16"
  c.model.rope.dtype = "bfloat16"
  c.model.remat = "blocks"
  c.dino.prototypes, c.dino.hidden, c.dino.bottleneck = 262144, 8192, 512
  c.ibot.prototypes, c.ibot.hidden, c.ibot.bottleneck = 98304, 4096, 384

  c.schedules.lr.update(start=0.0, peak=0.0, end=5e-5, warmup="0 steps", cosine="10 epochs")
  c.schedules.weight_decay.end = 0.04
  c.schedules.teacher_temperature.update(start=0.07, peak=0.07, end=0.07, warmup="0 steps")
  c.schedules.momentum.update(start=0.994, peak=0.994, end=1.0)
  c.optim.layerwise_decay = 0.99
  c.optim.freeze_last_layer = "0 steps"

  c.crops.global_size = 256
  c.crops.local_size = 112
  c.crops.flip = 0.0

  c.evaluation.every = "12500 steps"
  return c
