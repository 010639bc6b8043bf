"""Say what a checkpoint holds, and with --verify whether all of it is intact and as its recipe
says.

python tools/inspect_checkpoint.py runs/mine
python tools/inspect_checkpoint.py runs/mine/checkpoints/step_00000500 --verify

Exit code 0, or 2 if it is no checkpoint or a damaged one. Needs neither a GPU nor the layout it was
written at.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_spdf.checkpoint.inspect import describe, render, verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.command_line import end_quietly, make_parser, refusing, say
from megatron_spdf.records.json_writer import to_json


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Print what is there; the exit code is 2 where it cannot be trusted."""
    parser = make_parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR",
                        help="a checkpoint, or a run directory: its best checkpoint where the run "
                             "keeps that, else its newest complete one")
    parser.add_argument("--verify", action="store_true",
                        help="check every byte, every shape and every mask")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    reader = CheckpointReader(find_checkpoint(options.directory), checksums=options.verify)
    facts = describe(reader)
    facts["verified"] = verify(reader) if options.verify else None
    if options.json:
        print(to_json(facts, indent=1))
    else:
        say(render(facts))
        if options.verify:
            print(f"verified: every file has the content that was written; {facts['verified']}")
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
