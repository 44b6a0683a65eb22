"""Text, JSON and YAML from outside: what people mean is read, and all else is one sentence with the file's name."""

import dataclasses
import json
import os
import time
from typing import Any, NotRequired, TypedDict

import pytest

from stepdistill.config import apply_overrides
from stepdistill.files.reading import MAX_YAML_BYTES, parse_json, parse_yaml, read_json, read_text, read_yaml
from stepdistill.files.schema import ConfigError, convert
from stepdistill.files.words import LISTED, nearest, shown, visible
from stepdistill.files.writing import atomic_write

DEEP = 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
"""3.9 billion values in 500 bytes."""


def refusal(read, *args) -> str:
    with pytest.raises(ValueError) as caught:
        read(*args)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- text


def test_text_comes_without_a_mark_and_with_line_feeds(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree\n"


def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "long").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path, message in [
        (tmp_path / "latin", "expected UTF-8 text, got byte 0xe9"),
        (tmp_path / "lattin", "no such file; did you mean 'latin'"),
        (tmp_path, "expected a file, got a folder"),
        (tmp_path / "pipe", "expected a file, got a special file"),
        (tmp_path / "loop", "cannot be read: Too many levels of symbolic links"),
        (tmp_path / "latin/inside", "no such file"),
        (tmp_path / "a\0b", "cannot be read: embedded null byte"),
        (tmp_path / ("x" * 5_000), "cannot be read: File name too long"),
    ]:
        assert message in refusal(read_text, path)
    assert "expected at most 99 bytes, got 100" in refusal(read_text, tmp_path / "long", 99)


# ------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, got Expecting value"),
        ("[" * DEEP, "expected at most 50 levels"),
        ("[" * 60 + "]" * 60, "expected at most 50 levels"),
        ('{"a": ' * DEEP, "expected at most 50 levels"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' twice"),
        (f'{{"a": {"9" * 3_000}}}', "expected a number below 1e40"),
        (f'{{"a": {"9" * 6_000}}}', "expected JSON, got Exceeds the limit"),
        ("[1]", "expected a section of keys, got [1]"),
        ("3", "expected a section of keys, got 3"),
        ('"' + "x" * 10_000 + '"', "expected a section of keys, got 'xxx"),
    ],
)  # fmt: skip
def test_odd_json_is_a_short_sentence_that_begins_with_the_file(tmp_path, text, message):
    """FAULTS 9: RecursionError, TypeError, KeyError of damaged files."""
    path = tmp_path / "model.json"
    path.write_text(text)
    found = refusal(read_json, path)
    assert found.startswith(f"{path}: ") and message in found and len(found) < 500 and found.isprintable()


def test_honest_json_is_read(tmp_path):
    content = {"limit": 10**30, "emoji": "\N{GRINNING FACE}", "nan": [1.5, None, True], "nested": {"a": {"b": []}}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "a.json") == content
    assert parse_json('"a"', "x", str) == "a"


def test_more_values_than_a_file_has_are_refused():
    assert "expected at most 1,000,000 values" in refusal(parse_json, "[" + "0," * 1_000_000 + "0]", "x", list[int])
    assert "expected at most 3 values" in refusal(parse_json, "[1, 2, 3]", "x", list[int], 3)


# ------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "values, got more"),
        ("a: &a [*a]", "unconstructable recursive node"),
        ("&a [*a]", "expected at most 50 levels"),
        ("a: &a {b: *a}", "unconstructable recursive node"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a}", "the key '<<' is given twice"),
        ("? [1, 2]\n: 3", "line 1: expected a word as key, got a sequence"),
        ("a: 1\n? {b: 1}\n: 3", "line 2: expected a word as key, got a mapping"),
        ("a: !!int x", "line 1: expected a value of type int, got 'x'"),
        ("a: !!bool maybe", "expected a value of type bool, got 'maybe'"),
        ("a: !!int ''", "expected a value of type int, got ''"),
        ("a: " + "9" * 6_000, "expected a value of type int, got '999"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!binary '='", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: " + "[" * 5_000, "expected at most 50 levels"),
        ("a: *b", "undefined alias 'b'"),
        ('a: "\\ud800"', "expected text, got U+D800, half of a surrogate pair"),
        ('"\\0": 1', "expected text, got U+0000, in"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("- 1", "expected a section of keys, got [1]"),
    ],
)  # fmt: skip
def test_odd_yaml_is_a_short_sentence_that_begins_with_the_file(tmp_path, text, message):
    """FAULTS 10 (alias bombs), 9."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.process_time()
    found = refusal(read_yaml, path)
    assert time.process_time() - began < 5
    assert found.startswith(f"{path}: ") and message in found and len(found) < 500 and found.isprintable()


def test_a_file_that_its_parser_would_read_for_minutes_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b" " * (MAX_YAML_BYTES + 1))
    assert "expected at most 1,048,576 bytes" in refusal(read_yaml, tmp_path / "a.yaml")


def test_keys_are_words_and_dates_are_text():
    assert parse_yaml("{1: a, null: b, 1e-4: c, yes: d}") == {"1": "a", "null": "b", "1e-4": "c", "yes": "d"}
    assert parse_yaml("a: 2020-99-99") == {"a": "2020-99-99"}


@pytest.mark.parametrize(
    "override", ["", "=", "=1", ".=1", "a..b=1", ".".join("a" * 60) + "=1", "a=[", "a=&a [*a]", "a={b: 1, b: 2}",
                 "a=" + "[" * 3_000, "a=!!int x", "a=? [1]\n: 2", 'a="\\ud800"'],
)  # fmt: skip
def test_an_odd_override_is_named_shortly(override):
    found = refusal(apply_overrides, {"a": {}}, [override])
    assert found.startswith("override ") and len(found) < 500 and found.isprintable()


# ----------------------------------------------------------------------------------------------- schema


class Open(TypedDict):
    name: str
    numbers: NotRequired[list[int | float]]


@dataclasses.dataclass(frozen=True)
class Closed:
    size: int
    scale: float = 1.0
    inner: Open | None = None


def test_an_open_section_keeps_keys_of_newer_versions_and_a_closed_one_names_them():
    content = {"name": "a", "numbers": [1, 2.5], "new": {"x": 1}}
    assert convert(content, Open) == content and type(convert(content, Open)["numbers"][0]) is int
    assert refusal(convert, {"numbers": [1, "2"]}, Open) == (
        "2 problems:\n  - name: missing (expected text)\n  - numbers[1]: expected whole number or number, got '2'"
    )
    assert refusal(convert, {"size": 1, "new": 1}, Closed) == "new: unknown key; known: inner, scale, size"
    assert convert({"size": 1, "inner": {"name": "a", "b": 1}}, Closed) == Closed(1, 1.0, {"name": "a", "b": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": 2**63}, "size: expected whole number, got 9223372036854775808"),
        ({"size": 10**39, "scale": 10**400}, "scale: expected number, got 1000"),
        ({"size": 1, "scale": float("nan")}, "scale: expected number, got nan"),
        (
            {"size": 1, "inner": {"name": "\ud800"}},
            "inner.name: expected text, got U+D800, half of a",
        ),
        ({"size": 1, "inner": {"name": "\0"}}, "inner.name: expected text, got U+0000, in"),
        ({"size": True}, "size: expected whole number, got True"),
        ({"size": 1, "inner": []}, "inner: expected a section of keys, got []"),
    ],
)
def test_numbers_that_nothing_holds_are_refused(content, message):
    assert message in refusal(convert, content, Closed)


def test_many_problems_are_counted():
    content: dict[str, Any] = {f"key{number}": 1 for number in range(100_000)}
    began = time.process_time()
    found = refusal(convert, {"size": 1} | content, Closed)
    assert time.process_time() - began < 2
    assert f"{100_000 - LISTED} more unknown keys" in found or "more" in found
    assert len(found.splitlines()) < LISTED + 4
    assert len(str(ConfigError(map(str, range(500)))).splitlines()) == LISTED + 2


# ------------------------------------------------------------------------------------------------ words


def test_nothing_in_a_message_has_power_over_a_terminal():
    """RELIABILITY row 30 (logs): escape codes, line ends, marks that turn the direction of writing."""
    assert visible("\x1b[2Ja\nb\r\u202e\x9b\ud800") == "\\x1b[2Ja\\nb\\r\\u202e\\x9b\\ud800"
    assert visible("né 猫 🐈") == "né 猫 🐈"
    assert ConfigError(["a\x1b[31m\nb"]).problems == ["a\\x1b[31m\\nb"]
    assert len(shown("x" * 10**6)) < 300 and len(shown(list(range(10**5)))) < 300
    assert nearest("zzz", map(str, range(1_000))).endswith("and 980 more")


# ---------------------------------------------------------------------------------------------- writing


def test_a_link_at_the_temporary_path_leads_nowhere(tmp_path):
    """FAULTS, low: a file that is a link can empty another one."""
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "result.json.partial").symlink_to(tmp_path / "precious")
    with atomic_write(tmp_path / "result.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "result.json").read_text() == "new" and not (tmp_path / "result.json").is_symlink()


def test_what_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
