"""Reads the documents of a corpus and splits them into training and validation data."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path

from train.exits import DataError, OutOfMemoryError
from train.files import ensure_fits_memory
from train.paths import user_path
from train.process.diagnose import fault_of
from train.tasks.text.text_config import Data


def read_documents(data: Data) -> list[str]:
    """All non-empty documents of the corpus, in a fixed order.

    Raises DataError if a pattern matches no file, a file cannot be read or is not UTF-8, or there
    is no text.
    """
    if not data.files:
        return _reference_text()
    documents = []
    for path in find_files(data.files):
        text = _read(path)
        parts = [text] if data.document_separator is None else text.split(data.document_separator)
        documents += [part for part in parts if part]
    if not documents:
        raise DataError(
            f"The corpus is empty: the files of data.files={data.files} contain no text; name "
            "files with text."
        )
    return documents


def _reference_text() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "This Python lacks pydoc_data.topics, the default corpus; name text files in "
            "data.files."
        ) from None
    return [topics[key] for key in sorted(topics)]


def find_files(patterns: list[str]) -> list[Path]:
    """The files that the paths and globs match, sorted and unique. Raises DataError for a pattern
    that matches no file."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        literal = user_path(pattern, f"data.files names {pattern!r}")
        names = [literal]
        if not literal.exists():  # Path.glob rejects absolute patterns
            names = [Path(name) for name in glob.glob(str(literal), recursive=True)]  # noqa: PTH207
        files = [path for path in names if path.is_file()]
        if not files:
            advice = (
                f"it is a directory; write {literal}/**/*.txt for the files in it"
                if literal.is_dir()
                else f"the working directory is {Path.cwd()}"
            )
            raise DataError(f"data.files names {pattern!r}, which matches no file: {advice}.")
        for path in files:
            found.setdefault(path.resolve(), path)
    return sorted(found.values())


def _read(path: Path) -> str:
    try:
        ensure_fits_memory(path.stat().st_size)
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"The file {path} (data.files) is not UTF-8: the byte 0x{byte:02x} at offset "
            f"{error.start} is invalid ({error.reason}); convert the file or remove it."
        ) from None
    except MemoryError:
        raise OutOfMemoryError(
            f"The file {path} (data.files) has {path.stat().st_size:,} bytes, and the corpus does "
            "not fit into memory; use fewer files, or a machine with more memory."
        ) from None
    except OSError as error:
        wrong = DataError(f"The file {path} (data.files) cannot be read: {error.strerror}.")
        raise fault_of(error, wrong) from error


def split_documents(
    documents: list[str], validation: float | int, seed: int
) -> tuple[list[str], list[str]]:
    """Training and validation documents, in the order of the corpus.

    The validation documents are those with the smallest hash of (seed, text), so that the choice
    does not depend on file names or order. Equal documents are in the same part. ``validation`` is
    a number of documents or a ratio, rounded to at least one document. Raises DataError if no
    document remains for training.
    """
    wanted = validation if isinstance(validation, int) else round(validation * len(documents))
    keys = [_key(text, seed) for text in documents]
    held_out = set(sorted(keys)[: max(1, wanted)])
    sides: tuple[list[str], list[str]] = ([], [])
    for text, key in zip(documents, keys, strict=True):
        sides[key in held_out].append(text)
    if not sides[0]:
        raise DataError(
            f"The corpus has {len(documents)} document(s), {len(set(keys))} of them different, and "
            f"data.validation={validation} leaves none for training; add files, split them by "
            "data.document_separator, or lower data.validation."
        )
    return sides


def _key(text: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()
