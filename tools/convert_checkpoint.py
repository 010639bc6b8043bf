"""Convert a checkpoint to a model that Hugging Face's transformers loads without any code of ours.

python tools/convert_checkpoint.py to-hf runs/mine exported/mine

Exit code 0, or 2 for what the user can put right. Needs neither a GPU nor the layout the checkpoint was written at.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import _path  # noqa: F401  puts the repository root on sys.path

from megatron_spdf.checkpoint.huggingface import DTYPES, export
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; every byte of the checkpoint is checked before anything is written."""
    options = _make_parser().parse_args(arguments)
    try:
        reader = CheckpointReader(find_checkpoint(options.directory), checksums=True)
        export(reader, options.output, options.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"{options.output}: {reader.path} as a GPT-2 of transformers, {options.dtype}")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    to_hf = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "to-hf", help="to a directory for transformers' from_pretrained", allow_abbrev=False)
    to_hf.add_argument("directory", type=Path, metavar="DIR",
                       help="a checkpoint, or a run directory: its newest complete checkpoint")
    to_hf.add_argument("output", type=Path, metavar="OUT", help="directory to make")
    to_hf.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    sys.exit(main())
