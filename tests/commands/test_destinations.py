"""Where commands write: impossible places are refused before the work, and no result is lost to one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax.commands.common import destination
from vit_jax.config import UserError

RUN_FILE = Path(__file__).parents[2] / "configs" / "tiny.py"
TINY = f"--config={RUN_FILE}"
NOWHERE = "folder:/nowhere/at/all"  # opening it would be another error


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder to write in, with a file, a folder, a file of a model, a run file and links."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file.json").write_text("{}")
  (tmp_path / "folder.json").mkdir()
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "run.py").write_text("x = 1\n")
  (tmp_path / "loop.json").symlink_to("loop.json")
  (tmp_path / "dangling.json").symlink_to("file.json/x.json")
  (tmp_path / "link.json").symlink_to("new.json")
  (tmp_path / "pipe.json").symlink_to("/dev/null")
  return tmp_path


@pytest.mark.parametrize(
  "path", ["new.json", "new/folders/x.json", "file.json", "link.json", "pipe.json", "/dev/null", "X.JSON", "./x.json"]
)
def test_good_places_are_given_back_and_nothing_is_left_there(here, path):
  before = sorted(os.listdir(here))
  assert destination(path, "--json", endings=(".json",)) == Path(path) or path == "link.json"
  assert sorted(os.listdir(here)) == before
  assert (here / "file.json").read_text() == "{}"


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("", "--json=: names no file"),
    ("folder.json", "--json=folder.json: is a folder; name a file in it, such as folder.json/result.json"),
    ("new/", "--json=new/: is a folder"),
    ("x.txt", "--json=x.txt: must end in .json"),
    ("run.py", "--json=run.py: must end in .json"),
    ("file.json/x.json", "--json=file.json/x.json: cannot be written: Not a directory"),
    ("file.json/y/x.json", "cannot be written: Not a directory"),
    ("/proc/nothing/x.json", "--json=/proc/nothing/x.json: cannot be written: /proc"),
    ("loop.json", "cannot be written: Too many levels of symbolic links"),
    ("dangling.json", "cannot be written: Not a directory"),
    (f"{'n' * 300}.json", "cannot be written: File name too long"),
    (f"new/{'n' * 300}/x.json", "a name has 300 bytes, more than 255"),
    ("config.json", "--json=config.json: is there already, and nothing that this command writes"),
    ("~nobody-of-this-name/x.json", "cannot be written: "),
  ],
)
def test_impossible_places_are_refused_in_a_line(here, path, words):
  with pytest.raises(UserError) as caught:
    destination(path, "--json", endings=(".json",))
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_place_is_none():
  assert destination(None, "--json") is None


def test_home_is_meant_by_a_tilde(here, monkeypatch):
  monkeypatch.setenv("HOME", str(here))
  assert destination("~/x.json", "--json") == here / "x.json"


@pytest.mark.parametrize("path", ["new", "new/er", "folder.json", "/tmp"])
def test_folders_that_are_there_or_can_be_made(here, path):
  assert destination(path, "--workdir", folder=True) == Path(path)


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("file.json", "--workdir=file.json: is a file; give a folder to write into"),
    ("/dev/null", "is a file; give a folder"),
    ("/proc", "cannot be written: /proc: "),
    ("file.json/run", "Not a directory"),
  ],
)
def test_what_is_no_folder_is_refused(here, path, words):
  with pytest.raises(UserError, match=words):
    destination(path, "--workdir", folder=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_are_tried(here):
  (here / "file.json").chmod(0o400)
  (here / "folder.json").chmod(0o500)
  for path in ("file.json", "folder.json/x.json", "folder.json/new/x.json"):
    with pytest.raises(UserError, match="Permission denied"):
      destination(path, "--json")
  with pytest.raises(UserError, match="Permission denied"):
    destination("folder.json", "--workdir", folder=True)


def test_a_text_takes_the_place_of_texts_only(here):
  for name in ("t.txt", "t", "table.csv", "notes.md"):
    (here / name).write_text("old")
    assert destination(name, "--output", text=True) == Path(name)
  for name in ("run.py", "file.json", "config.json"):
    with pytest.raises(UserError, match="is there already, and nothing that this command writes"):
      destination(name, "--output", text=True)


@pytest.mark.parametrize(
  "command",
  [
    f"evaluate --model=nowhere --data={NOWHERE} --json=BAD.json",
    f"data scan {NOWHERE} --json=BAD.json",
    f"data convert {NOWHERE} array_record:BAD",
    f"data preview {TINY} --config.data.source={NOWHERE} --output=BAD.png",
    "export --model=nowhere --to=BAD",
    "export --model=nowhere --to=BAD.pth --format=pth",
    "convert --from=nowhere --to=BAD.safetensors --format=timm",
    f"inspect config {TINY} --output=BAD",
    f"inspect model {TINY} --output=BAD",
    f"inspect sharding {TINY} --output=BAD",
    f"inspect batch {TINY} --config.data.source={NOWHERE} --output=BAD.png",
    f"inspect features --model=nowhere --data={NOWHERE} --output=BAD.png",
    "inspect checkpoints --workdir=nowhere --output=BAD",
    "inspect run nowhere --output=BAD",
    "bench data --json=BAD.json",
    f"plan {TINY} --topology=h100:8 --json=BAD.json",
    f"profile {TINY} --config.data.source={NOWHERE} --workdir=BAD",
    "data scan folder:BAD --beside --index_only",
  ],
)
def test_every_command_tries_its_place_before_anything_else(here, capsys, command):
  assert cli.main(command.replace("BAD", f"{here}/file.json/out").split()) == 2
  error = capsys.readouterr().err
  assert "file.json/out" in error and "Not a directory" in error
  assert error.startswith("vit-jax: ") and error.count("\n") == 1


def test_an_export_is_refused_before_the_model_is_opened(here, capsys):
  (here / "weights").mkdir()
  (here / "weights" / "holiday.jpg").write_text("")
  for flags, words in (
    ("--to=weights", "holds other things than an exported model (holiday.jpg)"),
    ("--to=run.py --format=pth", "is there and no export of vit_jax"),
    ("--to=x.pth --format=timm", "is named …safetensors"),
    ("--to=folder.json --format=pth", "is a folder; name a file in it"),
    ("--to=run.py", "is a file; give a folder to write into"),
  ):
    assert cli.main(["export", "--model=nowhere", *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_text_that_cannot_be_written_after_all_is_printed(capsys):
  assert cli.main(["inspect", "config", TINY, "--output=/dev/full"]) == 2
  out, error = capsys.readouterr()
  assert "batch_size" in out
  assert error.splitlines()[-1] == "vit-jax: --output=/dev/full: cannot be written: No space left on device"


def test_a_report_of_a_scan_that_cannot_be_written_is_printed(capsys):
  assert cli.main(["data", "scan", "synthetic:photo?size=16x16&count=3", "--json=/dev/full"]) == 2
  out, error = capsys.readouterr()
  assert "3" in out
  assert error == "vit-jax: --json=/dev/full: cannot be written: No space left on device\n"


def test_json_goes_to_the_standard_output():
  command = ["data", "scan", "synthetic:photo?size=16x16&count=3", "--json=/dev/stdout"]
  done = subprocess.run([sys.executable, "-m", "vit_jax", *command], capture_output=True, text=True, check=True)
  assert json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])["records"] == 3
