"""Fine-tuning tasks: what the files hold comes out in its order, and what is malformed is named
with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from megatron_spdf.data.finetuning.task import (
    SPLITS,
    TASKS,
    Example,
    load_examples,
    require_splits,
    training_pairs,
)

DATA = Path(os.environ.get("SPDF_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")

VAULTS = '"name[The Vaults], eatType[pub], near[Café Adriatic]"'
E2E = (f"mr,ref\r\n{VAULTS},The Vaults is a pub.  It is cheap.\r\n"
       '"name[Zizzi], customer rating[5 out of 5]","A ""good"" one,\r\n of two lines."\r\n'
       f"{VAULTS},Second reference.\r\n")
TRIPLE = {"subject": "Aarhus_Airport", "property": "runwayLength", "object": "2702.0"}
ENTRY = {"category": "Airport",
         "modifiedtripleset": [TRIPLE, {**TRIPLE, "property": "cityServed", "object": "Aarhus"}],
         "lexicalisations": [{"comment": "good", "lex": "One."},
                             {"comment": "toFix", "lex": "Won."},
                             {"comment": "good", "lex": "Two ."}]}
UNSEEN = {**ENTRY, "category": "Artist", "lexicalisations": ENTRY["lexicalisations"][:1]}
XML = """<?xml version="1.0"?>
<benchmark><entries>
<entry category="Airport" eid="Id1" size="2">
 <originaltripleset><otriple>x | y | z</otriple></originaltripleset>
 <modifiedtripleset><mtriple>Aarhus_Airport | runwayLength | 2702.0</mtriple>
  <mtriple>Aarhus_Airport | cityServed | Aarhus</mtriple></modifiedtripleset>
 <lex comment="good" lid="Id1">One.</lex><lex comment="toFix" lid="Id2">Won.</lex>
 <lex comment="good" lid="Id3">Two .</lex></entry>
<entry category="Artist" eid="Id2" size="2">
 <modifiedtripleset><mtriple>Aarhus_Airport | runwayLength | 2702.0</mtriple>
  <mtriple>Aarhus_Airport | cityServed | Aarhus</mtriple></modifiedtripleset>
 <lex comment="good" lid="Id1">One.</lex></entry>
</entries></benchmark>
"""
AIRPORT = "Aarhus_Airport : runwayLength : 2702.0 | Aarhus_Airport : cityServed : Aarhus"
WEBNLG = [Example(AIRPORT, ("One.", "Two ."), "seen"), Example(AIRPORT, ("One.",), "unseen")]
RECORD = {"tripleset": [["Mars Hill College", "JOINED", "1973"],
                        ["[TABLECONTEXT]", "[TITLE]", "Members"]],
          "annotations": [{"source": "x", "text": "It joined in 1973. "},
                          {"source": "x", "text": ""}]}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def webnlg(*entries) -> dict:
    return {"entries": [{str(number): entry} for number, entry in enumerate(entries, start=1)]}


def test_e2e_is_grouped_by_meaning_and_spaced_as_in_the_data(tmp_path):
    write(tmp_path / "trainset.csv", E2E)
    vaults = "name : The Vaults | eatType : pub | near : Café Adriatic"
    examples = load_examples("e2e", tmp_path, "train")
    assert examples == [
        Example(vaults, ("The Vaults is a pub.  It is cheap.", "Second reference.")),
        Example("name : Zizzi | customer rating : 5 out of 5",
                ('A "good" one,\r\n of two lines.',))]
    assert [pair for pair in training_pairs(examples) if pair[0] == vaults] == [
        (vaults, "The Vaults is a pub.  It is cheap."), (vaults, "Second reference.")]


def test_the_test_split_of_e2e_has_references_where_there_are_some(tmp_path):
    write(tmp_path / "testset.csv", "MR\r\nname[Zizzi]\r\n")
    assert load_examples("e2e", tmp_path, "test") == [Example("name : Zizzi", ())]
    write(tmp_path / "testset_w_refs.csv", '\ufeff"mr","ref"\n"name[Zizzi]","Zizzi."\n')
    assert load_examples("e2e", tmp_path, "test") == [Example("name : Zizzi", ("Zizzi.",))]


def test_webnlg_from_json_and_from_xml_files_of_a_directory(tmp_path):
    write(tmp_path / "json" / "train.json", webnlg(ENTRY, UNSEEN))
    write(tmp_path / "xml" / "train" / "2triples" / "a.xml", XML)
    write(tmp_path / "xml" / "test" / "testdata_no_lex.xml", "<benchmark/>")
    write(tmp_path / "xml" / "test" / "testdata_with_lex.xml", XML)
    for path in (tmp_path / "json", tmp_path / "xml",
                 tmp_path / "xml" / "train" / "2triples" / "a.xml"):
        assert load_examples("webnlg", path, "train") == WEBNLG
    assert load_examples("webnlg", tmp_path / "xml", "test") == WEBNLG


def test_an_input_without_reference_is_for_testing_only(tmp_path):
    bad = {**ENTRY, "lexicalisations": [{"comment": "toFix", "lex": "Won."}]}
    path = write(tmp_path / "entries.json", webnlg(bad, ENTRY))
    assert [e.references
            for e in load_examples("webnlg", path, "validation")] == [("One.", "Two .")]
    assert [e.references for e in load_examples("webnlg", path, "test")] == [(), ("One.", "Two .")]


def test_dart_lower_cases_relations_and_leaves_blank_texts_out(tmp_path):
    path = write(tmp_path / "dart-v1.1.1-full-train.regrouped.json", [RECORD, RECORD])
    context = "Mars Hill College : joined : 1973 | [TABLECONTEXT] : [title] : Members"
    assert load_examples("dart", tmp_path,
                         "train") == [Example(context, ("It joined in 1973. ",))] * 2
    assert load_examples("dart", path, "test")


def test_curation_reads_long_articles(tmp_path):
    with (tmp_path / "validation.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["url", "title", "summary", "article_content"],
                                    ["u", "Title", "Short.", "long, \"quoted\"\n" * 20_000]])
    assert load_examples("curation", tmp_path, "validation") == [
        Example("long, \"quoted\"\n" * 20_000, ("Short.",))]


def test_scitldr_joins_sentences(tmp_path):
    record = {"source": ["First. ", "  ", "Second."], "target": ["Short.", "Brief. "], "title": "T"}
    write(tmp_path / "test.jsonl", json.dumps(record))
    assert load_examples("scitldr", tmp_path,
                         "test") == [Example("First.  Second.", ("Short.", "Brief. "))]


def test_json_lines_of_your_own(tmp_path):
    lines = [{"context": "a", "completion": "b"}, {"context": "a", "completion": ["c", "d"]},
             {"context": "e"}]
    path = write(tmp_path / "mine.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert load_examples("jsonl", path, "test") == [Example("a", ("b",)), Example("a", ("c", "d")),
                                                    Example("e", ())]
    assert load_examples("jsonl", path, "train") == [Example("a", ("b",)), Example("a", ("c", "d"))]


@pytest.mark.parametrize("odd", ["[" * 5000 + "]" * 5000, "7" * 5000, "NaN", '{"a": 1, "a": 2}'])
def test_fields_that_nobody_reads_may_be_odd(tmp_path, odd):
    path = write(tmp_path / "mine.jsonl", f'{{"context": "a", "completion": "b", "more": {odd}}}\n')
    assert load_examples("jsonl", path, "test") == [Example("a", ("b",))]


@pytest.mark.parametrize("entities", [
    '<!ENTITY a "x"><!ENTITY b "&a;&a;">', '<!ENTITY a SYSTEM "file:///etc/passwd">'])
def test_an_xml_file_declares_no_entities(tmp_path, entities):
    declared = XML.replace("<benchmark>", f"<!DOCTYPE benchmark [{entities}]><benchmark>", 1)
    path = write(tmp_path / "test.xml", declared.replace("One.", "&a;"))
    with pytest.raises(ValueError, match="test.xml declares a document type"):
        load_examples("webnlg", path, "test")


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize("task, content, message", [
    ("e2e", "mr;ref\nname[A];B\n", r"file, line 1: no column mr"),
    ("e2e", "mr,ref\nname[A],B\nname[A],B,C\n", r"file, line 3: 3 fields where the header has 2"),
    ("e2e", "mr,ref\nname A,B\n",
     r"file, line 2: the meaning representation 'name A' is not of the form slot\["),
    ("e2e", "mr,ref\nname[A],B\nname[A], \n",
     r"file, line 3: field 'ref' must be a text that is not blank"),
    ("e2e", 'mr,ref\nname[A],"B\n', r"file, line 2: not CSV"),
    ("webnlg", "{]", r"file: not valid JSON"),
    ("jsonl", '{"context": "a", "completion": "b \\ud83d c"}\n',
     r"file, line 1: field 'completion' has half of a surrogate pair, '.ud83d', at character 2"),
    ("jsonl", '{"context": "a", "completion": "b", "completion": "c"}\n',
     r"line 1: field 'completion' must be a text .* it is given 2 times: 'b', 'c'"),
    ("dart", [{**RECORD, "tripleset": [["a", "\ud83d", "c"]]}],
     r"file, record 1: field 'tripleset' has half of a surrogate pair"),
    ("webnlg", [], r"file: a list instead of an object with the field 'entries'"),
    ("webnlg", webnlg(ENTRY, without(ENTRY, "category")), r"file, entry 2: no field 'category'"),
    ("webnlg", webnlg({**ENTRY, "modifiedtripleset": []}),
     r"file, entry 1: field 'modifiedtripleset' is empty"),
    ("webnlg", webnlg({**ENTRY, "modifiedtripleset": [without(TRIPLE, "object")]}),
     r"entry 1: no field 'object'"),
    ("webnlg", webnlg({**ENTRY, "lexicalisations": [{"comment": "good"}]}),
     r"entry 1: no field 'lex'"),
    ("dart", {}, r"file: a dict instead of a list"),
    ("dart", [RECORD, without(RECORD, "tripleset")],
     r"file, record 2: field 'tripleset' must be a list"),
    ("dart", [{**RECORD, "tripleset": [["a", "b"]]}],
     r"file, record 1: a triple must be three texts"),
    ("dart", [{**RECORD, "annotations": [{"source": "x"}]}], r"file, record 1: no field 'text'"),
    ("curation", "title,summary\na,b\n", r"file, line 1: no column article_content"),
    ("e2e", 'mr,Ref,ref\n"a[b]",c,d\n', r"file, line 1: the column ref is given twice"),
    ("curation", "title,summary,article_content,Summary \n", r"the column summary is given twice"),
    ("scitldr", '{"source": "a", "target": ["b"]}\n',
     r"file, line 1: field 'source' must be a list"),
    ("scitldr", '{"source": ["a"], "target": [" "]}\n',
     r"file, line 1: field 'target' has no text"),
    ("jsonl", '{"context": "a", "completion": "b"}\n\n[1]\n',
     r"file, line 3: a list instead of an object; write one object a line"),
    ("jsonl", '{"context": "a", "completion": "b"}\n{"completion": "b"}\n',
     r"file, line 2: no field 'context'"),
    ("jsonl", '{"context": "a", "completion": 3}\n',
     r"file, line 1: field 'completion' must be a text"),
    ("jsonl", '{"context": "a", "completion": ["b", 3]}\n',
     r"file, line 1: field 'completion' must be a text that is not blank; it is 3"),
    ("jsonl", '{"context": "a"}\n',
     r"file has no example with a reference; the train split of jsonl"),
    ("jsonl", "", r"file has no example"),
])
def test_what_is_malformed_is_named(tmp_path, task, content, message):
    with pytest.raises(ValueError, match=message):
        load_examples(task, write(tmp_path / "file", content), "train")


def test_malformed_xml_is_named(tmp_path):
    path = write(tmp_path / "a.xml", XML.replace("runwayLength |", "runwayLength", 1))
    with pytest.raises(ValueError,
                       match=r"a.xml, entry 1 \(Id1\): the triple .* is not of the form subject \| "
                             r"prop"):
        load_examples("webnlg", path, "train")
    with pytest.raises(ValueError, match=r"a.xml, line 4: not XML"):
        load_examples("webnlg", write(path, XML.replace("y | z", "y | <z")), "train")


@pytest.mark.parametrize("encoding", ["utf-32", "utf-7", "nonsense"])
def test_xml_in_an_encoding_that_nobody_reads_is_named(tmp_path, encoding):
    path = write(tmp_path / "a.xml", XML.replace('"1.0"', f'"1.0" encoding="{encoding}"', 1))
    with pytest.raises(ValueError, match=r"a.xml: not XML \(.*encoding.*\); write it in UTF-8"):
        load_examples("webnlg", path, "train")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give the test file of dart"):
        load_examples("dart", tmp_path / "none", "test")
    with pytest.raises(FileNotFoundError,
                       match="has no devset.csv or dev.csv, the validation split of e2e"):
        load_examples("e2e", tmp_path, "validation")
    with pytest.raises(ValueError, match="there is no task 'e2'; known: e2e, "):
        load_examples("e2", tmp_path, "test")
    with pytest.raises(ValueError,
                       match="split 'dev' is unknown; choose one of train, validation, test"):
        load_examples("e2e", tmp_path, "dev")
    assert set(TASKS.names()) >= {"e2e", "webnlg", "dart", "curation", "scitldr", "jsonl"}


@pytest.mark.parametrize("task, name, pack", [
    ("jsonl", "train.jsonl", gzip.compress), ("e2e", "trainset.csv", bz2.compress),
    ("webnlg", "train.json", lzma.compress)])
def test_a_compressed_file_is_called_so_by_whatever_name(tmp_path, task, name, pack):
    (tmp_path / name).write_bytes(pack(b'{"context": "a", "completion": "b"}'))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} begins as files .* end in .*; unpack it"):
            load_examples(task, path, "train")
    (tmp_path / name).rename(tmp_path / f"{name}.gz")
    with pytest.raises(FileNotFoundError, match=f"there are {name}.gz, .* unpacked first"):
        load_examples(task, tmp_path, "train")


def test_of_two_files_that_may_be_a_split_none_is_taken(tmp_path):
    one = write(tmp_path / "dart-v1.0.0-full-train.json", [RECORD])
    assert load_examples("dart", tmp_path, "train")
    write(tmp_path / "dart-v1.1.1-full-train.json", [RECORD])
    with pytest.raises(ValueError, match="has dart-v1.0.0-full-train.json, dart-v1.1.1-full-tra.*; "
                                         "leave the one there that is meant"):
        load_examples("dart", tmp_path, "train")
    assert load_examples("dart", one, "train")


# Examples and (input, reference) pairs; the counts that the data's publishers state, or those of
# the files' READMEs.
PUBLISHED = {
    "e2e": ("e2e", {"train": (4862, 42061), "validation": (547, 4672), "test": (630, 4693)}),
    "webnlg": ("webnlg2017",
               {"train": (6935, 18025), "validation": (871, 2258), "test": (1862, 4928)}),
    "dart": ("dart", {"train": (30438, 62659), "validation": (2768, 6980), "test": (5097, 12551)}),
    "scitldr": ("scitldr", {"train": (1992, 1992), "validation": (619, 1453), "test": (618, 1967)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", PUBLISHED)
def test_published_data(task, split):
    directory, counts = PUBLISHED[task]
    if not (DATA / directory).is_dir():
        pytest.skip(f"no {directory} in {DATA}")
    examples = load_examples(task, DATA / directory, split)
    assert (len(examples), len(training_pairs(examples))) == counts[split]
    if (task, split) == ("webnlg", "test"):
        assert [sum(e.group == g for e in examples) for g in ("seen", "unseen")] == [971, 891]


def in_languages(*texts: tuple[str | None, str]) -> dict:
    return {**ENTRY, "lexicalisations": [
        {"comment": "good", "lex": text} | ({"lang": said} if said is not None else {})
        for said, text in texts]}


@pytest.mark.parametrize(("texts", "kept"), [
    ([("en", "One."), ("ru", "Odin.")], ("One.",)),
    ([(None, "One."), ("ru", "Odin."), ("", "Two."), ("en-GB", "Three.")],
     ("One.", "Two.", "Three.")),
    ([("ru", "Odin."), ("ru", "Dva.")], ("Odin.", "Dva.")),
])
def test_webnlg_texts_of_one_language(tmp_path, texts, kept):
    path = write(tmp_path / "train.json", webnlg(in_languages(*texts)))
    assert [e.references for e in load_examples("webnlg", path, "train")] == [kept]
    lines = "".join(f'<lex comment="good"{"" if said is None else f" lang={said!r}"}>{text}</lex>'
                    for said, text in texts)
    path = write(tmp_path / "train.xml", "<benchmark><entries><entry category='City' eid='Id1'>"
                 "<modifiedtripleset><mtriple>a | b | c</mtriple></modifiedtripleset>"
                 f"{lines}</entry></entries></benchmark>")
    assert [e.references for e in load_examples("webnlg", path, "train")] == [kept]


def test_webnlg_texts_of_several_other_languages_are_refused(tmp_path):
    path = write(tmp_path / "train.json", webnlg(in_languages(("ru", "Odin."), ("br", "Unan."))))
    with pytest.raises(ValueError, match="in the languages br, ru, and a model learns"):
        load_examples("webnlg", path, "train")


def test_training_and_validation_are_two_files(tmp_path):
    line = '{"context": "a", "completion": "b"}\n'
    train = write(tmp_path / "train.jsonl", line)
    with pytest.raises(ValueError, match="train.jsonl is a file, and a run needs a training and a"):
        require_splits("jsonl", train)
    with pytest.raises(FileNotFoundError, match="the validation split"):
        require_splits("jsonl", tmp_path)
    (tmp_path / "valid.jsonl").symlink_to(train)
    with pytest.raises(ValueError, match="train.jsonl and valid.jsonl are one file"):
        require_splits("jsonl", tmp_path)
    (tmp_path / "valid.jsonl").unlink()
    write(tmp_path / "valid.jsonl", line)
    require_splits("jsonl", tmp_path)
