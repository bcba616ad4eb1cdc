"""Reading of `metrics.jsonl`, of which a crash, a full disk or somebody may have damaged lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sparsify.runs.console import say
from sparsify.runs.run_folder import replace_atomically
from sparsify.settings.files import open_regular

MAX_LINE_BYTES = 10_000_000
"""A line of a run with a thousand SAEs is shorter."""
MAX_METRICS_BYTES = 4_000_000_000
"""More than the log of any run has."""
MAX_NUMBER = 1e300
"""A number beyond is none that a picture or a float could hold."""
COPY_BYTES = 2**20

Record = dict[str, float | None]
"""A line: `n_samples`, and metrics by their names. None: a number that was not finite."""


def read_metrics(path: Path) -> list[Record]:
    """Return the lines of a metrics file. Damaged ones are left out, with a warning.

    Raises:
        OSError: There is no such file, or something else in its place.
    """
    with open_regular(path, MAX_METRICS_BYTES) as file:
        records = [record for _, record in _lines(file)]
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        say(f"warning: {path}: {len(records) - len(whole)} damaged lines are left out")
    return whole


def cut_metrics(path: Path, n_bytes: int) -> None:
    """Keep the first bytes of a metrics file, without damaged lines at their end.

    Says so if lines are missing or damaged. The file is replaced: where it has another name
    elsewhere, that one keeps all lines.

    Raises:
        OSError: It cannot be read or written.
    """
    path.touch()
    with open_regular(path, MAX_METRICS_BYTES) as file:
        end = 0
        for line_end, record in _lines(file, n_bytes):
            end = end if record is None else line_end
        n_found = file.seek(0, 2)
        if n_found < n_bytes:
            say(f"warning: {path}: lines of it are missing")
        if end < min(n_found, n_bytes):
            say(f"warning: {path}: its last lines are damaged and have been cut off")
        with replace_atomically(path) as temporary, temporary.open("wb") as kept:
            file.seek(0)
            for start in range(0, end, COPY_BYTES):
                kept.write(file.read(min(COPY_BYTES, end - start)))


def _lines(file: BinaryIO, n_bytes: int = MAX_METRICS_BYTES) -> Iterator[tuple[int, Record | None]]:
    """Yield the end of each line that begins before `n_bytes`, and its content. None: damaged."""
    end = 0
    while end < n_bytes and (line := file.readline(min(MAX_LINE_BYTES, n_bytes - end))):
        end += len(line)
        yield end, _record(line)


def _record(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and all(map(_is_number, record.values()))
    return record if is_whole and isinstance(record.get("n_samples"), int) else None


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)
