"""Log-likelihood of tokens after those before them, in batches of like length.

A sequence is its token ids and the index of its first label: the tokens from there on are predicted
from those before them. Padding is on the right, where causal attention never looks, so that no mask
is needed.

Shapes: B sequences read together, T tokens of the longest, N labels of them, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Labeled = tuple[list[int], int]  # token ids, index of the first label
BATCH_TOKENS = 8192  # most that are read at once, padding included
_HEAD_ROWS = 1024  # labels whose logits are in memory together


@torch.inference_mode()
def label_states(model: PreTrainedModel, sequences: Sequence[Labeled], filler: int,
                 batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The hidden states that labels are predicted from, batch by batch, the longest first.

    Args:
        model: a Hugging Face causal language model.
        sequences: none is longer than the model's window and a label.
        filler: id of the padding.
        batch_tokens: most tokens, padding included, that are read at once.

    Yields:
        Indices of the batch's sequences, hidden states (N, H) and labels (N), the labels of a
        sequence one after the other.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    first = 0
    while first < len(order):
        longest = len(sequences[order[first]][0])
        batch = order[first : first + max(1, batch_tokens // longest)]
        first += len(batch)
        chosen = [sequences[i] for i in batch]
        ids = torch.tensor([ids + [filler] * (longest - len(ids)) for ids, _ in chosen],
                           device=model.device)  # (B, T)
        # (B, T - 1): token t is predicted from position t - 1
        counted = torch.tensor([[start <= t < len(ids) for t in range(1, longest)]
                                for ids, start in chosen], device=model.device)
        hidden = model.base_model(ids[:, :-1]).last_hidden_state[counted]
        yield batch, hidden, ids[:, 1:][counted]


@torch.inference_mode()
def token_likelihoods(model: PreTrainedModel, sequences: Sequence[Labeled], filler: int,
                      batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Log-likelihoods of labels, batch by batch, the longest sequences first.

    Args:
        model, sequences, filler, batch_tokens: as of `label_states`.

    Yields:
        Indices of the batch's sequences, and for each (2, labels) on the CPU: log-likelihoods in
        nats, and 1.0 where the label is the most likely token.
    """
    head = model.get_output_embeddings()
    for batch, hidden, labels in label_states(model, sequences, filler, batch_tokens):
        found = []
        for states, targets in zip(hidden.split(_HEAD_ROWS), labels.split(_HEAD_ROWS), strict=True):
            logits = head(states).float().log_softmax(-1)  # (N, V)
            likelihood = logits.gather(-1, targets[:, None])[:, 0]
            found.append(torch.stack([likelihood, (logits.argmax(-1) == targets).float()]))
        lengths = [len(ids) - start for ids, start in (sequences[i] for i in batch)]
        yield batch, list(torch.cat(found, 1).cpu().split(lengths, 1))


def windows_of(ids: list[int], prefix: int, window: int) -> Iterator[Labeled]:
    """Cuts a text into sequences of which every token is a label once.

    The first follows the prefix, the others the token before them; the last has as much before its
    labels as the window holds. So does lm-eval for rolling log-likelihoods.

    Args:
        ids: of the text.
        prefix: id of the token that the text begins after.
        window: most tokens that the model reads; a label is one more.
    """
    ids = [prefix, *ids]
    for begin in range(1, len(ids), window):
        end = min(begin + window, len(ids))
        first = max(0, end - 1 - window)
        yield ids[first:end], begin - first


def window_within(can: int, asked: int | None, most: int | None = None) -> int:
    """Tokens that a model is to read at once.

    Args:
        can: tokens that it reads at most.
        asked: by the user; None: as many as it can, `most` at most.

    Raises:
        ValueError: it cannot read so many.
    """
    if asked is not None and asked > can:
        raise ValueError(f"--window={asked:,} is more than the {can:,} tokens that the model reads "
                         "at once; give less, or leave it out")
    return asked or min(can, most or can)
