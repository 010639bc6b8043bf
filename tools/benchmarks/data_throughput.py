"""How fast text becomes tokens and tokens samples: `tools/preprocess_data.py` by number of workers,
beside Megatron-LM's own tool; and what one process reads of the result for training.

Both tools run as a user runs them, in turn, on the same text with the same tokenizer. Of wall and
CPU seconds the start (imports, a single document) is subtracted, so that a small sample says what a
large corpus will see. On a machine that does other work too, text per CPU second is the figure to
compare: it is the rate of a core that has nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_spdf.data.indexed.manifest import check_prefix
from megatron_spdf.data.preprocess.documents import expand_inputs, iterate_documents
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.files import new_file, write_file, write_json
from megatron_spdf.tables import MIB, SECONDS, Column, Table

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS = "tools/preprocess_data.py", "Megatron-LM"
SEQUENCE = 2048  # tokens
OUTPUTS = {OURS: "ours", THEIRS: "theirs"}


@dataclass(frozen=True)
class Timing:
    """One run of a tool, its children included.

    Attributes:
        wall, cpu: seconds; cpu of all processes together.
        memory: bytes of the largest of its processes.
    """

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Rate:
    """Medians over the rounds, the start subtracted; `start` is that, in wall seconds.

    Attributes:
        megabytes_per_second, megabytes_per_cpu_second: of text in UTF-8, 1e6 bytes.
    """

    tool: str
    workers: int
    start: float
    wall: float
    megabytes_per_second: float
    megabytes_per_cpu_second: float
    memory: int


def measure(
    inputs: Sequence[str], tokenizer: Path, workers: Sequence[int], rounds: int, place: Path,
    megatron_lm: Path | None = None,
) -> dict:
    """Runs the tools in turn, `rounds` times, writing to the directory `place`.

    Args:
        inputs: files or patterns.
        tokenizer: directory of GPT-2 BPE files.
        megatron_lm: a checkout of Megatron-LM; None: ours alone is measured.

    Raises:
        ValueError: bad arguments, or a tool that failed, with what it said.
    """
    files = expand_inputs(inputs)
    if megatron_lm and not (megatron_lm / "tools/preprocess_data.py").is_file():
        raise ValueError(f"{megatron_lm} has no tools/preprocess_data.py; name a checkout of "
                         "Megatron-LM, of the release that the installed megatron-core is of")
    plain = _as_plain_lines(files, place / "all.jsonl")
    single = _first_line(plain, place / "one.jsonl")
    hub_form = _hub_form(tokenizer, place / "hub_form") if megatron_lm else None
    commands = {
        (tool, count): _command(tool, count, tokenizer, megatron_lm, hub_form)
        for tool in ([OURS, THEIRS] if megatron_lm else [OURS]) for count in workers}
    timings: dict[tuple[str, int], list[tuple[Timing, Timing]]] = {key: [] for key in commands}
    for _ in range(rounds):
        for (tool, count), command in commands.items():
            source = files if tool == OURS else [plain]
            pair = (_run(command, [single], place / "start"),
                    _run(command, source, place / OUTPUTS[tool]))
            timings[tool, count].append(pair)
    made = check_prefix(place / "ours")
    rates = [_rate(tool, count, pairs, made.text_bytes / 1e6) for (tool, count),
             pairs in timings.items()]
    return {"text_bytes": made.text_bytes, "documents": made.documents, "tokens": made.tokens,
            "rounds": rounds,
            "rates": [asdict(rate) for rate in rates],
            "samples_per_second": _samples_per_second(place / "ours"),
            "different_documents": _different(place / "ours", place / "theirs_text_document")
            if megatron_lm else None}


def render(facts: dict) -> list[str]:
    """The rates as a table, and the ratios that matter."""
    lines = [f"{facts['text_bytes'] / 1e6:,.1f} MB of text in {facts['documents']:,} documents, "
             f"{facts['tokens']:,} tokens; medians of {facts['rounds']} rounds, start subtracted",
             "",
             Table([Column("tool"), Column("workers", form="d"),
                    Column("MB/s", "megabytes_per_second", ".2f"),
                    Column("MB per CPU second", "megabytes_per_cpu_second", ".2f"),
                    Column("start", form=".1f", unit=SECONDS),
                    Column("largest process", "memory", ",.0f", MIB)], facts["rates"]).markdown()]
    lines.append("")
    ours, theirs = ([r for r in facts["rates"] if r["tool"] == tool] for tool in (OURS, THEIRS))
    for more in ours[1:]:
        wall, cpu = (more[k] / ours[0][k]
                     for k in ("megabytes_per_second", "megabytes_per_cpu_second"))
        added = (wall - 1) / (more["workers"] / ours[0]["workers"] - 1)
        lines.append(f"{more['workers']} workers over {ours[0]['workers']}: {added:.2f} of the "
                     f"rate per added worker, {cpu:.2f} of the MB per CPU second")
    for mine, other in zip(ours, theirs, strict=False):
        wall, cpu = (mine[k] / other[k]
                     for k in ("megabytes_per_second", "megabytes_per_cpu_second"))
        lines.append(f"over {THEIRS}'s tool, {mine['workers']} workers: {wall:.1f} times the MB/s, "
                     f"{cpu:.1f} times the MB per CPU second")
    lines.append(f"one process reads {facts['samples_per_second']:,.0f} samples of {SEQUENCE:,} "
                 "tokens a second for training, "
                 f"{SEQUENCE * facts['samples_per_second'] / 1e6:.1f} million tokens/s")
    if facts["different_documents"] is not None:
        lines.append(f"documents whose tokens differ from {THEIRS}'s: "
                     f"{facts['different_documents']:,}")
    return lines


def _command(tool: str, workers: int, tokenizer: Path, megatron_lm: Path | None,
             hub_form: Path | None) -> list[str]:
    """Without inputs and output."""
    if tool == OURS:
        return [sys.executable, str(ROOT / OURS), "--tokenizer", str(tokenizer), "--workers",
                str(workers),
                "--overwrite"]
    return [sys.executable, str(megatron_lm / "tools/preprocess_data.py"), "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model", str(hub_form), "--append-eod", "--workers", str(workers)]


def _run(command: list[str], files: Sequence[Path], output: Path) -> Timing:
    ours = command[1].startswith(str(ROOT))
    words = ["--output" if ours else "--output-prefix", str(output), "--input", *map(str, files)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([*command, *words], stdout=said, stderr=said, env=environment)
        _, status, used = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if run.returncode:
            raise ValueError(f"{command[1]} ended with {run.returncode}: {said.read()[-1500:]}")
    return Timing(time.perf_counter() - started, used.ru_utime + used.ru_stime,
                  used.ru_maxrss * 1024)


def _rate(tool: str, workers: int, pairs: list[tuple[Timing, Timing]], megabytes: float) -> Rate:
    wall, cpu = (statistics.median(getattr(whole, k) - getattr(start, k) for start, whole in pairs)
                 for k in ("wall", "cpu"))
    return Rate(tool, workers, statistics.median(start.wall for start, _ in pairs), wall,
                megabytes / wall, megabytes / cpu, max(whole.memory for _, whole in pairs))


def _as_plain_lines(files: Sequence[Path], path: Path) -> Path:
    """All records in one uncompressed file, the only form that Megatron-LM's tool reads."""
    with new_file(path) as out:
        out.writelines(json.dumps({"text": document.text}).encode() + b"\n"
                       for document in iterate_documents(files))
    return path


def _first_line(path: Path, single: Path) -> Path:
    with open(path, "rb") as lines:
        write_file(single, lines.readline())
    return single


def _hub_form(tokenizer: Path, directory: Path) -> Path:
    """GPT-2 BPE files as a directory that Hugging Face's `AutoTokenizer` loads, Rust behind it."""
    load_tokenizer(tokenizer).save(directory)
    end = "<|endoftext|>"
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "GPT2TokenizerFast", "model_max_length": 10**9, "eos_token": end,
        "bos_token": end,
        "unk_token": end})
    return directory


def _samples_per_second(prefix: Path) -> float:
    """Samples in the random order of training, memory-mapped, tensors made; without collating, in
    this process."""
    from megatron_spdf.data.pretraining.samples import ShuffledEpochs
    from megatron_spdf.data.pretraining.sources import make_source
    from megatron_spdf.recipe.recipe import Recipe

    tokenizer = load_tokenizer(f"{prefix}.tokenizer")
    recipe = Recipe.model_validate({
        "output": "-", "optimizer": {"lr": 1.0},
        "model": {"layers": 1, "hidden": 64, "heads": 1, "vocab_size": tokenizer.vocab_size,
                  "max_positions": SEQUENCE},
        "train": {"tokens": SEQUENCE, "global_batch": 1, "micro_batch": 1}})
    source = make_source(str(prefix), check_prefix(prefix))
    samples = ShuffledEpochs(source, 0, recipe, tokenizer, prefix.parent / "cache")
    count, started = min(len(samples), 5000), time.perf_counter()
    for number in range(count):
        samples[number]
    return count / (time.perf_counter() - started)


def _different(ours: Path, theirs: Path) -> int:
    """Documents of two data sets that are not token for token the same."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    one, other = IndexedDataset(str(ours)), IndexedDataset(str(theirs))
    together = zip(range(len(one)), range(len(other)), strict=False)
    return abs(len(one) - len(other)) + sum(one[i].tolist() != other[j].tolist() for i,
                                            j in together)
