"""DINOv3 ViT-7B/16, stage 2 of 3: Gram anchoring, 200,000 steps that follow stage 1.

    vit-jax train --config=configs/dinov3/vit7b16_gram_anchor.py --workdir=runs/7b/gram \\
      --config.init_from=runs/7b/pretrain --config.gram.source=runs/7b/pretrain --config.data.source=folder:/images

Values of `dinov3_vit7b16_gram_anchor.yaml`. The reference goes on counting steps from stage 1 (1,000,000 to 1,200,000),
where its warm-ups are over; here the stage is a run of its own, so they are left out: the learning rate is constant,
the Gram loss and the local crops' weight change over the first 1,000 steps, the Gram teacher is refreshed after
10,000, 20,000 and 30,000. The optimizer's moments start anew. The paper takes an early Gram teacher (about step
200,000 of stage 1): `--config.gram.source=runs/7b/pretrain/checkpoints/200000`.
Hardware: the reference's was 256 H100. Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import load


def get_config():
  c = load("dinov3/vit7b16_pretrain")
  c.duration = "200 epochs"

  c.gram.source = "init"
  c.gram.refresh.first = "10 epochs"
  c.gram.refresh.every = "10 epochs"
  c.gram.refresh.max = 3
  c.crops.gram_size = 512

  c.schedules.lr.update(start=3e-5, peak=3e-5, end=3e-5, warmup="0 steps")
  c.schedules.teacher_temperature.update(start=0.07, peak=0.07, end=0.07, warmup="0 steps")
  c.schedules.momentum.update(start=0.999, peak=0.999, end=0.999)
  c.schedules.gram_loss_weight.update(start=0.0, peak=0.0, end=2.0, cosine="1 epochs")
  c.schedules.local_loss_weight.update(start=1.0, peak=1.0, end=0.5, cosine="1 epochs")
  c.optim.freeze_last_layer = "0 steps"
  return c
