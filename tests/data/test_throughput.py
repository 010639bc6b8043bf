"""tools/benchmark.py data: what it measures, not how fast it is."""

from __future__ import annotations

import pytest
from benchmarks import data_throughput
from text_shards import records, write_shard


@pytest.mark.slow
def test_all_text_is_measured(tmp_path, tiny_bpe):
    shards = [write_shard(tmp_path / f"{i}.jsonl.zst", records(200, seed=i)) for i in range(2)]
    facts = data_throughput.measure(list(map(str, shards)), tiny_bpe, [1], 1, tmp_path)
    texts = [r["text"] for i in range(2) for r in records(200, seed=i)]
    assert (facts["documents"], facts["text_bytes"]) == (400, sum(len(t.encode()) for t in texts))
    [rate] = facts["rates"]
    assert (
        rate["tool"] == data_throughput.OURS
        and rate["memory"] > 2**20
        and facts["samples_per_second"] > 0
    )
    assert "million tokens/s" in data_throughput.render(facts)[-1]


def test_equal_and_different_documents(tmp_path, tiny_bpe):
    from megatron_spdf.data.preprocess.preprocess import preprocess
    from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

    items = records(20)
    changed = [*items[:7], {"text": "another"}, *items[8:18]]
    for name, there in (("a", items), ("b", changed)):
        preprocess([write_shard(tmp_path / f"{name}.jsonl", there)], tmp_path / name,
                   load_tokenizer(tiny_bpe))
    assert data_throughput._different(tmp_path / "a", tmp_path / "a") == 0
    # one changed, two missing
    assert data_throughput._different(tmp_path / "a", tmp_path / "b") == 3


def test_a_directory_without_the_other_tool_is_refused(tmp_path, tiny_bpe):
    shard = write_shard(tmp_path / "a.jsonl", records(3))
    with pytest.raises(ValueError,
                       match="has no tools/preprocess_data.py; name a checkout of Megatron-LM"):
        data_throughput.measure([str(shard)], tiny_bpe, [1], 1, tmp_path, tmp_path)
