"""What strangers and damaged processes do to process 0, and that it comes to no harm, or says what ended the job."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import os
import resource
import socket
import threading
import time

import pytest

from tests.parallel import attackers
from tests.parallel.attackers import hello, pretend
from tests.parallel.members import SECRET, eventually, free_address, in_parallel, join
from vit_jax.parallel import addresses, hub, lifeline, wire
from vit_jax.parallel.ending import FAILED, JoinError


def place_of(address: str) -> attackers.Place:
  host, port = address.split(":")
  return host, int(port)


def wait_for(place: attackers.Place) -> None:
  def listens() -> bool:
    with socket.socket() as probe:
      return probe.connect_ex(place) == 0

  assert eventually(listens)


def under_attack(attack, count: int = 2, seconds: float = 5.0):
  """The members of a job that is attacked from its first moment to its end, and how long the last took to join."""
  address = free_address()
  place = place_of(address)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, count)
    wait_for(place)
    kept = attack(place)
    start = time.monotonic()
    others = in_parallel(*(lambda i=i: join(address, i, count) for i in range(1, count)))
    members = [first.result(), *others]
  assert time.monotonic() - start < seconds
  return members, kept


def agree(members) -> set[int]:
  """The steps at which the members act that one asked for."""
  acted = []

  def run(member):
    for step in range(1, 2000):
      time.sleep(0.002)
      if member.due("stop", step):
        acted.append(step)
        return

  members[-1].ask("stop")
  in_parallel(*(lambda m=m: run(m) for m in members))
  assert len(acted) == len(members)
  return set(acted)


def leave(members) -> None:
  for member in members:
    member.leave()


@pytest.mark.parametrize("attack", attackers.ATTACKS.values(), ids=attackers.ATTACKS)
def test_no_stranger_disturbs_a_job(attack, ends, capfd):
  members, kept = under_attack(attack)
  assert len(agree(members)) == 1 and not ends
  assert in_parallel(*(lambda m=m: m.check_same("all", "x") for m in members)) == [None, None]
  said = capfd.readouterr()
  assert "\x1b" not in said.out + said.err and "\u202e" not in said.out + said.err
  leave(members)
  assert kept


def test_what_a_process_has_said_is_of_no_use_to_who_heard_it(ends):
  members, _ = under_attack(lambda place: attackers.replayed_hello(place, SECRET))
  assert len(agree(members)) == 1 and not ends
  leave(members)


def test_strangers_do_not_push_out_who_has_proven_itself():
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 2)
    wait_for(place_of(address))
    slow, proof, session = attackers.meet(place_of(address), SECRET)
    assert attackers.hear(attackers.say(slow, proof), wire.ANSWER_SIZE)
    kept = attackers.flood(place_of(address))
    attackers.say(slow, session.pack("hello", **hello(1)))
    member = first.result()
  assert member.hosts == ["h0", "h1"] and len(kept) == 400
  attackers.say(slow, session.pack("bye"))
  leave([member])


def test_who_proves_nothing_is_closed_in_time_and_takes_no_place_or_memory(monkeypatch):
  monkeypatch.setattr(hub, "_PROOF_TIME", 0.5)
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 2)
    wait_for(place_of(address))
    descriptors = len(os.listdir("/proc/self/fd"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = [connection for attack in attackers.ATTACKS.values() for connection in attack(place_of(address))]
    # Those of the attackers are in this process, too; process 0 has no more than it allows.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + len(kept) + hub._STRANGERS + 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB
    time.sleep(1.2)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + len(kept) + 20
    leave([join(address, 1, 2), first.result()])


def test_a_guess_is_told_that_it_is_wrong_and_the_first_is_logged(caplog):
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 2)
    wait_for(place_of(address))
    with pytest.raises(JoinError, match=f"{address}: process 0 has another secret: VIT_JAX_JOB_SECRET must be the"):
      join(address, 1, 2, secret=b"a guess of theirs")
    with pytest.raises(JoinError, match="or set for none"):
      join(address, 1, 2, secret=b"")
    leave([join(address, 1, 2), first.result()])
  logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
  assert logged[0].startswith("A connection from 127.0.0.1 did not know the job's secret")
  assert len(logged) == 2 and "2 did not know the job's secret" in logged[1]


def test_at_the_deadline_the_strangers_are_counted():
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 2, timeout=2.0)
    wait_for(place_of(address))
    attackers.forged_hello(place_of(address))
    error = first.exception()
  assert "Missing: process 1." in str(error) and "10 did not know the job's secret" in str(error)


def test_a_coordinator_that_cannot_prove_itself_is_not_believed():
  with socket.create_server(("127.0.0.1", 0)) as server:

    def impostor():
      for first_words in (wire.challenge(), b"HTTP/1.1 400 Bad Request\r\n" * 5, b""):
        connection, _ = server.accept()
        with connection:
          attackers.say(connection, first_words)
          attackers.hear(connection, wire.PROOF_SIZE)
          attackers.say(connection, bytes(range(wire.ANSWER_SIZE)))

    thread = threading.Thread(target=impostor, daemon=True)
    thread.start()
    host, port = server.getsockname()
    for words in ("does not know the job's secret", "is no coordinator of vit_jax", "timed out"):
      with pytest.raises(OSError, match=words):
        lifeline.Channel(host, port, secret=SECRET, count=2, until=time.monotonic() + 1.0)
    thread.join()


def test_want_of_file_descriptors_passes(monkeypatch, ends):
  accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOBUFS]

  def scarce(self):
    if failures:
      raise OSError(number := failures.pop(), os.strerror(number))
    return accept(self)

  monkeypatch.setattr(socket.socket, "accept", scarce)
  address = free_address()
  members = in_parallel(lambda: join(address, 0, 2), lambda: join(address, 1, 2))
  assert len(agree(members)) == 1 and not failures and not ends
  leave(members)


def test_a_process_that_never_reads_blocks_nobody_and_ends_the_job_by_its_name(monkeypatch, ends, capsys):
  monkeypatch.setattr(hub, "_UNSENT", 10_000)
  monkeypatch.setattr(hub, "_FAREWELL", 0.2)
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    futures = [pool.submit(join, address, i, 3) for i in (0, 1)]
    wait_for(place_of(address))
    deaf, _ = pretend(place_of(address), SECRET, hello(2, of=3, host="h2"))
    members = [future.result() for future in futures]
  with contextlib.suppress(OSError):  # when the job is over
    for topic in range(60):  # 200 kB for each process: more than the system keeps of it
      members[1]._channel.send("ask", what=f"{topic} " + "x" * 200_000)
  assert eventually(lambda: len(ends) == 2) and set(ends) == {FAILED}
  assert "stopping: process 2 of 3 (h2, pid 1) does not read what it is told" in capsys.readouterr().err
  deaf.close()


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda session: b"\0" * 100, "a message that is damaged"),
    (lambda session: b"\xff" * 100, "a message of 4294967295 bytes"),
    (lambda session: session._seal(b"[" * 200_000), "more than 4 lists and objects"),
    (lambda session: session._seal(b"\xff"), "a message that cannot be read"),
    (lambda session: session._seal(b'["at",{"what":"stop","step":"soon"}]'), "'step' is str"),
    (lambda session: session.pack("at", what="stop", step=1), "an answer that nobody asked for"),
    (lambda session: session.pack("hello", **hello(0)), "a message 'hello', which is not for it to send"),
    (lambda session: session.pack("same", what="x"), "a message 'same', which is not for it to send"),
    (lambda session: b"".join(session.pack("claim", what=str(i), value="") for i in range(99)), "more than 64 things"),
  ],
)
def test_a_damaged_process_ends_the_job_by_its_name(damage, words, ends, capsys, job):
  members = job(2)
  members[1]._channel._connection.sendall(damage(members[1]._channel._session))
  assert eventually(lambda: len(ends) >= 2) and set(ends) == {FAILED}
  said = capsys.readouterr().err
  assert f"process 0 of 2 (h0): stopping: process 1 of 2 (h1, pid {os.getpid()}) sent" in said and words in said


def test_a_process_damaged_before_the_job_begins_ends_it_by_its_name():
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 3)
    wait_for(place_of(address))
    damaged, _ = pretend(place_of(address), SECRET, hello(1, of=3))
    attackers.say(damaged, bytes(100))
    error = first.exception()
  assert "process 1 of 3 (h1, pid 1) sent a message that is damaged" in str(error)


def test_a_process_of_another_count_ends_the_job_and_is_named():
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(join, address, 0, 2)
    wait_for(place_of(address))
    error = pool.submit(join, address, 1, 3, host=attackers.ESCAPES).exception()
  for told in (error, first.exception()):
    assert "was started as one of 3, process 0 as one of 2" in str(told)
    assert "\x1b" not in str(told) and "\u202e" not in str(told)


def test_names_and_words_of_processes_are_shown_without_control_characters(ends, capsys):
  address = free_address()
  members = in_parallel(*(lambda i=i: join(address, i, 2, host=attackers.ESCAPES) for i in range(2)))
  assert all("\x1b" not in "".join(member.hosts) for member in members)
  with pytest.raises(SystemExit):
    members[1].fail(f"bad\n{attackers.ESCAPES}", 7)
  assert eventually(lambda: len(ends) == 2)
  said = capsys.readouterr().err
  assert "\x1b" not in said and "\u202e" not in said and "failed: bad" in said


def test_the_hub_does_not_die_unnoticed(monkeypatch, ends, capsys, job):
  job(4)
  turn = hub.Hub._turn

  def break_down(self):
    if self._count == 4:  # not that of another test
      raise MemoryError("no more")
    turn(self)

  monkeypatch.setattr(hub.Hub, "_turn", break_down)
  assert eventually(lambda: len(ends) >= 5) and set(ends) == {FAILED}
  said = capsys.readouterr().err
  assert "process 0 of 4: the thread that watches over the processes failed: MemoryError: no more" in said
  assert "process 3 of 4 (h3): stopping: process 0 of 4: the thread that watches" in said


def test_a_hub_that_breaks_down_before_the_job_begins_ends_process_0(monkeypatch, ends, capsys):
  monkeypatch.setattr(addresses, "keep_alive", lambda connection: 1 / 0)
  with pytest.raises(JoinError):
    join(free_address(), 0, 2, timeout=0.5)
  assert eventually(lambda: FAILED in ends)
  assert "failed: ZeroDivisionError" in capsys.readouterr().err


def test_a_listener_does_not_die_unnoticed(monkeypatch, ends, capsys, job):
  members = job(2)

  def break_down(message):
    raise RecursionError("too deep")

  members[1]._take = break_down
  members[0].ask("stop")
  assert eventually(lambda: len(ends) >= 2) and set(ends) == {FAILED}
  said = capsys.readouterr().err
  assert "process 1 of 2 (h1): the connection to process 0 failed: RecursionError: too deep" in said
  assert f"process 0 of 2 (h0): stopping: process 1 of 2 (h1, pid {os.getpid()}) failed: the connection" in said


def test_a_hub_that_speaks_nonsense_is_left(ends, capsys, job):
  members = job(2)
  for kind, fields in (("do", {"what": "stop", "step": 3}), ("bye", {})):
    with pytest.raises(wire.WireError):
      members[0]._take(wire.Message(kind, fields))
  members[1]._take(wire.Message("where", {"what": "x"}))
  with pytest.raises(wire.WireError, match="a second question"):  # would wait for itself
    members[1]._take(wire.Message("where", {"what": "x"}))
  assert eventually(lambda: len(ends) >= 2)  # as process 0 did not ask


def test_a_job_without_a_secret_is_open_and_has_the_same_bounds(ends):
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(join, address, 0, 2, secret=b"")
    wait_for(place_of(address))
    for name in ("nested_json", "endless_line", "never_reading", "slow_loris", "flood", "random_bytes"):
      attackers.ATTACKS[name](place_of(address))
    members = [join(address, 1, 2, secret=b""), first.result()]
  assert len(agree(members)) == 1 and not ends
  leave(members)


def test_a_large_job_meets_at_once():
  address, count = free_address(), 200
  members = in_parallel(*(lambda i=i: join(address, i, count) for i in range(count)))
  assert all(member.hosts == [f"h{i}" for i in range(count)] for member in members)
  leave(members)
