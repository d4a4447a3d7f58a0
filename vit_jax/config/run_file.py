"""One run file: finding it by path or name, running its `get_config`, and saying what is wrong in it, with the line.

A mistake in a run file is answered as a compiler would: "my/run.py, line 12: dino.prototype: no such key; did you mean
dino.prototypes?", without a traceback through the libraries beneath.
"""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax.config import shipped
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import did_you_mean, flatten
from vit_jax.config.saving import conform

_SHOWN = 8  # names of files in a message


class NoVariant(ConfigError):
  """The argument of a run file is none that it knows: the mistake is in the command line, not in a line of the file."""


class Place(NamedTuple):
  """Where a run file is, and the argument for it."""

  path: Path
  arg: str | None


def check_argument(arg: str | None, variants: Iterable[str]) -> None:
  """For run files: raises ConfigError unless the argument of `get_config` is None or one of `variants`."""
  variants = list(variants)
  if arg is not None and arg not in variants:
    names = ", ".join(f":{name}" for name in variants)
    raise NoVariant(f"no variant {arg!r}{did_you_mean(arg, variants)}; there are {names}, or none")


def run_file(spec: str) -> ConfigDict:
  """The config that a run file makes: "my/run.py", or the name of one that comes with vit_jax, each with ":argument".

  Raises:
    ConfigError: in one line: no such file; or what is wrong in it, with its line.
  """
  path, arg = locate(spec)
  module = _imported(path, spec)
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
    near = did_you_mean("get_config", functions)
    raise ConfigError(f"--config={spec}: {path} has no function get_config(arg=None) that returns the config{near}")
  takes_arg = _takes_argument(get_config)
  if arg is not None and not takes_arg:
    raise ConfigError(f"--config={spec}: {path.name} takes no argument")
  try:
    result = get_config(arg) if takes_arg else get_config()
  except (Exception, SystemExit) as error:
    raise _explained(error, path, spec) from error
  if not isinstance(result, ConfigDict):
    line = inspect.unwrap(get_config).__code__.co_firstlineno if inspect.isfunction(get_config) else 1
    raise ConfigError(f"{path}, line {line}: get_config must return a config, got {type(result).__name__}")
  return conform(flatten(result), where=f"{path}: ")


def locate(spec: str) -> Place:
  """The file that a specification means: a path that exists, else a run file of vit_jax by its name.

  Raises:
    ConfigError: if there is none, or it may be either.
  """
  found = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
  if found:
    path, arg = Path(os.path.expanduser(found[1])), found[2]
    if not os.path.isfile(path):
      what = "is a folder" if os.path.isdir(path) else "leads nowhere" if os.path.islink(path) else "no such file"
      raise ConfigError(f"--config={spec}: {what}; {_other_files(path)}")
    return Place(path, arg)
  name, colon, arg = spec.partition(":")
  try:
    path = shipped.find(name)
  except ConfigError as error:
    raise ConfigError(f"--config={error}") from None
  here = [one for one in (Path(f"{name}.py"), Path(name), Path(name, "config.json")) if os.path.isfile(one)]
  if path is None:
    meant = shipped.nearest(name)
    if here and here[0] == Path(name) and here[0].suffix != ".json":
      meant = f"; {name} is there, but its name does not end in .py"
    elif here:
      meant = f" (did you mean {here[0]}{colon + arg if here[0].suffix == '.py' else ''}?)"
    raise ConfigError(
      f"--config={spec}: must be a run file, as my/run.py or my/run.py:argument, or the name of one that comes with "
      f"vit_jax (see `vit-jax config list`){meant}"
    )
  # A run's folder is no run file: `--config=tiny --workdir=tiny` means the same when it is given again.
  others = [one for one in here if one.name != "config.json" and one.read_bytes() != path.read_bytes()]
  if others:
    raise ConfigError(f"--config={spec}: may mean {others[0]} here or {path} of vit_jax: give one of these paths")
  return Place(path, arg if colon else None)


def _other_files(path: Path) -> str:
  """What there is instead of a path that does not exist."""
  if path.stem in {name.rpartition("/")[2] for name in shipped.names()}:
    return f"did you mean --config={_name_of(path)}, which comes with vit_jax?"
  folder = path.parent if os.path.isdir(path.parent) else Path("configs")
  files = sorted(file.name for file in folder.glob("*.py") if file.is_file()) if folder.is_dir() else []
  if not files:
    return f"the folder {folder} has no run files; `vit-jax config list` shows those of vit_jax"
  shown = ", ".join(files[:_SHOWN]) + (f", … ({len(files)} in all)" if len(files) > _SHOWN else "")
  return f"{folder} has {shown}{did_you_mean(path.name, files)}"


def _name_of(path: Path) -> str:
  """The name of the run file of vit_jax that a path ends with: as much of it as is a name."""
  known = shipped.names()
  endings = ("/".join([*path.parts[i:-1], path.stem]) for i in range(len(path.parts)))
  return next((name for name in endings if name in known), path.stem)


def _takes_argument(get_config: Any) -> bool:
  try:
    return bool(inspect.signature(get_config).parameters)
  except (TypeError, ValueError):  # of something that is not written in Python
    return False


def _imported(path: Path, spec: str) -> ModuleType:
  found = importlib.util.spec_from_file_location("vit_jax_run_file", path)
  module = importlib.util.module_from_spec(found)
  write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no __pycache__ among the run files
  try:
    found.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise _explained(error, path, spec) from error
  finally:
    sys.dont_write_bytecode = write_bytecode
  return module


def _explained(error: BaseException, path: Path, spec: str) -> ConfigError:
  """An exception in a run file in one line: the file, its own line, and what is wrong."""
  if isinstance(error, NoVariant):
    return ConfigError(f"--config={spec}: {error}")
  file, line, frame = path, *_last_line(error, path)
  if isinstance(error, ConfigError):
    what = str(error)
  elif isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
    # Of the file itself, or of one that it imports.
    file = path if Path(error.filename).samefile(path) else error.filename
    line, what = error.lineno, f"{type(error).__name__}: {error.msg}"
  elif said := _of_plain_config(error):
    what = said
  elif isinstance(error, SystemExit):
    what = f"the run file ends the program (exit {error.code})"
  else:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}{_near(error, frame)}"
  return ConfigError(f"{file}, line {line}: {what}" if line else f"--config={spec}: {file}: {what}")


def _of_plain_config(error: BaseException) -> str | None:
  """What is wrong where a ConfigDict that the run file made itself refuses a key or a value; None: it is not that."""
  step = error.__traceback__
  while step is not None and not isinstance(step.tb_frame.f_locals.get("self"), ConfigDict):
    step = step.tb_next
  if step is None:
    return None
  here = step.tb_frame.f_locals
  key = here.get("attribute", here.get("key"))
  if isinstance(error, KeyError | AttributeError) and key is not None:
    return f"{key}: no such key in this ConfigDict{did_you_mean(str(key), map(str, here['self']))}"
  if isinstance(error, TypeError) and key is not None and "value" in here:
    return f"{key}={here['value']!r}: must be of the type of {here['self'].get(key)!r}, which is there"
  return None


def _last_line(error: BaseException, path: Path) -> tuple[int | None, FrameType | None]:
  """The line of the run file that was being executed, and its frame; None: it was not come to."""
  found, step = (None, None), error.__traceback__
  while step is not None:
    if Path(step.tb_frame.f_code.co_filename) == path.absolute():
      found = step.tb_lineno, step.tb_frame
    step = step.tb_next
  return found


def _near(error: BaseException, frame: FrameType | None) -> str:
  """Brackets that ask for the nearest name, where an exception says that a name does not exist."""
  known: Iterable[str] = ()
  name = getattr(error, "name", None)
  if isinstance(error, NameError) and frame is not None:
    known = [*frame.f_locals, *frame.f_globals, *dir(builtins)]
  elif isinstance(error, AttributeError) and error.obj is not None:
    known = [one for one in dir(error.obj) if not one.startswith("_")]
  elif isinstance(error, ImportError):
    wanted = re.match(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    if wanted and wanted[2] in sys.modules:
      name, known = wanted[1], dir(sys.modules[wanted[2]])
  return did_you_mean(name, known) if name else ""
