"""Where Optuna keeps a study: a journal or a database, its lock, and its errors in a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from launch.contract import (
    ResumeRefusedError,
    RetryError,
    RunError,
    UsageError,
    first_line,
    redact,
)
from launch.tune.locks import FileLock
from launch.tune.settings import STUDY_FILE, Settings

JOURNAL = "journal.log"
DATABASE = "study.db"
FILES = {"journal": JOURNAL, "sqlite": DATABASE}


def load_study(directory: Path, record: Mapping[str, Any], storage: str | None) -> optuna.Study:
    """The study of a record. ``storage``: the word on the command line. Raises RunError."""
    stored = str(record["storage"])
    if storage is not None and redact(storage) != stored:
        raise ResumeRefusedError(
            f"--storage is {redact(storage)!r}, but the study in {directory} is in {stored!r}; "
            "leave the option out, or choose another run.dir for a new study."
        )
    if storage is None and "***" in stored:
        raise UsageError(
            f"The study in {directory} is in {stored!r}, whose secrets are not recorded; give the "
            "whole URL as --storage."
        )
    with storage_errors():
        try:
            return optuna.load_study(
                study_name=str(record["name"]),
                storage=_storage(directory, storage or stored),
                sampler=optuna.samplers.RandomSampler(),
            )
        except KeyError:
            raise ResumeRefusedError(
                f"The storage {stored!r} has no study {record['name']!r}, which "
                f"{directory / STUDY_FILE} names; restore the storage, or choose another "
                "run.dir for a new study."
            ) from None


def create_study(directory: Path, settings: Settings, name: str, storage: str) -> optuna.Study:
    """A new study. ``storage``: the word on the command line. Raises RunError."""
    with storage_errors():
        return optuna.create_study(
            study_name=name,
            storage=_storage(directory, storage),
            directions=[
                "maximize" if each.mode == "max" else "minimize" for each in settings.objectives
            ],
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=storage in FILES,  # of a process that was killed before the record
        )


class _JournalLock(JournalFileOpenLock):
    """Released by the kernel when its holder is killed. Optuna's own would block for 30 s."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(journal.with_name(f"{journal.name}.lock"))

    def acquire(self) -> bool:
        """Takes it, and removes an incomplete last line, which a crash of the machine left."""
        self._lock.acquire()
        with self._journal.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Releases it."""
        self._lock.release()


def _storage(directory: Path, word: str) -> BaseStorage:
    if word == "journal":
        path = directory / JOURNAL
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    if word == "sqlite":
        return RDBStorage(
            f"sqlite:///{(directory / DATABASE).absolute()}",
            engine_kwargs={"connect_args": {"timeout": 60}},
        )
    if "://" not in word:
        raise UsageError(
            f"--storage is {redact(word)!r}, but must be journal, sqlite, or the URL of a database "
            "such as postgresql://HOST/NAME."
        )
    return RDBStorage(word)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns errors of storages into one sentence. Raises UsageError and RetryError."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        known = _storage_error(error)
        if known is error:
            raise
        raise known from error


def _storage_error(error: Exception) -> Exception:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    text = redact(first_line(error.__cause__ or error))
    if isinstance(error, ArgumentError | NoSuchModuleError | ImportError):
        return UsageError(
            f"The storage of the study cannot be used ({text}); correct --storage, or install the "
            "driver of the database."
        )
    if isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError | OSError):
        return RetryError(
            f"The storage of the study failed ({text}); nothing is lost: fix the cause, then rerun."
        )
    if isinstance(error, json.JSONDecodeError | optuna.exceptions.OptunaError):
        return ResumeRefusedError(
            f"The storage of the study is damaged ({text}); restore it from a backup, or choose "
            "another run.dir for a new study."
        )
    return error
