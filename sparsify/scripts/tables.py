"""Tables in Markdown, and their places in documents that people write the rest of."""

from collections.abc import Sequence
from pathlib import Path

from sparsify.base_config import UserError
from sparsify.training.run_folder import write_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put_into(document: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the comments `begin NAME` and `end NAME` of a document.

    Raises:
        UserError: It has no such comments.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = document.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{document}: has no lines '{begin}' and '{end}'; put them where they go")
    write_text(document, "\n".join([f"{before}{begin}", *lines, f"{end}{after}"]))
