"""Run files by name: those that come with vit_jax, in a checkout and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax.config import ConfigError, load, shipped

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """An empty current folder."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_names_are_those_of_the_folder_at_the_top():
  assert shipped.folder() == ROOT / "configs"
  files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
  assert {Path(f"{name}.py") for name in shipped.names()} == files


def test_a_name_works_in_any_folder(elsewhere):
  assert load("dinov3_vits16").batch_size == 64
  assert load("dinov3_vits16:cpu", ["--config.seed=3"]).batch_size == 16
  assert load("dinov3/vitl16_im1k").model.name == "vit_large"
  assert load("vitl16_im1k") == load("dinov3/vitl16_im1k")
  assert load("dinov3/stages:b_gram").model.name == "dinov3_vitb16"


@pytest.mark.parametrize("name", shipped.names())
def test_every_run_file_may_be_copied_elsewhere(elsewhere, name):
  assert cli.main(["config", "copy", name]) == 0
  copy = Path(Path(name).name + ".py")
  assert copy.read_bytes() == shipped.path_of(name).read_bytes()
  ours, theirs = load(str(copy)), load(name)
  ours.distillation.students = theirs.distillation.students = ()  # which name the file itself
  assert ours == theirs


def test_a_copy_that_was_not_changed_is_the_same_by_either_name(elsewhere):
  assert cli.main(["config", "copy", "tiny"]) == 0
  assert load("tiny") == load("tiny.py")
  with open("tiny.py", "a") as file:
    file.write("# mine\n")
  with pytest.raises(ConfigError, match="--config=tiny: may mean tiny.py here or"):
    load("tiny")


def test_a_path_that_exists_is_that_file(elsewhere):
  text = "from vit_jax.config import default\ndef get_config():\n  c = default()\n  c.seed = 7\n  return c\n"
  (elsewhere / "mine.py").write_text(text)
  assert load("mine.py").seed == 7
  (elsewhere / "tiny.py").write_text(text)
  assert load("tiny.py").seed == 7


def test_the_folder_of_a_run_does_not_hide_a_name(elsewhere):
  (elsewhere / "tiny").mkdir()
  (elsewhere / "tiny" / "config.json").write_text("{}")
  assert load("tiny").batch_size == 8


@pytest.mark.parametrize("there", ["tiny.py", "tiny"])
def test_a_name_that_may_be_a_file_here_is_refused_with_both(elsewhere, there):
  (elsewhere / there).write_text("")
  with pytest.raises(ConfigError) as caught:
    load("tiny")
  assert f"--config=tiny: may mean {there} here or {ROOT}/configs/tiny.py of vit_jax" in str(caught.value)
  assert load(str(ROOT / "configs" / "tiny.py")).batch_size == 8


def test_the_folder_of_the_run_files_itself_is_not_ambiguous(monkeypatch):
  monkeypatch.chdir(ROOT / "configs")
  assert load("tiny") == load("tiny.py")
  assert load("dinov3/stages").model.name == "dinov3_vits16"


def test_a_last_part_that_several_names_have_is_refused_with_all(tmp_path, monkeypatch):
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "same.py").write_text("")
  monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
  with pytest.raises(ConfigError, match="--config=same: may mean a/same or b/same"):
    load("same")


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("dinov3_vits6", "(did you mean 'dinov3_vits16'?)"),
    ("dinov3-vits16:cpu", "(did you mean 'dinov3_vits16'?)"),
    ("dinov3/vitl16", "(did you mean 'dinov3/vitl16_"),
    ("dinov3_vits16:gpu", "no variant 'gpu'"),
    ("tiny:x", "tiny.py takes no argument"),
    ("zork", "see `vit-jax config list`"),
    ("configs/dinov3_vits16.py", "no such file; did you mean --config=dinov3_vits16, which comes with vit_jax?"),
    ("configs/dinov3/vitl16_im1k.py", "did you mean --config=dinov3/vitl16_im1k, which comes"),
    ("quickstart.py", "did you mean --config=quickstart, which comes with vit_jax?"),
    (":cpu", "must be a run file"),
    ("x" * 5000, "must be a run file"),
    ("x" * 5000 + ".py", "no such file"),
    ("~nobody_here/x.py", "no such file"),
    ("a\0b", "must be a run file"),
    ("../tiny", "must be a run file"),
  ],
)
def test_unknown_names_are_one_line_with_the_nearest(elsewhere, spec, message, capsys):
  assert cli.main(["inspect", "config", f"--config={spec}"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_the_list_says_what_each_is_for(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  assert cli.main(["config", "list"]) == 0
  out = capsys.readouterr().out
  assert set(shipped.names()) <= set(out.splitlines())
  assert "The quick start: a small ViT" in out and "dinov3_vits16:cpu" in out
  assert "Hardware: 2 CPU cores. Wall time: 5 to 6 minutes." in out
  assert max(map(len, out.splitlines())) <= 80
  for name in shipped.names():
    header = shipped.header(shipped.path_of(name))
    assert all((header.title, header.hardware, header.wall_time)), name


def test_show_prints_the_file_and_copy_does_not_overwrite(elsewhere, capsys):
  assert cli.main(["config", "show", "dinov3/vitl16_im1k"]) == 0
  assert capsys.readouterr().out == (ROOT / "configs" / "dinov3" / "vitl16_im1k.py").read_text()
  assert cli.main(["config", "copy", "dinov3/vitl16_im1k"]) == 0
  assert "wrote vitl16_im1k.py; use it as --config=vitl16_im1k.py" in capsys.readouterr().out
  (elsewhere / "vitl16_im1k.py").write_text("mine")
  assert cli.main(["config", "copy", "vitl16_im1k"]) == 2
  assert "vitl16_im1k.py: is there already" in capsys.readouterr().err
  assert (elsewhere / "vitl16_im1k.py").read_text() == "mine"
  assert cli.main(["config", "show", "vits"]) == 2
  assert "vits: vit_jax has no run file of this name" in capsys.readouterr().err


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A wheel, and one made from a source distribution, of a copy of this checkout."""
  tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
  ignored = shutil.ignore_patterns("__pycache__")
  for name in ("vit_jax", "configs"):
    shutil.copytree(ROOT / name, tree / name, ignore=ignored)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tree)
  build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

  def make(kind: str, folder: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", build, kind, str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]

  wheel = make("build_wheel", tree).rename(out / "first.whl")
  shutil.unpack_archive(make("build_sdist", tree), out / "unpacked")
  return wheel, make("build_wheel", next((out / "unpacked").iterdir()))


def test_a_wheel_holds_every_module_and_run_file(built):
  files = {f"vit_jax/{path.relative_to(ROOT / 'vit_jax')}" for path in (ROOT / "vit_jax").rglob("*.py")}
  files |= {f"vit_jax/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.py")}
  for wheel in built:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files | {"vit_jax/py.typed"}


def test_an_installed_package_has_its_run_files(built, tmp_path):
  zipfile.ZipFile(built[1]).extractall(tmp_path / "installed")
  environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}
  (tmp_path / "work").mkdir()

  def run(*argv: str) -> str:
    command = [sys.executable, *argv]
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  shown = run("-m", "vit_jax", "inspect", "config", "--config=dinov3_vits16:cpu").splitlines()
  assert any(line.split()[:3] == ["*", "batch_size", "16"] for line in shown)
  assert "\ndinov3/vitl16_im1k\n" in run("-m", "vit_jax", "config", "list")
  code = "import vit_jax.config as c; print(c.shipped.folder(), c.load('dinov3/vit7b16_high_res').model.name)"
  assert run("-c", code).split() == [str(tmp_path / "installed" / "vit_jax" / "configs"), "dinov3_vit7b16"]
