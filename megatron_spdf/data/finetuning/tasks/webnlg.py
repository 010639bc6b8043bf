"""WebNLG Challenge 2017 (Gardent et al., 2017): triples of an entry to texts that verbalize it;
JSON or XML.

JSON is one file per split. XML is a file, or per split a directory of them as published:
train/1triples/*.xml. Texts that annotators marked as other than "good" are left out, as in LoRA's
NLG examples. Of the later releases, whose entries have texts in several languages, those in English
are read, or in the one language that there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from defusedxml import DefusedXmlException, ElementTree
from unidecode import unidecode

from megatron_spdf.data.finetuning.files import checked_text, json_file, list_of, text_of
from megatron_spdf.data.finetuning.task import TASKS, Example, OfficialForm, Task
from megatron_spdf.data.finetuning.texts import linearize, split_words

# The categories of the training set; the test set has five others.
SEEN = frozenset({"Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food",
                  "Monument", "SportsTeam", "University", "WrittenWork"})
_ENGLISH = "en"  # what a text without a language is in
_GOOD = ("good", "")  # as which a text without a comment counts


def read(path: Path) -> list[Example]:
    """One example per entry, in the order of the file; of a directory, of its sorted files."""
    files = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
    entries = [entry for file in files
               for entry in (_read_xml if file.suffix.lower() == ".xml" else _read_json)(file)]
    languages = {language for entry in entries for language, _ in entry.texts}
    if len(languages) > 1 and _ENGLISH not in languages:
        raise ValueError(f"{path}: the texts are in the languages {', '.join(sorted(languages))}, "
                         "and a model learns to answer in one; leave the others out")
    if _ENGLISH in languages:
        languages = {_ENGLISH}
    return [Example(linearize(entry.triples), tuple(t for said, t in entry.texts
                                                    if said in languages),
                    "seen" if entry.category in SEEN else "unseen") for entry in entries]


class _Entry(NamedTuple):
    """An entry of a file; its texts come with their languages."""

    category: str
    triples: list[tuple[str, str, str]]
    texts: list[tuple[str, str]]


def _read_json(path: Path) -> Iterator[_Entry]:
    content = json_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__} instead of an object with the field "
                         "'entries'")
    for number, wrapped in enumerate(list_of(str(path), content, "entries"), start=1):
        where = f"{path}, entry {number}"
        if not (isinstance(wrapped, dict) and len(wrapped) == 1
                and isinstance(*wrapped.values(), dict)):
            raise ValueError(f"{where}: an entry must be {{number: {{fields}}}}; it is "
                             f"{wrapped!r:.80}")
        (entry,) = wrapped.values()
        triples = [_json_triple(where, triple)
                   for triple in list_of(where, entry, "modifiedtripleset")]
        if not triples:
            raise ValueError(f"{where}: field 'modifiedtripleset' is empty")
        yield _Entry(text_of(where, entry, "category"), triples,
                     [text for lex in list_of(where, entry, "lexicalisations")
                      for text in _json_texts(where, lex)])


def _json_triple(where: str, triple: Any) -> tuple[str, str, str]:
    if not isinstance(triple, dict):
        raise ValueError(f"{where}: a triple must have subject, property and object; it is "
                         f"{triple!r:.80}")
    subject, relation, value = (text_of(where, triple, field)
                                for field in ("subject", "property", "object"))
    return subject, relation, value


def _json_texts(where: str, lexicalisation: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(lexicalisation, dict):
        raise ValueError(f"{where}: a lexicalisation must have the field 'lex'; it is "
                         f"{lexicalisation!r:.80}")
    if lexicalisation.get("comment", "") in _GOOD:
        yield _language(lexicalisation.get("lang")), text_of(where, lexicalisation, "lex")


def _read_xml(path: Path) -> Iterator[_Entry]:
    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}, line {error.position[0]}: not XML ({error})") from None
    except DefusedXmlException:
        raise ValueError(f"{path} declares a document type, whose entities may grow without end; "
                         "WebNLG has none, remove the declaration") from None
    except (LookupError, ValueError) as error:  # of the encoding that it declares
        raise ValueError(f"{path}: not XML ({error}); write it in UTF-8") from None
    for number, entry in enumerate(root.iter("entry"), start=1):
        where = f"{path}, entry {number} ({entry.get('eid', 'no eid')})"
        triples = [_xml_triple(where, triple.text)
                   for triple in entry.iterfind("modifiedtripleset/mtriple")]
        if not triples:
            raise ValueError(f"{where}: no modifiedtripleset/mtriple")
        yield _Entry(text_of(where, dict(entry.attrib), "category"), triples,
                     [(_language(lex.get("lang")), checked_text(where, "lex", lex.text))
                      for lex in entry.iterfind("lex") if lex.get("comment", "") in _GOOD])


def _language(said: Any) -> str:
    """`en` of `en`, `EN-gb` or nothing."""
    return (said if isinstance(said, str) else "").strip().lower().split("-")[0] or _ENGLISH


def _xml_triple(where: str, text: str | None) -> tuple[str, str, str]:
    parts = (text or "").split(" | ", 2)
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise ValueError(f"{where}: the triple {text!r:.80} is not of the form subject | property "
                         "| object")
    subject, relation, value = (part.strip() for part in parts)
    return subject, relation, value


def official_output(text: str) -> str:
    """Lower-cased words of an output; transliterated to ASCII first, so `½` becomes `1 / 2`."""
    return split_words(unidecode(text.strip()).lower())


def official_reference(text: str) -> str:
    """Lower-cased words of a reference; transliterated last, so `½` becomes `1/2`."""
    return unidecode(split_words(text).lower())


def in_ascii(references: Sequence[Sequence[str]]) -> bool:
    """True if reference files can be those that the official script writes."""
    return all(text.isascii() for texts in references for text in texts)


TASKS.register("webnlg", Task(
    title="WebNLG Challenge 2017 (Gardent et al., 2017)",
    files={"train": ("train.json", "train.xml", "train"),
           "validation": ("dev.json", "dev.xml", "dev"),
           "test": ("test.json", "test.xml", "test/testdata_with_lex.xml",
                    "testdata_with_lex.xml", "test")},
    read=read, metrics=("bleu_tokenized", "meteor", "ter"),
    form=OfficialForm(official_output, official_reference, most=3, applies_to=in_ascii)))
