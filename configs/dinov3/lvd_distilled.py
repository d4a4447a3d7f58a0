"""The published distillation job: DINOv3 ViT-S, S+, B and L from the 7B teacher at once, 25,000 steps of 1,920 images.

    vit-jax train --config=configs/dinov3/lvd_distilled.py --workdir=runs/distilled \\
      --config.distillation.teacher=runs/7b/gram --config.data.source=folder:/images

Every batch is answered by the teacher once; the students then learn from it one after the other, each over the whole
mesh. Give what they start from as `--config.students.s.init_from=PATH`, and so on. `runs/distilled/students/s` is a
student's address for `vit-jax evaluate` and `vit-jax export`. All share the settings of `vitl16_distilled.py`: of the
published files of the four students it is the only one.
Hardware: the reference's was 296 H100 (S 48, S+ 48, B 80, L 120). Wall time: not measured. Expected: not measured.
"""

from pathlib import Path

from vit_jax.config import check_argument, load

SIZES = {"s": "dinov3_vits16", "splus": "dinov3_vits16plus", "b": "dinov3_vitb16", "l": "dinov3_vitl16"}


def get_config(arg: str | None = None):
  """The job; with an argument of SIZES: what one student has for its own."""
  check_argument(arg, list(SIZES))
  c = load("dinov3/vitl16_distilled")
  c.schedules.lr.end *= (1776 / 1920) ** 0.5  # the reference scales it as for 6 images on each of 296 processes
  if arg is not None:
    c.model.name = SIZES[arg]
    return c
  c.distillation.students = tuple(f"{name}={Path(__file__)}:{name}" for name in SIZES)
  return c
