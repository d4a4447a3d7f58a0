"""The `vit-jax` command: what it parses, how it fails, and that the documents show it as it is."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import vit_jax
from vit_jax import cli, config
from vit_jax.config import UserError

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT}/configs/tiny.py"


@pytest.fixture
def calls(monkeypatch):
  """What `vit_jax.train.loop.train` is called with, instead of training; an error put into `fails` is raised."""
  from vit_jax.train import loop

  seen = types.SimpleNamespace(args=None, fails=None)

  def train(config, workdir, **kwargs):
    seen.args = (config, workdir, kwargs)
    if seen.fails:
      raise seen.fails

  monkeypatch.setattr(loop, "train", train)
  return seen


def test_what_a_terminal_has_no_character_for_is_printed_all_the_same():
  env = {**os.environ, "PYTHONIOENCODING": "ascii"}
  done = subprocess.run([sys.executable, "-m", "vit_jax", "data", "list"], capture_output=True, env=env, cwd=ROOT)
  assert done.returncode == 0 and b"\\u2026" in done.stdout  # the "…" of the list of formats


def test_help_imports_no_jax():
  code = "import sys, vit_jax.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: sys.exit('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0
  assert "train" in done.stdout


def test_version_is_that_of_the_distribution(capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(["--version"])
  version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
  assert (caught.value.code, capsys.readouterr().out) == (0, f"vit-jax {version}\n")


def test_the_package_shows_its_names_and_no_others():
  assert {name for name in dir(vit_jax) if not name.startswith("__")} == set(vit_jax.__all__)
  assert "__version__" in dir(vit_jax)


def test_module_runs_as_the_command():
  done = subprocess.run([sys.executable, "-m", "vit_jax", "data", "list"], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0
  assert "folder:/path" in done.stdout


def test_train_gets_the_config_with_its_overrides(calls):
  assert cli.main(["train", TINY, "--workdir=w", "--config.batch_size=4", "--config.seed", "3"]) == 0
  config, workdir, kwargs = calls.args
  assert (config.batch_size, config.seed, workdir, kwargs) == (4, 3, "w", {"accept_config_change": False})


def test_flags_with_and_without_equals_are_the_same(calls):
  assert cli.main(["train", "--config", TINY.split("=")[1], "--workdir", "w", "--accept_config_change"]) == 0
  assert calls.args[2] == {"accept_config_change": True}


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
    (f"train {TINY} --workdir=w --batch_size=3", "--batch_size=3: no such flag; did you mean --config.batch_size=3?"),
    (f"train {TINY} --workdir=w --confg.model.rope.dtype=x", "no such flag; did you mean --config.model.rope.dtype=x?"),
    (f"train {TINY} --workdir=w --batchsize=3", "no such flag; did you mean --config.batch_size=3?"),
    (f"train {TINY[:-3]} --workdir=w", "configs/tiny.py?)"),
    (f"train {TINY} --workdir=w --config.data.source={ROOT}/tests", f"(did you mean folder:{ROOT}/tests?)"),
    (
      f"train {TINY} --workdir=w --config.data.source=folder:",
      "names nothing after the colon; must be like folder:/path",
    ),
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
  calls.fails = error
  assert cli.main(["train", TINY, "--workdir=w"]) == 2
  assert capsys.readouterr().err == f"vit-jax: {error}\n"


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("seed"), RuntimeError("seed=0: no")])
def test_other_errors_keep_their_traceback(calls, error):
  calls.fails = error
  with pytest.raises(type(error)):
    cli.main(["train", TINY, "--workdir=w"])


@pytest.mark.parametrize(
  "command",
  [
    "",
    "trane",
    f"train {TINY}",
    f"train {TINY} --work=w",
    f"train {TINY} --workdir=w --zork",
    "export --model=m --to=t --format=npz",
    "evaluate --model=m --data=folder:x --image_size=0",
    "evaluate --model=m --data=folder:x --batch_size=0",
    f"data preview {TINY} --step=-1",
    f"inspect sharding {TINY} --devices=0",
  ],
)
def test_wrong_usage_exits_with_2(command, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(command.split())
  assert caught.value.code == 2
  assert "usage: vit-jax" in capsys.readouterr().err


def sub_commands(parser: argparse.ArgumentParser | None = None) -> list[list[str]]:
  """The words of every sub-command, "inspect", "config", …, and none for the command itself."""
  found = [[]]
  for action in (parser or cli._parser())._actions:
    if isinstance(action, argparse._SubParsersAction):
      found += [[name, *rest] for name, inner in action.choices.items() for rest in sub_commands(inner)]
  return found


@pytest.mark.parametrize("words", sub_commands(), ids=" ".join)
def test_help_fits_a_terminal_of_80_columns_and_says_all(words, capsys, monkeypatch):
  texts = {}
  for columns in ("80", "400"):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
      cli.main([*words, "--help"])
    texts[columns] = capsys.readouterr().out
  lines = texts["80"].splitlines()
  assert max(map(len, lines)) <= 80
  assert sorted(texts["80"].split()) == sorted(texts["400"].split())
  options = lines.index("options:")
  assert all(line == line.rstrip() for line in lines[options:])


@pytest.mark.parametrize("command", ["inspect model", "data list", "config list"])
def test_a_reader_that_ends_is_no_error(command):
  flags = TINY if command == "inspect model" else ""
  line = f"{sys.executable} -m vit_jax {command} {flags} | true; exit ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode in (0, 141) and done.stderr == ""


def documented_commands() -> list[str]:
  """Every `vit-jax` command line of the README, the pages of docs/ and the run files' headers."""
  pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.py"))]
  texts = [path.read_text() for path in pages]
  lines = [line.strip() for text in texts for line in re.sub(r"\\+\n\s*", " ", text).splitlines()]
  return [line for line in lines if line.startswith("vit-jax ")]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_parses(line, monkeypatch):
  monkeypatch.chdir(ROOT)
  args = cli.parse(shlex.split(line, comments=True)[1:])
  if getattr(args, "config", None):
    config.validate(config.load(args.config, args.overrides))


def test_readme_opens_with_the_two_commands():
  top = (ROOT / "README.md").read_text()[:1500]
  assert "./launch/quickstart.sh" in top
  assert "./launch/test.sh" in top
  assert len(documented_commands()) >= 8


def test_links_between_pages_lead_somewhere():
  for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
      assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_docs_show_the_error_as_it_is(capsys):
  page = (ROOT / "docs" / "configuration.md").read_text()
  command, message = re.search(r"\$ vit-jax (.*)\n +(vit-jax: .*)\n", page).groups()
  assert cli.main(command.replace("configs/", f"{ROOT}/configs/").split()) == 2
  assert capsys.readouterr().err == message + "\n"
