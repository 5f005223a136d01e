"""Every token of the corpus is a target exactly once, in one part of the split."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.exits import DataError, Exit, OutOfMemoryError, RetryError, UsageError
from train.tasks.text.corpus import find_files, read_documents, split_documents
from train.tasks.text.data import Windows, tokenize, unigram_entropy
from train.tasks.text.task import TextTask
from train.tasks.text.text_config import Data
from train.tasks.text.tokenizer import ByteTokenizer, byte_counts, make_tokenizer

END = ByteTokenizer.end
MakeTask = Callable[..., TextTask]
DOCUMENTS = ["abcdefghij", "é", "klm", "0123456"]


def targets_of(dataset: Windows) -> list[list[int]]:
    """The targets of each sample without padding, which must be at the end."""
    found = []
    for n in range(len(dataset)):
        targets = dataset[n]["targets"]
        length = int((targets != -100).sum())
        assert (targets[length:] == -100).all()
        found.append(targets[:length].tolist())
    return found


def test_a_broken_disk_is_not_a_fault_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(RetryError, match="Input/output error"):
        read_documents(Data(files=[str(tmp_path / "a.txt")]))


@pytest.mark.parametrize("context", [1, 3, 4, 7, 25, 100])
def test_packed_samples_split_the_stream_evenly(context: int) -> None:
    dataset = Windows(tokenize(DOCUMENTS, ByteTokenizer()), context, pack=True)
    stream = [t for text in DOCUMENTS for t in [*text.encode(), END]]
    targets = targets_of(dataset)
    assert [t for part in targets for t in part] == stream
    assert all(len(part) == context for part in targets[:-1])
    previous = [END, *stream[:-1]]
    for n, part in enumerate(targets):
        tokens = dataset[n]["tokens"].tolist()
        assert tokens[: len(part)] == previous[n * context :][: len(part)]
        assert tokens[len(part) :] == [END] * (context - len(part))


@pytest.mark.parametrize("context", [1, 3, 4, 7, 25])
def test_unpacked_samples_never_cross_a_document(context: int) -> None:
    dataset = Windows(tokenize(DOCUMENTS, ByteTokenizer()), context, pack=False)
    expected = []
    for text in DOCUMENTS:
        document = [*text.encode(), END]
        expected += [document[i : i + context] for i in range(0, len(document), context)]
    assert targets_of(dataset) == expected
    for n in range(len(dataset)):
        sample = dataset[n]
        length = len(expected[n])
        assert sample["tokens"][length:].tolist() == [END] * (context - length)
        assert sample["tokens"][1:length].tolist() == expected[n][: length - 1]


@pytest.mark.parametrize("pack", [True, False])
def test_bytes_of_all_samples_add_up_to_the_files(
    make_text_task: MakeTask, corpus: list[str], pack: bool
) -> None:
    task = make_text_task({"files": corpus, "pack": pack})
    total = sum(
        dataset[n]["bytes"]
        for dataset in (task.train_dataset(), task.eval_dataset())
        for n in range(len(dataset))
    )
    assert total == sum(path.stat().st_size for path in find_files(corpus))


def test_samples_loaded_together_equal_single_ones(
    make_text_task: MakeTask, corpus: list[str]
) -> None:
    dataset = make_text_task({"files": corpus}).train_dataset()
    indices = [3, 0, len(dataset) - 1, 3]
    for index, sample in zip(indices, dataset.__getitems__(indices), strict=True):
        alone = dataset[index]
        assert torch.equal(sample["tokens"], alone["tokens"])
        assert torch.equal(sample["targets"], alone["targets"])
        assert sample["bytes"] == alone["bytes"]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_batch_costs_far_less_than_a_step(make_text_task: MakeTask) -> None:
    task = make_text_task({"context": 128})
    dataset = task.train_dataset()
    indices = np.random.default_rng(0).integers(0, len(dataset), (200, 32)).tolist()
    seconds = []
    for batch in indices:
        begin = time.perf_counter()
        collated = task.collate(dataset.__getitems__(batch))
        seconds.append(time.perf_counter() - begin)
    assert collated["tokens"].shape == collated["targets"].shape == (32, 128)
    assert collated["tokens"].dtype == collated["targets"].dtype == torch.int64
    assert collated["bytes"].shape == (32,)
    assert sorted(seconds)[len(seconds) // 2] < 1e-3  # 0.1 ms on a quiet machine


def test_tokens_take_two_bytes_in_memory() -> None:
    assert tokenize(DOCUMENTS, ByteTokenizer()).stream.dtype == np.uint16


def test_unigram_entropy_of_a_known_corpus() -> None:
    tokens = tokenize(["aaab"], ByteTokenizer())  # a 3/5, b 1/5, end 1/5
    expected = -(0.6 * np.log(0.6) + 2 * 0.2 * np.log(0.2))
    assert unigram_entropy(tokens) == pytest.approx(expected)


# The split


def test_the_split_is_disjoint_complete_and_a_function_of_its_seed() -> None:
    documents = [f"document {n}" for n in range(100)]
    train, held_out = split_documents(documents, 0.1, seed=0)
    assert len(held_out) == 10
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert split_documents(documents, 0.1, seed=0) == (train, held_out)
    assert split_documents(documents, 10, seed=0) == (train, held_out)
    assert split_documents(documents, 0.1, seed=1)[1] != held_out
    assert set(split_documents(documents[::-1], 0.1, seed=0)[1]) == set(held_out)


def test_the_split_is_the_same_on_every_machine() -> None:
    documents = [f"document {n}" for n in range(30)]
    assert split_documents(documents, 3, seed=7)[1] == [
        "document 6",
        "document 11",
        "document 20",
    ]


def test_equal_documents_are_in_the_same_part() -> None:
    documents = ["same"] * 5 + [f"other {n}" for n in range(5)]
    for seed in range(20):
        train, held_out = split_documents(documents, 3, seed)
        assert not set(train) & set(held_out)
        assert Counter(train + held_out) == Counter(documents)


# Files


def test_files_are_sorted_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.txt", "a/y.txt", "a/b/x.txt", "a/b/[1].txt", "skip.md"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    patterns = ["z.txt", "**/*.txt", str(tmp_path / "a/y.txt"), "a/b/[1].txt"]
    names = ["a/b/[1].txt", "a/b/x.txt", "a/y.txt", "z.txt"]
    assert read_documents(Data(files=patterns)) == names


def test_a_corpus_larger_than_the_memory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.touch()
    os.truncate(path, 1 << 43)  # a sparse file
    with pytest.raises(OutOfMemoryError, match=r"large\.txt .* has 8,796,093,022,208 bytes"):
        read_documents(Data(files=[str(path)]))


def test_a_separator_splits_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n---\ntwo\n---\n")
    data = Data(files=[str(tmp_path / "t.txt")], document_separator="\n---\n")
    assert read_documents(data) == ["one", "two"]


def test_the_default_corpus_needs_no_file() -> None:
    documents = read_documents(Data())
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000


@pytest.mark.parametrize(
    ("content", "data", "parts"),
    [
        (None, {"files": ["missing/*.txt"]}, ["'missing/*.txt'", "matches no file"]),
        (None, {"files": ["."]}, ["'.'", "directory", "./**/*.txt"]),
        (b"", {}, ["empty"]),
        (b"fine \xff bytes", {}, ["t.txt", "offset 5", "0xff"]),
        (b"one document", {}, ["1 document(s)", "data.validation=0.1", "training"]),
        (b"a|b|c", {"document_separator": "|", "validation": 3}, ["3 document(s)", "=3"]),
        (b"ab|cd|ef", {"document_separator": "|"}, ["6 tokens", "data.context=16"]),
        (b"a|b", {"tokenizer": "none.json"}, ["none.json", "data.tokenizer"]),
        (b"a|b", {"tokenizer": "t.txt"}, ["t.txt", "data.tokenizer"]),
    ],
)
def test_invalid_data_is_reported_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_text_task: MakeTask,
    content: bytes | None,
    data: dict[str, Any],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    task = make_text_task({"files": ["t.txt"]} | data)
    with pytest.raises(DataError) as caught:
        task.train_dataset()
    assert caught.value.code == Exit.DATA
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_context_beyond_the_learned_positions_is_refused(make_text_task: MakeTask) -> None:
    learned = {"positions": "learned", "context": 8}
    make_text_task({"context": 8}, learned)
    with pytest.raises(UsageError, match=r"data.context=9 .* model.context=8"):
        make_text_task({"context": 9}, learned)


# Tokenizers from a file


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the words of naïve documents " * 20], trainer)
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_a_trained_tokenizer_encodes_whole_documents(tokenizer_json: str) -> None:
    tokenizer = make_tokenizer(Data(tokenizer=tokenizer_json))
    texts = ["the naïve words — 😀 of documents", "\n x\t", "the words " * 50]
    for text, (ids, sizes) in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert sizes.sum() == len(text.encode())
        assert len(ids) == len(sizes) < len(text.encode()) + 1
        assert ids.max() < tokenizer.end == tokenizer.vocabulary - 1
    assert "end of document" in tokenizer.decode([tokenizer.end])


def test_the_tokenizers_own_end_of_document_can_be_named(tokenizer_json: str) -> None:
    added = make_tokenizer(Data(tokenizer=tokenizer_json))
    own = make_tokenizer(Data(tokenizer=tokenizer_json, end_of_document="<|endoftext|>"))
    assert (own.end, own.vocabulary) == (0, added.vocabulary - 1)
    with pytest.raises(DataError, match="'<eos>'"):
        make_tokenizer(Data(tokenizer=tokenizer_json, end_of_document="<eos>"))


def test_bytes_are_counted_even_if_the_tokenizer_drops_or_splits_characters(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "e": 1, "?": 2}, unk_token="?"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    text = "  é   a 😀 e   "
    ((ids, sizes),) = make_tokenizer(Data(tokenizer=str(path))).encode([text])
    assert ids.tolist() == [1, 0, 2, 1]
    assert sizes.tolist() == [4, 4, 5, 5]
    assert sum(sizes) == len(text.encode())


def test_a_token_that_a_tokenizer_inserts_counts_no_byte() -> None:
    assert byte_counts("aéb", [(0, 2), (0, 0), (2, 3)]).tolist() == [3, 0, 1]
