"""Reading and writing on any pyarrow filesystem (local, S3, GCS, HDFS), addressed by one path or URI.

Invariant: a file is either whole or absent. It is written beside its place and renamed; on S3 and GCS a write becomes visible
when it is closed, so no rename is needed. An empty file counts as absent: it is what an upload leaves there that was interrupted as it began.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rc_ray.config.base import secret_parameter
from rc_ray.errors import DataError

LOCK_NAME = "driver.json"
# Filesystems on which a file is there, or takes an older one's place, when its stream is closed; on others (HDFS, Azure) as soon as it is opened.
WHOLE_WHEN_CLOSED = ("s3", "gcs")
# What passes, in the errors of object storage, after pyarrow has tried again for some seconds; one of them must not cost what is being computed.
TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|UNAVAILABLE|REQUEST_TIMEOUT|DEADLINE_EXCEEDED|HTTP status (429|5\d\d)|"
    "timed? ?out",
    re.IGNORECASE,
)
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
P = ParamSpec("P")
T = TypeVar("T")


@functools.lru_cache(maxsize=256)
def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """One connection per process and folder, rather than one for every file."""
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return filesystem, str(path)


def _patient(method: Callable[Concatenate[Folder, P], T]) -> Callable[Concatenate[Folder, P], T]:
    """Repeats an operation on storage other than a local disk after an error that passes. It must be one that can be repeated."""

    @functools.wraps(method)
    def repeated(self: Folder, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for wait_s in () if self.is_local else WAITS_S:
            try:
                return method(self, *args, **kwargs)
            except OSError as error:
                if not TRANSIENT.search(str(error)):
                    raise
                time.sleep(wait_s)
        return method(self, *args, **kwargs)

    return repeated


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Cheap to create and to send to other processes."""

    uri: str
    """Path or URI as the user wrote it, local paths made absolute."""

    @classmethod
    def at(cls, uri: str | Path) -> Folder:
        """A folder from a path or URI; `file://` and relative paths become absolute local paths.

        Raises:
            DataError: the URI holds a secret, which manifests, logs and messages would repeat.
        """
        text = str(uri)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if "://" not in text:
            return cls(os.path.abspath(os.path.expanduser(text)))
        base, mark, query = text.partition("?")
        parts = urlsplit(base)
        secret = "password" if parts.password is not None else secret_parameter(query)
        if secret is not None:
            raise DataError(
                f"the URI of {parts.hostname}{parts.path} on {parts.scheme} holds a {secret}, which would be repeated in "
                "records and messages; give the keys to the machines as that storage's environment variables or a role, and leave them out of the URI"
            )
        return cls(f"{base.rstrip('/')}{mark}{query}")

    @property
    def is_local(self) -> bool:
        """Whether the folder is a path of this machine."""
        return "://" not in self.uri

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem and the path in it."""
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        try:
            return _opened(self.uri)
        except (pa.ArrowInvalid, OSError, ImportError) as error:
            raise DataError(
                f"cannot open {self.uri!r}: {error}; use a local path or a URI that pyarrow reads (s3://, gs://)"
            ) from None

    def __truediv__(self, name: str) -> Folder:
        return self.beside(f"/{name}")

    def beside(self, suffix: str) -> Folder:
        """The folder whose path is this one's with a suffix; options of the filesystem in a URI's query stay."""
        base, mark, query = self.uri.partition("?") if not self.is_local else (self.uri, "", "")
        return Folder(f"{base}{suffix}{mark}{query}")

    @_patient
    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the plain files in this folder; empty when it does not exist."""
        filesystem, path = self.filesystem()
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and i.size and i.base_name.endswith(suffix))

    @_patient
    def exists(self, name: str = "") -> bool:
        """Whether the folder, or a file in it, is there."""
        filesystem, path = self.filesystem()
        found = filesystem.get_file_info(f"{path}/{name}" if name else path)
        return bool(found.type == pafs.FileType.Directory or found.size)

    @_patient
    def is_empty(self) -> bool:
        """Whether the folder is absent or holds nothing but what a killed driver left behind: its lock, half a file."""
        filesystem, path = self.filesystem()
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            return False
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return all(
            i.size == 0 or i.base_name == LOCK_NAME or (i.base_name.startswith(".") and i.base_name.endswith(".tmp"))
            for i in infos
        )

    def remove_unfinished(self) -> None:
        """Removes what killed writes left behind. For folders with one writer only."""
        if self.is_local and os.path.isdir(self.uri):
            for name in os.listdir(self.uri):
                if name.startswith(".") and name.endswith(".tmp"):
                    os.unlink(os.path.join(self.uri, name))

    @_patient
    def read_bytes(self, name: str) -> bytes:
        """A file's content."""
        filesystem, path = self.filesystem()
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            return bytes(stream.read())

    @_patient
    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file whole, replacing an older one.

        Raises:
            OSError: it cannot be written; the older one, or none, is there. `filename` is the file's.
        """
        filesystem, path = self.filesystem()
        filesystem.create_dir(path, recursive=True)
        target = f"{path}/{name}"
        staged = f"{path}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        if not self.is_local:
            whole = filesystem.type_name in WHOLE_WHEN_CLOSED
            with filesystem.open_output_stream(target if whole else staged) as stream:
                stream.write(content)
            if not whole:
                filesystem.move(staged, target)
            return
        try:
            with open(staged, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        except OSError as error:
            # A full disk names no file, other errors name the temporary one.
            raise OSError(error.errno, error.strerror, target) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(staged)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file only if there is none of that name, and tells whether it did.

        Exact on local disks; on others two writers in the same second may both see an empty place, and the later one wins.
        """
        filesystem, path = self.filesystem()
        filesystem.create_dir(path, recursive=True)
        if self.is_local:
            try:
                with open(f"{path}/{name}", "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
            except OSError as error:
                self.remove(name)
                raise OSError(error.errno, error.strerror, f"{path}/{name}") from None
            return True
        if self.exists(name):
            return False
        self.write_bytes(name, content)
        time.sleep(1.0)
        return self.read_bytes(name) == content

    @_patient
    def remove(self, name: str) -> None:
        """Deletes a file; nothing happens when it is gone already."""
        filesystem, path = self.filesystem()
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{path}/{name}")

    def read_json(self, name: str) -> Any:
        """A JSON file's value."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON."""
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    @_patient
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table."""
        filesystem, path = self.filesystem()
        return pq.read_table(f"{path}/{name}", filesystem=filesystem, columns=columns, partitioning=None)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes a table as one Parquet file."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write_bytes(name, buffer.getvalue())

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The Parquet files of this folder in the order of their names, one after the other."""
        for name in self.names(".parquet"):
            yield self.read_table(name, columns)

    def read_all(self, schema: pa.Schema | None = None, columns: list[str] | None = None) -> pa.Table:
        """All Parquet files of this folder in the order of their names; columns are matched by name."""
        tables = list(self.tables(columns))
        if not tables:
            if schema is None:
                raise DataError(f"no Parquet file in {self.uri!r}")
            return schema.empty_table()
        return pa.concat_tables(tables, promote_options="default")

    @_patient
    def listing(self) -> list[tuple[str, int, str]]:
        """Path in this folder, size in bytes and time of the last change of all files below it; empty when it does not exist."""
        filesystem, path = self.filesystem()
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        files = (info for info in infos if info.type == pafs.FileType.File)
        return sorted((info.path.removeprefix(path), info.size, str(info.mtime)) for info in files)

    @_patient
    def upload(self, local: str | Path) -> None:
        """Copies a local folder into this one."""
        filesystem, path = self.filesystem()
        filesystem.create_dir(path, recursive=True)
        pafs.copy_files(str(local), path, pafs.LocalFileSystem(), filesystem)

    @_patient
    def copy_to(self, other: Folder) -> None:
        """Copies all that is in this folder into another."""
        (filesystem, path), (target, there) = self.filesystem(), other.filesystem()
        target.create_dir(there, recursive=True)
        pafs.copy_files(path, there, filesystem, target)

    @_patient
    def download(self, local: str | Path) -> None:
        """Copies this folder to a local one."""
        filesystem, path = self.filesystem()
        pafs.copy_files(path, str(local), filesystem, pafs.LocalFileSystem())
