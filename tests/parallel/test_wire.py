"""Who is believed, and what can be a message."""

from __future__ import annotations

import json

import pytest

from vit_jax.parallel import wire
from vit_jax.parallel.wire import Session, WireError

SECRET = b"of the job"


def sessions(first_secret: bytes = SECRET, second_secret: bytes = SECRET) -> tuple[Session, Session]:
  """The two sides of one connection."""
  challenge = wire.challenge()
  proof = wire.prove(SECRET, challenge)
  return (
    Session(first_secret, challenge, proof, first=True, count=2),
    Session(second_secret, challenge, proof, first=False, count=2),
  )


def sealed(session: Session, content: bytes) -> bytes:
  """A message whose code is right and whose content is this."""
  return session._seal(content)


def test_both_sides_prove_the_secret_and_neither_sends_it():
  challenge = wire.challenge()
  proof = wire.prove(SECRET, challenge)
  answer = wire.answer(SECRET, challenge, proof)
  assert len(challenge) == wire.CHALLENGE_SIZE and len(proof) == wire.PROOF_SIZE and len(answer) == wire.ANSWER_SIZE
  assert wire.convinces(SECRET, challenge, proof, answer)
  assert SECRET not in challenge + proof + answer
  assert wire.answer(b"another", challenge, proof) is None
  assert not wire.convinces(b"another", challenge, proof, answer)
  assert not wire.convinces(SECRET, challenge, proof, proof[-wire.ANSWER_SIZE :])  # one's own code sent back


def test_what_was_said_once_proves_nothing_again():
  challenge = wire.challenge()
  proof = wire.prove(SECRET, challenge)
  assert wire.answer(SECRET, wire.challenge(), proof) is None
  changed = bytearray(proof)
  for place in range(len(proof)):
    changed[place] ^= 1
    assert wire.answer(SECRET, challenge, bytes(changed)) is None
    changed[place] ^= 1


def test_messages_arrive_as_sent_however_they_are_cut():
  first, second = sessions()
  text = 'π "[{" \x1b \ud800 \\'
  data = first.pack("refused", text=text) + first.pack("same", what="x") + first.pack("do", what="stop", step=3)
  got = [message for i in range(len(data)) for message in second.unpack(data[i : i + 1])]
  assert got == [("refused", {"text": text}), ("same", {"what": "x"}), ("do", {"what": "stop", "step": 3})]
  assert list(first.unpack(second.pack("bye") + second.pack("ask", what="a"))) == [("bye", {}), ("ask", {"what": "a"})]


@pytest.mark.parametrize("attack", ["change", "repeat", "reorder", "reflect", "redirect", "leave out"])
def test_nobody_on_the_way_can_change_the_conversation(attack):
  first, second = sessions()
  one, two = first.pack("same", what="a"), first.pack("same", what="b")
  data = {
    "change": one.replace(b'"a"', b'"c"'),
    "repeat": one + one,
    "reorder": two + one,
    "reflect": second.pack("bye"),
    "redirect": sessions()[0].pack("same", what="a"),
    "leave out": two,
  }[attack]
  with pytest.raises(WireError, match="damaged, or not of this job"):
    list(second.unpack(data))


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"[" * 200_000, "more than 4 lists"),
    (b'{"a":' * 1000 + b"1" + b"}" * 1000, "more than 4 lists"),
    (b'["ask",{"what":"' + b"[" * 1000 + b'","more":1}]', "'more' is int"),  # brackets in a text are none
    (b'["ask",{"what":"\\"[[[[[["}', "cannot be read"),
    (b"\xff\xfe\xfa", "cannot be read"),
    (b"", "cannot be read"),
    (b"9" * 10_000, "cannot be read"),
    (b"null", "no known kind"),
    (b'["shout",{}]', "no known kind"),
    (b'[["ask"],{}]', "no known kind"),
    (b'["ask",{}]', "'what' is NoneType"),
    (b'["ask",{"what":1}]', "'what' is int"),
    (b'["at",{"what":"stop","step":true}]', "'step' is bool"),
    (b'["at",{"what":"stop","step":1e3}]', "'step' is float"),
    (b'["at",{"what":"stop","step":' + str(2**64).encode() + b"}]", "beyond all bounds"),
    (b'["bye",{"\\u001b[2J":1}]', "'\N{REPLACEMENT CHARACTER}[2J' is int"),
  ],
)
def test_what_makes_no_sense_is_named(content, words):
  first, second = sessions()
  with pytest.raises(WireError) as error:
    list(second.unpack(sealed(first, content)))
  assert words in str(error.value) and len(str(error.value)) < 200


def test_a_message_has_a_longest_length_on_both_sides():
  first, second = sessions()
  assert list(first.unpack(second.pack("ask", what="x" * (wire.LIMIT - 100))))
  with pytest.raises(WireError, match="are the most"):
    second.pack("ask", what="x" * wire.LIMIT)
  with pytest.raises(WireError, match="a message of 4294967295 bytes"):  # before any of it has come
    list(first.unpack(b"\xff" * 36))
  hosts = ["x" * wire.NAME] * 4096
  challenge = wire.challenge()
  proof = wire.prove(SECRET, challenge)
  down, up = (Session(SECRET, challenge, proof, first=first, count=4096) for first in (True, False))
  assert list(up.unpack(down.pack("welcome", hosts=hosts, about={}))) == [("welcome", {"hosts": hosts, "about": {}})]


def test_what_is_shown_cannot_command_a_terminal():
  shown = wire.printable("a\x1b[2J\r\x00\x9b\u202eb\nc\ud800é")
  assert shown == "a\ufffd[2J\ufffd\ufffd\ufffd\ufffdb\nc\ufffdé"
  assert wire.printable("x" * 30_000) == "x" * 20_000 + " … (10000 characters more)"
  assert wire.name("a\nvit-jax: process 0 of 2") == "a\ufffdvit-jax: process 0 of 2"
  assert json.dumps(shown)
