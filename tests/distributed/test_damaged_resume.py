"""A run whose checkpoint was damaged at random, with and without a new list of its files: a start
says why it is refused, in a sentence that names a file of the checkpoint, or goes on as before."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import bench

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import RunState

pytestmark = pytest.mark.slow

Damage = Callable[[Path, Path, random.Random], object]


def flip(file: Path, _: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, _: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[:draw.randrange(file.stat().st_size or 1)])


def lengthen(file: Path, _: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randrange(1, 5000)))


def remove(file: Path, *_: object) -> None:
    file.unlink()


def rename(file: Path, *_: object) -> None:
    file.rename(file.with_name(f"x{file.name}"))


def of_another(file: Path, other: Path, _: random.Random) -> None:
    shutil.copyfile(other, file)


def swap(file: Path, _: Path, draw: random.Random) -> None:
    other = draw.choice([p for p in file.parent.iterdir() if p.is_file() and p != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def noise(file: Path, _: Path, draw: random.Random) -> None:
    file.write_bytes(draw.randbytes(file.stat().st_size))


DAMAGES = (flip, flip, cut, lengthen, remove, rename, of_another, swap, noise)


def damaged_at_random(recipe: dict, other: dict, seeds: list[int]) -> dict[str, str]:
    """What a start says after each damage, or "resumed", or the exception that is no sentence."""
    with bench(other) as b:
        b.checkpointer.save(b.engine, RunState(), b.engine.measured_sparsity())
        foreign = b.checkpointer.wait().path
    with bench(recipe) as b:
        b.checkpointer.save(b.engine, RunState(), b.engine.measured_sparsity())
        place = b.checkpointer.wait().path
        sound, said = place.parent.parent / "sound", {}
        shutil.copytree(place, sound)
        for seed in seeds:
            draw = random.Random(seed)
            damage, name = draw.choice(DAMAGES), draw.choice([*store.files_of(sound), store.FILES])
            if draw.random() < 0.4:
                name = ".metadata"  # the file of the most rules
            damage(place / name, foreign / name, draw)
            if relisted := draw.random() < 0.6 and name != store.FILES:
                (place / store.FILES).write_text(json.dumps(
                    {n: store.describe(place / n) for n in store.files_of(place)}))
            said[f"{seed} {damage.__name__} {name} {relisted}"] = start(b)
            shutil.rmtree(place)
            shutil.copytree(sound, place)
        said["sound"] = start(b)
        return said


def start(b) -> str:
    started = time.monotonic()
    try:
        b.checkpointer.restore(b.engine)
    except (ValueError, OSError) as error:
        said = str(error)
    except Exception as error:
        said = f"NO SENTENCE {type(error).__name__}: {error}"
    else:
        said = "resumed"
    return said if time.monotonic() - started < 60 else f"SLOW {said}"


def test_a_checkpoint_damaged_at_random_is_refused_in_a_sentence(ranks, make_recipe, tmp_path):
    recipe = make_recipe(parallel={})
    other = make_recipe(str(tmp_path / "other"), parallel={}, sparsity={"seed": 77})
    said = ranks(1).run(damaged_at_random, recipe, other, list(range(60)))
    assert said.pop("sound") == "resumed"
    refused = {damage: words for damage, words in said.items() if words != "resumed"}
    for damage, words in refused.items():
        assert "step_00000000" in words and "\n" not in words, (damage, words)
        assert not words.startswith(("NO SENTENCE", "SLOW")), (damage, words)
    # What passes was listed anew: other numbers, or bytes that nobody needs.
    assert all(damage.endswith("True") for damage in said.keys() - refused.keys())
    assert len(refused) > 45
