"""Every stage in minutes on a CPU, on tiles of photographs: pretraining, Gram anchoring, high resolution, distillation.

    vit-jax train --config=configs/stages_demo.py --workdir=runs/demo/pretrain
    vit-jax train --config=configs/stages_demo.py:gram --workdir=runs/demo/gram \\
      --config.init_from=runs/demo/pretrain --config.gram.source=runs/demo/pretrain
    vit-jax train --config=configs/stages_demo.py:high_res --workdir=runs/demo/high_res \\
      --config.init_from=runs/demo/gram --config.gram.source=runs/demo/gram
    vit-jax train --config=configs/stages_demo.py:distill --workdir=runs/demo/distilled \\
      --config.distillation.teacher=runs/demo/high_res

Variants: `:gram`, `:plain` (the Gram stage without its loss, to compare), `:high_res`, `:distill`, and its students
`:small` and `:smaller`. A few dozen steps on a few hundred tiles: it shows that the stages work, not how good features
become; dinov3/stages.py has recipes for accelerators.
Hardware: 2 CPU cores. Wall time: 4 min 23 s for these four runs and `:plain`. Expected: as tests/train/test_stages.py
prints, the mean squared distance of the patches' Gram matrices to the gram teacher's is 0.0022 after the Gram stage and
0.0038 without its loss; losses of the students fall from 9.4 to 7.4 (small) and 7.5 (smaller).
"""

from pathlib import Path

from vit_jax.config import check_argument, default

VARIANTS = ("gram", "plain", "high_res", "distill", "small", "smaller")


def get_config(arg: str | None = None):
  check_argument(arg, VARIANTS)
  c = default()
  c.duration = "120 steps"
  c.batch_size = 32

  c.model.name = "vit_small"
  c.model.patch_size = 8
  c.model.width, c.model.depth, c.model.num_heads = 96, 3, 3
  c.model.layer_scale = 1.0
  c.model.init_std = 0.1
  for head in (c.dino, c.ibot):
    head.prototypes, head.hidden, head.bottleneck = 256, 128, 64
    head.init_std = 0.1
  c.schedules.lr.peak = 3e-3  # 1.5e-3 for a batch of 32 images
  c.schedules.momentum.update(start=0.9, peak=0.9, end=0.99)
  c.schedules.teacher_temperature.update(start=0.04, peak=0.04, end=0.04, warmup="0 steps")
  c.optim.layerwise_decay = c.optim.patch_embed_lr = 1.0
  c.optim.freeze_last_layer = "100 %"

  c.data.source = "embedded:photos?size=64"
  c.crops.global_size, c.crops.local_size, c.crops.local_number = 48, 24, 2
  c.augment.blur = (0.0, 0.0, 0.0)
  c.evaluation.every = "0 steps"
  c.checkpoint.every = "50 %"

  if arg in ("gram", "plain", "high_res"):
    c.duration = "60 steps"
    c.schedules.momentum.update(start=0.95, peak=0.95, end=0.95)
  if arg in ("gram", "high_res"):
    c.gram.source = "init"
    c.schedules.gram_loss_weight.update(start=5.0, peak=5.0, end=5.0)
  if arg == "high_res":
    c.crops.resolutions = ((48, 24, 72, 0.5), (64, 24, 96, 0.5))
  if arg == "distill":
    c.method = "distillation"
    c.distillation.teacher = "runs/demo/high_res"
    c.distillation.students = tuple(f"{name}={Path(__file__)}:{name}" for name in ("small", "smaller"))
  if arg == "small":
    c.model.width, c.model.num_heads = 64, 2
  if arg == "smaller":
    c.model.width, c.model.num_heads, c.model.depth = 32, 1, 2
  return c
