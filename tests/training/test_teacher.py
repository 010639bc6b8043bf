"""A teacher is checked before a device is touched, and known again by its content."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import save_file
from small_models import MODEL, gpt2_tensors, make_recipe, make_tokenizer, write_gpt2

from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.training.teacher import Teacher

OTHER = make_tokenizer(merges=1)


@pytest.fixture
def teacher(tmp_path):
    """A GPT-2 with the tokenizer of the data, and a recipe that distills from it."""
    directory = write_gpt2(tmp_path / "teacher")
    make_tokenizer().save(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", directory, dirs_exist_ok=True)
    return directory, make_recipe(output=str(tmp_path / "run"), model=MODEL,
                                  distill={"teacher": str(directory)})


def test_a_teacher_has_the_tokenizer_of_the_data(teacher):
    directory, recipe = teacher
    assert "frozen" in Teacher(recipe, make_tokenizer()).summary
    with pytest.raises(ValueError, match="another|same tokenizer") as error:
        Teacher(recipe, OTHER)
    assert make_tokenizer().sha256 in str(error.value) and OTHER.sha256 in str(error.value)


def test_no_teacher_is_looked_for_where_none_counts(tmp_path):
    alone = Teacher(make_recipe(distill={"teacher": str(tmp_path / "gone"), "weight": 0.0}),
                    make_tokenizer())
    assert alone.contents == {} and alone.summary == ""
    alone.teach(engine=None)


def test_a_run_goes_on_with_the_teacher_that_it_began_with_wherever_it_lies(teacher, tmp_path):
    directory, recipe = teacher
    contents = Teacher(recipe, make_tokenizer()).contents
    RunDir(recipe, contents).create()
    moved = shutil.copytree(directory, tmp_path / "moved")
    distill = recipe.distill.model_copy(update={"teacher": str(moved)})
    again = recipe.model_copy(update={"distill": distill})
    RunDir(again, Teacher(again, make_tokenizer()).contents).check()
    tensors = gpt2_tensors()
    tensors["transformer.ln_f.bias"] += 1.0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="distill.teacher has another content"):
        RunDir(recipe, Teacher(recipe, make_tokenizer()).contents).check()
