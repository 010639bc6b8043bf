"""What the demo's models say, before and after fine-tuning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from megatron_spdf.files import write_json
from megatron_spdf.records.json_reader import read_json

BEGINNING = "    def read(self"  # that the pre-trained model goes on from
TOKENS, TEMPERATURE, TOP_P, SEED = 72, 0.7, 0.9, 1
MOST_LINES = 7  # of a text that are shown
EXAMPLES = 2  # of the test set


def write_samples(pretrained: Path, tuned: Mapping[str, Path], data: Path, output: Path) -> None:
    """Lets models go on from a line of Python and say what records hold.

    Args:
        pretrained: run that knows no records.
        tuned: name -> run that was fine-tuned on them.
        data: directory of their splits.
        output: JSON file: the line and what follows, and for each record of some of the test set
            the name of each run -> its completion.
    """
    import torch

    from megatron_spdf.evaluation.sampling import SamplingSettings

    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:EXAMPLES]]
    torch.manual_seed(SEED)
    drawn = SamplingSettings(TOKENS, TEMPERATURE, top_p=TOP_P)
    text = BEGINNING + _said(pretrained, [BEGINNING], drawn, context=False)[0]
    contexts = [record["context"] for record in records]
    said = {name: _said(run, contexts, SamplingSettings(48), context=True)
            for name, run in {"before": pretrained, **tuned}.items()}
    write_json(output, {"text": text, "records": [
        {"record": record["context"], **{name: texts[i] for name, texts in said.items()},
         "a reference": record["completion"][0]} for i, record in enumerate(records)]})


def render_samples(path: Path, name: str, columns: int) -> str:
    """The samples of a file for a terminal of so many columns.

    Args:
        name: of the pre-trained run.
    """
    found = read_json(path, dict)
    heading = (f"The {name} model, before fine-tuning, goes on from {BEGINNING.strip()!r}, at "
               f"temperature {TEMPERATURE} and top-p {TOP_P}:")
    lines = [textwrap.fill(heading, max(40, columns)),
             textwrap.indent(_shortened(found["text"]), "    ")]
    for record in found["records"]:
        width = max(map(len, record))
        lines += ["", *(_entry(key, text, width, columns) for key, text in record.items())]
    return "\n".join(lines)


def _said(run: Path, prompts: list[str], settings, context: bool) -> list[str]:
    """What a run adds to each prompt."""
    from megatron_spdf.convert.huggingface_export import in_memory
    from megatron_spdf.convert.source import open_weights, tokenizer_of
    from megatron_spdf.evaluation.sampling import context_prompt, continue_text, text_prompt

    source = open_weights(run, checksums=False)
    model, tokenizer, texts = in_memory(source), tokenizer_of(source), []
    for prompt in prompts:
        pieces: list[str] = []
        continue_text(model, tokenizer, (context_prompt if context else text_prompt)(
            tokenizer, prompt), settings, pieces.append)
        texts.append("".join(pieces))
    return texts


def _shortened(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join([*lines[:MOST_LINES], *(["..."] if len(lines) > MOST_LINES else [])])


def _entry(key: str, text: str, width: int, columns: int) -> str:
    """A text in one paragraph, behind its key."""
    return textwrap.fill(f"{key:{width}}  {' '.join(text.split()) or '(nothing)'}",
                         max(40, columns), subsequent_indent=" " * (width + 2))
