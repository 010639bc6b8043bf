"""Weights & Biases, where the package is installed: `log: {wandb: PROJECT}`.

A run directory is one run there, whatever restarts it takes: its id is kept in RUN/wandb.json. What
the environment says to the library (WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY, WANDB_TAGS,
...) holds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_spdf.files import write_json
from megatron_spdf.recipe.recipe import LOG_WRITERS
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.runs.writers.base import Writer
from megatron_spdf.version import __version__

if TYPE_CHECKING:
    from megatron_spdf.runs.run_dir import RunDir

# That the ranks wait for the service at most, at the start and at the end. What has not got there
# by then lies in RUN/wandb, from which `wandb sync` takes it.
WAIT_SECONDS = 30.0
STEP = "step"  # the axis of all figures
_PROJECT = re.compile(r"([^/\\#?%:\s]+/)?[^/\\#?%:]{1,128}")


def _project(text: str) -> str:
    if not _PROJECT.fullmatch(text) or not text.strip():
        raise PydanticCustomError("project", "input should be PROJECT or TEAM/PROJECT, a name of "
                                             "at most 128 characters without / \\ # ? % :")
    return text


class WeightsAndBiases(Writer):
    """A run at wandb.ai, or of a server of one's own.

    A run that goes on from a checkpoint writes steps again that were written before a crash. The
    service takes no figure back, so these have two points, one on the other at the same layout.

    Its process has a session of its own, which torchrun's signals do not reach. It ignores SIGUSR1,
    with which launch/ stops ranks, and ends at the SIGTERM of `scancel`, as of wandb 0.31: points
    after that are in log.jsonl only.
    """

    name: ClassVar = "wandb"
    type: ClassVar = Annotated[str, AfterValidator(_project)] | None
    field: ClassVar = Field(None, description="project at Weights & Biases, or TEAM/PROJECT, that "
                                              "gets the figures too; needs the package wandb")
    title: ClassVar = "Weights & Biases"

    @classmethod
    def check(cls, value: str) -> None:
        """See the base."""
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # a directory of that name, which runs leave
            raise ValueError(f"log.wandb={value} needs the package wandb, which is not installed; "
                             "pip install wandb, or leave the key out")

    def __init__(self, value: str, run: RunDir, step: int):
        self._run = _start(value, run)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See the base."""
        # not as wandb's own step, which drops what does not rise
        self._run.log({STEP: step, **figures})

    def close(self) -> None:
        """See the base."""
        import wandb

        try:
            self._run.finish()
        except Exception:  # of a service that is gone; the next writer starts another
            wandb.teardown()
            raise


def _start(project: str, run: RunDir) -> Any:
    """Begins the run of a directory there, or goes on with it."""
    import wandb

    # its own log files, which else go to the user's home
    os.environ.setdefault("WANDB_CACHE_DIR", str(run.root / "wandb/cache"))
    team, _, name = project.rpartition("/")
    started = wandb.init(
        project=name, entity=team or None, id=_id_of(run), resume="allow", name=run.root.name,
        dir=str(run.root), config={**run.recipe.model_dump(), "megatron_spdf": __version__},
        settings=wandb.Settings(init_timeout=WAIT_SECONDS, login_timeout=WAIT_SECONDS,
                                finish_timeout=WAIT_SECONDS))
    started.define_metric(STEP)
    started.define_metric("*", step_metric=STEP)
    return started


def _id_of(run: RunDir) -> str:
    """The id that a run directory keeps; a new one the first time, or that of the environment."""
    kept = run.root / "wandb.json"
    if kept.is_file():
        return read_json(kept, dict[str, str])["id"]
    made = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_json(kept, {"id": made})
    return made


LOG_WRITERS.register(WeightsAndBiases.name, WeightsAndBiases)
