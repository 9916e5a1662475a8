"""What a backfill keeps on disk: how far it came, and what failed."""

from __future__ import annotations

import os
from collections import Counter
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import orjson

from worker.commands.backfill.progress import Progress
from worker.errors import SettingsError
from worker.json_access import as_text

if TYPE_CHECKING:
    from pathlib import Path

    from worker.commands.backfill.records import Selection
    from worker.model import Json


def describe(selection: Selection, project: str) -> Json:
    """Return what a checkpoint is of. Another selection goes through other ids."""
    return {
        "backfill": selection.name,
        "project": project,
        "since": selection.since and selection.since.isoformat(),
        "until": selection.until and selection.until.isoformat(),
        "ids": sha256("\n".join(selection.ids).encode()).hexdigest() if selection.ids else None,
    }


class Checkpoint:
    """A file that is always whole: it is replaced, never written over. `about`: what it must be of."""

    def __init__(self, path: Path, about: Json) -> None:
        self.path = path
        self._about = about

    def load(self) -> Progress:
        """Return the progress of an earlier run; none yet when there is no file. Raises SettingsError."""
        try:
            document = orjson.loads(self.path.read_bytes())
            progress = _progress(document)
        except FileNotFoundError:
            return Progress()
        except OSError as error:
            raise SettingsError(f"--resume: cannot read {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise SettingsError(
                f"--resume: {self.path} is damaged or no checkpoint: name another file, or delete it to begin anew"
            ) from None
        if differing := [name for name, value in self._about.items() if document.get(name) != value]:
            raise SettingsError(
                f"--resume: {self.path} is of a backfill with other {', '.join(differing)}: "
                "repeat the options it was begun with, or name another file"
            )
        return progress

    def save(self, progress: Progress) -> None:
        """Write how far all records have ended; durable when this returns. Raises OSError."""
        document = self._about | {
            "last_id": progress.last_id,
            "sent": progress.sent,
            "nothing_to_do": progress.nothing_to_do,
            "failed": dict(progress.failed),
        }
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")  # others may be at work with it
        with temporary.open("wb") as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _progress(document: Any) -> Progress:
    last_id, failed = document["last_id"], document["failed"]
    if not isinstance(last_id, str) or not isinstance(failed, dict):
        raise TypeError
    numbers = (document["sent"], document["nothing_to_do"], *failed.values())
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError
    return Progress(last_id, document["sent"], document["nothing_to_do"], Counter(failed))


class Failures:
    """A file that failed records are added to, a JSON line each; a record that fails again is there again.

    Raises OSError when there is no writing to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.open("ab").close()  # better now than at the first failure; an empty file may stay

    def add(self, line: Json) -> None:
        """Add a line; durable when this returns. Raises OSError."""
        with self._path.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # behind a line that a crash cut short
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())


def read_ids(path: Path, resource_type: str) -> list[str]:
    """Return the ids in a file: an id a line, or the lines of a file of failures. Raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--ids: cannot read {path}: {type(error).__name__}") from None
    return [_id(line, f"--ids: {path}, line {number}", resource_type) for number, line in enumerate(lines, 1) if line]


def _id(line: str, where: str, resource_type: str) -> str:
    if not line.startswith("{"):
        return line.strip()
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise SettingsError(
            f"{where}: expected an id, or a line that a backfill wrote; delete it if it was cut off"
        ) from None
    if document.get("resource_type") != resource_type:
        raise SettingsError(f"{where}: expected a failure of this kind, {resource_type}: name the file of another run")
    return as_text(document.get("resource_id"))
