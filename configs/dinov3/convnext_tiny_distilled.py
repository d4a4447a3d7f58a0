"""DINOv3 ConvNeXt-Tiny distilled from a ViT teacher: 625,000 steps of 4,096 images.

    vit-jax train --config=configs/dinov3/convnext_tiny_distilled.py --workdir=runs/convnext_tiny \\
      --config.distillation.teacher=runs/vitl16 --config.data.source=folder:/images

Schedules of the reference's `convnext_tiny_p16.yaml`, crops of its ConvNeXt test job. The student has a token for each
32 x 32 pixels: the teacher (patches of 16) sees the crops at half their size, so that both grids are equal.
Hardware: the reference names 16 nodes of 8 GPUs. Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.method = "distillation"
  c.distillation.teacher = "runs/vitl16"
  c.duration = "500 epochs"
  c.epoch_steps = 1250
  c.batch_size = 4096
  c.loss_group_size = 32

  c.model.name = "dinov3_convnext_tiny"
  c.model.dtype = "bfloat16"

  c.schedules.lr.update(start=1e-6, peak=2e-4, end=1e-6, warmup="80 epochs")
  c.schedules.weight_decay.update(start=0.04, peak=0.2, end=0.2, warmup="500 epochs")
  c.schedules.teacher_temperature.warmup = "120 epochs"
  c.schedules.momentum.update(start=0.994, peak=1.0, end=1.0, warmup="500 epochs")
  c.optim.layerwise_decay = 1.0
  c.optim.freeze_last_layer = "1 epochs"
  c.optim.decay_downsample_norms = True

  c.crops.global_size = 512
  c.crops.local_size = 224

  c.evaluation.every = "12500 steps"
  c.checkpoint.every = "3750 steps"
  return c
