import pytest

from sparsify.settings.secrets import one_line, redact_secrets

WANDB_KEY = "0123456789abcdef" * 3
HF_TOKEN = "hf_" + "Zx9" * 10


def test_tokens_of_the_environment_are_cut_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("HF_TOKEN", "any-form-of-token")
    text = f"key {WANDB_KEY} and any-form-of-token are bad"
    assert redact_secrets(text) == "key [redacted] and [redacted] are bad"


def test_the_header_of_a_request_is_cut_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 9)
    # base64 of "api:kkkkkkkkk": 13 bytes
    assert redact_secrets("Basic YXBpOmtra2tra2traw== sent") == "Basic [redacted] sent"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {HF_TOKEN}.", "token [redacted]."),
        ("at https://me:word@host/x", "at https://[redacted]@host/x"),
        ("GET /f?a=1&Signature=Ab%2F&b=2", "GET /f?a=1&Signature=[redacted]&b=2"),
    ],
)
def test_what_has_the_form_of_a_token_is_cut_out(text: str, shown: str):
    assert redact_secrets(text) == shown


def test_empty_and_short_values_of_the_environment_leave_a_text_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redact_secrets("a bad name") == "a bad name"


def test_an_error_is_one_line():
    assert one_line(OSError("no\n  route ")) == "no route"
    assert one_line(TimeoutError()) == "TimeoutError"
