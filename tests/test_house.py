"""The law of the house: which room may import which. Imports inside functions count, too."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vit_jax
from vit_jax import config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vit_jax"

# What each room may import besides itself. `config` imports no room but `files` (the standard library's part of
# reading and writing), so that every other may be configured by it; the rooms below take plain values instead, except
# those that list it.
LAW = {
  "files": set(),
  "config": {"files"},
  "ops": set(),
  "optim": set(),
  "parallel": set(),
  "models": {"ops"},
  "losses": {"ops"},
  "data": {"ops", "files"},
  "weights": {"models", "files"},
  "checkpoints": {"parallel", "files"},
  "methods": {"models", "losses", "ops", "optim", "weights", "data", "checkpoints", "config"},
  "evaluation": {"models", "data", "parallel", "checkpoints", "files"},
  "inspect": {"models", "methods", "parallel", "checkpoints", "data", "files"},
  "train": {"methods", "data", "parallel", "checkpoints", "evaluation", "inspect", "config", "files"},
}
# Rooms of which only these files may be imported: a description of views; a saved config, and a student's part of one.
ONE_FILE = {
  "methods": {"data.views", "data.bands", "config.schema", "config.saving", "config.students"},
  "inspect": {"data.views"},
}
ANYTHING = {"cli", "commands", "__main__", "__init__", "hub", "bench"}  # the faces of the package

# Distributions whose import name is another.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "cv2": "opencv-python-headless",
  "orbax": "orbax-checkpoint",
  "skimage": "scikit-image",
  "sklearn": "scikit-learn",
}


def source_files() -> list[Path]:
  return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return parts[0]


def imports(path: Path) -> list[tuple[int, str]]:
  """(line, dotted module) of every import in a file; `from a import b` counts as a.b."""
  package = ["vit_jax", *path.relative_to(PACKAGE).parent.parts]
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      module = ".".join([*base, *([node.module] if node.module else [])])
      found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
  return found


def rooms_imported(path: Path) -> list[tuple[int, str]]:
  """(line, "room.file.name") of every import of this package; of the package itself: its face, "__init__"."""
  inside = [(line, name.split(".", 1)) for line, name in imports(path) if name.split(".")[0] == "vit_jax"]
  return [(line, parts[1] if len(parts) > 1 else "__init__") for line, parts in inside]


def test_law_names_every_room():
  rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
  assert rooms - ANYTHING == set(LAW) - ANYTHING
  assert {path.stem for path in PACKAGE.glob("*.py")} <= ANYTHING


def test_law_has_no_circle():
  seen = []

  def visit(room: str, path: tuple[str, ...]) -> None:
    assert room not in path, " -> ".join([*path, room])
    if room not in seen:
      for other in LAW[room]:
        visit(other, (*path, room))
      seen.append(room)

  for room in LAW:
    visit(room, ())


@pytest.mark.parametrize("room", sorted(LAW))
def test_room_imports_only_what_the_law_lists(room):
  broken = []
  for path in source_files():
    if room_of(path) != room:
      continue
    for line, name in rooms_imported(path):
      other = name.split(".")[0]
      allowed = other == room or other in LAW[room]
      if other in {whole.split(".")[0] for whole in ONE_FILE.get(room, ())}:
        allowed = any(f"{name}.".startswith(f"{whole}.") for whole in ONE_FILE[room])
      if not allowed:
        broken.append(f"{path.relative_to(ROOT)}:{line} imports vit_jax.{name}")
  assert not broken, "\n".join(broken)


def test_checker_sees_every_form_of_import(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
  path = tmp_path / "data" / "x.py"
  path.parent.mkdir()
  path.write_text(
    "import vit_jax\nimport vit_jax.train.loop as t\nfrom vit_jax import hub\nfrom ..models import vit\n"
    "def f():\n  from vit_jax.methods.supervised import init\n"
  )
  assert rooms_imported(path) == [
    (1, "__init__"), (2, "train.loop"), (3, "hub"), (4, "models.vit"), (6, "methods.supervised.init"),
  ]  # fmt: skip


def test_ops_import_jax_only_and_config_no_jax():
  outside = {"ops": {"numpy", "jax", "jaxtyping", "chex"}, "config": {"ml_collections"}, "files": set()}
  for room, allowed in outside.items():
    for path in source_files():
      if room_of(path) == room:
        names = {name.split(".")[0] for _, name in imports(path)}
        assert names - sys.stdlib_module_names - {"vit_jax"} <= allowed, path


def test_every_module_imports():
  for module in pkgutil.walk_packages(vit_jax.__path__, "vit_jax."):
    if module.name == "vit_jax.__main__":  # runs the command
      continue
    try:
      importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # a peer of the benchmarks is a script for an environment that has PyTorch
      assert module.name.startswith("vit_jax.bench.torch_") and error.name == "torch", module.name


def test_everything_imported_is_declared():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = [name for group in project["optional-dependencies"].values() for name in group]
  declared = {re.split(r"[\[<>=;]", name)[0].replace("_", "-") for name in project["dependencies"] + extras}
  for path in source_files():
    for line, name in imports(path):
      top = name.split(".")[0]
      if top in sys.stdlib_module_names or top == "vit_jax":
        continue
      assert DISTRIBUTIONS.get(top, top).replace("_", "-") in declared, f"{path}:{line} imports {top}"


def test_every_dependency_is_imported():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  needed = {re.split(r"[\[<>=;]", name)[0].replace("_", "-") for name in project["dependencies"]}
  tops = {name.split(".")[0] for path in source_files() for _, name in imports(path)}
  assert needed <= {DISTRIBUTIONS.get(top, top).replace("_", "-") for top in tops}


def test_constraints_pin_every_dependency_by_name_and_version():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  pinned = set()
  for line in (ROOT / "constraints.txt").read_text().splitlines():
    if not line.startswith("#"):
      match = re.fullmatch(r'([a-z0-9-]+)==[\w.]+(; python_version (<|>=) "3\.12")?', line)
      assert match, line
      pinned.add(match[1])
  needed = project["dependencies"] + project["optional-dependencies"]["test"][1:]
  assert {re.split(r"[\[<>=]", name)[0].replace("_", "-") for name in needed} <= pinned


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.name)
def test_every_run_file_builds_and_says_how_to_run_it(path):
  text = path.read_text()
  variants = [None, *re.findall(r"^Variants?:.*", text, re.M)]
  specs = [str(path)] + [f"{path}:{name}" for line in variants[1:] for name in re.findall(r"`:(\w+)`", line)]
  for spec in specs:
    config.validate(config.load(spec))
  header = ast.get_docstring(ast.parse(text))
  assert f"vit-jax train --config={path.relative_to(ROOT)} --workdir=" in header
  assert all(word in header for word in ("Hardware:", "Wall time:", "Expected:"))


@pytest.mark.parametrize("path", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_script_is_bash_that_parses(path):
  assert subprocess.run(["bash", "-n", path]).returncode == 0
  if path.name != "environment.sh":  # sourced by the others
    assert path.stat().st_mode & 0o100, f"{path} is not executable"
