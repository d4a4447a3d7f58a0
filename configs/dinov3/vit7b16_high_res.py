"""DINOv3 ViT-7B/16, stage 3 of 3: high resolution, 30,000 steps of 2,048 images at five mixed crop sizes.

    vit-jax train --config=configs/dinov3/vit7b16_high_res.py --workdir=runs/7b/high_res \\
      --config.init_from=runs/7b/gram --config.gram.source=runs/7b/gram --config.data.source=folder:/images

Values of `dinov3_vit7b16_high_res_adapt.yaml`, but for one size of local crops that is no whole number of patches; a
loss group is the 8 images that one of its GPUs held, KoLeo looks for neighbours among 16.
Hardware: the reference's was 256 H100. Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import load


def get_config():
  c = load("dinov3/vit7b16_pretrain")
  c.duration = "30 epochs"
  c.batch_size = 2048
  c.loss_group_size = 8
  c.koleo.group_size = 16
  c.model.remat = "blocks"

  c.gram.source = "init"
  c.crops.resolutions = (
    # global, local, gram, probability
    (512, 112, 768, 0.3),
    (768, 112, 1152, 0.3),
    (768, 160, 1152, 0.3),  # the reference: crops of 168, of which its patch embedding sees 160
    (768, 224, 1152, 0.05),
    (768, 336, 1152, 0.05),
  )

  c.schedules.lr.update(start=0.0, peak=0.0, end=1.25e-5, warmup="0 steps", cosine="10 epochs")
  c.schedules.teacher_temperature.update(start=0.07, peak=0.07, end=0.07, warmup="0 steps")
  c.schedules.momentum.update(start=0.999, peak=0.999, end=0.999)
  c.schedules.gram_loss_weight.update(start=1.5, peak=1.5, end=1.5)
  c.schedules.local_loss_weight.update(start=0.5, peak=0.5, end=0.5)
  c.optim.freeze_last_layer = "0 steps"
  c.checkpoint.every = "250 steps"
  return c
