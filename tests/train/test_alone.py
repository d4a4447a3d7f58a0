"""One run at a time in a workdir, whatever way the one before it ended; and workdirs that cannot be."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.train.jobs import ROOT
from vit_jax import cli
from vit_jax.config import UserError
from vit_jax.train.alone import FILE, alone

TINY = f"--config={ROOT}/configs/tiny.py"
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on {sys.argv[2]}\\n")
file.flush()
if os.fork() == 0:  # a data worker, which may live on when its parent is killed
  time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def another_run(workdir, host=None):
  """A process that holds the workdir as a run does, and has a child."""
  command = [sys.executable, "-c", HOLD, str(workdir / FILE), host or socket.gethostname()]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
    try:
      process.stdout.readline()
      yield process
    finally:
      os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_is_refused_in_one_line_and_changes_nothing(tmp_path, capsys):
  with another_run(tmp_path) as other:
    assert cli.main(["train", TINY, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"vit-jax: --workdir={tmp_path}: process {other.pid} on {socket.gethostname()} trains here; wait" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_dry_run_beside_a_run_is_not_refused(tmp_path, capsys):
  with another_run(tmp_path):
    assert cli.main(["train", TINY, f"--workdir={tmp_path}", "--dry_run"]) == 0


def test_a_host_that_is_gone_is_waited_for_and_one_that_is_there_is_not_disturbed(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr("vit_jax.train.alone._EVERY", 0.05)
  with another_run(tmp_path, "elsewhere") as other:
    threading.Timer(0.5, other.kill).start()
    with alone(tmp_path):
      assert "on elsewhere trains in" in caplog.text
  monkeypatch.setattr("vit_jax.train.alone.LEASE", 0.2)
  with another_run(tmp_path, "elsewhere"), pytest.raises(UserError, match="on elsewhere trains here"), alone(tmp_path):
    pass


def test_after_a_kill_the_same_command_goes_on_though_a_worker_still_lives(tmp_path):
  with another_run(tmp_path) as other:
    other.kill()
    other.wait()
    os.killpg(other.pid, 0)  # its child is there
    with alone(tmp_path):
      assert (tmp_path / FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
  with alone(tmp_path / "a" / "new"):
    assert (tmp_path / "a" / "new" / FILE).exists()
  assert not (tmp_path / "a" / "new").exists()
  with alone(tmp_path):
    pass
  assert tmp_path.exists() and not (tmp_path / FILE).exists()


def test_a_file_that_the_run_before_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
  lock, (path, calls) = fcntl.lockf, (tmp_path / FILE, [])

  def removed_first(file, how):
    calls.append(how)
    if len(calls) == 1:
      path.unlink()
    lock(file, how)

  monkeypatch.setattr(fcntl, "lockf", removed_first)
  with alone(tmp_path):
    assert len(calls) == 2 and path.read_text().startswith("process ")


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "lockf", no_locks)
  with alone(tmp_path):
    pass
  assert [record.getMessage() for record in caplog.records] == [
    f"No locks on files in {tmp_path} (No locks available): a second run in it will not be noticed."
  ]


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
@pytest.mark.parametrize(("place", "words"), [("file", "is a file"), ("file/in", "file is a file")])
def test_a_workdir_that_is_a_file_is_refused_in_one_line(tmp_path, capsys, place, words, flags):
  (tmp_path / "file").write_text("")
  assert cli.main(["train", TINY, f"--workdir={tmp_path / place}", *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith(f"vit-jax: --workdir={tmp_path / place}: ") and words in error and error.count("\n") == 1


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
  def mkdir(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
  with (
    pytest.raises(UserError, match=r"--workdir=.*new: cannot be made or written to \(Permission denied\)"),
    alone(tmp_path / "new"),
  ):
    pass


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(FILE, path)])
def test_a_lock_that_is_no_file_is_named(tmp_path, make):
  make(tmp_path / FILE)
  said = rf"{tmp_path / FILE}: cannot be used \(.+\); remove it"
  with pytest.raises(UserError, match=said) as refused, alone(tmp_path):
    pass
  assert "None" not in str(refused.value)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
  (tmp_path / "config.json" / "x").mkdir(parents=True)
  assert cli.main(["train", TINY, f"--workdir={tmp_path}"]) == 2
  assert f"vit-jax: {tmp_path / 'config.json'}: Is a directory; put it right or move it away" in capsys.readouterr().err
