"""Figures of EleutherAI's lm-eval, an optional package, for whatever holds weights.

Tasks are lm-eval's own, by name, or YAML files of one's own. Nothing is fetched from the network
unless HF_HUB_OFFLINE=0 says so; task files may name Python functions, which lm-eval runs.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_spdf.convert.huggingface_export import in_memory
from megatron_spdf.convert.source import WeightSource, tokenizer_of
from megatron_spdf.evaluation.metrics.metric import ALL
from megatron_spdf.evaluation.scores import Scores
from megatron_spdf.evaluation.token_likelihood import window_within
from megatron_spdf.parallel.ranks import init_gloo
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.text import counted, first_line

PACKAGE = "lm_eval"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_SEED = 1234  # lm-eval's own, of examples in the context


@dataclass(frozen=True)
class HarnessSettings:
    """Options of lm-eval.

    Attributes:
        examples: shown in the context; None: as each task says.
        limit: most documents of a task; None: all.
        window: most tokens that the model reads at once; None: as many as it can.
        batch_size: prompts decoded together; changes no text.
    """

    examples: int | None = None
    limit: int | None = None
    window: int | None = None
    batch_size: int = 32


def require_harness() -> None:
    """Raises ValueError where lm-eval is not installed; keeps it off the network. To be called
    before transformers is imported."""
    for name in _OFFLINE:
        os.environ.setdefault(name, os.environ.get(_OFFLINE[0], "1"))
    if find_spec(PACKAGE) is None:
        raise ValueError("--harness needs EleutherAI's lm-eval, which is not installed; "
                         "pip install lm_eval==0.4.13")


def load_harness_tasks(names: Sequence[str], include: Path | None, ranks: Ranks,
                       settings: HarnessSettings) -> dict[str, Any]:
    """Tasks and groups of tasks with their data, as lm-eval's `TaskManager.load` gives them.

    Args:
        names: of tasks, groups or tags, or YAML files.
        include: directory of YAML files whose tasks have names, too.
        ranks: that will share the documents.
        settings: of the evaluation.

    Raises:
        ValueError: a task is unknown, cannot be loaded, or has fewer documents than there are
            ranks.
    """
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ValueError(f"--include={include} is no directory; name the one that has the tasks' "
                         "YAML files")
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    for name in names:
        file = Path(name).suffix in (".yaml", ".yml")
        if not (Path(name).is_file() if file else name in known):
            raise ValueError(f"--harness={name}: no such {'file' if file else 'task'}; give a task "
                             "of lm-eval (lm_eval ls tasks lists them), one of a directory that "
                             "--include names, or a YAML file")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of a task file, of its Python, of the library of data sets
        raise ValueError(f"--harness={','.join(names)} cannot be loaded ({type(error).__name__}: "
                         f"{first_line(error)}); mend the task, or, where its data are on the "
                         "network only, set HF_HUB_OFFLINE=0") from None
    for name, task in loaded["tasks"].items():
        _prepare(name, task, ranks, settings)
    return loaded


def _prepare(name: str, task: Any, ranks: Ranks, settings: HarnessSettings) -> None:
    """Sets the examples of a task, as lm-eval's command does."""
    if settings.examples is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=settings.examples)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    documents = min(len(task.eval_docs), settings.limit or len(task.eval_docs))
    if documents < ranks.world:
        raise ValueError(f"the task {name} has {counted(documents, 'document')} to share between "
                         f"{ranks.world} ranks; start fewer")


def evaluate_harness(source: WeightSource, loaded: dict[str, Any], settings: HarnessSettings,
                     ranks: Ranks) -> Scores | None:
    """Scores a model on loaded tasks; the ranks share the documents.

    Args:
        source: weights and tokenizer.
        loaded: from `load_harness_tasks`.
        settings: of the evaluation.
        ranks: of this job.

    Returns:
        On rank 0 the scores, "TASK METRIC" -> value; None on the others.

    Raises:
        ValueError: the window is larger than the model's, or a request does not fit it.
    """
    from lm_eval.evaluator import evaluate

    from megatron_spdf.evaluation.harness_model import HarnessModel

    tokenizer = tokenizer_of(source)
    window = window_within(source.model.max_positions, settings.window)
    device = init_gloo(ranks)
    try:
        model = HarnessModel(in_memory(source).to(device), tokenizer, window, settings.batch_size,
                             ranks)
        found = evaluate(lm=model, task_dict=loaded, limit=settings.limit, log_samples=False)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return None if found is None else _scores(found)


def _scores(found: dict[str, Any]) -> Scores:
    """lm-eval's results as ours. Keys there are "METRIC,FILTER"."""
    scores = Scores()
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr"):
                continue
            name = f"{task} {metric}" + (f" ({kept})" if kept != "none" else "")
            if isinstance(value, int | float) and math.isfinite(value):
                scores.values[ALL][name] = float(value)
                scores.signatures[name] = _signature(found, task,
                                                     results.get(f"{metric}_stderr,{kept}"))
            else:
                scores.missing[name] = f"lm-eval says {value!r}"
    return scores


def _signature(found: dict[str, Any], task: str, error: Any) -> str:
    """Metric, filter and settings behind a value."""
    parts = [f"lm-eval {version(PACKAGE)}"]
    if task in found["n-samples"]:
        counts = found["n-samples"][task]
        parts.append(f"{counts['effective']:,} of {counted(counts['original'], 'document')}")
    if task in found["n-shot"]:
        parts.append(f"{counted(found['n-shot'][task], 'example')} in the context")
    if (number := found["versions"].get(task)) is not None:
        parts.append(f"version {number} of the task")
    if isinstance(error, float) and math.isfinite(error):
        parts.append(f"standard error {error:.6f}")
    return ", ".join(parts)


def facts_of(settings: HarnessSettings, ranks: Ranks) -> dict[str, Any]:
    """Entries of scores.json on how the figures came about."""
    return {**asdict(settings), "ranks": ranks.world}
