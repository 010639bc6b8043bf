"""Say what a data set holds, and with --verify whether every byte of it is as its manifest says.

python tools/inspect_data.py data/train
python tools/inspect_data.py data/train --sample 17 --png lengths.png
python tools/inspect_data.py data/pile --verify

PREFIX is that of one data set or a directory of several, of this package or of Megatron-LM's tool.
Exit code 0, or 2 if it is no data set or a damaged one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_spdf.command_line import (
    end_quietly,
    make_parser,
    number,
    output_picture,
    path_text,
    refusing,
    say,
)
from megatron_spdf.data.indexed.inspect import (
    data_sets,
    describe_all,
    highest_id,
    plot_histogram,
    render,
    sample,
    verify,
    verify_corpus,
)
from megatron_spdf.data.indexed.manifest import CORPUS
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.records.json_writer import to_json


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Print what is there; the exit code is 2 where it cannot be trusted."""
    parser = make_parser(__doc__)
    parser.add_argument("prefix", type=path_text, metavar="PREFIX",
                        help="of a data set, or a directory of data sets")
    parser.add_argument("--sample", type=number(int, least=0), metavar="N",
                        help="decode document N, counted from 0")
    parser.add_argument("--png", type=output_picture, metavar="FILE",
                        help="draw the histogram of document lengths")
    parser.add_argument("--verify", action="store_true", help="read everything and check it")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="that the ids must belong to (default: the copy beside the data)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    prefixes = data_sets(options.prefix)
    if len(prefixes) > 1 and (options.sample is not None or options.png):
        raise ValueError(f"{options.prefix} holds {len(prefixes)} data sets; name one for "
                         "--sample or --png: "
                         + ", ".join(prefixes))
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    whole, faults = describe_all(prefixes)
    facts = {"data_sets": whole, **({"faults": faults} if faults else {})}
    if options.sample is not None:
        facts["sample"] = sample(prefixes[0], options.sample, tokenizer)
    if options.png:
        plot_histogram(facts["data_sets"][0], options.png)
    if options.verify:
        found = (verify_corpus(options.prefix, tokenizer)
                 if (Path(options.prefix) / CORPUS).is_file()
                 else [fault for prefix in prefixes for fault in verify(prefix, tokenizer)])
        facts["faults"] = list(dict.fromkeys([*faults, *found]))
        if not (facts["faults"] or tokenizer or facts["data_sets"][0]["manifest"]["tokenizer"]):
            facts["highest_id"] = max(map(highest_id, prefixes))
    say(to_json(facts, indent=1) if options.json else as_text(facts))
    for fault in facts.get("faults", []):
        say(f"error: {fault}", sys.stderr)
    return 2 if facts.get("faults") else 0


def as_text(facts: dict) -> str:
    """All that was asked for, for people."""
    lines = [render(data_set) for data_set in facts["data_sets"]]
    if found := facts.get("sample"):
        origin = f", from {found['source']}" if found["source"] else ""
        lines += [f"document {found['document']:,}, {found['tokens']:,} tokens{origin}:",
                  found["text"]]
    if "highest_id" in facts:
        lines.append("no fault found: the index fits the tokens, whose ids are 0 to "
                     f"{facts['highest_id']:,}. Another tool made them: nothing says what was "
                     "written, nor which ids there are; --tokenizer PATH checks the ids")
    elif facts.get("faults") == []:
        lines.append("verified: every byte is as it was written, and the counts add up")
    return "\n".join(lines)


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
