"""docs/deployment.md: its lines of Python, run as far as a CPU goes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.sparse import _semi_structured_conversions as conversions
from torch.sparse import to_sparse_semi_structured

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
import convert_checkpoint  # noqa: E402
from families import save_family  # noqa: E402
from huggingface_models import logits_of  # noqa: E402
from small_models import make_tokenizer  # noqa: E402

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Path:
    """A 2:4 Llama in bf16, whose layers PyTorch's libraries take; the working directory is above
    it."""
    directory = save_family("llama", tmp_path / "given", intermediate_size=128)
    make_tokenizer().save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(directory / file.name)
    monkeypatch.chdir(tmp_path)
    for words in (["from-hf", "given", "run", "--select", "magnitude",
                   'sparsity={level: 0.5, pattern: "2:4"}'],
                  ["to-hf", "run", "exported", "--dtype", "bf16"]):
        assert convert_checkpoint.main(words) == 0
    return tmp_path / "exported"


def test_the_lines_on_two_four(exported, monkeypatch):
    page = (ROOT / "docs/deployment.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.S)
    packed = []

    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        """Through CUTLASS' layout and back; a weight that is not 2:4 loses entries."""
        values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        packed.append(values.numel() / weight.numel())
        return conversions.sparse_semi_structured_to_dense_cutlass(values, metadata)

    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", round_trip)
    scope: dict = {}
    exec(compile(lines, "docs/deployment.md", "exec"), scope)
    assert packed == [0.5] * 14  # Q, K, V, W_D, gate, up and W_O of two layers
    with torch.inference_mode():
        logits = scope["model"](IDS).logits
    wanted = logits_of(exported, IDS)
    assert torch.equal(logits, wanted) and wanted.std() > 0.1


def test_pytorch_refuses_such_weights_on_a_cpu():
    """As the page says; where it does not, the test above should run the lines as they are."""
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        to_sparse_semi_structured(torch.zeros(64, 64, dtype=torch.bfloat16))
