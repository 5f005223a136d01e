"""Tokenizers: bytes, or a tokenizer.json of Hugging Face ``tokenizers``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from train.exits import DataError
from train.imports import import_extra
from train.paths import user_path
from train.process.diagnose import fault_of
from train.tasks.text.text_config import Data

END_MARK = "\n[end of document]\n"


class Tokenizer(Protocol):
    """Encodes documents and decodes tokens; ids are below ``vocabulary``."""

    vocabulary: int
    end: int
    """The id that ends a document; it also precedes the first document."""

    def encode(
        self, documents: Sequence[str]
    ) -> Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """For each document its token ids, without the end, and the UTF-8 bytes of each token,
        whose sum is the document's size. Both (tokens,), integers."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with U+FFFD for invalid UTF-8."""
        ...


def make_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names."""
    return ByteTokenizer() if data.tokenizer == "bytes" else JsonTokenizer(data)


class ByteTokenizer:
    """The 256 byte values, and 256 as the end of a document."""

    vocabulary = 257
    end = 256

    def encode(
        self, documents: Sequence[str]
    ) -> Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Token ids uint8 (tokens,), one per UTF-8 byte."""
        for text in documents:
            tokens = np.frombuffer(text.encode(), np.uint8)
            yield tokens, np.ones(len(tokens), np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes, with END_MARK for each end of a document."""
        mark = END_MARK.encode()
        joined = b"".join(mark if token == self.end else bytes([token]) for token in tokens)
        return joined.decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json of Hugging Face ``tokenizers``.

    Raises DataError where the file cannot be read, UsageError where the library is not installed.
    """

    def __init__(self, data: Data) -> None:
        library = import_extra(
            "tokenizers", "tokenizers", f"data.tokenizer={data.tokenizer}", "use bytes"
        )
        path = user_path(data.tokenizer, f"data.tokenizer is {data.tokenizer!r}")
        try:
            self._backend = library.Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            wrong = DataError(
                f"The tokenizer {path} (data.tokenizer) cannot be read: {error}; set the path of "
                "a tokenizer.json, or bytes."
            )
            raise fault_of(error, wrong) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = self._backend.get_vocab(with_added_tokens=True)
        if data.end_of_document is None:
            self.end = max(ids.values(), default=-1) + 1
        elif data.end_of_document in ids:
            self.end = ids[data.end_of_document]
        else:
            raise DataError(
                f"data.end_of_document={data.end_of_document!r} is not a token of the tokenizer "
                f"{path}; name one of its tokens, or null to add one."
            )
        self.vocabulary = max(self.end, *ids.values()) + 1

    def encode(
        self, documents: Sequence[str]
    ) -> Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Encodes batches of 256 documents, on all cores."""
        # Set explicitly, it silences the library's warning in each forked data worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        for start in range(0, len(documents), 256):
            texts = documents[start : start + 256]
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                yield np.array(encoding.ids, np.int64), byte_counts(text, encoding.offsets)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, with END_MARK for each end of a document."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == self.end:
                parts.append([])
            else:
                parts[-1].append(token)
        return END_MARK.join(
            self._backend.decode(part, skip_special_tokens=False) for part in parts
        )


def byte_counts(text: str, offsets: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of each token, (tokens,) int64, from its (start, end) character offsets in
    ``text``.

    A token counts the characters from the largest end before it to its own end, so that characters
    which the tokenizer drops, or splits into several tokens, count exactly once; the last token
    counts the rest.
    """
    if not offsets:
        return np.zeros(0, np.int64)
    ends = np.maximum.accumulate(np.array(offsets, np.int64)[:, 1])
    ends[-1] = len(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    until = np.concatenate(([0], np.cumsum(sizes)))
    return np.diff(until[ends], prepend=0)
