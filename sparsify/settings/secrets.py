"""Removal of access tokens from what is shown, logged and saved."""

import base64
import os
import re

SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
REDACTED = "[redacted]"

# Tokens may also come from a login's file. Those of the hub have a form of their own, and addresses
# may bring a password or a signature along.
_TOKEN_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)|(?<=[Ss]ignature=)[^&\s'\"]+"
)


def redact_secrets(text: str) -> str:
    """Return `text` without the tokens of the environment and whatever else looks like one."""
    for secret in secrets_of_environment():
        text = text.replace(secret, REDACTED)
    return _TOKEN_FORMS.sub(REDACTED, text)


def secrets_of_environment() -> list[str]:
    """Return the tokens of the environment, also in the form that a request's header has."""
    tokens = [os.environ.get(name, "").strip() for name in SECRET_VARIABLES]
    # A shorter one is not a token, and to cut it out might leave nothing to read.
    tokens = [token for token in tokens if len(token) >= 8]
    headers = [base64.b64encode(f"api:{token}".encode()).decode() for token in tokens]
    return tokens + headers


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without secrets; its class if it has no message."""
    return redact_secrets(" ".join(str(error).split())) or type(error).__name__
