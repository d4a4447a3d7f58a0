"""What a config alone shows to be impossible."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from tests.config.changed import changed
from vit_jax.config import ConfigError, default, loss_group_size, validate
from vit_jax.config.fields import assign, fields


def problems(config: ConfigDict) -> list[str]:
  with pytest.raises(ConfigError) as caught:
    validate(config)
  return str(caught.value).splitlines()


def test_no_jax_is_imported():
  code = "import sys, vit_jax.config as c; c.validate(c.default()); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


IMPOSSIBLE = {  # for every key whose values can be impossible by themselves: such values
  "method": ["dinov2"],
  "seed": [-1, 2**32],
  "duration": ["0 steps", "10 %", "soon"],
  "epoch_steps": [0],
  "batch_size": [0, -8],
  "micro_batches": [0, -1],
  "loss_group_size": [0],
  "model.in_channels": [0],
  "model.depths": [(3, 0, 9, 3)],
  "model.widths": [(0,)],
  "model.pool": ["max"],
  "model.positions": ["absolute"],
  "model.position_table.image_size": [0],
  "model.position_table.prefix": ["patches"],
  "model.mlp": ["relu"],
  "model.norm": ["batchnorm"],
  "model.norm_eps": [0.0],
  "model.init_std": [0.0],
  "dino.init_std": [-0.02],
  "ibot.init_std": [0.0],
  "model.rope.base": [0.0],
  "model.rope.min_period": [-1.0],
  "model.rope.max_period": [0.0],
  "model.rope.shift": [-0.1],
  "model.rope.jitter": [0.5],
  "model.rope.rescale": [0.0],
  "model.rope.normalize": ["mean"],
  "model.rope.dtype": ["float16"],
  "model.num_registers": [-1],
  "model.drop_path": [-0.1, 1.0],
  "model.dtype": ["fp32"],
  "model.remat": ["block"],
  "compilation_cache": [""],
  "model.unroll": [0],
  "losses.chunk": [0],
  "koleo.loss_weight": [-1.0],
  "koleo.topk": [0],
  "koleo.group_size": [0],
  "ibot.mask_probability": [-0.1, 1.1],
  "ibot.mask_ratio": [(0.5, 0.1), (-0.1, 0.5), (0.1, 1.5)],
  "init.freeze_backbone_steps": ["one epoch", "101 %"],
  "gram.load_at": ["soon", "101 %"],
  "gram.refresh.first": ["soon"],
  "gram.refresh.every": ["0 steps", "often"],
  "gram.refresh.max": [0],
  "gram.tokens": ["visible"],
  "gram.remove_negative": ["student"],
  "gram.resize": ["nearest"],
  "schedules.version": [0, 3],
  "schedules.truncate": [-0.1, 0.25],  # with version 2
  "optim.b1": [1.0, -0.1],
  "optim.b2": [1.0],
  "optim.eps": [0.0],
  "optim.clip": [-1.0],
  "optim.max_nonfinite": [0],
  "optim.lr_scaling": ["sqrt"],
  "optim.layerwise_decay": [0.0, 1.1],
  "evaluation.crop_ratio": [0.0, 1.1],
  "optim.patch_embed_lr": [-0.1],
  "optim.freeze_last_layer": ["one epoch", "101 %"],
  "crops.global_size": [0],
  "crops.local_size": [-16],
  "crops.local_number": [0],
  "crops.global_scale": [(0.0, 1.0), (1.0, 0.3), (0.3, 1.1)],
  "crops.local_scale": [(0.5, 0.1)],
  "crops.flip": [1.5],
  "crops.gram_size": [0],
  "crops.resolutions": [
    ((224, 96, 0, 0.0),),
    ((224, -96, 0, 1.0),),
    ((0, 96, 0, 1.0),),
    ((224, 96, -1, 1.0),),
    ((224, 96, 0, 0.5), (224, 96, 0, 0.5)),
    ((224, 96, 0, 0.5), (448, 96, 448, 0.5)),
    ((224, 96, 0, 0.5), (448, 96, 0, 0.4)),
  ],
  "augment.jitter": [-0.5],
  "augment.brightness": [-0.1],
  "augment.contrast": [-0.1],
  "augment.saturation": [-0.1],
  "augment.hue": [0.6, -0.1],
  "augment.grayscale": [2.0],
  "augment.blur": [(0.0, 1.1, 0.5)],
  "augment.blur_sigma": [(0.0, 2.0), (2.0, 0.1)],
  "augment.solarize": [(0.0, -0.2, 0.0)],
  "augment.std": [(0.2, 0.0, 0.2)],
  "data.source": ["/my/photos", "folder:", "zip:x", "embedded:texture"],
  "data.workers": [-2],
  "data.augment": ["gpu"],
  "data.canvas": [(576,), (1, 576)],
  "data.value_range": [(0.0,), (1.0, 1.0), (2.0, 1.0)],
  "data.max_pixels": [0],
  "data.max_file_bytes": [0, -1],
  "data.prefetch": [0],
  "data.max_bad_fraction": [1.1],
  "data.timeout": [-1.0],
  "model.quantization": ["fp4"],
  "evaluation.every": ["often"],
  "evaluation.tasks": [("knn", "linaer")],
  "evaluation.train_source": ["imagenet"],
  "evaluation.test_source": ["folder"],
  "evaluation.image_size": [0],
  "evaluation.batch_size": [0],
  "evaluation.max_examples": [0],
  "checkpoint.every": ["0 steps", "x"],
  "checkpoint.minutes": [0.0],
  "checkpoint.grace": [-1.0],
  "checkpoint.keep": [0],
  "checkpoint.keep_every": ["0 epochs", "x"],
  "log.every": [0],
}
IMPOSSIBLE |= {f"model.{key}": [0] for key in ("patch_size", "width", "depth", "num_heads", "mlp_hidden")}
for head in ("dino", "ibot"):
  IMPOSSIBLE |= {f"{head}.{key}": [0] for key in ("hidden", "bottleneck", "num_layers")}
  IMPOSSIBLE |= {f"{head}.centering": ["sinkhorn"], f"{head}.center_momentum": [1.0, -0.1]}
  IMPOSSIBLE |= {f"{head}.prototypes": [0, 1], f"{head}.loss_weight": [-1.0]}
IMPOSSIBLE |= {f"mesh.{axis}": [0, -2] for axis in ("replica", "data", "fsdp", "tensor")} | {"mesh.zero": [0, 2]}
for name, values in {"lr": [-1.0], "weight_decay": [-1.0], "momentum": [-0.1, 1.1], "teacher_temperature": [0.0],
                     "local_loss_weight": [-1.0], "gram_loss_weight": [-1.0]}.items():  # fmt: skip
  IMPOSSIBLE |= {f"schedules.{name}.{end}": values for end in ("start", "peak", "end")}
  IMPOSSIBLE |= {f"schedules.{name}.{part}": ["long", "-1 steps", "101 %"] for part in ("warmup", "cosine")}

IMPOSSIBLE |= {"checkpoint.keep_best": ["zork/top1"], "checkpoint.keep_best_mode": ["most"]}
IMPOSSIBLE |= {  # with the default method
  "distillation.teacher": ["runs/x"], "distillation.fingerprint": ["ab"], "distillation.students": [("a=b.py",)],
}  # fmt: skip

ANY_VALUE = {  # or judged where the model, or the file, is known
  "model.name",
  "model.layer_scale",
  "model.position_table.offset",
  "augment.mean",
  "data.cache_dir",
  "init_from",
  "gram.source",
}


def test_default_is_valid():
  validate(default())


@pytest.mark.parametrize("key", sorted(IMPOSSIBLE))
def test_impossible_value_is_named_in_one_line(key):
  for value in IMPOSSIBLE[key]:
    config = default()
    assign(config, key, value)
    lines = problems(config)
    assert any(line.startswith(f"{key}={value!r}: ") and len(line) > len(f"{key}={value!r}: ") for line in lines), lines


def test_every_key_has_a_rule_or_takes_any_value():
  free = ANY_VALUE | {key for key, field in fields().items() if field.kind is bool}
  assert set(IMPOSSIBLE) | free == set(fields())
  assert not set(IMPOSSIBLE) & free


def test_enumerations_name_the_nearest():
  assert "did you mean 'bfloat16'?" in problems(changed(model__dtype="bfloat"))[0]
  assert "did you mean 'embedded'?" in problems(changed(data__source="embeded:textures"))[0]
  assert "did you mean 'textures'?" in problems(changed(data__source="embedded:texture?size=64"))[0]
  assert (
    "'liner' must be one of knn, linear (did you mean 'linear'?)"
    in problems(changed(evaluation__tasks=("knn", "liner")))[0]
  )


def test_all_problems_are_named_at_once():
  lines = problems(changed(batch_size=0, model__dtype="fp8", crops__flip=2.0))
  assert [line.split("=")[0] for line in lines] == ["model.dtype", "batch_size", "crops.flip"]


COMBINATIONS = {
  "distillation.teacher=None": dict(method="distillation"),
  "loss_group_size=10": dict(batch_size=64, loss_group_size=10),
  "loss_group_size=128": dict(batch_size=64, loss_group_size=128),
  "micro_batches=3": dict(batch_size=64, micro_batches=3),
  "micro_batches=4": dict(batch_size=64, loss_group_size=32, micro_batches=4),
  "koleo.group_size=24": dict(batch_size=64, koleo__group_size=24),
  "koleo.group_size=12": dict(batch_size=24, loss_group_size=8, koleo__group_size=12),
  "koleo.topk=1": dict(batch_size=1, ibot__mask_probability=1.0),
  "koleo.topk=4": dict(koleo__topk=4, koleo__group_size=4),
  "crops.local_number=7": dict(crops__local_number=7, crops__local_inside_global=True),
  "crops.local_size=240": dict(crops__local_size=240, crops__local_inside_global=True),
  "crops.resolutions=((64, 96, 0, 1.0),)": dict(
    crops__resolutions=((64, 96, 0, 1.0),), crops__local_inside_global=True
  ),
  "crops.gram_size=448": dict(crops__gram_size=448, crops__resolutions=((224, 96, 448, 1.0),)),
  "ibot.mask_probability=0.1": dict(batch_size=4, ibot__mask_probability=0.1),
  "ibot.mask_ratio=(0.0, 0.0)": dict(ibot__mask_ratio=(0.0, 0.0)),
  "dino.loss_weight=0.0": dict(dino__loss_weight=0.0, ibot__loss_weight=0.0),
  "mesh={": dict(mesh__fsdp=-1),
  "batch_size=64": dict(mesh__data=3),
  "model.width=100": dict(model__width=100, model__num_heads=3),
  "augment.mean=(0.485, 0.456, 0.406)": dict(model__in_channels=1, augment__std=(0.25,)),
  "augment.std=(0.2, 0.2)": dict(augment__std=(0.2, 0.2)),
  "model.rope.base=50.0": dict(model__rope__base=50.0, model__positions="learned"),
  "model.position_table.antialias=True": dict(model__position_table__antialias=True, model__positions="rope"),
  "model.rope.base=100.0": dict(model__rope__base=100.0, model__rope__min_period=1.0),
  "model.rope.min_period=2.0": dict(model__rope__min_period=2.0, model__rope__max_period=1.0),
  "gram.tokens='masked'": dict(gram__source="init", gram__tokens="masked"),
  "gram.tokens='unmasked'": dict(gram__source="ema", gram__tokens="unmasked"),
  "gram.tokens='masked': no patch": dict(
    gram__tokens="masked", gram__per_image=False, ibot__mask_probability=0.0, ibot__loss_weight=0.0
  ),
  "gram.source='ema': that teacher sees": dict(gram__source="ema", crops__gram_size=448),
  "gram.source='ema'": dict(gram__source="ema", crops__resolutions=((224, 96, 448, 1.0),)),
  "gram.load_at='5 %'": dict(gram__source="ema", gram__load_at="5 %"),
  "gram.refresh.every='5 %'": dict(gram__source="ema", gram__refresh__every="5 %"),
  "gram.refresh.every='10 %'": dict(gram__refresh__every="10 %"),
  "gram.refresh.first='10 %'": dict(gram__source="init", gram__refresh__first="10 %"),
  "gram.refresh.max=3": dict(gram__source="init", gram__refresh__max=3),
  "schedules.lr.warmup='200 steps'": dict(duration="100 steps", schedules__lr__warmup="200 steps"),
  "schedules.momentum.warmup='200 epochs'": dict(schedules__momentum__warmup="200 epochs"),
  "schedules.lr.warmup='6401 examples'": dict(duration="100 steps", schedules__lr__warmup="6401 examples"),
  "schedules.lr.warmup='2 epochs'": dict(duration="19 steps", epoch_steps=10, schedules__lr__warmup="2 epochs"),
  "schedules.lr.warmup='10 %'": dict(schedules__lr__cosine="91 %"),
  "schedules.lr.warmup='60 epochs'": dict(schedules__lr__warmup="60 epochs", schedules__lr__cosine="50 %"),
}


@pytest.mark.parametrize("start", sorted(COMBINATIONS))
def test_impossible_combination_is_named_in_one_line(start):
  lines = problems(changed(**COMBINATIONS[start]))
  assert len(lines) == 1
  assert lines[0].startswith(start)


@pytest.mark.parametrize(
  "values",
  [
    dict(batch_size=1, koleo__loss_weight=0.0),
    dict(batch_size=7),
    dict(batch_size=131, koleo__group_size=131),  # groups of one image, neighbours among all
    dict(batch_size=64, loss_group_size=8, koleo__group_size=32),
    dict(batch_size=64, loss_group_size=8, koleo__group_size=64, micro_batches=8),
    dict(batch_size=96, micro_batches=3),  # loss groups of 32
    dict(batch_size=64, loss_group_size=32, koleo__group_size=8),
    dict(ibot__loss_weight=0.0, ibot__mask_probability=0.0),
    dict(mesh__data=8, mesh__fsdp=-1),
    dict(mesh__data=1, mesh__fsdp=1),
    dict(model__in_channels=2, augment__mean=(0.5, 0.5), augment__std=(0.2, 0.2)),
    dict(model__width=36, model__num_heads=6, model__positions="learned", model__position_table__offset=0.1),
    dict(model__rope__min_period=1.0, model__rope__max_period=2.0),
    dict(duration="100 steps", schedules__lr__warmup="100 steps", schedules__lr__cosine="0 steps"),
    dict(duration="100 steps", schedules__lr__warmup="6400 examples"),
    dict(duration="10 steps", schedules__lr__warmup="5 epochs"),  # depends on the number of images
    dict(schedules__lr__warmup="10 %", schedules__lr__cosine="90 %"),
    dict(crops__resolutions=((512, 112, 768, 0.667), (768, 112, 1152, 0.333))),
    dict(crops__resolutions=((64, 48, 64, 1 / 3), (64, 32, 64, 1 / 3), (64, 48, 96, 1 / 3)), crops__local_size=240),
    dict(optim__clip=0.0, evaluation__every="0 steps", evaluation__tasks=()),
    dict(data__source="embedded:textures/train?size=64&count=6000", evaluation__test_source="folder:/a"),
    dict(data__source="tfds:imagenet2012/train"),
    dict(gram__load_at="20 %", gram__refresh__every="10 %", gram__refresh__first="30 %", gram__refresh__max=2),
    dict(gram__source="ema", gram__tokens="masked", gram__per_image=False),
    dict(gram__source="runs/a", gram__load_at="0 steps", init_from="runs/b"),
  ],
)
def test_possible_combination_passes(values):
  validate(changed(**values))


def test_micro_batches_that_do_not_divide_say_what_to_choose():
  assert "choose micro_batches=2, or a batch_size that is a multiple of 3" in problems(changed(micro_batches=3))[0]
  line = problems(changed(loss_group_size=32, micro_batches=4))[0]
  assert "choose micro_batches=2, or a loss_group_size that divides the 16 images of a micro-batch" in line


def test_loss_groups_are_chosen_within_a_micro_batch():
  assert loss_group_size(changed(batch_size=256)) == 64
  assert loss_group_size(changed(batch_size=256, micro_batches=8)) == 32
