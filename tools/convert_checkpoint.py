"""Convert checkpoints: to and from Hugging Face and Megatron-LM, from DeepSpeed, between sparsities
and layouts, and to a run of another length.

    tools/convert_checkpoint.py to-hf runs/mine exported/mine
    tools/convert_checkpoint.py from-hf models/gpt2 runs/half --recipe r.yaml --sparsity 0.5
    tools/convert_checkpoint.py densify runs/mine runs/dense optimizer.lr=1e-4
    tools/convert_checkpoint.py reshard runs/mine runs/wider parallel.tensor=4
    tools/convert_checkpoint.py branch runs/trunk runs/short train.tokens=1B optimizer.decay=linear

A run is given as its directory, whose best checkpoint is taken, where it keeps one, else the newest
(`reshard` and `branch` always take the newest), or as one checkpoint. What is written as a run
directory is trained on by pretrain.py with the same recipe and output=OUT. One weight at a time is
dense in memory, OUT appears complete or not at all, and an OUT that exists is refused.

Exit code 0, or 2 for what the user can put right. Needs neither a GPU nor the layout a checkpoint
was written at.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_spdf.architecture.base import ARCHITECTURES
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.command_line import (
    hear_interrupts,
    make_parser,
    path_text,
    positive,
    refusing,
    say,
)
from megatron_spdf.convert.calibration import SAMPLES, Calibration, CheckedText, check_text
from megatron_spdf.convert.continued import recipe_for
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader
from megatron_spdf.convert.huggingface_export import DTYPES, SHARD_GB, export
from megatron_spdf.convert.huggingface_import import HuggingFaceReader
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.megatron_lm import VERSION, MegatronReader, arguments, save_for_megatron
from megatron_spdf.convert.reshard import branch, reshard
from megatron_spdf.convert.source import WeightSource, open_weights, richer_of, tokenizer_of
from megatron_spdf.data.pretraining.corpus import data_tokenizer
from megatron_spdf.data.tokenizers.base import Tokenizer, render_padding
from megatron_spdf.evaluation.perplexity import perplexity
from megatron_spdf.files import require_directory, require_free
from megatron_spdf.recipe.load import load_recipe, make_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.words import add_overrides, require_given_once
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.selectors.base import SELECTORS
from megatron_spdf.sparsity.selectors.nonzero import BY_CHANCE


@refusing
def main(words: list[str] | None = None) -> int:
    """Run the tool; every byte of a checkpoint of ours is checked before anything is written."""
    options = parse(words)
    try:
        require_free(options.output)
        require_directory(options.output, "OUT")
        said = options.run(options)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    say(said)
    return 0


def to_hf(options: argparse.Namespace) -> str:
    """A directory for transformers' from_pretrained."""
    source = read_run(options)
    export(source, options.output, options.dtype, options.masks, options.shard_size)
    return (f"{options.output}: {source.path} as a {source.model.title} of transformers, "
            f"{options.dtype}")


def from_hf(options: argparse.Namespace) -> str:
    """A run whose step 0 has the weights of a Hugging Face model, or of a run of ours, in another
    recipe."""
    source = open_weights(options.source)
    if isinstance(source, HuggingFaceReader):
        recipe = recipe_for(source, options.recipe, words_of(options))
        source = open_weights(options.source, like=recipe.model)
    else:
        recipe = given_recipe(options) if options.recipe else own_recipe(source, options)
    has_data = recipe.data.train or recipe.data.blend
    tokenizer = (richer_of(data_tokenizer(recipe), source) if has_data
                 else tokenizer_of(source))
    text = text_of(options, recipe, tokenizer)
    return begin(source, recipe, tokenizer, options, text)


def prune(options: argparse.Namespace) -> str:
    """A run whose step 0 has the weights of another run, sparse as the words say; a fresh
    optimizer."""
    source = read_run(options)
    recipe = own_recipe(source, options)
    return begin(source, recipe, source.tokenizer, options,
                 text_of(options, recipe, source.tokenizer))


def densify(options: argparse.Namespace) -> str:
    """A run whose step 0 has the weights of another run without its masks; a fresh optimizer."""
    source = read_run(options)
    return begin(source, own_recipe(source, options, "sparsity=0", "stages=[]"), source.tokenizer,
                 options)


def reshard_run(options: argparse.Namespace) -> str:
    """The same checkpoint, optimizer and run state included, its files cut for another layout."""
    if other := [word for word in options.overrides if not word.startswith("parallel.")]:
        raise ValueError(f"{' '.join(other)}: only parallel.* can change here, as in "
                         "parallel.tensor=2")
    source = CheckpointReader(find_checkpoint(options.source, newest=True), checksums=True)
    layout = make_recipe(source.recipe.model_dump(), options.overrides, source.path / "run.json",
                         rules=lambda _: ()).parallel  # `reshard` checks those of layouts
    checkpoint = reshard(source, layout, options.output)
    return (f"{checkpoint}: {source.origin}, for tensor {layout.tensor} x pipeline "
            f"{layout.pipeline} x data {layout.data}\ntrain it: pretrain.py "
            f"{options.output}/recipe.yaml")


def branch_run(options: argparse.Namespace) -> str:
    """The same checkpoint, optimizer and run state included, in a run that goes on with another
    length, and another fall of the learning rate."""
    source = CheckpointReader(find_checkpoint(options.source, newest=True), checksums=True)
    recipe = source.recipe.without_stages().stored_at(1.0)
    recipe = make_recipe(recipe.model_dump(), words_of(options), source.path / "run.json")
    checkpoint = branch(source, recipe, options.output)
    return (f"{checkpoint}: {source.origin}, which goes on to step {recipe.steps:,}\ntrain it: "
            f"pretrain.py {options.output}/recipe.yaml")


def to_megatron(options: argparse.Namespace) -> str:
    """A directory for Megatron-LM's --load."""
    source = read_run(options)
    save_for_megatron(source, options.output, DTYPES[options.dtype])
    return (f"{options.output}: the weights of {source.path} for Megatron-LM {VERSION}, "
            f"{options.dtype}; load them with\n--load {options.output} "
            f"{' '.join(arguments(source).split())}\n(--make-vocab-size-divisible-by over your "
            "--tensor-model-parallel-size)")


def from_megatron(options: argparse.Namespace) -> str:
    """A run whose step 0 has the weights of a checkpoint of Megatron-LM."""
    recipe = given_recipe(options)
    tokenizer = data_tokenizer(recipe)
    text = text_of(options, recipe, tokenizer)
    return begin(MegatronReader(options.source, recipe.model), recipe, tokenizer, options, text)


def from_deepspeed(options: argparse.Namespace) -> str:
    """A run whose step 0 has the weights of a checkpoint that DeepSpeed wrote."""
    recipe = given_recipe(options)
    tokenizer = data_tokenizer(recipe)
    text = text_of(options, recipe, tokenizer)
    return begin(DeepSpeedReader(options.source, recipe.model), recipe, tokenizer, options, text)


def read_run(options: argparse.Namespace) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(options.source), checksums=True)


def given_recipe(options: argparse.Namespace) -> Recipe:
    return load_recipe(options.recipe, words_of(options))


def own_recipe(source: CheckpointReader, options: argparse.Namespace, *first: str) -> Recipe:
    """The recipe a checkpoint was made with, changed by words."""
    return make_recipe(source.recipe.model_dump(), [*first, *words_of(options)],
                       source.path / "run.json")


def words_of(options: argparse.Namespace) -> list[str]:
    sparsity = getattr(options, "sparsity", None)
    return [f"output={json.dumps(str(options.output))}", *options.overrides,
            *([] if sparsity is None else [f"sparsity={sparsity}"])]


def text_of(options: argparse.Namespace, recipe: Recipe,
            tokenizer: Tokenizer) -> CheckedText | None:
    """The text that --calibration and --evaluate name, checked."""
    asked = Calibration(options.calibration, options.evaluate,
                        options.calibration_samples or SAMPLES, options.sequence_length)
    if (options.calibration_samples or options.sequence_length) and not (
            asked.calibrate or asked.evaluate):
        raise ValueError("--calibration-samples and --sequence-length are of the text that "
                         "--calibration or --evaluate names; give one of these, or leave them out")
    SELECTORS.get(options.select)
    return check_text(asked, recipe, tokenizer)


def begin(source: WeightSource, recipe: Recipe, tokenizer: Tokenizer,
          options: argparse.Namespace, text: CheckedText | None = None) -> str:
    begun = write_initial_checkpoint(source, recipe, tokenizer, options.output,
                                     getattr(options, "select", "random"), text)
    plan = begun.plan
    sparse = (
        f"{plan.sparsity:.2%} of {plan.numel:,} linear weights zero" if plan.weights else "dense"
    )
    lines = [f"{options.output}: a run at step 0 with the weights of {source.origin}, {sparse}"]
    if not plan.weights and begun.zeros > BY_CHANCE:
        lines.append(f"{begun.zeros:.2%} of its linear weights are zero, and no mask holds them: "
                     "training fills them. --select nonzero keeps them at zero")
    if holds_zeros(plan):
        lines.append(f"{begun.zeros:.2%} of all linear weights are zero and stay so; slices of a "
                     "weight have different numbers of zeros, and all store as many entries as "
                     "the fullest")
    if source.tokenizer is None:
        lines.append("the source has no tokenizer; that of the recipe's data is taken, sha256 "
                     f"{tokenizer.sha256}")
    lines += filter(None, [render_padding(tokenizer, recipe.model.vocab_size)])
    if losses := begun.losses:
        before, after = (f"{perplexity(loss) or math.inf:.4g}"
                         for loss in (losses.dense, losses.pruned))
        lines.append(f"perplexity {before} before, {after} after, on {losses.text}")
    return "\n".join([*lines, f"train it: pretrain.py {options.output}/recipe.yaml"])


def holds_zeros(plan: Plan) -> bool:
    """True if slices of a run's weights store entries that stay zero."""
    return any(weight.algorithm.holds for weight in plan.weights.values())


RUN = "a run directory, or one of its checkpoints"
SELECTION = ["--select", "--calibration", "--calibration-samples", "--sequence-length",
             "--evaluate"]
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], str], str, list[str], str]] = {
    "to-hf": (to_hf, RUN, ["--dtype", "--masks", "--shard-size"], ""),
    "from-hf": (
        from_hf,
        "directory with config.json and safetensors or pytorch_model.bin, or a run",
        ["--recipe?", "--sparsity", *SELECTION, "words"],
        """\
The model's section of the recipe is read off config.json; what a recipe or words say of it must
agree, but for dropout, initial spread and slices. Without a recipe the run continues dense, in the
precision of the files: give train.tokens=..., data.train=... as words here, since pretrain.py
refuses a run of another recipe.
The model_type of config.json is {model_types}.
What the model computes otherwise than ours is refused by its key. vocab_size is the number of its
rows, which may be more than the tokenizer has ids. Its tokenizer files must be those of the
recipe's data; where there are none, the data's tokenizer is taken. Vocabulary rows that pad the
embedding are the mean of the others.""",
    ),
    "prune": (prune, RUN, ["--sparsity", *SELECTION, "words"], ""),
    "densify": (densify, RUN, ["words"], ""),
    "reshard": (
        reshard_run,
        RUN,
        ["words"],
        """\
A checkpoint resumes at any layout as it is: no conversion is needed for that. This cuts its files
anew, so that every rank reads one file, and makes the layout that of the new run's recipe.""",
    ),
    "branch": (
        branch_run,
        RUN,
        ["words"],
        """\
One trunk serves several lengths: a run with optimizer.decay=constant, or with a decay that has not
begun, goes on from its newest checkpoint, or from the one given, with other values of train.tokens,
optimizer.decay, decay_share and min_lr_ratio. decay_share is of all steps, those of the trunk
included. The branch equals a straight run of its recipe. The trunk is left as it is.""",
    ),
    "to-megatron": (
        to_megatron,
        RUN,
        ["--dtype"],
        f"""\
Names, shapes and files are those of Megatron-LM {VERSION} (megatron-core 0.16.1, --ckpt-format
torch_dist), for both its local and its Transformer Engine layers, as a release: --load needs no
other flag, and starts at iteration 0. Its tensors are dense and fit any tensor and pipeline
parallelism. OUT/arguments.txt has Megatron-LM's arguments.""",
    ),
    "from-megatron": (
        from_megatron,
        "directory with latest_checkpointed_iteration.txt, or one checkpoint in it",
        ["--recipe", "--sparsity", *SELECTION, "words"],
        f"""\
A distributed checkpoint (--ckpt-format torch_dist) of Megatron-LM {VERSION}, saved at any layout.
Only its tensors are read, not its pickled arguments, so architecture and shape come from the
recipe's model section; the number of heads, the activation and the tokenizer cannot be checked.""",
    ),
    "from-deepspeed": (
        from_deepspeed,
        "directory with a file `latest`, or one checkpoint in it",
        ["--recipe", "--sparsity", *SELECTION, "words"],
        """\
What engine.save_checkpoint of DeepSpeed 0.19 wrote for a model of Megatron-Core with our names,
ZeRO 0 to 3, at any tensor and data parallelism; sparse weights of ours become dense. No pickled
code is run. The shape comes from the recipe's model section; the number of heads, the activation
and the tokenizer cannot be checked. Runs of finetune.py and of pretrain.py engine=deepspeed need no
conversion: their checkpoints are this project's own.""",
    ),
}
OPTIONS = {
    "--dtype": dict(choices=DTYPES, default="fp32", help="of the weights (default: fp32)"),
    "--masks": dict(action="store_true",
                    help="also write masks.safetensors: weight name -> bool, true is active"),
    "--recipe": dict(required=True, metavar="RECIPE.yaml", help="of the run to come"),
    "--recipe?": dict(metavar="RECIPE.yaml", dest="recipe",
                      help="of the run to come (default: the model's section of config.json, and "
                           "what suits continued training)"),
    "--shard-size": dict(type=float, default=SHARD_GB, metavar="GB",
                         help=f"most of a file of weights (default: {SHARD_GB})"),
    "--sparsity": dict(metavar="S", help="short for the word sparsity=S"),
    "--select": dict(default="random", metavar="NAME",
                     help="weights that stay, one of {selectors}; random (default): the "
                          "recipe's masks; magnitude: the largest in each of the slices a weight "
                          "is cut into; wanda, sparsegpt: by the inputs of each weight, sparsegpt "
                          "changes what stays; nonzero: the masks that are in the weights, as they "
                          "are"),
    "--calibration": dict(type=path_text, metavar="PREFIX",
                          help="data set whose text wanda and sparsegpt look at; perplexity "
                               "before and after is printed"),
    "--calibration-samples": dict(type=positive, metavar="N",
                                  help="sequences of it, and the most that perplexity is measured "
                                       f"on (default: {SAMPLES})"),
    "--sequence-length": dict(type=positive, metavar="T",
                              help="tokens of these (default: train.sequence_length)"),
    "--evaluate": dict(type=path_text, metavar="PREFIX",
                       help="data set of the perplexity (default: the last tenth of the other, "
                            "which is held out)"),
}


def _model_types() -> str:
    """transformers' names of the architectures here that it has."""
    families = [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()]
    *names, last = sorted({family.huggingface for family in families if family.huggingface})
    return f"{', '.join(names)} or {last}"


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, source, options, more) in COMMANDS.items():
        more = more.replace("{model_types}", _model_types())
        command = commands.add_parser(name, help=run.__doc__,
                                      description=f"{run.__doc__}\n\n{more}".strip(),
                                      formatter_class=parser.formatter_class,
                                      allow_abbrev=False)
        command.add_argument("source", type=Path, metavar="DIR", help=source)
        command.add_argument("output", type=Path, metavar="OUT", help="directory to make")
        for option in options:
            if option != "words":
                own = OPTIONS[option]
                text = own["help"].replace("{selectors}", ", ".join(SELECTORS.names()))
                command.add_argument(option.removesuffix("?"), **{**own, "help": text})
        if "words" in options:
            add_overrides(command)
        command.set_defaults(run=run, takes_words="words" in options)
    parsed, rest = parser.parse_known_args(words)
    if rest and (not parsed.takes_words or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # words that came after an option
        parsed.overrides += rest
        try:
            require_given_once(parsed.overrides)
        except ValueError as error:
            parser.error(str(error))
    return parsed


if __name__ == "__main__":
    hear_interrupts()
    # so that clean-up runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
