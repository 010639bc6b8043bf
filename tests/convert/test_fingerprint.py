"""What weights are, whatever their path: a change in any file makes them other ones."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_spdf.convert.source import fingerprint


def test_weights_are_known_by_all_their_files_or_by_the_list_of_them(tmp_path):
    """A checkpoint of ours has a list of the hashes of all its files."""
    source = SimpleNamespace(path=tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "more").mkdir()
    seen = [fingerprint(source)]
    for name in ("config.json", "model.safetensors", "files.json"):
        (tmp_path / name).write_bytes(b"2")
        seen.append(fingerprint(source))
    assert len(set(seen)) == 4
    (tmp_path / "config.json").write_bytes(b"3")
    assert fingerprint(source) == seen[-1]
