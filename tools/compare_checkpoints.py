"""How far each matrix of each layer moved between two checkpoints: the cosine distance of SPDF's
subspace analysis.

python tools/compare_checkpoints.py runs/pretrained runs/finetuned
python tools/compare_checkpoints.py runs/pretrained runs/finetuned --png distance.png

Each is a run directory (its best checkpoint where the run keeps that, else its newest complete
one), a checkpoint of a run, or a Hugging Face directory. Sparse weights are compared dense, zeros
included.

Exit code 0, or 2 for what the user can put right. Needs neither a GPU nor the layout they were
written at.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_spdf.command_line import end_quietly, make_parser, output_picture, refusing, say
from megatron_spdf.convert.source import open_weights
from megatron_spdf.evaluation.subspace import distances, draw, render
from megatron_spdf.records.json_writer import to_json


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser(__doc__)
    parser.add_argument("before", type=Path, metavar="A", help="for example the pre-trained model")
    parser.add_argument("after", type=Path, metavar="B", help="for example the fine-tuned model")
    parser.add_argument("--png", type=output_picture, metavar="FILE", help="draw a heat map")
    parser.add_argument("--force", action="store_true", help="overwrite the picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.png and options.png.exists() and not options.force:
        raise ValueError(f"{options.png} exists; give another file, or --force to overwrite it")
    before, after = (open_weights(path, checksums=False)
                     for path in (options.before, options.after))
    layers = distances(before, after)
    if options.png:
        draw(layers, options.png, f"{before.origin}\nagainst {after.origin}")
    facts = {"a": before.origin, "b": after.origin, "cosine_distance": layers}
    say(to_json(facts, indent=1) if options.json
          else f"{before.origin}\n{after.origin}\n{render(layers)}")
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
