"""A sweep's folder: observations are appended to ``answers.jsonl`` as they come; ``--resume`` goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.observations import OBSERVATION, Observation

_ANSWERS = "answers.jsonl"
_SETTINGS = "settings.json"


class Store:
    """What has been observed so far, in memory and on disk.

    Args:
        folder: the output folder; made, unless the sweep is resumed.
        fixed: settings that decide what is observed: a sweep is resumed only under the same.
        resume: whether to go on with what is there.

    Raises:
        UsageError: the folder exists and is not resumed, does not exist and is, or was begun under other settings.
        ExpoError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, fixed: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.observations: list[Observation] = []
        if not resume:
            self._make(fixed)
        self._lock = self._take_lock()
        if resume:
            try:
                self._read(fixed)
            except UsageError:
                self.close()
                raise

    def _take_lock(self) -> IO[bytes]:
        """Keep others from going on with the sweep at the same time; returns the open file that holds the lock."""
        try:
            file = (self.folder / _SETTINGS).open("rb")
        except OSError:
            raise UsageError(f"--resume: {self.folder} is not the folder of a sweep") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(f"--resume: a sweep is running in {self.folder}") from None
        return file

    def close(self) -> None:
        """Let others go on with the sweep."""
        self._lock.close()

    def add(self, observation: Observation) -> None:
        """Append one observation.

        Raises:
            ExpoError: it cannot be written; what was written before stays.
        """
        with self.writing(), (self.folder / _ANSWERS).open("a", encoding="utf-8") as file:
            file.write(observation.model_dump_json() + "\n")
        self.observations.append(observation)

    def add_all(self, observations: Iterable[Observation]) -> Iterator[Observation]:
        """Append observations as they come, and yield each."""
        for observation in observations:
            self.add(observation)
            yield observation

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure to write into one line.

        Raises:
            ExpoError: says where, and how to go on.
        """
        try:
            yield
        except OSError as error:
            raise ExpoError(
                f"sweep: {error.filename or self.folder} cannot be written: {error.strerror}; what was observed before "
                f"is kept: make room, then give --resume --out {self.folder}"
            ) from None

    def _make(self, fixed: dict[str, Any]) -> None:
        if self.folder.exists():
            raise UsageError(
                f"--out: {self.folder} exists; give a folder that does not exist yet, or --resume to go on with it"
            )
        with self.writing():
            self.folder.mkdir()
        try:
            with self.writing():
                (self.folder / _SETTINGS).write_text(json.dumps(fixed, indent=2) + "\n", encoding="utf-8")
        except ExpoError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _read(self, fixed: dict[str, Any]) -> None:
        try:
            before = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"--resume: {self.folder} is not the folder of a sweep") from None
        now = json.loads(json.dumps(fixed))
        if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            found = "; ".join(f"{key} was {before.get(key)!r:.60}, is {now.get(key)!r:.60}" for key in differing)
            raise UsageError(f"--resume: {self.folder} was begun with other settings ({found}); give the same ones")
        self.observations = list(self._observations())

    def _observations(self) -> Iterator[Observation]:
        """Yield what was observed; a last line that was cut while it was written is removed."""
        path = self.folder / _ANSWERS
        if not path.exists():
            return
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    yield OBSERVATION.validate_json(line)
                except ValidationError:
                    raise UsageError(f"--resume: {path}, line {number} is not an observation of a sweep") from None
        if whole < path.stat().st_size:
            os.truncate(path, whole)
