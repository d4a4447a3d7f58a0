"""The reference's quick recipe: ViT-L/16 on ImageNet-1k, 100 epochs of 1,250 steps of 2,048 images.

    vit-jax train --config=configs/dinov3/vitl16_im1k.py --workdir=runs/vitl16

All values are those of `vitl_im1k_lin834.yaml`; a loss group is the 64 images that one of its GPUs held.
Hardware: the reference's was 4 x 8 H100. Wall time: not measured (the reference states about 14 h).
Expected: not measured (the reference states 82.0 % k-NN and 83.5 % linear top-1 on ImageNet).
"""

from vit_jax.config import default


def get_config():
  c = default()
  c.duration = "100 epochs"
  c.epoch_steps = 1250
  c.batch_size = 2048
  c.loss_group_size = 64
  c.data.source = "tfds:imagenet2012/train"

  c.model.name = "vit_large"
  c.model.rope.dtype = "bfloat16"
  c.model.drop_path = 0.3
  c.model.dtype = "bfloat16"

  c.schedules.version = 1
  c.schedules.lr.warmup = "10 epochs"
  c.schedules.teacher_temperature.warmup = "30 epochs"

  c.evaluation.every = "12500 steps"
  c.checkpoint.every = "3750 steps"
  return c
