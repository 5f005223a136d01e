"""Objects such as those of a mirror: at a URL of fsspec, or in a folder of a local file system.

Others may be able to write there. What is larger than expected is not read into memory. In a folder
no symbolic link is followed, and only regular files are read and replaced; the folder itself may be
a link.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from train.exits import RetryError, UsageError, first_line
from train.files import NotRegularError, create, open_regular, refuse_irregular, refuse_link

_TEMPORARY = ".writing"


class Storage(Protocol):
    """Objects by keys such as ``folder/name``. All methods raise the errors of the storage."""

    def read(self, key: str, size: int) -> bytes | None:
        """An object's content; None if it does not exist, and nothing if it has more than ``size``
        bytes, so that it matches no hash."""

    def size(self, key: str) -> int | None:
        """The bytes of an object; None if it does not exist."""

    def modified(self, key: str) -> datetime | None:
        """When an object was written; None if the storage does not tell. Raises FileNotFoundError
        if it does not exist."""

    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces an object."""

    def folders(self, name: str) -> list[str]:
        """The folders that have an object of this name."""

    def remove(self, key: str) -> None:
        """Removes an object."""

    def remove_folder(self, folder: str) -> None:
        """Removes a folder with all objects in it."""


def open_storage(url: str, options: dict[str, Any], field: str) -> Storage:
    """The storage of a URL that ``field``, which begins the messages, has. Raises UsageError for
    one that fsspec does not support, and RetryError for one that cannot be reached."""
    try:
        return storage_at(url, options)
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(
            f"{field} {url!r}, which cannot be used ({first_line(error)}); set a URL such as "
            "s3://bucket/folder, and install its driver with `pip install 'isorun[s3]'` or "
            "'isorun[gcs]'."
        ) from error
    except Exception as error:  # some drivers, such as that of FTP, connect at once
        raise RetryError(
            f"{field} {url!r}, which cannot be reached ({first_line(error)}); correct the URL, or "
            "rerun when it can."
        ) from error


def described(error: Exception) -> str:
    """An error of a storage, in one line."""
    if isinstance(error, NotRegularError):
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {first_line(error)}"


def is_misconfigured(error: Exception) -> bool:
    """Whether an error of a storage is one that a retry cannot help: credentials or rights are
    missing, or a file is of the wrong kind."""
    # s3fs and gcsfs raise these for missing credentials or rights.
    return (
        isinstance(error, (PermissionError, NotRegularError, IsADirectoryError))
        or "Credential" in type(error).__name__
    )


def storage_at(url: str, options: dict[str, Any]) -> Storage:
    """The storage of a URL, with further arguments of fsspec. Raises what fsspec raises for a URL
    that it does not support."""
    import fsspec  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    # Other processes write too. Only a constructor's argument switches the cache off.
    files, root = fsspec.core.url_to_fs(url, **options | {"use_listings_cache": False})
    if isinstance(files, LocalFileSystem):
        return FolderStorage(Path(root))
    return UrlStorage(files, root)


class UrlStorage:
    """A storage that fsspec reaches."""

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root

    def read(self, key: str, size: int) -> bytes | None:
        """See Storage."""
        path = f"{self._root}/{key}"
        try:
            known = self._files.info(path).get("size")
            if known == 0 or (known or 0) > size:
                return b""  # no range of an empty object can be requested
            data = bytes(self._files.cat_file(path, start=0, end=size + 1))
        except FileNotFoundError:
            return None
        return data if len(data) <= size else b""

    def size(self, key: str) -> int | None:
        """See Storage."""
        try:
            known = self._files.info(f"{self._root}/{key}").get("size")
        except FileNotFoundError:
            return None
        return None if known is None else int(known)

    def modified(self, key: str) -> datetime | None:
        """See Storage."""
        try:
            found = self._files.modified(f"{self._root}/{key}")
        except NotImplementedError:
            return None
        return found if isinstance(found, datetime) and found.tzinfo else None

    def write(self, key: str, data: bytes) -> None:
        """See Storage."""
        path = f"{self._root}/{key}"
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(path, data)

    def folders(self, name: str) -> list[str]:
        """See Storage."""
        return [str(path).split("/")[-2] for path in self._files.glob(f"{self._root}/*/{name}")]

    def remove(self, key: str) -> None:
        """See Storage."""
        self._files.rm_file(f"{self._root}/{key}")

    def remove_folder(self, folder: str) -> None:
        """See Storage."""
        self._files.rm(f"{self._root}/{folder}", recursive=True)


class FolderStorage:
    """A folder of a local file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str, size: int) -> bytes | None:
        """See Storage. Raises NotRegularError for a link and what is not a regular file."""
        try:
            with (
                self._folder_of(key) as (folder, name),
                os.fdopen(open_regular(name, dir_fd=folder), "rb") as file,
            ):
                known = os.fstat(file.fileno()).st_size
                data = file.read(known + 1) if known <= size else b""
        except FileNotFoundError:
            return None
        return data if len(data) <= size else b""  # it may have grown

    def size(self, key: str) -> int | None:
        """See Storage. Raises NotRegularError for a link and what is not a regular file."""
        try:
            with (
                self._folder_of(key) as (folder, name),
                os.fdopen(open_regular(name, dir_fd=folder), "rb") as file,
            ):
                return os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return None

    def modified(self, key: str) -> datetime | None:
        """See Storage."""
        with self._folder_of(key) as (folder, name):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return datetime.fromtimestamp(found.st_mtime, UTC)

    def write(self, key: str, data: bytes) -> None:
        """See Storage. Raises NotRegularError for a link and what is not a regular file."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._folder_of(key, make=True) as (folder, name):
            refuse_irregular(name, dir_fd=folder)
            with os.fdopen(create(_TEMPORARY, dir_fd=folder), "wb") as file:
                file.write(data)
            os.replace(_TEMPORARY, name, src_dir_fd=folder, dst_dir_fd=folder)

    def folders(self, name: str) -> list[str]:
        """See Storage. Raises NotRegularError if such an object or its folder is a link."""
        found = []
        with suppress(FileNotFoundError):
            for path in self._root.iterdir():
                if os.path.lexists(path / name):
                    refuse_link(path)
                    refuse_irregular(path / name)
                    found.append(path.name)
        return found

    def remove(self, key: str) -> None:
        """See Storage."""
        with self._folder_of(key) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_folder(self, folder: str) -> None:
        """See Storage."""
        shutil.rmtree(self._root / folder)  # follows no link

    @contextmanager
    def _folder_of(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder of an object, and the object's name in it. Errors get the
        path."""
        *folders, name = key.split("/")
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                inner = _opened(folder, descriptor, make=make)
                os.close(descriptor)
                descriptor = inner
            yield descriptor, name
        except OSError as error:
            error.filename = str(self._root / key)
            raise
        finally:
            os.close(descriptor)


def _opened(folder: str, parent: int, *, make: bool) -> int:
    """A descriptor of a folder in another. Raises NotRegularError for a link."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(folder, dir_fd=parent)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(folder, flags, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        text = "it is a link or a file, not a directory"
        raise NotRegularError(errno.ENOTDIR, text, folder) from None
