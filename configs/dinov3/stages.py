"""Three stages scaled down: ViT-S, B and L on your own images, with one, four and eight accelerators in mind.

    vit-jax train --config=configs/dinov3/stages.py --workdir=runs/s/pretrain --config.data.source=folder:/images
    vit-jax train --config=configs/dinov3/stages.py:s_gram --workdir=runs/s/gram --config.data.source=folder:/images \\
      --config.init_from=runs/s/pretrain --config.gram.source=runs/s/pretrain
    vit-jax train --config=configs/dinov3/stages.py:s_high_res --workdir=runs/s/high_res \\
      --config.data.source=folder:/images --config.init_from=runs/s/gram --config.gram.source=runs/s/gram

Variants: `:s_gram`, `:s_high_res`, `:b_pretrain`, `:b_gram`, `:b_high_res`, `:l_pretrain`, `:l_gram`, `:l_high_res`;
none, or `:s_pretrain`, is the first stage of ViT-S.
The recipes follow the published 7B ones in what each stage changes, with the learning rates of the ViT-L recipe and
durations in passes over the data. The batch is a choice, not a need: `--config.batch_size=…` with
`--config.micro_batches=…` fits any memory, and the learning rate follows the batch.
Hardware: one accelerator for S (batch 64), four for B (256), eight for L (512). Memory: not measured.
Wall time: not measured. Expected: not measured.
"""

from vit_jax.config import check_argument, default

SIZES = {"s": ("dinov3_vits16", 64, 0.1), "b": ("dinov3_vitb16", 256, 0.2), "l": ("dinov3_vitl16", 512, 0.3)}
STAGES = ("pretrain", "gram", "high_res")


def get_config(arg: str | None = None):
  check_argument(arg, [f"{size}_{stage}" for size in SIZES for stage in STAGES])
  size, _, stage = (arg or "s_pretrain").partition("_")
  c = default()
  c.model.name, c.batch_size, c.model.drop_path = SIZES[size]
  c.model.dtype = "bfloat16"
  c.data.source = "folder:images"
  {"pretrain": _pretrain, "gram": _gram, "high_res": _high_res}[stage](c)
  return c


def _pretrain(c):
  c.duration = "100 epochs"
  c.crops.global_size, c.crops.local_size = 256, 112


def _after_pretraining(c):
  """What both later stages share: warm-ups are over, the teacher moves slowly, a Gram teacher holds the patches."""
  c.schedules.weight_decay.end = 0.04
  c.schedules.teacher_temperature.update(start=0.07, peak=0.07, end=0.07, warmup="0 steps")
  c.schedules.momentum.update(start=0.999, peak=0.999, end=0.999)
  c.optim.freeze_last_layer = "0 steps"
  c.gram.source = "init"


def _gram(c):
  _after_pretraining(c)
  c.duration = "20 epochs"
  c.crops.global_size, c.crops.local_size, c.crops.gram_size = 256, 112, 512
  c.schedules.lr.update(peak=2e-4, warmup="2 %")
  c.schedules.gram_loss_weight.update(start=0.0, peak=0.0, end=2.0, cosine="2 %")
  c.schedules.local_loss_weight.update(end=0.5, cosine="2 %")
  c.gram.refresh.update(first="5 %", every="5 %", max=3)


def _high_res(c):
  _after_pretraining(c)
  c.duration = "5 epochs"
  c.crops.global_size = 512
  c.crops.resolutions = ((384, 112, 576, 0.4), (512, 112, 768, 0.3), (512, 224, 768, 0.3))
  c.schedules.lr.update(peak=5e-5, warmup="10 %")
  c.schedules.gram_loss_weight.update(start=1.5, peak=1.5, end=1.5)
  c.schedules.local_loss_weight.update(start=0.5, peak=0.5, end=0.5)
  c.model.remat = "blocks"
