"""Blocks of config.json by which llm-compressor and others say how weights are stored."""

from __future__ import annotations

from typing import Any

DENSE = "dense"
_REMEDY = ("use the model that it was made from, or save it with plain weights (llm-compressor: "
           "save_pretrained with save_compressed=False, disable_sparse_compression=True)")


def storage_fault(config: dict[str, Any]) -> str | None:
    """Returns why the weights of a config.json are not plain tensors, with the remedy; None: they
    are, zeros included."""
    block = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(block, dict):
        return f"has quantization_config={block!r:.40}, which is no mapping; {_REMEDY}"
    method = block.get("quant_method", "compressed-tensors" if block else None)
    if method not in (None, "compressed-tensors"):
        return (f"has quantization_config.quant_method={method!r}, whose weights are packed; "
                f"{_REMEDY}")
    stored = block.get("format") or (DENSE if not block.get("config_groups") else "unknown")
    if stored != DENSE:
        return f"has quantization_config.format={stored!r}, whose weights are packed; {_REMEDY}"
    for place, sparse in (("quantization_config.sparsity_config", block.get("sparsity_config")),
                          ("sparsity_config", config.get("sparsity_config"))):
        stored = sparse.get("format") or DENSE if isinstance(sparse, dict) else DENSE
        if stored != DENSE:
            return f"has {place}.format={stored!r}, whose zeros are packed away; {_REMEDY}"
    return None
