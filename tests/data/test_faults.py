import errno
import http.client
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)

from sparsify.data import faults
from sparsify.data.faults import RETRY_DELAYS_S, Patience, is_transient, retried

pytestmark = pytest.mark.fault


def hub_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = requests.Response()  # the hub's client has had three kinds of response
    response.status_code = status
    return kind("from the hub", response=response)


def connection_refused() -> httpx.HTTPError:
    with pytest.raises(httpx.ConnectError) as error:
        httpx.get("http://127.0.0.1:9", trust_env=False)
    return error.value


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        requests.ConnectionError("no route"),
        http.client.IncompleteRead(b""),
        httpx.ReadTimeout("slow"),
        hub_error(503),
        hub_error(429),
    ],
    ids=repr,
)
def test_errors_that_pass_are_tried_again(error: Exception, is_local: bool):
    assert is_transient(error, is_local)


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        PermissionError(errno.EACCES, "not yours"),
        hub_error(403),
        hub_error(404, RemoteEntryNotFoundError),
        OfflineModeIsEnabled("offline"),
        ValueError("a bug"),
    ],
    ids=repr,
)
def test_errors_that_last_are_not(error: Exception, is_local: bool):
    assert not is_transient(error, is_local)


def test_an_error_of_a_real_connection_passes():
    assert is_transient(connection_refused(), is_local=False)


def test_an_error_without_a_number_is_of_the_network_or_of_what_the_file_holds():
    error = OSError("Unexpected end of stream")
    assert is_transient(error, is_local=False)
    assert not is_transient(error, is_local=True)


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def test_each_wait_is_longer_until_a_read_succeeds(
    delays: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    patience = Patience("some/data", is_local=False)
    error = ConnectionError("no route with secret-token")
    assert [patience.wait_out(error) for _ in range(3)] == [True] * 3
    patience.reset()
    assert [patience.wait_out(error) for _ in range(6)] == [True] * 5 + [False]
    assert delays == [1, 2, 4, *RETRY_DELAYS_S]
    assert len(caplog.messages) == 8
    assert caplog.messages[1] == (
        "'some/data' cannot be read at the moment (no route with [redacted]); "
        "trying again in 2 s (2 of 5)"
    )
    assert patience.so_far() == ", tried 6 times"


def test_a_read_is_tried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "RETRY_DELAYS_S", (0.0, 0.0))
    outcomes: Iterator[Exception | str] = iter(
        [OSError(errno.EIO, "away"), OSError(errno.EIO, "away"), "text"]
    )

    def read() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retried(read, "file") == "text"


def test_a_read_that_never_succeeds_raises_its_last_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "RETRY_DELAYS_S", (0.0,))
    n_tries = 0

    def read() -> str:
        nonlocal n_tries
        n_tries += 1
        raise OSError(errno.EIO, f"away {n_tries}")

    with pytest.raises(OSError, match="away 2"):
        retried(read, "file")
