"""Parts of the demo: the commands that each is made of, and what came of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from functools import cached_property, partial
from math import nan
from pathlib import Path

from demo_parts.corpus import write_shards
from demo_parts.functions import TRAINING_LINES, write_functions
from demo_parts.progress import Part
from demo_parts.samples import render_samples, write_samples
from demo_parts.tables import fine_tuning_table, plot_losses, pretraining_table
from demo_parts.work import ROOT, Work, command, in_order, steps_done
from megatron_spdf.recipe.finetune import load_finetune
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.words import overruled_by
from megatron_spdf.reports.runs import Logged, read_all

RECIPE, FINETUNE = ROOT / "configs/pretrain/demo.yaml", ROOT / "configs/finetune/demo.yaml"
SET = "{level: 0.75, algorithm: set, update: {every: 20, fraction: 0.3, stop: 0.75}}"
# Name of a model -> directory of its run, and what its recipe says of sparsity.
MODELS = {"dense": ("dense", "0.0"), "75% static": ("s75_static", "0.75"),
          "75% SET": ("s75_set", SET)}
# Models that are fine-tuned, and how. The longest come first, so that two cores end together.
MODES = [("75% static", "sparse"), ("dense", "dense"), ("75% static", "dense"),
         ("75% SET", "dense")]
WHOLE_BATCH = "train.micro_batch=6"  # the recipe's leaves room for two replicas
SAMPLED = "75% static"
# Of each part, on two quiet cores.
SECONDS = {"data": 5, "pre-training": 32, "fine-tuning": 21, "page": 4}
LOGS = "logs"


class Demo:
    """All that the demo does, below one directory.

    Args:
        output: the directory.
        overrides: of the pre-training recipe.

    Raises:
        ValueError: an override is wrong.
    """

    def __init__(self, output: Path, overrides: list[str]):
        self.output, self._overrides = output, overrides
        self.runs = {name: output / place for name, (place, _) in MODELS.items()}
        self.tuned = {(name, mode): output / f"{MODELS[name][0]}_tuned_{mode}"
                      for name, mode in MODES}
        self._recipe = load_recipe(RECIPE, [WHOLE_BATCH, *overrides, f"output={output}/dense"])

    @cached_property
    def version(self) -> str:
        """Hash of everything that the demo is made by."""
        files = [RECIPE, FINETUNE, *sorted(Path(__file__).parent.glob("*.py"))]
        digest = hashlib.sha256(repr(self._overrides).encode())
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def data(self) -> Part:
        """Text, a tokenizer of it, and the data sets of both trainings."""
        out, log = self.output, self._log("data")
        tool = ["tools/preprocess_data.py", "--tokenizer", out / "tokenizer"]
        return Part("data", SECONDS["data"], [in_order([
            Work("(demo) write text shards and a table-to-text set",
                 partial(write_data, out), log),
            command([*tool, "--input", f"{out}/shards/train-*.jsonl.zst", "--output",
                     out / "data/train", "--train-tokenizer", "bpe", "--vocab-size",
                     self._recipe.model.vocab_size], log),
            command([*tool, "--input", f"{out}/shards/valid.jsonl.zst", "--output",
                     out / "data/valid"], log)])],
            lambda: "Python's standard library, a tokenizer of it, and a table-to-text set")

    def pretraining(self) -> list[Part]:
        """One part for each model."""
        return [self._pretrain(name) for name in MODELS]

    def _pretrain(self, name: str) -> Part:
        run, steps = self.runs[name], self._recipe.steps
        own = [f"output={run}", f"data.train={self.output}/data/train",
               f"data.valid={self.output}/data/valid", WHOLE_BATCH]
        words = [RECIPE, *overruled_by(overruled_by(own, self._overrides),
                                       [f"sparsity={MODELS[name][1]}"])]
        return Part(f"pre-training, {name}", SECONDS["pre-training"], [
            command(["pretrain.py", *words], self._log(run.name), self._recipe.parallel.world,
                    partial(steps_done, run, steps))],
            lambda: f"validation perplexity {self.logged([run])[0].perplexity or nan:.1f}")

    def fine_tuning(self) -> list[Part]:
        """One part for each model and mode: training, decoding and scores."""
        return [self._fine_tune(name, mode) for name, mode in MODES]

    def _fine_tune(self, name: str, mode: str) -> Part:
        run, data = self.tuned[name, mode], self.output / "functions"
        words = [f"checkpoint={self.runs[name]}", f"output={run}", f"data.path={data}",
                 f"mode={mode}"]
        batches = load_finetune(FINETUNE, words).train
        steps = TRAINING_LINES * batches.epochs // batches.global_batch
        log = self._log(run.name)
        kept = ", mask kept" if mode == "sparse" else ""
        return Part(f"fine-tuning, {name}{kept}", SECONDS["fine-tuning"], [
            command(["finetune.py", FINETUNE, *words], log, 1, partial(steps_done, run, steps)),
            command(["tools/evaluate.py", run, "--task", "jsonl", "--data", data, "--beams", 1,
                     "--no-repeat-ngram", 0, "--force"], log)],
            lambda: f"BLEU {self.logged([run])[0].scores['BLEU']:.2f}")

    def page(self) -> list[Part]:
        """Samples of text, plot and report page."""
        runs, log = [*self.runs.values(), *self.tuned.values()], self._log("page")
        spoken = {"dense fine-tuned": self.tuned[SAMPLED, "dense"]}
        return [
            Part("samples of text", SECONDS["page"], [Work(
                "(demo) write samples", partial(write_samples, self.runs[SAMPLED], spoken,
                                                self.output / "functions", self.samples), log)],
                lambda: str(self.samples)),
            Part("plot and report page", SECONDS["page"], [
                Work("(demo) plot the losses", self._plot, log),
                command(["tools/report.py", *runs, "-o", self.report], log)],
                lambda: str(self.report))]

    @property
    def samples(self) -> Path:
        return self.output / "samples.json"

    @property
    def plot(self) -> Path:
        return self.output / "loss.png"

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    def _plot(self) -> None:
        plot_losses(dict(zip(self.runs, self.logged(self.runs.values()), strict=True)), self.plot)

    def _log(self, name: str) -> Path:
        return self.output / LOGS / f"{name}.log"

    @staticmethod
    def logged(runs: Iterable[Path]) -> list[Logged]:
        """Runs as their logs have them."""
        return read_all(list(runs))

    def pretraining_table(self) -> str:
        return pretraining_table(dict(zip(self.runs, self.logged(self.runs.values()),
                                          strict=True)))

    def fine_tuning_table(self) -> str:
        return fine_tuning_table(self.logged([*self.runs.values(), *self.tuned.values()]),
                                 {run.name: name for name, run in self.runs.items()})

    def texts(self, columns: int) -> str:
        """Samples of text for a terminal of so many columns."""
        return render_samples(self.samples, SAMPLED, columns)


def write_data(output: Path) -> None:
    """Shards and a table-to-text set, in place of what an interrupted start has left."""
    for name in ("shards", "functions", "tokenizer", "data"):
        shutil.rmtree(output / name, ignore_errors=True)
    count, size = write_shards(output / "shards")
    print(f"{count:,} modules of Python's standard library, {size / 1e6:.1f} MB")
    lines = write_functions(output / "functions")
    print(f"table-to-text: {', '.join(f'{n:,} {split}' for split, n in lines.items())} lines")
