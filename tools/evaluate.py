"""Score a checkpoint on a task, or outputs that anyone made, with figures equal to those of the
official scripts; on tasks of EleutherAI's lm-eval; or on any text.

    python tools/evaluate.py runs/finetune/e2e --task e2e --data data/e2e
    torchrun --nproc-per-node 8 tools/evaluate.py runs/finetune/webnlg --task webnlg \\
        --data data/webnlg --beams 10
    python tools/evaluate.py --task e2e --predictions outputs.txt \\
        --references data/e2e/testset_w_refs.csv
    python tools/evaluate.py --task dart --predictions outputs.txt \\
        --references reference0 reference1 reference2
    python tools/evaluate.py runs/mine --harness my_tasks/quiz.yaml lambada_openai --limit 500
    python tools/evaluate.py runs/mine --text 'held_out/*.jsonl.zst'

The checkpoint is a run directory, a checkpoint of a run, or a Hugging Face directory. On a --task
it is decoded by transformers' beam search; inputs, predictions, references in the official form and
scores.json go to RUN/evaluation/TASK_SPLIT.

--harness needs lm-eval (pip install lm_eval==0.4.13). Its figures are those that lm-eval's
own model `hf` has of the exported directory; chat templates are not applied. Nothing is fetched
unless HF_HUB_OFFLINE=0 is set: give tasks whose data are local, or in the cache of `datasets`. Task
files may name Python functions, which are run.

--text gives perplexity and bits per byte of the documents of files, each by itself.

BLEU of E2E is in [0, 1] and that of WebNLG and DART in percent, as their scripts print them.
METEOR, ROUGE_L and CIDEr need Java. TER is tercom's, not pyter's. Outputs for reference files of
DART are scored as they are: give them tokenized and lower-cased like the references, or give the
data.

Exit code 0, or 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from megatron_spdf.command_line import (
    MOST,
    end_quietly,
    make_parser,
    number,
    path_text,
    positive,
    refusing,
    say,
)
from megatron_spdf.data.finetuning.task import SPLITS, TASKS, load_examples, render_tasks
from megatron_spdf.data.preprocess.documents import ON_ERROR
from megatron_spdf.files import inside, require_directory
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.text import counted

_MODES = {  # option -> what it is of
    **dict.fromkeys(("split", "data", "predictions", "references", "beams", "length_penalty",
                     "no_repeat_ngram", "max_new_tokens"), ("task",)),
    "batch_size": ("task", "harness"), "window": ("harness", "text"),
    **dict.fromkeys(("include", "examples", "limit"), ("harness",)), "text_key": ("text",),
    "on_error": ("text",)}


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run the tool."""
    options = parse_arguments(arguments)
    if options.harness:
        return score_harness(options)
    if options.text:
        return score_text(options)
    TASKS.get(options.task)
    return score_predictions(options) if options.predictions else score_checkpoint(options)


def score_predictions(options: argparse.Namespace) -> int:
    """Scores --predictions against --references; writes scores.json where --output is given."""
    from megatron_spdf.evaluation.references import read_predictions, read_references
    from megatron_spdf.evaluation.scores import score
    from megatron_spdf.evaluation.scores_file import describe, write_scores

    require_free(options.output, options.force)
    predictions = read_predictions(options.predictions)
    references = read_references(options.task, options.references, options.split)
    scores = score(options.task, predictions, references)
    description = describe(options.task, options.split, scores,
                           predictions=str(options.predictions),
                           references=list(map(str, options.references)), inputs=len(predictions))
    if options.output:
        write_scores(options.output, description)
    show(options, scores, description)
    return 0


def score_checkpoint(options: argparse.Namespace) -> int:
    """Decodes the split with the checkpoint, scores and keeps what came out."""
    from megatron_spdf.checkpoint.store import run_of
    from megatron_spdf.convert.source import open_weights
    from megatron_spdf.evaluation.decoding import DecodingSettings
    from megatron_spdf.evaluation.evaluate import evaluate, scores_of
    from megatron_spdf.evaluation.scores_file import describe, write_scores, write_texts
    from megatron_spdf.resilience.world import find_ranks
    from megatron_spdf.runs.run_dir import splits_of

    run = run_of(options.run)
    output = output_of(options, f"{options.task}_{options.split}")
    asked = {setting.name: getattr(options, setting.name) for setting in fields(DecodingSettings)}
    settings = DecodingSettings(**{**TASKS.get(options.task).decoding,
                                   **{k: v for k, v in asked.items() if v is not None}})
    data = options.data or (run and splits_of(run, options.task))
    examples = load_examples(options.task, data or Path("data") / options.task, options.split)
    ranks = find_ranks()
    source = open_weights(options.run, checksums=False)
    found = evaluate(source, options.task, examples, settings, ranks)
    if found is None:
        return 0
    facts = found.facts
    write_texts(output, options.task, found.predictions, examples)  # whatever becomes of the scores
    scores = scores_of(options.task, examples, found)
    description = describe(options.task, options.split, scores, checkpoint=str(source.path),
                           origin=source.origin, decoding=facts)
    write_scores(output, description)
    show(options, scores, description)
    if not options.json:
        say(f"{counted(facts['inputs'], 'input')}, {counted(facts['tokens'], 'token')} in "
            f"{facts['seconds']:,} s: {facts['tokens_per_second']:,} tokens/s; "
            f"{counted(facts['truncated_prompts'], 'prompt')} truncated\nwrote {output}")
    return 0


def score_harness(options: argparse.Namespace) -> int:
    """Scores the checkpoint on tasks of lm-eval."""
    from megatron_spdf.evaluation.harness import (
        PACKAGE,
        HarnessSettings,
        evaluate_harness,
        facts_of,
        load_harness_tasks,
        require_harness,
    )

    require_harness()
    from megatron_spdf.convert.source import open_weights, tokenizer_of
    from megatron_spdf.evaluation.token_likelihood import window_within
    from megatron_spdf.resilience.world import find_ranks

    names = [name for word in options.harness for name in word.split(",")]
    output = output_of(options, f"harness_{'_'.join(Path(name).stem for name in names)}"[:100])
    settings = HarnessSettings(options.examples, options.limit, options.window, options.batch_size)
    source, ranks = open_weights(options.run, checksums=False), find_ranks()
    window_within(source.model.max_positions, settings.window)
    tokenizer_of(source)
    loaded = load_harness_tasks(names, options.include, ranks, settings)
    scores = evaluate_harness(source, loaded, settings, ranks)
    return keep(options, output, source, "harness", scores, ("torch", "transformers", PACKAGE),
                tasks=names, settings=facts_of(settings, ranks))


def score_text(options: argparse.Namespace) -> int:
    """Perplexity of the checkpoint on texts."""
    from megatron_spdf.convert.source import open_weights, tokenizer_of
    from megatron_spdf.data.preprocess.documents import expand_inputs
    from megatron_spdf.evaluation.text_perplexity import (
        WINDOW,
        Texts,
        evaluate_text,
        text_scores,
    )
    from megatron_spdf.evaluation.token_likelihood import window_within
    from megatron_spdf.resilience.world import find_ranks

    ranks = find_ranks()
    texts = Texts(expand_inputs(options.text), options.text_key, options.on_error)
    output = output_of(options, f"text_{'_'.join(path.name for path in texts.paths)}"[:100])
    source = open_weights(options.run, checksums=False)
    window = window_within(source.model.max_positions, options.window, WINDOW)
    tokenizer = tokenizer_of(source)
    skipped = texts.check()
    found = evaluate_text(source, texts, window, ranks)
    begin = tokenizer.begin_token or tokenizer.end_token
    scores = None if found is None else text_scores(found, window, begin)
    return keep(options, output, source, "text", scores, ("torch", "transformers"),
                files=list(map(str, texts.paths)), skipped=skipped, window=window,
                ranks=ranks.world)


def output_of(options: argparse.Namespace, name: str) -> Path:
    """Directory of the files of an evaluation, which has none yet."""
    from megatron_spdf.checkpoint.store import run_of

    run = run_of(options.run)
    output = options.output or (run and inside(run, f"evaluation/{name}"))
    if output is None:
        raise ValueError(f"{options.run} is a checkpoint outside of a run directory; give --output")
    require_free(output, options.force)
    return output


def keep(options: argparse.Namespace, output: Path, source, task: str, scores, libraries,
         **facts) -> int:
    """Writes and prints scores, where this is the rank that has them."""
    from megatron_spdf.evaluation.scores_file import describe, write_scores

    if scores is not None:
        description = describe(task, None, scores, libraries, checkpoint=str(source.path),
                               origin=source.origin, **facts)
        write_scores(output, description)
        show(options, scores, description)
        if not options.json:
            say(f"wrote {output}")
    return 0


def require_free(output: Path | None, force: bool) -> None:
    """Raises ValueError where the output has figures already and may not be overwritten, or is in
    a checkpoint."""
    from megatron_spdf.evaluation.scores_file import SCORES

    if output:
        require_directory(output, "--output")
    if output and (output / SCORES).exists() and not force:
        raise ValueError(f"{output / SCORES} exists; give another --output, or --force to "
                         "overwrite it")


def show(options: argparse.Namespace, scores, description: dict) -> None:
    from megatron_spdf.evaluation.scores import render

    say(to_json(description, indent=1) if options.json else render(scores))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, epilog=f"tasks:\n{render_tasks()}")
    add, of_task = parser.add_argument, "default: the task's, mostly"
    add("run", nargs="?", type=Path, metavar="RUN",
        help="run directory, checkpoint, or Hugging Face directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="TASK", help="one of those below")
    what.add_argument("--harness", nargs="+", metavar="TASK",
                      help="tasks or groups of lm-eval, or YAML files")
    what.add_argument("--text", nargs="+", type=path_text, metavar="FILE",
                      help="files or quoted patterns, of JSON lines (plain, .gz, .zst), or .txt")
    add("--split", choices=SPLITS, default="test", help="default: test")
    add("--data", type=Path,
        help="the split's file or the directory of the splits (default: the run's own, else "
             "data/TASK)")
    add("--predictions", type=Path, metavar="FILE",
        help="score these outputs, one per line, instead of a checkpoint")
    add("--references", type=Path, nargs="+", metavar="FILE",
        help="the task's data; or a text file, a blank line after the references of each input; or "
             "one text file for the first reference of every input, one for the second, ..., or "
             "what their names begin with")
    add("--beams", type=positive, help=f"{of_task} 10")
    add("--length-penalty", type=number(float), help=f"{of_task} 0.8")
    add("--no-repeat-ngram", type=number(int, least=0, most=MOST), help=f"0 for none; {of_task} 4")
    add("--max-new-tokens", type=positive, help=f"{of_task} 64")
    add("--batch-size", type=positive, default=32, help="prompts decoded together (default: 32)")
    add("--include", type=Path, metavar="DIR", help="YAML files of more tasks for --harness")
    add("--examples", type=number(int, least=0, most=MOST), metavar="N",
        help="shown in the context by --harness (default: as each task says)")
    add("--limit", type=positive, metavar="N", help="most documents of each task of --harness")
    add("--window", type=positive, metavar="T",
        help="most tokens read at once by --harness (default: as many as the model can) and --text "
             "(default: 2048, or as many as the model can)")
    add("--text-key", default="text", metavar="KEY",
        help="key of the text in a record of --text (default: text)")
    add("--on-error", choices=ON_ERROR, default="stop",
        help="at a record of --text that cannot be read: stop (default), or skip it")
    add("--output", type=Path, metavar="DIR",
        help="where the files go (default: RUN/evaluation/TASK_SPLIT, harness_TASK or text_FILE)")
    add("--force", action="store_true", help="overwrite an evaluation that is there")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    require_one_mode(parser, options)
    return options


def require_one_mode(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with what is wrong where options do not go together."""
    if bool(options.run) == bool(options.predictions):
        parser.error("give either RUN or --predictions")
    if bool(options.references) != bool(options.predictions):
        parser.error("--predictions and --references go together")
    mode = "task" if options.task else "harness" if options.harness else "text"
    for name, modes in _MODES.items():
        if mode not in modes and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not of --{mode} but of "
                         f"{' and '.join(f'--{other}' for other in modes)}")


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
