"""Errors of reading data that may pass, and the time to wait for that.

A stream of a day meets errors that are gone a second later: a connection that was closed, a server
that is busy, a file server that does not answer. They are waited out, and reading
resumes behind the last row that came. All others, such as a damaged file, are the same on every
try.
"""

import errno
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

from sparsify.settings.secrets import one_line

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each try after the first. One that succeeds resets the count."""

_Value = TypeVar("_Value")
_LOGGER = logging.getLogger(__name__)

# Known by name, since which of them the hub's client uses differs between its versions.
_NETWORK_PACKAGES = {
    *("aiohttp", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "ssl", "urllib3")
}
_TRANSIENT_STATUS = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}
_LASTING_OS_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# What a local or mounted disk reports while its server or its cable is away. By name: not every
# system has all.
_TRANSIENT_ERRNOS = {
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "EINTR", "EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "ENOTCONN")
    if hasattr(errno, name)
}


def is_transient(error: Exception, is_local: bool) -> bool:
    """Return True if the same read may succeed a little later.

    Args:
        error: What the read raised.
        is_local: It read a file. Then an error that is none of the system's or of a connection
            comes from what the file holds, and lasts.
    """
    if isinstance(error, (*_LASTING_OS_ERRORS, OfflineModeIsEnabled)):
        return False
    if (status := _http_status(error)) is not None:
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRANSIENT_STATUS
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    if packages & _NETWORK_PACKAGES:
        return True
    # pyarrow raises an OSError without a number for a file that is too short.
    return isinstance(error, OSError) and (not is_local or error.errno in _TRANSIENT_ERRNOS)


def _http_status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = getattr(error, "status", None) if status is None else status  # aiohttp
    return status if isinstance(status, int) else None


class Patience:
    """Waits after each of several transient errors in a row, longer each time.

    Args:
        name: What to call the data in messages.
        is_local: See `is_transient`.
    """

    def __init__(self, name: str, is_local: bool) -> None:
        self.name = name
        self.is_local = is_local
        self._n_errors = 0

    def reset(self) -> None:
        """Take note that a read has succeeded."""
        self._n_errors = 0

    def wait_out(self, error: Exception) -> bool:
        """Wait before the next try, and say so; False at once if there is to be none."""
        if self._n_errors == len(RETRY_DELAYS_S) or not is_transient(error, self.is_local):
            return False
        delay = RETRY_DELAYS_S[self._n_errors]
        self._n_errors += 1
        _LOGGER.warning(
            "'%s' cannot be read at the moment (%s); trying again in %g s (%d of %d)",
            *(self.name, one_line(error), delay, self._n_errors, len(RETRY_DELAYS_S)),
        )
        time.sleep(delay)
        return True

    def so_far(self) -> str:
        """Count of the tries, for the message of the error that was not waited out."""
        return f", tried {self._n_errors + 1} times" if self._n_errors else ""


def retried(read: Callable[[], _Value], name: str) -> _Value:
    """Return what `read` returns from a local file, tried again after transient errors.

    The last error is raised if they do not pass.
    """
    patience = Patience(name, is_local=True)
    while True:
        try:
            return read()
        except OSError as error:
            if not patience.wait_out(error):
                raise
