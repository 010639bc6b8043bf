"""JSON and YAML are read within bounds and without ambiguity; what is wrong has file, line, key and
rule."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NotRequired

import pytest
from typing_extensions import TypedDict

from megatron_spdf.files import write_json
from megatron_spdf.records.foreign import DuplicateKey, foreign_record
from megatron_spdf.records.json_reader import json_lines, parse_json, read_json
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.records.limits import MOST_NESTING
from megatron_spdf.records.values import Unreadable
from megatron_spdf.records.yaml_reader import parse_yaml, read_yaml


class State(TypedDict):
    step: int
    loss: float | None


class Run(TypedDict):
    state: State
    names: NotRequired[list[str]]


def brackets(count: int) -> str:
    return "[" * count + "]" * count


JSON = {  # text -> what the message says
    "a duplicate": ('{"a": 1,\n"b": {"c": 1,\n"c": 2}}', "line 3: the key 'c' is given twice"),
    "a duplicate in escapes": ('{"\\u0061": 1, "a": 2}', "line 1: the key 'a' is given twice"),
    "a duplicate in a list": ('[{"a": 1},\n{"a": 1, "a": 1}]', "line 2: the key 'a' is given"),
    "NaN": ('{"a": [1,\nNaN]}', "line 2: a.1=NaN is not a finite number"),
    "-Infinity": ('{"a": -Infinity}', "line 1: a=-Infinity is not a finite"),
    "beyond all floats": ('{"a": 1e999}', "line 1: a=1e999 is not a finite number"),
    "a long number": ('{"a":\n' + "7" * 5000 + "}", "line 2: a number of 5,000 digits"),
    "beyond all floats, of digits": ("[" + "9" * 308 + ",\n-" + "9" * 309 + "]",
                                     "line 2: a number of 309 digits"),
    "a duplicate after a long number": ('{"a": ' + "9" * 308 + ', "b": 1,\n"b": 1}',
                                        "line 2: the key 'b' is given twice"),
    "deep": (brackets(MOST_NESTING + 1), "line 1: nested more than 64 deep"),
    "deeper than Python's stack": ("[" * 200_000, "line 1: nested more than 64 deep"),
    "half of a pair": ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    "not UTF-8": (b'{\n"a": "\xff"}', "line 2: not UTF-8 (byte 0xff)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "line 1: not UTF-8"),
    "empty": ("", "line 1: not JSON"),
    "cut short": ('{"a": [1,\n 2', "line 2: not JSON"),
    "something after it": ('{"a": 1}\n{"b": 1}', "line 2: not JSON"),
    "a raw line end in a text": ('{"a": "x\ny"}', "line 1: not JSON"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_is_refused(tmp_path, case):
    content, said = JSON[case]
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Unreadable) as refused:
        read_json(path, remedy="use another")
    message = str(refused.value)
    assert message.startswith(str(path)) and said in message and message.endswith("; use another")


@pytest.mark.parametrize("content,said", [
    ('{"state": {"step": "3", "loss": null}}', "line 1: state.step='3': input should be a valid"),
    ('{"state":\n{"step": true, "loss": null}}', "line 2: state.step=True"),
    ('{"state":\n{"loss": 1.5}}', "line 1: state.step is missing"),
    ('{"state": {"step": 1, "loss": 2},\n"names": ["a",\n7]}', "line 3: names.1=7"),
    ('{"state": []}', "line 1: state=[]: input should be a mapping of keys"),
    ("null", "line 1: it=None"),
])
def test_a_value_of_another_type_is_named_with_its_line(content, said):
    with pytest.raises(Unreadable, match=f"^run.json, {said}".replace("[", r"\[")):
        parse_json(content, Run, "run.json")


def test_what_is_sound_is_read_with_keys_of_other_versions():
    text = '\ufeff{"state": {"step": 3, "loss": 1}, "a newer one": [1.5e3, "\\ud83d\\ude00"]}'
    assert parse_json(text.encode(), Run) == json.loads(text[1:])
    assert parse_json(brackets(MOST_NESTING)) == json.loads(brackets(MOST_NESTING))
    assert parse_json('{"a": [NaN, -Infinity, 1e999, 1.5]}', constants=True) == {
        "a": [None, None, None, 1.5]}
    most, more = "9" * 308, "-" + "9" * 309  # a float has up to 1.8e308
    assert parse_json(f"[{most}, -{most}]") == [int(most), -int(most)]
    assert parse_json(f"[{most}, {more}, {'7' * 5000}]", constants=True) == [int(most), None, None]


def test_a_line_is_named_and_one_that_was_cut_short_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"state": {"step": 1, "loss": 1}}\n\n{"state": {"st')
    assert len(list(json_lines(path, Run, cut_short=True))) == 1
    with pytest.raises(Unreadable, match="log.jsonl, line 3: not JSON"):
        list(json_lines(path, Run))
    path.write_text('{"state": {"step": 1, "loss": 1}}\n{"state": 1}\n')
    with pytest.raises(Unreadable, match="log.jsonl, line 2: state=1"):
        list(json_lines(path, Run))


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_regular_files_of_some_size_are_read(tmp_path, read, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(Unreadable, match="no regular file"):
            read(path)
    monkeypatch.setattr("megatron_spdf.records.limits.MOST_BYTES", 100)
    monkeypatch.setattr("megatron_spdf.records.limits.MOST_YAML_BYTES", 100)
    (tmp_path / "long").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(Unreadable, match="over 100 bytes long"):
        read(tmp_path / "long")


def doubling(first: str, next_one: str) -> str:
    """A YAML bomb: each line has ten times the one before."""
    return f"a0: &a0 {first}\n" + "".join(
        f"a{i + 1}: &a{i + 1} {next_one.format(','.join([f'*a{i}'] * 10))}\n" for i in range(12))


YAML = {
    "a duplicate": ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
    "a duplicate in quotes": ("a: {b: 1,\n'b': 2}", "line 2: the key 'b' is given twice"),
    "a duplicate in another spelling": ("yes: 1\ntrue: 2", "line 2: the key 'true' is given twice"),
    "two merges": ("a: &a {b: 1}\n<<: *a\n<<: *a", "line 3: the key '<<' is given twice"),
    "a bomb of lists": (doubling("[x]", "[{}]"), "over 100,000 values"),
    "a bomb of merges": (doubling("{x: 1}", "{{<<: [{}]}}"), "over 100,000 values"),
    "a value in itself": ("a: &a [*a]", "line 1: a value that holds itself"),
    "deep": (brackets(MOST_NESTING + 1), "line 1: nested more than 64 deep"),
    "deep through aliases": ("".join(f"a{i}: &a{i} {'[' * 9}*a{i - 1}{']' * 9}\n" if i else
                                     "a0: &a0 [1]\n" for i in range(9)), "nested more than 64"),
    "deeper than Python's stack": ("[" * 5000, "line 1: nested more than 64 deep"),
    "a Python tag": ("a: !!python/object/apply:os.system [ls]", "line 1: not YAML"),
    "no such day": ("a: 1\nb: 2001-99-99", "line 2: '2001-99-99' cannot be read as timestamp"),
    "a long number": ("a: " + "7" * 5000, "line 1: '777777"),
    "a wrong tag": ("a: !!timestamp x", "line 1: 'x' cannot be read as timestamp"),
    "a list as key": ("? [a]\n: 1", "line 1: not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: not YAML"),
    "control characters": ("a: 1\nb: \x00", "line 2: not YAML"),
    "not UTF-8": (b"a: 1\nb: \xff", "line 2: not UTF-8"),
    "another type": ("a: [1,\n x]", "line 2: a.1='x'"),
    "octal": ("a: 1\nlr: 010", "line 2: some read 010 by base 8"),
    "octal under zero": ("a: [-0_17]", "line 1: some read -0_17 by base 8"),
    "octal as a key": ("010: a", "line 1: some read 010 by base 8"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_is_refused(case):
    content, said = YAML[case]
    kind: Any = dict[str, list[int]] if case == "another type" else Any
    with pytest.raises(Unreadable) as refused:
        parse_yaml(content, kind, "recipe.yaml")
    assert str(refused.value).startswith("recipe.yaml, ") and said in str(refused.value)


def test_yaml_that_is_sound():
    merged = parse_yaml("\ufeffa: &a {b: 1, c: 1e-3}\nd: {<<: *a, b: 2}\n".encode())
    assert merged == {"a": {"b": 1, "c": "1e-3"}, "d": {"b": 2, "c": "1e-3"}}
    assert parse_yaml("[0, 0.5, -0.0, 0x10, 0b1, 1_000, 09.5, '010', 2:4, 1:30.5, -1:30]") == [
        0, 0.5, 0.0, 16, 1, 1000, 9.5, "010", "2:4", "1:30.5", "-1:30"]
    assert parse_yaml("") is None and parse_yaml("a: [1, 2]", dict[str, list[int]]) == {"a": [1, 2]}


@pytest.mark.parametrize("odd", [
    brackets(5000), brackets(300), "7" * 5000, '{"c": 1, "c": 2}', "NaN", '"\\ud83d"',
    '{"]": "' + "[" * 500 + '"}'])
def test_what_nobody_reads_of_a_corpus_may_be_odd(odd):
    record = foreign_record(f'\ufeff{{"text": "a [b", "odd": {odd}, "last": 1}}'.encode())
    assert record["text"] == "a [b" and record["last"] == 1


@pytest.mark.parametrize(("digits", "kind"), [(308, int), (309, float), (1000, float)])
def test_beside_a_number_of_thousands_of_digits_others_are_what_they_are(digits, kind):
    line = f'{{"long": {"7" * 5000}, "other": {"9" * digits}, "text": "a"}}'.encode()
    record = foreign_record(line)
    assert record["long"] == math.inf and record["text"] == "a"
    assert record["other"] == (int("9" * digits) if kind is int else math.inf)


@pytest.mark.parametrize("line,said", [
    (b'{"a": "\xff"}', "not UTF-8: 0xff at byte 7"), (b"[" * 5000, "5000 brackets are not closed"),
    (b'{"a":' + b"[" * 100 + b"}" * 100 + b"}", "not valid JSON"), (b"{'a': 1}", "not valid JSON"),
    (b'{"a": ' + b"7" * 5000 + b", }", "not valid JSON"),
])
def test_a_record_that_is_no_json(line, said):
    with pytest.raises(Unreadable, match=said):
        foreign_record(line)


@pytest.mark.parametrize("depth", [1, MOST_NESTING - 1, MOST_NESTING, MOST_NESTING + 1, 300, 20000])
def test_what_nests_too_deep_in_a_corpus_is_nothing(depth):
    """The record itself is the first level; lists at the others hold a number and the next one."""
    odd = "[7," * (depth - 1) + "[7]" + "]" * (depth - 1)
    level, kept = foreign_record(f'{{"odd": {odd}, "text": "[" }}'.encode()), 1
    assert level["text"] == "["
    level = level["odd"]
    while isinstance(level, list):
        assert level[0] == 7
        kept, level = kept + 1, level[1] if len(level) > 1 else "the end"
    assert kept == min(depth + 1, MOST_NESTING)
    assert level == ("the end" if depth < MOST_NESTING else None)


def test_a_key_of_a_corpus_given_twice_has_neither_value():
    twice = foreign_record(b'{"text": "a", "text": "b"}')["text"]
    assert isinstance(twice, DuplicateKey) and repr(twice) == "given 2 times: 'a', 'b'"


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    value = {"a": [math.nan, {"b": -math.inf}], "c": 1.5, "d": (1,)}
    assert json.loads(to_json(value)) == {"a": [None, {"b": None}], "c": 1.5, "d": [1]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json")["a"] == [None, {"b": None}]
