"""Tokenised documents in memory, and the samples made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from train.exits import DataError
from train.tasks.text.tokenizer import Tokenizer

IGNORED = -100
"""Target of a padded position, which the loss ignores."""


@dataclass(frozen=True)
class Tokens:
    """The documents of a split as one stream: each document's tokens, then the end of document.

    ``stream`` starts with an extra end token, from which the first token is predicted: target t is
    ``stream[t + 1]``, predicted from ``stream[: t + 1]``.
    """

    stream: npt.NDArray[Any]
    """(targets + 1,) uint16 or uint32."""

    byte_ends: npt.NDArray[np.int64]
    """(targets + 1,): UTF-8 bytes of the targets before target t."""

    document_starts: npt.NDArray[np.int64]
    """(documents,): the first target of each document."""

    @property
    def targets(self) -> npt.NDArray[Any]:
        """(targets,): every token that is predicted."""
        return self.stream[1:]


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Tokenises documents; tokens take two bytes each, or four for a large vocabulary."""
    dtype = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    end = np.array([tokenizer.end], dtype)
    stream, sizes, lengths = [end], [], []
    for ids, byte_counts in tokenizer.encode(documents):
        stream += [ids.astype(dtype), end]
        sizes += [byte_counts.astype(np.uint32), np.zeros(1, np.uint32)]
        lengths.append(len(ids) + 1)
    return Tokens(
        stream=np.concatenate(stream),
        byte_ends=np.concatenate(([0], np.cumsum(np.concatenate(sizes), dtype=np.int64))),
        document_starts=np.cumsum([0, *lengths[:-1]], dtype=np.int64),
    )


def unigram_entropy(tokens: Tokens) -> float:
    """Entropy of the token frequencies in nats per token: the loss of the best model without
    context."""
    counts = np.bincount(tokens.targets)
    probabilities = counts[counts > 0] / len(tokens.targets)
    return float(-(probabilities * np.log(probabilities)).sum())


class Windows(Dataset[dict[str, Any]]):
    """Samples of ``context`` tokens; every token of the split is the target of exactly one.

    With ``pack``, sample n starts at target n * context, across documents, and only the last
    sample is padded. Without, each document starts a new sample and its last one is padded.

    A sample is a dict of ``tokens`` (context,) int64, ``targets`` (context,) int64, -100 if padded,
    and ``bytes`` int, the UTF-8 bytes of its targets.
    """

    deterministic = True

    def __init__(self, tokens: Tokens, context: int, pack: bool) -> None:
        total = len(tokens.targets)
        bounds = np.array([0, total]) if pack else np.append(tokens.document_starts, total)
        starts, ends = [], []
        for begin, end in pairwise(bounds):
            cuts = np.arange(begin, end, context)
            starts.append(cuts)
            ends.append(np.minimum(cuts + context, end))
        self._starts = np.concatenate(starts)
        stops = np.concatenate(ends)
        self._lengths = stops - self._starts
        self._bytes = tokens.byte_ends[stops] - tokens.byte_ends[self._starts]
        # Pad the stream with the end token, for windows that reach past its end.
        self._end = int(tokens.stream[0])
        self._stream = np.append(tokens.stream, np.repeat(tokens.stream[:1], context))
        self._offsets = np.arange(context + 1)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples at once, in vectorised form."""
        chosen = np.asarray(indices)
        windows = self._stream[self._starts[chosen, None] + self._offsets].astype(np.int64)
        tokens, targets = windows[:, :-1], windows[:, 1:].copy()
        padded = self._offsets[:-1] >= self._lengths[chosen, None]
        if padded.any():
            tokens = np.where(padded, self._end, tokens)
            targets[padded] = IGNORED
        return [
            {"tokens": row, "targets": target, "bytes": size}
            for row, target, size in zip(
                torch.from_numpy(tokens),
                torch.from_numpy(targets),
                self._bytes[chosen].tolist(),
                strict=True,
            )
        ]


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks samples: ``tokens`` and ``targets`` (B, context), ``bytes`` (B,), all int64."""
    return {
        "tokens": torch.stack([sample["tokens"] for sample in samples]),
        "targets": torch.stack([sample["targets"] for sample in samples]),
        "bytes": torch.tensor([sample["bytes"] for sample in samples]),
    }


def check_length(tokens: Tokens, context: int) -> None:
    """Raises DataError if the training documents are shorter than one sample."""
    total = len(tokens.targets)
    if total < context:
        raise DataError(
            f"The training documents have {total} tokens, fewer than one sample of "
            f"data.context={context}; add text or lower data.context."
        )
