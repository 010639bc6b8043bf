"""CNN/DailyMail (Hermann et al. 2015, See et al. 2017): article to highlights.

Read are the csv files of Hugging Face and Kaggle (id, article, highlights); directories `train`,
`validation` and `test` of .story files; or See's lists of URLs, all_train.txt and so on, beside
cnn/stories and dailymail/stories. The text is not anonymized, and keeps its case. A summary is one
line of its highlights, each with a period at its end as in See's script.

An article without text, or without highlights, is left out, as See's script and the csv files leave
out 114 of them. One that is too long loses its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from megatron_spdf.data.finetuning.files import csv_rows, require_whole
from megatron_spdf.data.finetuning.task import TASKS, Example, Task
from megatron_spdf.text import lines_of

STORIES = ("cnn/stories", "dailymail/stories", "cnn_stories", "dailymail_stories", "stories")
_MARK = "@highlight"
_ENDS = (".", "!", "?", "'", "`", '"', "\u2019", "\u201d", ")")  # of a sentence, See et al.


def read(path: Path) -> list[Example]:
    """One example per article."""
    if path.is_dir():
        found = (_story(file) for file in sorted(path.glob("*.story")))
    elif path.suffix.lower() == ".csv":
        found = _csv(path)
    elif path.suffix.lower() == ".story":
        found = iter([_story(path)])
    else:
        found = (_story(file) for file in _listed(path))
    return [example for example in found if example.context and example.references != ("",)]


def _csv(path: Path) -> Iterator[Example]:
    for where, row in csv_rows(path, ("article",), ("highlights", "id")):
        for field, text in row.items():
            require_whole(where, field, text)
        lines = [line.strip() for line in row.get("highlights", "").split("\n")]
        yield Example(row["article"].strip(),
                      (" ".join(filter(None, lines)),) if "highlights" in row else (),
                      key=row.get("id", ""))


def _story(path: Path) -> Example:
    """Article and highlights of a file, of which each highlight follows a line "@highlight"."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    article: list[str] = []
    highlights: list[str] = []
    chosen = article
    for line in filter(None, map(str.strip, lines_of(text))):
        if line.startswith(_MARK):
            chosen = highlights
        else:
            chosen.append(line if line.endswith(_ENDS) else f"{line} .")
    return Example(" ".join(article), (" ".join(highlights),), key=path.stem)


def _listed(path: Path) -> Iterator[Path]:
    """The stories of a list of URLs, in its order; a story is named by the SHA-1 of its URL."""
    for number, url in enumerate(lines_of(path.read_text(encoding="utf-8-sig")), start=1):
        if not url.strip():
            continue
        name = f"{hashlib.sha1(url.strip().encode()).hexdigest()}.story"
        places = [path.parent / directory / name for directory in STORIES]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ValueError(f"{path}, line {number}: there is no story of {url.strip()!r:.80}; "
                             f"{name} must be in {' or '.join(STORIES)} beside the list")
        yield found


TASKS.register("cnn_dailymail", Task(
    title="CNN/DailyMail (See et al. 2017)",
    files={"train": ("train.csv", "train", "all_train.txt"),
           "validation": ("validation.csv", "valid.csv", "val.csv", "validation", "val",
                          "all_val.txt"),
           "test": ("test.csv", "test", "all_test.txt")},
    read=read, metrics=("rouge", "rouge_lsum"), loses="end",
    decoding={"beams": 4, "length_penalty": 2.0, "no_repeat_ngram": 3, "max_new_tokens": 142}))
