"""Loading, overriding, validating and saving a configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from vit_jax import config as config_lib
from vit_jax.config import ConfigError, default, flatten, load, resolve_duration, validate
from vit_jax.config.fields import assign, fields

RUN_FILE = """
from vit_jax.config import check_argument, default

def get_config(arg=None):
  check_argument(arg, ("small", "large"))
  c = default()
  c.batch_size = 16 if arg == "small" else 32
  return c
"""


@pytest.fixture
def run_file(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(RUN_FILE)
  return str(path)


def body(statement: str) -> str:
  """The text of a run file that changes the defaults by one statement, on its line 4."""
  return f"from vit_jax.config import default\ndef get_config():\n  c = default()\n  {statement}\n  return c\n"


def changed(**values) -> ConfigDict:
  """The default config with values by dotted key, written with __ for the dots."""
  config = default()
  for key, value in values.items():
    assign(config, key.replace("__", "."), value)
  return config


def problems(config) -> list[str]:
  with pytest.raises(ConfigError) as caught:
    validate(config)
  return str(caught.value).splitlines()


def test_no_jax_is_imported():
  code = "import sys, vit_jax.config as c; c.validate(c.default()); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- loading


def test_overrides_come_after_the_run_file_and_its_argument(run_file):
  assert load(run_file).batch_size == 32
  assert load(run_file + ":small").batch_size == 16
  assert load(run_file + ":small", ["--config.batch_size=8"]).batch_size == 8


@pytest.mark.parametrize(
  ("override", "key", "value"),
  [
    ("batch_size=128", "batch_size", 128),
    ("evaluation.max_examples=50_000", "evaluation.max_examples", 50_000),
    ("schedules.lr.peak=1e-4", "schedules.lr.peak", 1e-4),
    ("optim.clip=3", "optim.clip", 3.0),
    ("koleo.topk=2", "koleo.topk", 2),
    ("log.tensorboard=false", "log.tensorboard", False),
    ("ibot.mask_shift=True", "ibot.mask_shift", True),
    ("model.qkv_bias=False", "model.qkv_bias", False),
    ("data.source=folder:/my photos/a=b", "data.source", "folder:/my photos/a=b"),
    ("crops.global_scale=(0.2,1)", "crops.global_scale", (0.2, 1.0)),
    ("crops.global_scale=0.2, 1", "crops.global_scale", (0.2, 1.0)),
    ("augment.blur=[1,0.1,0.5]", "augment.blur", (1.0, 0.1, 0.5)),
    ("evaluation.tasks=('knn','linear')", "evaluation.tasks", ("knn", "linear")),
    ("evaluation.tasks=linear", "evaluation.tasks", ("linear",)),
    ("evaluation.tasks=()", "evaluation.tasks", ()),
    ("model.width=192", "model.width", 192),
    ("model.width=None", "model.width", None),
    ("model.remat=none", "model.remat", "none"),
  ],
)
def test_override_takes_the_type_of_the_schema(run_file, override, key, value):
  result = flatten(load(run_file, ["--config." + override]))[key]
  assert result == value
  assert type(result) is type(value)


def test_none_empties_a_placeholder_set_by_the_run_file(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(
    "from vit_jax.config import default\ndef get_config():\n  c = default()\n  c.model.width = 64\n  return c\n"
  )
  assert load(str(path)).model.width == 64
  assert load(str(path), ["--config.model.width=None"]).model.width is None


@pytest.mark.parametrize(
  ("override", "right"),
  [
    ("batch_size=4.5", "an integer"),
    ("batch_size=None", "an integer"),
    ("batch_size=many", "an integer"),
    ("optim.clip=big", "a number"),
    ("optim.clip=nan", "a number"),
    ("optim.clip=inf", "a number"),
    ("log.tensorboard=2", "true or false"),
    ("data.source=None", "text"),
    ("crops.global_scale=0.3", "2 numbers"),
    ("augment.blur=(1,0.1)", "3 numbers"),
    ("augment.blur=(1,0.1,x)", "3 numbers"),
    ("model.width=3.5", "an integer or None"),
  ],
)
def test_override_of_the_wrong_type_names_key_value_and_type(run_file, override, right):
  with pytest.raises(ConfigError) as caught:
    load(run_file, ["--config." + override])
  assert str(caught.value).startswith(f"--config.{override}: must be {right}")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("key", "near"),
  [
    ("dino.prototype", "did you mean dino.prototypes"),
    ("prototypes", "ibot.prototypes or dino.prototypes"),
    ("crop.global_size", "crops.global_size"),
    ("batchsize", "batch_size"),
    ("koleo.zzz", "there are koleo.group_size, koleo.loss_weight, koleo.topk"),
    ("zzz", "there are augment, batch_size, checkpoint"),
    ("koleo", "is a section, not a key; its keys are koleo.group_size"),
  ],
)
def test_unknown_key_names_the_nearest(run_file, key, near):
  with pytest.raises(ConfigError, match=re.escape(near)) as caught:
    load(run_file, [f"--config.{key}=1"])
  assert str(caught.value).startswith(f"--config.{key}: ")


def test_override_without_a_value_is_refused(run_file):
  with pytest.raises(ConfigError, match="needs a value"):
    load(run_file, ["--config.batch_size"])


def run_file_error(tmp_path, text: str, suffix: str = "") -> str:
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(ConfigError) as caught:
    load(str(path) + suffix)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_missing_run_file_lists_what_there_is(run_file):
  with pytest.raises(ConfigError, match=r"no such file; .* has run\.py \(did you mean 'run\.py'\?\)"):
    load(run_file.replace("run.py", "runn.py"))


def test_spec_that_is_no_run_file_is_refused():
  with pytest.raises(ConfigError, match=r"must be a run file"):
    load("configs/quickstart")


def test_unknown_variant_lists_the_variants(run_file):
  with pytest.raises(ConfigError, match=r"no variant 'smal' \(did you mean 'small'\?\); there are :small, :large"):
    load(run_file + ":smal")


def test_run_file_without_get_config(tmp_path):
  assert "no function get_config" in run_file_error(tmp_path, "x = 1\n")


def test_run_file_without_argument_refuses_one(tmp_path):
  text = "from vit_jax.config import default\ndef get_config():\n  return default()\n"
  assert "mine.py takes no argument" in run_file_error(tmp_path, text, ":x")


def test_run_file_that_returns_no_config(tmp_path):
  assert "must return a config, got NoneType" in run_file_error(tmp_path, "def get_config():\n  pass\n")


def test_run_file_that_sets_an_unknown_key(tmp_path):
  error = run_file_error(tmp_path, body("c.dino.prototype = 4"))
  assert "dino.prototype: no such key; did you mean dino.prototypes" in error


@pytest.mark.parametrize("statement", ["c.dinoo.prototypes = 4", "c.batch_size = 'x'", "c.crops = 3"])
def test_mistake_in_a_run_file_names_file_and_line(tmp_path, statement):
  assert "mine.py, line 4: " in run_file_error(tmp_path, body(statement))


def test_wrong_tuple_in_a_run_file_is_named(tmp_path):
  text = (
    "from vit_jax.config import default\ndef get_config():\n  c = default()\n  c.augment.blur = (1, 2)\n  return c\n"
  )
  assert "augment.blur=(1, 2): must be 3 numbers" in run_file_error(tmp_path, text)


def test_loaded_config_takes_no_new_keys(run_file):
  config = load(run_file)
  with pytest.raises(AttributeError):
    config.dino.prototypse = 3


# --- durations


@pytest.mark.parametrize(
  ("text", "steps"),
  [
    ("100 steps", 100),
    ("100", 100),
    ("1 step", 1),
    ("1e3 steps", 1000),
    ("1 epoch", 16),  # 1000 images / 64, rounded up
    ("2 epochs", 32),
    ("0.5 epochs", 8),
    ("2e6 examples", 31250),
    ("65 examples", 2),
    ("10 %", 60),
    ("10%", 60),
    ("0.1 %", 1),
    ("0 steps", 0),
    ("0 %", 0),
    ("0 epochs", 0),
  ],
)
def test_duration_in_steps(text, steps):
  assert resolve_duration(text, batch_size=64, num_examples=1000, total_steps=600) == steps


def test_epoch_is_epoch_steps_where_given():
  assert resolve_duration("2 epochs", batch_size=64, num_examples=1000, epoch_steps=100) == 200


@pytest.mark.parametrize("percent", range(1, 101))
def test_percentages_of_whole_steps_are_exact(percent):
  assert resolve_duration(f"{percent} %", batch_size=1, total_steps=100_000) == percent * 1000


@pytest.mark.parametrize(
  "text", ["", "ten steps", "10 apples", "-1 steps", "1 2 steps", "steps", "1.2.3 epochs", "1_ %"]
)
def test_text_that_is_no_duration_is_named(text):
  with pytest.raises(ConfigError, match=f"^optim.freeze_last_layer={re.escape(repr(text))}: must "):
    resolve_duration(text, batch_size=1, num_examples=1, total_steps=1, key="optim.freeze_last_layer")


def test_duration_whose_measure_is_unknown_is_named():
  with pytest.raises(ConfigError, match=r"^duration='10 %': .*percentage"):
    resolve_duration("10 %", batch_size=1, num_examples=1)
  with pytest.raises(ConfigError, match=r"^duration='1 epochs': .*epoch_steps"):
    resolve_duration("1 epochs", batch_size=1)


@pytest.mark.parametrize(("batch", "given", "group"), [(64, None, 64), (7, None, 7), (256, None, 64), (96, None, 48),
                                                       (131, None, 1), (64, 8, 8)])  # fmt: skip
def test_loss_group_size(batch, given, group):
  assert config_lib.loss_group_size(changed(batch_size=batch, loss_group_size=given)) == group


# --- validation

IMPOSSIBLE = {  # for every key whose values can be impossible by themselves: such values
  "method": ["dinov2"],
  "seed": [-1, 2**32],
  "duration": ["0 steps", "10 %", "soon"],
  "epoch_steps": [0],
  "batch_size": [0, -8],
  "loss_group_size": [0],
  "model.mlp": ["relu"],
  "model.norm": ["batchnorm"],
  "model.norm_eps": [0.0],
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
  "model.unroll": [0],
  "koleo.loss_weight": [-1.0],
  "koleo.topk": [0],
  "koleo.group_size": [0],
  "ibot.mask_probability": [-0.1, 1.1],
  "ibot.mask_ratio": [(0.5, 0.1), (-0.1, 0.5), (0.1, 1.5)],
  "schedules.version": [0, 3],
  "optim.b1": [1.0, -0.1],
  "optim.b2": [1.0],
  "optim.eps": [0.0],
  "optim.clip": [-1.0],
  "optim.lr_scaling": ["sqrt"],
  "optim.layerwise_decay": [0.0, 1.1],
  "optim.patch_embed_lr": [-0.1],
  "optim.freeze_last_layer": ["one epoch", "101 %"],
  "crops.global_size": [0],
  "crops.local_size": [-16],
  "crops.local_number": [0],
  "crops.global_scale": [(0.0, 1.0), (1.0, 0.3), (0.3, 1.1)],
  "crops.local_scale": [(0.5, 0.1)],
  "crops.flip": [1.5],
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
  "data.prefetch": [0],
  "data.max_bad_fraction": [1.1],
  "evaluation.every": ["often"],
  "evaluation.tasks": [("knn", "linaer")],
  "evaluation.train_source": ["imagenet"],
  "evaluation.test_source": ["folder"],
  "evaluation.image_size": [0],
  "evaluation.batch_size": [0],
  "evaluation.max_examples": [0],
  "checkpoint.every": ["0 steps", "x"],
  "checkpoint.keep": [0],
  "checkpoint.keep_every": ["0 epochs", "x"],
  "log.every": [0],
}
IMPOSSIBLE |= {f"model.{key}": [0] for key in ("patch_size", "width", "depth", "num_heads", "mlp_hidden")}
for head in ("dino", "ibot"):
  IMPOSSIBLE |= {f"{head}.{key}": [0] for key in ("hidden", "bottleneck", "num_layers")}
  IMPOSSIBLE |= {f"{head}.prototypes": [0, 1], f"{head}.loss_weight": [-1.0]}
IMPOSSIBLE |= {f"mesh.{axis}": [0, -2] for axis in ("replica", "data", "fsdp", "tensor")}
for name, values in {"lr": [-1.0], "weight_decay": [-1.0], "momentum": [-0.1, 1.1], "teacher_temperature": [0.0],
                     "local_loss_weight": [-1.0]}.items():  # fmt: skip
  IMPOSSIBLE |= {f"schedules.{name}.{end}": values for end in ("start", "peak", "end")}
  IMPOSSIBLE |= {f"schedules.{name}.{part}": ["long", "-1 steps", "101 %"] for part in ("warmup", "cosine")}

ANY_VALUE = {"model.name", "model.layer_scale", "augment.mean", "data.cache_dir"}  # or judged where the model is known


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
  "loss_group_size=10": dict(batch_size=64, loss_group_size=10),
  "loss_group_size=128": dict(batch_size=64, loss_group_size=128),
  "koleo.group_size=24": dict(batch_size=64, koleo__group_size=24),
  "koleo.group_size=12": dict(batch_size=24, loss_group_size=8, koleo__group_size=12),
  "koleo.topk=1": dict(batch_size=1, ibot__mask_probability=1.0),
  "koleo.topk=4": dict(koleo__topk=4, koleo__group_size=4),
  "ibot.mask_probability=0.1": dict(batch_size=4, ibot__mask_probability=0.1),
  "ibot.mask_ratio=(0.0, 0.0)": dict(ibot__mask_ratio=(0.0, 0.0)),
  "dino.loss_weight=0.0": dict(dino__loss_weight=0.0, ibot__loss_weight=0.0),
  "mesh={": dict(mesh__fsdp=-1),
  "batch_size=64": dict(mesh__data=3),
  "model.width=100": dict(model__width=100, model__num_heads=3),
  "model.rope.base=100.0": dict(model__rope__base=100.0, model__rope__min_period=1.0),
  "model.rope.min_period=2.0": dict(model__rope__min_period=2.0, model__rope__max_period=1.0),
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
    dict(batch_size=64, loss_group_size=32, koleo__group_size=8),
    dict(ibot__loss_weight=0.0, ibot__mask_probability=0.0),
    dict(mesh__data=8, mesh__fsdp=-1),
    dict(mesh__data=1, mesh__fsdp=1),
    dict(model__rope__min_period=1.0, model__rope__max_period=2.0),
    dict(duration="100 steps", schedules__lr__warmup="100 steps", schedules__lr__cosine="0 steps"),
    dict(duration="100 steps", schedules__lr__warmup="6400 examples"),
    dict(duration="10 steps", schedules__lr__warmup="5 epochs"),  # depends on the number of images
    dict(schedules__lr__warmup="10 %", schedules__lr__cosine="90 %"),
    dict(optim__clip=0.0, evaluation__every="0 steps", evaluation__tasks=()),
    dict(data__source="embedded:textures/train?size=64&count=6000", evaluation__test_source="folder:/a"),
    dict(data__source="tfds:imagenet2012/train"),
  ],
)
def test_possible_combination_passes(values):
  validate(changed(**values))


# --- saving


def unusual():
  return changed(
    model__width=48, model__layer_scale=1e-5, model__qkv_bias=False, schedules__lr__cosine="50 %", evaluation__tasks=(),
    crops__global_scale=(0.1, 1 / 3), data__source="folder:/é", seed=2**31,
  )  # fmt: skip


def test_saved_config_is_read_back_exactly(tmp_path):
  path = tmp_path / "runs" / "config.json"
  config_lib.save(unusual(), path)
  back = config_lib.read(path)
  before, after = flatten(unusual()), flatten(back)
  assert after == before
  assert {k: type(v) for k, v in after.items()} == {k: type(v) for k, v in before.items()}
  assert config_lib.config_hash(back) == config_lib.config_hash(unusual())
  assert [file.name for file in path.parent.iterdir()] == ["config.json"]
  assert flatten(load(str(path))) == before


def test_read_config_keeps_its_placeholders(tmp_path):
  config_lib.save(default(), tmp_path / "c.json")
  back = config_lib.read(tmp_path / "c.json")
  back.model.width = 64
  with pytest.raises(TypeError):
    back.model.width = 1.5


def test_dictionary_is_plain_json():
  values = config_lib.to_dict(unusual())
  assert json.loads(json.dumps(values)) == values
  assert flatten(config_lib.from_dict(values)) == flatten(unusual())


def test_key_of_another_version_is_named(tmp_path):
  values = config_lib.to_dict(default())
  values["dino"]["centering"] = "softmax"
  (tmp_path / "c.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match=r"c\.json .*another version.*dino\.centering: no such key"):
    config_lib.read(tmp_path / "c.json")


def test_key_that_an_older_version_lacked_takes_its_default():
  values = config_lib.to_dict(default())
  del values["koleo"]["topk"]
  assert config_lib.from_dict(values).koleo.topk == default().koleo.topk


@pytest.mark.parametrize("text", ["", "[1]", '{"batch_size": "x"}'])
def test_damaged_file_is_named(tmp_path, text):
  (tmp_path / "c.json").write_text(text)
  with pytest.raises(ConfigError, match=r"c\.json"):
    config_lib.read(tmp_path / "c.json")


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"c\.json: no such file"):
    config_lib.read(tmp_path / "c.json")


def test_difference_names_every_changed_key():
  assert config_lib.difference(default(), default()) == []
  assert config_lib.difference(default(), changed(seed=1, model__width=64, augment__blur=(1.0, 0.1, 0.5))) == [
    "augment.blur: (0.0, 0.9, 0.5) -> (1.0, 0.1, 0.5)",
    "model.width: None -> 64",
    "seed: 0 -> 1",
  ]


def test_hash_follows_the_values():
  assert config_lib.config_hash(default()) == config_lib.config_hash(default().lock())
  assert config_lib.config_hash(default()) != config_lib.config_hash(changed(seed=1))
