"""Run files and overrides."""

from __future__ import annotations

import re

import pytest

from vit_jax.config import ConfigError, flatten, load, save
from vit_jax.config.students import student_config

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


PLAIN = "import ml_collections as m; d = m.ConfigDict(dict(seed=3)).lock(); "


def body(statement: str) -> str:
  """The text of a run file that changes the defaults by one statement, on its line 4."""
  return f"from vit_jax.config import default\ndef get_config():\n  c = default()\n  {statement}\n  return c\n"


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
    ("crops.resolutions=()", "crops.resolutions", ()),
    ("crops.resolutions=((64,32,0,1),)", "crops.resolutions", ((64, 32, 0, 1.0),)),
    (
      "crops.resolutions=[[64, 32, 96, 0.5], [96, 32, 128, 0.5]]",
      "crops.resolutions",
      ((64, 32, 96, 0.5), (96, 32, 128, 0.5)),
    ),
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
    ("crops.resolutions=(512,112,0,1)", "rows of 4 numbers such as ((96,96,96,0.5),"),
    ("crops.resolutions=((512,112,1),)", "rows of 4 numbers"),
    ("crops.resolutions=((512,112,0.5,1),)", "rows of 4 numbers"),
    ("crops.resolutions=large", "rows of 4 numbers"),
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


def test_folder_and_link_with_the_name_of_a_run_file_are_said(tmp_path):
  (tmp_path / "folder.py").mkdir()
  (tmp_path / "link.py").symlink_to("nowhere")
  for name, what in (("folder", "is a folder"), ("link", "leads nowhere")):
    with pytest.raises(ConfigError, match=rf"{name}\.py: {what}; "):
      load(f"{tmp_path}/{name}.py")


def test_of_many_run_files_some_are_shown(tmp_path):
  for i in range(30):
    (tmp_path / f"run{i:02}.py").write_text("")
  with pytest.raises(ConfigError, match=r"run06\.py, run07\.py, … \(30 in all\) \(did you mean 'run29\.py'\?\)$"):
    load(f"{tmp_path}/rum29.py")


def test_run_file_without_its_ending_is_told_so(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine").write_text("")
  with pytest.raises(ConfigError, match=r"; mine is there, but its name does not end in \.py$"):
    load("mine")


def test_spec_that_is_no_run_file_is_refused():
  with pytest.raises(ConfigError, match=r"must be a run file"):
    load("configs/quickstart")


def test_folder_of_a_run_is_answered_with_its_config(run_file, tmp_path):
  save(load(run_file), tmp_path / "config.json")
  with pytest.raises(ConfigError, match=rf"\(did you mean {tmp_path}/config.json\?\)"):
    load(str(tmp_path))


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


@pytest.mark.parametrize(
  ("statement", "message"),
  [
    ("c.dino.prototype = 4", "dino.prototype: no such key; did you mean dino.prototypes"),
    ("c.dinoo.prototypes = 4", "dinoo: no such key; did you mean dino?"),
    ("c['dino']['prototype'] = 4", "dino.prototype: no such key; did you mean dino.prototypes"),
    ("c['dino.prototype'] = 4", "dino.prototype: no such key; did you mean dino.prototypes"),
    ("c.model.update(widht=3)", "model.widht: no such key; did you mean model.width"),
    ("c.update(batchsize=3)", "batchsize: no such key; did you mean batch_size"),
    ("c.update_from_flattened_dict({'dino.prototype': 3})", "dino.prototype: no such key; did you mean dino.proto"),
    ("c.schedules.lr = dict(warmpu='1 steps')", "schedules.lr.warmpu: no such key; did you mean schedules.lr.warmup"),
    ("x = c.schedules.lr.peek", "schedules.lr.peek: no such key; did you mean schedules.lr.peak"),
    ("c.lr = 1e-3", "lr: no such key; did you mean schedules.lr?"),
    ("c.zork = 1", "zork: no such key; there are augment, batch_size"),
    ("del c.seed", "seed: cannot be removed: every config has all keys"),
    ("c.batch_size = 'x'", "batch_size='x': must be an integer"),
    ("c.batch_size = 4.0", "batch_size=4.0: must be an integer"),
    ("c.batch_size = True", "batch_size=True: must be an integer"),
    ("c.optim.clip = float('nan')", "optim.clip=nan: must be a number"),
    ("c.augment.blur = (1, 2)", "augment.blur=(1, 2): must be 3 numbers such as"),
    ("c.evaluation.tasks = 'knn'", "evaluation.tasks='knn': must be names such as"),
    ("c.model.name = None", "model.name=None: must be text"),
    ("c.crops = 3", "crops=3: is a section, not a key; its keys are crops.flip"),
    ("c.batch_size = undefined", "NameError: name 'undefined' is not defined"),
    ("c = defalt()", "NameError: name 'defalt' is not defined (did you mean 'default'?)"),
    ("import math; c.seed = math.flor(1)", "module 'math' has no attribute 'flor' (did you mean 'floor'?)"),
    ("from vit_jax.config import lod", "(did you mean 'load'?)"),
    ("c.batch_size.x = 3", "AttributeError: 'int' object has no attribute 'x'"),
    (PLAIN + "d.sedd = 3", "sedd: no such key in this ConfigDict (did you mean 'seed'?)"),
    (PLAIN + "d['sed'] = 3", "sed: no such key in this ConfigDict (did you mean 'seed'?)"),
    (PLAIN + "x = d.sed", "sed: no such key in this ConfigDict (did you mean 'seed'?)"),
    (PLAIN + "d.seed = 'x'", "seed='x': must be of the type of 3, which is there"),
    ("raise SystemExit(3)", "the run file ends the program (exit 3)"),
    ("raise ValueError('two\\nlines')", "ValueError: two lines"),
  ],
)
def test_mistake_in_a_run_file_is_one_line_with_file_line_and_the_nearest(tmp_path, statement, message):
  said = run_file_error(tmp_path, body(statement))
  assert said.startswith(f"{tmp_path}/mine.py, line 4: ") and message in said
  assert "ml_collections" not in said and "Could not override" not in said and "locked" not in said


@pytest.mark.parametrize(
  ("statement", "key", "value"),
  [
    ("c.model.depths = [3, 3]", "model.depths", (3, 3)),
    ("c['dino.prototypes'] = 4", "dino.prototypes", 4),
    ("c.optim.clip = 3", "optim.clip", 3.0),
    ("c.ibot.prototypes = c.dino.get_ref('prototypes'); c.dino.prototypes = 8", "ibot.prototypes", 8),
    ("c.schedules.lr = dict(peak=0.5)", "schedules.lr.warmup", "10 %"),
    ("import numpy; c.batch_size = numpy.int64(8)", "batch_size", 8),
    ("import copy; c = copy.deepcopy(c); c.seed = 3", "seed", 3),
    ("c.seed = c.get('zork', 5) + getattr(c, 'zork', 5) + hasattr(c.model, 'zork')", "seed", 10),
  ],
)
def test_what_a_run_file_may_do(tmp_path, statement, key, value):
  (tmp_path / "mine.py").write_text(body(statement))
  result = flatten(load(str(tmp_path / "mine.py")))[key]
  assert result == value and type(result) is type(value)


def test_mistakes_in_a_loaded_config_are_named_as_in_a_run_file(run_file):
  config = load(run_file)
  with pytest.raises(ConfigError, match=r"model\.rope\.bse: no such key; did you mean model\.rope\.base"):
    config.model.rope.bse = 3.0
  with pytest.raises(ConfigError, match=r"seed='x': must be an integer"):
    config.update(seed="x")


def test_mistake_in_a_derived_run_file_names_both_lines(tmp_path):
  (tmp_path / "base.py").write_text(body("c.dino.prototype = 4"))
  (tmp_path / "mine.py").write_text(
    f"from vit_jax.config import load\n\ndef get_config():\n  return load('{tmp_path}/base.py')\n"
  )
  with pytest.raises(ConfigError) as caught:
    load(str(tmp_path / "mine.py"))
  assert str(caught.value).startswith(f"{tmp_path}/mine.py, line 4: {tmp_path}/base.py, line 4: dino.prototype: ")


def test_a_relative_run_file_has_its_line(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(body("c.seed = 1 // 0"))
  with pytest.raises(ConfigError, match=r"^mine\.py, line 4: ZeroDivisionError"):
    load("mine.py")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\ndef get_config(:\n  pass\n", "mine.py, line 2: SyntaxError: invalid syntax"),
    ("x = 1\nimport no_such_module\n", "mine.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    (body("c.seed = 1 // 0"), "mine.py, line 4: ZeroDivisionError: "),
    ("import json\ndef get_config():\n  return json.loads('x')\n", "mine.py, line 3: JSONDecodeError: "),
    ("def get_config(a, b):\n  pass\n", "mine.py: TypeError: get_config() missing 1 required"),
    ("def get_confg():\n  pass\n", "has no function get_config(arg=None) that returns the config (did you mean"),
    ("get_config = dict\n", "get_config must return a config, got dict"),
    ("get_config = 3\n", "has no function get_config"),
    ("x = 1\n x = 2\n", "mine.py, line 2: IndentationError: unexpected indent"),
    ("def get_config():\n  return get_config()\n", "mine.py, line 2: RecursionError: "),
    ("from vit_jax.config import defualt\n", "mine.py, line 1: ImportError: cannot import name 'defualt'"),
    ("import ast\nx = ast.literal_eval('1 +')\n", "mine.py, line 2: SyntaxError: "),
  ],
)
def test_exception_in_a_run_file_is_one_line_with_its_own_line(tmp_path, text, message):
  assert message in run_file_error(tmp_path, text)


def test_wrong_tuple_in_a_run_file_is_named(tmp_path):
  text = (
    "from vit_jax.config import default\ndef get_config():\n  c = default()\n  c.augment.blur = (1, 2)\n  return c\n"
  )
  assert "augment.blur=(1, 2): must be 3 numbers" in run_file_error(tmp_path, text)


def test_loaded_config_takes_no_new_keys(run_file):
  config = load(run_file)
  with pytest.raises(AttributeError):
    config.dino.prototypse = 3


STUDENTS = "distillation.students=(small={0}:small,large={0}:large)"


def test_students_are_read_from_their_run_files_and_changed_by_overrides(run_file):
  base = [STUDENTS.format(run_file), "students.small.model.depth=3", "students.large.optim.clip=1"]
  config = load(run_file, base)
  assert (config.students.small.model.depth, config.students.large.model.depth) == (3, None)
  assert config.students.large.optim.clip == 1.0
  assert "batch_size" not in config.students.small and "prototypes" not in config.students.small.dino
  alone = student_config(config, "small")
  assert (alone.batch_size, alone.model.depth, alone.distillation.students) == (config.batch_size, 3, ())


def test_a_saved_config_keeps_its_students_whatever_became_of_their_files(run_file, tmp_path):
  path = tmp_path / "config.json"
  save(load(run_file, [STUDENTS.format(run_file), "students.small.model.depth=3"]), path)
  (tmp_path / "run.py").unlink()
  assert load(str(path)).students.small.model.depth == 3
  fewer = load(str(path), [f"distillation.students=(small={tmp_path / 'run.py'}:small)"])
  assert list(fewer.students) == ["small"] and fewer.students.small.model.depth == 3


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("students.smal.model.depth=3", "--config.students.smal.model.depth: no such student; there are large, small"),
    ("students.small.model.dept=3", "--config.students.small.model.dept: no such key; did you mean model.depth"),
    ("students.small.batch_size=3", "--config.students.small.batch_size: is common to all students: set batch_size"),
    ("students.small.ibot.mask_shift=True", "is common to all students: set ibot.mask_shift itself"),
    ("students.small.dino.centering=softmax", "is common to all students: set dino.centering itself"),
    ("students.small.model.depth=x", "--config.students.small.model.depth=x: must be an integer"),
    ("distillation.students=(small=nope.py)", "distillation.students: small: --config=nope.py: no such file"),
  ],
)
def test_mistakes_about_students_are_named(run_file, override, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    load(run_file, [STUDENTS.format(run_file), override])
