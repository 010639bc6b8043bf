"""Operations on the stand-in's tensors, computed on the CPU where they lie.

An operation first runs as it is, so that PyTorch checks devices, types and shapes and allocates
what it returns, and then once more on CPU tensors over the same memory. Shapes that depend on
values come from the CPU.
"""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AS_THEY_ARE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
               "alias", "set_",
               "_local_scalar_dense", "resize_", "record_stream", "is_pinned", "_pin_memory",
               "lift_fresh",
               # the last has no CPU's counterpart: its form is right, its values are not
               "_cslt_compress"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
                    "repeat_interleave",
                    "bincount", "equal"}


def install() -> None:
    """For all that this process does from here on."""
    Computed().__enter__()
    torch.Tensor.__repr__ = torch.nn.Parameter.__repr__ = shown
    # there, operations arrive that are made of others
    torch.inference_mode = lambda mode=True: torch.no_grad()
    tolist = Tensor.tolist
    # it would copy out of sight
    Tensor.tolist = lambda self: tolist(self.cpu() if self.is_cuda else self)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        GridExecutor._init_args_hst = lambda self, arguments, keywords: (arguments, keywords)
        GridExecutor._restore_args_dev = lambda self, *_: None


def shown(tensor: Tensor, **_: Any) -> str:
    """PyTorch's own representation looks for values out of sight."""
    return f"tensor{tuple(tensor.shape)}"


class Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, name = tree_leaves((args, kwargs)), func._schema.name.partition("::")[2]
        if not any(map(_there,
                       leaves)) or func.namespace != "aten" or func.is_view or name in AS_THEY_ARE:
            return func(*args, **kwargs)
        if name in ATTENTION:
            out = func(*args, **kwargs)
            ATTENTION[name](out, args, kwargs)
            return out
        here, here_by_name = tree_map(_over_memory, (args, kwargs))
        here_by_name |= {key: value for key, value in
                         {"device": torch.device("cpu"), "pin_memory": False,
                          "generator": None}.items()
                         if key in here_by_name}
        if name == "_to_copy":
            here_by_name |= {"device": torch.device("cpu"), "non_blocking": False}
        # statistics are fp32 there and of the input's type here
        if name.startswith("native_layer_norm"):
            here = tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, here)
        if name in SHAPED_BY_VALUES or _picks_by_bools(name, args):
            done = func(*here, **here_by_name)
            return args[0] if name.endswith("_") else tree_map(_moved, done)
        out = func(*args, **kwargs)
        done = ONLY_THERE.get(func, func)(*here, **here_by_name)
        return _fill(out, done, leaves if func._schema.is_mutable else [])


def _there(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.is_cuda) or (isinstance(value, torch.device)
                                                             and value.type == "cuda")


def _over_memory(value: Any) -> Any:
    """A CPU tensor over the memory of one of the stand-in's."""
    if not (isinstance(value, Tensor) and value.is_cuda):
        return value
    storage = value.untyped_storage()
    if not storage.nbytes() or not value.numel():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    bytes_there = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(bytes_there, value.storage_offset(), value.shape,
                                                  value.stride())


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    _over_memory(out).copy_(value)
    return out


def _picks_by_bools(name: str, args: tuple) -> bool:
    picked = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    return picked and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
                          for i in tree_leaves(args[1]))


def _fill(out: Any, done: Any, changed: list) -> Any:
    """Copies values into what an operation returned, but for what it changed in place."""
    held = {t.untyped_storage().data_ptr() for t in changed if isinstance(t, Tensor)}
    tensors = False
    for there, here in zip(tree_leaves(out), tree_leaves(done), strict=True):
        if not isinstance(there, Tensor):
            continue
        tensors = True
        assert there.shape == here.shape, (there.shape, here.shape)
        if there.numel() and there.untyped_storage().data_ptr() not in held:
            _over_memory(there).copy_(here)
    return out if tensors else done


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None, bias: Tensor | None) -> Tensor:
    """(B, heads, T, S) of queries (B, heads, T, hs) and as many keys (B, heads, S, hs)."""
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:],
                                               dtype=torch.bool).triu(1), -torch.inf)
    if bias is None:
        return scores
    return (
        scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
    )


def _heads(t: Tensor, heads: int) -> Tensor:
    return _over_memory(t).float().repeat_interleave(heads // t.shape[1], 1)


def _attend(out, q, k, v, causal, scale, bias=None) -> None:
    n = q.shape[1]
    scores = _scores(_heads(q, n), _heads(k, n), causal, scale, _over_memory(bias))
    _over_memory(out[0]).copy_(scores.softmax(-1).nan_to_num(0.0) @ _heads(v, n))
    if out[1].numel():  # log-sum-exp, whose rows may be padded
        _over_memory(out[1])[..., : scores.shape[-2]].copy_(scores.logsumexp(-1))


def _attend_backward(out, gradient, q, k, v, causal, scale, bias=None) -> None:
    n, groups = q.shape[1], k.shape[1]
    queries, keys, values, g = (_heads(t, n) for t in (q, k, v, gradient))
    p = _scores(queries, keys, causal, scale, _over_memory(bias)).softmax(-1).nan_to_num(0.0)
    dp = g @ values.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * (scale or 1 / math.sqrt(q.shape[-1]))
    found = ds @ keys, *(t.unflatten(1, (groups, -1)).sum(2) for t in (ds.mT @ queries, p.mT @ g))
    for there, here in zip(out, found, strict=False):
        _over_memory(there).copy_(here)


def _add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *,
                 out: Tensor) -> Tensor:
    return out.copy_(total + left.to(dtype) @ right.to(dtype))


def _given(args: tuple, kwargs: dict, place: int, name: str) -> bool:
    return args[place] if len(args) > place else kwargs.get(name, False)


ATTENTION = {
    "_scaled_dot_product_flash_attention": lambda out, args, kwargs: _attend(
        out, *args[:3], _given(args, kwargs, 4, "is_causal"), kwargs.get("scale")),
    "_scaled_dot_product_flash_attention_backward": lambda out, args, kwargs: _attend_backward(
        out, *args[:4], _given(args, kwargs, 11, "is_causal"), kwargs.get("scale")),
    "_scaled_dot_product_efficient_attention": lambda out, args, kwargs: _attend(
        out, *args[:3], _given(args, kwargs, 6, "is_causal"), kwargs.get("scale"), args[3]),
    "_scaled_dot_product_efficient_attention_backward": lambda out, args, kwargs: _attend_backward(
        out, *args[:4], _given(args, kwargs, 11, "is_causal"), kwargs.get("scale"), args[4]),
}
# operations that the CPU has not
ONLY_THERE = {torch.ops.aten.addmm.dtype_out: _add_product}
