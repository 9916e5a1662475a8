"""The files of a backfill: the checkpoint and the failure log."""

from __future__ import annotations

import os
from collections import Counter, deque
from dataclasses import dataclass, field
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Any

import orjson

from worker.errors import SettingsError
from worker.json_access import as_text

if TYPE_CHECKING:
    from pathlib import Path

    from worker.commands.backfill.records import BackfillRecord, RecordSelection
    from worker.model import Json


@dataclass(slots=True)
class BackfillProgress:
    """The counts in a checkpoint.

    Records complete in any order. A record is counted when it and all records before it are complete.
    """

    last_id: str = ""
    sent: int = 0
    ignored: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    _started: deque[BackfillRecord] = field(default_factory=deque)

    @property
    def done(self) -> int:
        """Return the number of records up to `last_id`."""
        return self.sent + self.ignored + self.failed.total()

    def start(self, record: BackfillRecord) -> None:
        """Register a record. Records must start in the order of their ids."""
        self._started.append(record)

    def complete_message(self, record: BackfillRecord, *, is_sent: bool = False, failure: str = "") -> None:
        """Record the outcome of one message: sent, failed, or else ignored."""
        record.pending -= 1
        record.is_sent = record.is_sent or is_sent
        record.failure = record.failure or failure
        while self._started and not self._started[0].pending:
            self._count(self._started.popleft())

    def _count(self, record: BackfillRecord) -> None:
        self.last_id = record.id
        if record.failure:
            self.failed[record.failure] += 1
        elif record.is_sent:
            self.sent += 1
        else:
            self.ignored += 1


def checkpoint_key(selection: RecordSelection, project: str) -> Json:
    """Return the fields that identify a backfill. Its checkpoint is valid only for the same fields."""
    return {
        "backfill": selection.name,
        "project": project,
        "since": selection.since and selection.since.isoformat(),
        "until": selection.until and selection.until.isoformat(),
        "ids": sha256("\n".join(selection.ids).encode()).hexdigest() if selection.ids else None,
    }


class Checkpoint:
    """A file that is replaced atomically. `key` identifies the backfill."""

    def __init__(self, path: Path, key: Json) -> None:
        self.path = path
        self._key = key

    def load(self) -> BackfillProgress:
        """Return the progress of the previous run; empty if the file does not exist. Raises SettingsError."""
        try:
            document = orjson.loads(self.path.read_bytes())
            progress = _parse_progress(document)
        except FileNotFoundError:
            return BackfillProgress()
        except OSError as error:
            raise SettingsError(f"--checkpoint: cannot read {self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise SettingsError(
                f"--checkpoint: {self.path} is damaged or not a checkpoint: "
                "use another file, or delete it to start over"
            ) from None
        if differing := [name for name, value in self._key.items() if document.get(name) != value]:
            raise SettingsError(
                f"--checkpoint: {self.path} belongs to a backfill with another {', '.join(differing)}: "
                "repeat the options of that run, or use another file"
            )
        return progress

    def save(self, progress: BackfillProgress) -> None:
        """Replace the file. The content is durable on return. Raises OSError."""
        document = self._key | {
            "last_id": progress.last_id,
            "sent": progress.sent,
            "ignored": progress.ignored,
            "failed": dict(progress.failed),
        }
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")  # another process might save too
        temporary.unlink(missing_ok=True)  # of a process that was killed and had the same id
        with open(temporary, "xb", opener=_open_privately) as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _parse_progress(document: Any) -> BackfillProgress:
    last_id, failed = document["last_id"], document["failed"]
    if not isinstance(last_id, str) or not isinstance(failed, dict):
        raise TypeError
    counts = (document["sent"], document["ignored"], *failed.values())
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError
    return BackfillProgress(last_id, document["sent"], document["ignored"], Counter(failed))


class FailureLog:
    """A file to which a JSON line is appended for every failure, including repeated failures of a record.

    Raises OSError if the file is not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open().close()  # report an unwritable file now, not at the first failure

    def add(self, line: Json) -> None:
        """Append a line. It is durable on return. Raises OSError."""
        with self._open() as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # end a line that a crash truncated
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())

    def _open(self) -> IO[bytes]:
        return open(self._path, "ab+", opener=_open_privately)


def _open_privately(path: str, flags: int) -> int:
    """Open a file, and create it for its owner only, but never follow a link that another user may have made."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def read_ids(path: Path, resource_type: str) -> list[str]:
    """Return the ids in a file. Each line is an id, or a line of a failure log. Raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--ids: cannot read {path}: {type(error).__name__}") from None
    return [
        _parse_id(line, f"--ids: {path}, line {number}", resource_type) for number, line in enumerate(lines, 1) if line
    ]


def _parse_id(line: str, location: str, resource_type: str) -> str:
    if not line.startswith("{"):
        return line.strip()
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise SettingsError(
            f"{location}: expected an id or a line of a failures file: delete the line if it is truncated"
        ) from None
    if document.get("resource_type") != resource_type:
        raise SettingsError(
            f"{location}: expected a failure of the kind {resource_type}: use the failures file of that kind"
        )
    return as_text(document.get("resource_id"))
