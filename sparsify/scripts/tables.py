"""Tables in Markdown, and their places in documents that people write the rest of."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsify.runs.run_folder import write_text
from sparsify.settings.base_config import UserError


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check_places(document: Path, names: Iterable[str]) -> None:
    """Raise a `UserError` if a document lacks the comments that `put_into` looks for."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{document}: cannot be read ({error.strerror}); run this in a clone of the repository"
        ) from None
    for name in names:
        begin, end = _comments(name)
        if end not in text.partition(begin)[2]:
            raise UserError(f"{document}: has no '{begin}' before '{end}'; put them where they go")


def put_into(document: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the comments `begin NAME` and `end NAME` of a document.

    Raises:
        UserError: It has no such comments.
    """
    check_places(document, [name])
    begin, end = _comments(name)
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_text(document, "\n".join([f"{before}{begin}", *lines, f"{end}{after}"]))


def _comments(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"
