"""DINOv3 ViT-S/16 from scratch on your own images: stage 1 (DINO, iBOT, KoLeo), 100 epochs.

    vit-jax train --config=configs/dinov3_vits16.py --workdir=runs/vits16 --config.data.source=folder:/path/to/images

Variants: none, for one GPU or TPU chip: batch 64, bfloat16 compute; `:cpu`, to try it without one: batch 16, float32,
fewer prototypes. Any batch size works (`--config.batch_size=32`); the learning rate follows it.
Hardware: one accelerator. Memory: not measured. Wall time: not measured. Expected: k-NN top-1 not measured.
"""

from vit_jax.config import check_argument, default


def get_config(arg: str | None = None):
  check_argument(arg, ("cpu",))
  c = default()
  c.model.name = "dinov3_vits16"
  c.duration = "100 epochs"
  c.batch_size = 64
  c.model.dtype = "bfloat16"
  c.data.source = "folder:images"
  if arg == "cpu":
    c.batch_size = 16
    c.model.dtype = "float32"
    c.dino.prototypes = c.ibot.prototypes = 8192
  return c
