"""Small files: whole or not at all; and what is damaged is named by file, line and reason."""

from __future__ import annotations

import json
import os
import stat

import pytest

from vit_jax.files import DamagedFile, append, parse_json, read_json, read_json_lines, write_json, write_text

DEEP = "[" * 100_000


@pytest.mark.parametrize(
  ("content", "line", "reason"),
  [
    (b"", 1, "is empty"),
    (b" \n", 1, "is empty"),
    (b'{"a": 1,\n "b"', 2, "is no JSON"),
    (b'{"a": 1}\n{"a": 2}\n', 2, "is no JSON"),
    (DEEP.encode(), 1, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", 1, "cannot be read"),
    (b'{"a":\n "\xff"}', 2, "bytes that are no text"),
    (b"[1]", 1, "must be an object of JSON, not list"),
    (b"\x00" * 100, 1, "is no JSON"),
  ],
)
def test_damage_is_named_with_file_line_and_what_to_do(tmp_path, content, line, reason):
  path = tmp_path / "x.json"
  path.write_bytes(content)
  with pytest.raises(DamagedFile) as damaged:
    read_json(path, kind=dict, advice="restore it from a copy")
  text = str(damaged.value)
  assert text.startswith(f"{path}, line {line}: ") and reason in text and text.endswith("; restore it from a copy")
  assert "\n" not in text and damaged.value.line == line and damaged.value.path == path


def test_what_is_no_readable_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError):
    read_json(tmp_path / "none")
  with pytest.raises(DamagedFile, match="is no file"):
    read_json(tmp_path)
  os.mkfifo(tmp_path / "fifo")
  with pytest.raises(DamagedFile, match="is no file"):  # and does not wait for somebody to write
    read_json(tmp_path / "fifo")


def test_good_lines_are_kept_whatever_is_between_them(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"a": 1}\n' + DEEP.encode() + b'\n{"a": 2}\n{"b": 3}\n{"a": 4}\n{"a"')
  found = read_json_lines(path, lambda value: None if "a" in value else "has no a")
  assert [value["a"] for _, value in found.good] == [1, 2, 4]
  assert [(bad.line, bad.reason) for bad in found.bad] == [(2, "is nested too deeply to be read"), (4, "has no a")]
  assert found.torn.line == 6
  path.write_bytes(b'{"a": 1}\n{"a": 2}')
  found = read_json_lines(path)
  assert len(found.good) == 1 and found.torn.line == 2  # perhaps "a": 23 was to be written


def test_more_than_one_damaged_line_at_the_end_is_no_torn_one(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"a": 1}\n' + b"\xff\n" * 1000)
  found = read_json_lines(path)
  assert len(found.good) == 1 and len(found.bad) == 1000 and found.torn is None
  assert len(found.problems()) == 6 and found.problems()[-1] == f"{path}: 995 more lines cannot be read"
  path.write_bytes(b'{"a": 1}\n')
  assert read_json_lines(path).problems() == []


def test_parsing_bytes_and_text_agree():
  assert parse_json(b'{"a": "\xc3\xa9"}', "x") == parse_json('{"a": "é"}', "x") == {"a": "é"}


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  write_json(path, {"a": 1}, indent=2)
  assert json.loads(path.read_text()) == {"a": 1} and path.read_text().endswith("}\n")
  mask = os.umask(0)
  os.umask(mask)
  assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
  path.chmod(0o640)
  order = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
  monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a)))
  write_text(path, "new")
  assert order == ["fsync", "replace", "fsync"] and path.read_text() == "new"
  assert stat.S_IMODE(path.stat().st_mode) == 0o640

  def power_cut(*_):
    raise OSError("power cut")

  monkeypatch.setattr(os, "replace", power_cut)
  with pytest.raises(OSError, match="power cut"):
    write_text(path, "newer")
  assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
  path, write = tmp_path / "x", os.write

  def full_disk(descriptor, content):
    if os.fstat(descriptor).st_size >= 8:
      raise OSError(28, "No space left on device")
    return write(descriptor, content[: 8 - os.fstat(descriptor).st_size])

  with open(path, "ab", buffering=0) as file:
    append(file.fileno(), b"12345\n")
    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
      append(file.fileno(), b"67890\n")
  assert path.read_bytes() == b"12345\n"
