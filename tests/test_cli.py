"""The `vit-jax` command: what it parses, what it calls, how it fails."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vit_jax import cli, config
from vit_jax.config import UserError

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT}/configs/tiny.py"


class Calls:
  """Stands in for the modules behind a sub-command and records what they are called with."""

  def __init__(self, monkeypatch) -> None:
    self.seen, self._monkeypatch = [], monkeypatch

  def replace(self, module: str, function: str, result=None) -> None:
    def record(*args, **kwargs):
      self.seen.append((function, args, kwargs))
      if isinstance(result, Exception):
        raise result
      return result

    try:
      found = importlib.import_module(module)
    except ImportError:
      found = types.ModuleType(module)
      self._monkeypatch.setitem(sys.modules, module, found)
    self._monkeypatch.setattr(found, function, record, raising=False)
    parent, _, name = module.rpartition(".")
    self._monkeypatch.setattr(importlib.import_module(parent), name, found, raising=False)


@pytest.fixture
def calls(monkeypatch):
  return Calls(monkeypatch)


def test_help_imports_no_jax():
  code = "import sys, vit_jax.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: sys.exit('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0
  assert "train" in done.stdout


def test_module_runs_as_the_command():
  done = subprocess.run([sys.executable, "-m", "vit_jax", "data", "list"], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0
  assert "folder:/path" in done.stdout


def test_train_gets_the_config_with_its_overrides(calls):
  calls.replace("vit_jax.train.loop", "train")
  assert cli.main(["train", TINY, "--workdir=w", "--config.batch_size=4", "--config.seed", "3"]) == 0
  ((_, (config, workdir), kwargs),) = calls.seen
  assert (config.batch_size, config.seed, workdir, kwargs) == (4, 3, "w", {"accept_config_change": False})


def test_flags_with_and_without_equals_are_the_same(calls):
  calls.replace("vit_jax.train.loop", "train")
  assert cli.main(["train", "--config", TINY.split("=")[1], "--workdir", "w", "--accept_config_change"]) == 0
  assert calls.seen[0][2] == {"accept_config_change": True}


def test_dry_run_describes_and_does_not_train(calls, capsys):
  calls.replace("vit_jax.train.loop", "train")
  calls.replace("vit_jax.train.loop", "describe", "the plan")
  assert cli.main(["train", TINY, "--workdir=w", "--dry_run"]) == 0
  assert [name for name, _, _ in calls.seen] == ["describe"]
  assert capsys.readouterr().out == "the plan\n"


def test_evaluate_passes_its_flags_and_prints_the_scores(calls, capsys):
  calls.replace("vit_jax.evaluation", "evaluate_model", {"knn/top1": 0.5})
  command = "evaluate --model=runs/mine --tasks=knn,linear --data=folder:/a --test_data=folder:/b --json=s.json"
  assert cli.main([*command.split(), "--image_size=64"]) == 0
  assert calls.seen[0][1:] == (
    ("runs/mine",),
    dict(tasks=("knn", "linear"), train_source="folder:/a", test_source="folder:/b", image_size=64, batch_size=64,
         max_examples=None, output="s.json"),
  )  # fmt: skip
  assert re.fullmatch(r"knn/top1 +0\.5000\n", capsys.readouterr().out)


def test_export_loads_and_saves(calls):
  calls.replace("vit_jax.hub", "load_model", ("model", "params"))
  calls.replace("vit_jax.hub", "save_model")
  assert cli.main(["export", "--model=runs/mine", "--to=out", "--format=pth"]) == 0
  assert calls.seen[1] == ("save_model", ("out", "model", "params"), {"format": "pth"})


@pytest.mark.parametrize("what", ["config", "model"])
def test_inspect_tables_are_printed_or_written(calls, capsys, tmp_path, what):
  calls.replace("vit_jax.inspect.tables", f"{what}_table", "a table")
  assert cli.main(["inspect", what, TINY]) == 0
  assert capsys.readouterr().out == "a table\n"
  assert cli.main(["inspect", what, TINY, f"--output={tmp_path}/t.txt"]) == 0
  assert (tmp_path / "t.txt").read_text() == "a table\n"


def test_inspect_pictures_say_where_they_are(calls, capsys):
  calls.replace("vit_jax.inspect.pictures", "batch_sheet", "b.png")
  calls.replace("vit_jax.inspect.pictures", "feature_sheet", "f.png")
  assert cli.main(["inspect", "batch", TINY, "--output=b.png"]) == 0
  assert cli.main(["inspect", "features", "--model=m", "--data=folder:/a", "--output=f.png"]) == 0
  assert capsys.readouterr().out == "wrote b.png\nwrote f.png\n"
  assert calls.seen[1][1] == ("m", "folder:/a", "f.png")


@pytest.mark.parametrize(
  ("command", "message"),
  [
    (f"train {TINY} --workdir=w --config.dino.prototype=3", "--config.dino.prototype: no such key; did you mean"),
    (f"train {TINY} --workdir=w --config.batch_size=x", "--config.batch_size=x: must be an integer"),
    (f"train {TINY} --workdir=w --config.batch_size=0", "batch_size=0: must be at least 1"),
    (f"train {TINY} --workdir=w --config.batch_size", "--config.batch_size: needs a value"),
    (f"train {TINY} --config.batch_size --workdir=w", "--config.batch_size: needs a value"),
    (f"train {TINY}:x --workdir=w", "takes no argument"),
    ("train --config=nope.py --workdir=w", "--config=nope.py: no such file"),
    ("data list --config.batch_size=3", "--config.batch_size=3: this sub-command takes no config"),
  ],
)
def test_mistake_is_one_line_without_a_traceback(command, message, capsys):
  assert cli.main(command.split()) == 2
  error = capsys.readouterr().err
  assert error.startswith("vit-jax: ")
  assert message in error
  assert error.count("\n") == 1


class Ours(RuntimeError):
  """As defined somewhere in vit_jax."""


Ours.__module__ = "vit_jax.data.sources"


@pytest.mark.parametrize("error", [UserError("no"), Ours("no"), ValueError("crops.local_size=50: no")])
def test_errors_for_users_have_no_traceback(calls, capsys, error):
  calls.replace("vit_jax.train.loop", "train", error)
  assert cli.main(["train", TINY, "--workdir=w"]) == 2
  assert capsys.readouterr().err == f"vit-jax: {error}\n"


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("seed"), RuntimeError("seed=0: no")])
def test_other_errors_keep_their_traceback(calls, error):
  calls.replace("vit_jax.train.loop", "train", error)
  with pytest.raises(type(error)):
    cli.main(["train", TINY, "--workdir=w"])


@pytest.mark.parametrize("command", ["", "trane", f"train {TINY}", f"train {TINY} --work=w", "export --model=m --to=t "
                                     "--format=npz"])  # fmt: skip
def test_wrong_usage_exits_with_2(command, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(command.split())
  assert caught.value.code == 2
  assert "usage: vit-jax" in capsys.readouterr().err


def documented_commands() -> list[str]:
  """Every `vit-jax` command line of the README, the run files' headers and the scripts."""
  texts = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "configs").glob("*.py"))]]
  lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
  return [line for line in lines if line.startswith("vit-jax ")]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_parses(line):
  args = cli.parse(shlex.split(line, comments=True)[1:])
  if getattr(args, "config", None):
    config.validate(config.load(f"{ROOT / args.config}", args.overrides))


def test_readme_opens_with_the_two_commands():
  top = (ROOT / "README.md").read_text()[:1500]
  assert "./launch/quickstart.sh" in top
  assert "./launch/test.sh" in top
  assert len(documented_commands()) >= 8


def test_readme_shows_the_error_as_it_is(capsys):
  command, message = re.search(r"\$ vit-jax (.*)\n +(vit-jax: .*)\n", (ROOT / "README.md").read_text()).groups()
  assert cli.main(command.replace("configs/", f"{ROOT}/configs/").split()) == 2
  assert capsys.readouterr().err == message + "\n"
