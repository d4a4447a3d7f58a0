"""DINOv3 ConvNeXt-Base distilled from a ViT teacher: 625,000 steps of 4,096 images.

    vit-jax train --config=configs/dinov3/convnext_base_distilled.py --workdir=runs/convnext_base \\
      --config.distillation.teacher=runs/vitl16 --config.data.source=folder:/images

Schedules of the reference's `convnext_base_p16.yaml`, crops of its ConvNeXt test job. The student has a token for each
32 x 32 pixels: the teacher (patches of 16) sees the crops at half their size, so that both grids are equal.
Hardware: the reference names 16 nodes of 8 GPUs. Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import load


def get_config():
  c = load("dinov3/convnext_tiny_distilled")
  c.model.name = "dinov3_convnext_base"
  c.schedules.lr.peak = 1e-4
  c.schedules.weight_decay.start = 0.02
  return c
