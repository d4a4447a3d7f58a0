"""The roll call, the agreements, and what is heard of a process that fails; the processes are threads here."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.parallel.members import eventually, free_address, in_parallel, join
from vit_jax.parallel import ending
from vit_jax.parallel.ending import JoinError


def test_everyone_hears_of_everyone(job):
  members = job(3)
  assert [member.hosts for member in members] == [["h0", "h1", "h2"]] * 3
  assert [member.about["you"] for member in members] == [0, 1, 2]
  assert members[2].name == "process 2 of 3 (h2)"


def test_a_stranger_does_not_disturb_the_roll_call():
  address = free_address()
  host, port = address.split(":")

  def stranger():
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
      with contextlib.suppress(ConnectionResetError):
        while connection.recv(100):  # what process 0 opens with, and the end
          pass
    return join(address, 1, 2)

  first, second = in_parallel(lambda: join(address, 0, 2), stranger)
  assert first.hosts == second.hosts == ["h0", "h1"]


def test_missing_processes_and_the_coordinator_are_named_by_all_that_came():
  address = free_address()
  errors = in_parallel(lambda: join(address, 0, 5, timeout=1.0), lambda: join(address, 2, 5, timeout=1.0))
  for error, process in zip(errors, (0, 2), strict=True):
    assert isinstance(error, JoinError)
    assert f"process {process} of 5 (h{process})" in str(error)
    assert f"only 2 of 5 processes came to the coordinator {address} within 1 s. Missing: process 1, 3-4." in str(error)


def test_a_coordinator_that_is_not_there_is_named():
  address = free_address()
  with pytest.raises(JoinError) as error:
    join(address, 1, 2, timeout=0.5)
  assert f"no connection to the coordinator {address} (process 0) within" in str(error.value)
  assert "Connection refused" in str(error.value)


def test_a_port_in_use_and_a_number_given_twice_are_named():
  address = free_address()
  with socket.create_server(("", int(address.split(":")[1]))), pytest.raises(JoinError, match="cannot listen"):
    join(address, 0, 2)
  address = free_address()
  late = lambda: (time.sleep(0.3), join(address, 1, 3))[1]  # noqa: E731
  errors = in_parallel(lambda: join(address, 0, 3), lambda: join(address, 1, 3), late)
  assert all("process_id 1 was given to h1" in str(error) for error in errors)


def test_all_act_at_the_same_step_however_far_they_are(job):
  members = job(3)
  acted = {}

  def run(member, pause):
    for step in range(1, 400):
      time.sleep(pause)
      if member.process == 1 and step == 5:
        member.ask("stop")
        member.ask("stop")
      if member.due("stop", step):
        acted[member.process] = step
        return

  in_parallel(*(lambda m=m, p=p: run(m, p) for m, p in zip(members, (0.001, 0.02, 0.01), strict=True)))
  assert len(acted) == 3 and len(set(acted.values())) == 1


def test_what_is_asked_before_the_first_step_happens_at_it(job):
  members = job(3)
  members[1].ask("stop")
  assert eventually(lambda: all(member.agreed("stop") for member in members))
  assert [member.due("stop", 501) for member in members] == [True] * 3  # the first of a run that goes on
  assert [member.due("stop", step) for step in (501, 502) for member in members] == [True] * 3 + [False] * 3


def test_what_is_asked_twice_happens_twice(job):
  members = job(2)
  for step in range(1, 4):
    assert not any(member.due("save", step) for member in members)
  assert not members[0].due("save", 4)  # one is ahead
  for times in (1, 2):
    members[1].ask("save")
    assert eventually(lambda times=times: all(len(m._agreements["save"]._ahead) == times for m in members))
  assert [[member.due("save", step) for step in (5, 6)] for member in members] == [[True, False]] * 2


def test_what_must_be_the_same_is_compared(ends, capsys, job):
  members = job(3)
  assert in_parallel(*(lambda m=m: m.check_same("the config", "x") for m in members)) == [None] * 3
  for member, value in zip(members, ("x", "x", "y"), strict=True):
    threading.Thread(target=member.check_same, args=("the config", value), daemon=True).start()
  assert eventually(lambda: len(ends) == 3) and set(ends) == {ending.FAILED}
  said = capsys.readouterr().err
  assert "process 0 of 3 (h0): stopping: the config differs between the processes" in said
  assert "x: process 0-1" in said and "y: process 2" in said


def test_a_failure_is_told_to_all_with_its_cause(ends, capsys, job):
  members = job(3)
  with pytest.raises(SystemExit):
    members[1].fail("ValueError: a bad day", 7)
  assert eventually(lambda: len(ends) == 3)
  assert sorted(ends) == [ending.FAILED, ending.FAILED, 7]
  said = capsys.readouterr().err
  for process in (0, 2):
    assert f"process {process} of 3 (h{process}): stopping: process 1 of 3 (h1, pid" in said
  assert "failed: ValueError: a bad day" in said


def test_a_failure_of_the_first_keeps_its_code_though_the_others_end_before_it(ends, capsys, job):
  members = job(2)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    failure = pool.submit(members[0].fail, "the workdir is in use", 2)
    assert eventually(lambda: ends == [ending.FAILED])  # of the other, told why
    members[1]._channel._connection.shutdown(socket.SHUT_WR)
    with pytest.raises(SystemExit):
      failure.result()
  assert ends == [ending.FAILED, 2]
  assert "without a word" not in capsys.readouterr().err


def test_the_end_of_one_may_give_all_its_exit_code(ends, capsys, job):
  members = job(2)
  with pytest.raises(SystemExit):
    members[1].fail("asked to stop", 75, others=75)
  assert eventually(lambda: len(ends) == 2) and ends == [75, 75]
  assert not members[0].agreed("stop")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_connection_that_breaks_is_a_process_that_was_killed(ends, capsys, dead, job):
  members = job(2)
  members[dead]._channel._connection.shutdown(socket.SHUT_WR)  # as the kernel does when a process ends
  survivor, said = 1 - dead, []
  news = (
    f"process {survivor} of 2 (h{survivor}): stopping: process {dead} of 2 (h{dead}, pid {os.getpid()}) ended without"
  )
  assert eventually(lambda: said.append(capsys.readouterr().err) or news in "".join(said)), said
  assert eventually(lambda: len(ends) >= 2) and set(ends) == {ending.FAILED}


def test_leaving_is_no_failure(ends, capsys, job):
  members = job(2)
  for member in members:
    member.leave()
    member._channel._connection.shutdown(socket.SHUT_WR)
  time.sleep(0.5)
  assert not ends and "stopping" not in capsys.readouterr().err


@pytest.mark.parametrize(("code", "left"), [(75, 75), (2**40, ending.FAILED), (-3, ending.FAILED)])
def test_a_process_ends_whatever_its_output_and_the_code_it_was_told(code, left):
  full = "import sys; sys.stdout = open('/dev/full', 'w'); print('lost')"
  script = f"{full}; from vit_jax.parallel import ending; ending.end({code})"
  assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL).returncode == left
