"""Bounds on what a file of data may become in memory."""

MAX_DOCUMENT = 64_000_000
"""Characters, token ids or bytes of JSON in one row; a longer row is refused."""

_BOMB_BYTES = 256_000_000
_BOMB_RATIO = 100


def check_decompressed(what: str, n_stored: int, n_bytes: int) -> None:
    """Check that a part of a file does not fill the memory with little data.

    Args:
        what: Name of the part, for the message.
        n_stored: Bytes that it has in the file.
        n_bytes: Bytes that it has when decompressed.

    Raises:
        ValueError: It does.
    """
    if n_bytes > _BOMB_BYTES and n_bytes > _BOMB_RATIO * n_stored:
        raise ValueError(f"{n_stored:,} bytes of its {what} would become {n_bytes:,} in memory")
