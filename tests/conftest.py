"""What all tests share: no network, fixed seeds, and a model small enough to be built in each test.

Torch and TransformerLens are imported where they are used, so that tests of configs start at once.
"""

import random
import signal
import socket
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import pytest

TINY_MODEL: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "d_mlp": 32,
    "n_ctx": 16,
    "d_vocab": 64,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "seed": 0,
    "device": "cpu",
}
MODEL_FIXTURES = {"tiny_model", "tiny_bridge", "tlens_model"}
WORDS = ["def", "return", "yield", "class", "import", "self", "value", "range", "print", "pass"]
LOCAL_HOSTS = ("127.", "::1", "localhost", "0.0.0.0", "::")


@pytest.fixture
def tiny_model() -> Any:  # HookedTransformer is no name that both versions have
    """A random model with 3 blocks: a HookedTransformer where TransformerLens still has it."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        return _build_tiny_bridge()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(HookedTransformerConfig(**TINY_MODEL)).eval()


@pytest.fixture
def tiny_bridge() -> Any:  # tests reach into attributes that its class does not declare
    """The same model as a TransformerBridge, with other weights."""
    return _build_tiny_bridge()


@pytest.fixture(params=["tiny_model", "tiny_bridge"])
def tlens_model(request: pytest.FixtureRequest) -> Any:
    """Each of them in turn."""
    return request.getfixturevalue(request.param)


def _build_tiny_bridge() -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(**TINY_MODEL, architecture="TransformerLensNative")
    return TransformerBridge.boot_native(config).eval()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """40 texts of different lengths, no two alike."""
    rng = random.Random(0)
    return [f"# {i}\n" + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Any:  # a PreTrainedTokenizerFast
    """A tokenizer of 300 tokens that was trained on them."""
    from sparsify.tlens.tokenizers import train_tokenizer

    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)  # noqa: NPY002  (for libraries that use the global generator)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `model` what uses a fixture that is one."""
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")


def pytest_configure(config: pytest.Config) -> None:
    """Cut tests, and what they import, off from the network, files and shell of the user."""
    cache = tempfile.TemporaryDirectory(prefix="sparsify-tests-")
    config.add_cleanup(cache.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setenv("HF_HOME", cache.name)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("WANDB_MODE", "disabled")
    patch.setenv("MPLBACKEND", "Agg")
    # Tensors here are too small to be worth sharing. Before torch is loaded, so that a fixture of
    # the session adds in the same order as a test.
    patch.setenv("OMP_NUM_THREADS", "1")
    # A shell has what it puts into the background ignore Ctrl-C, and so would the runs that tests
    # interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _block_network(patch)


def _block_network(patch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to another machine.

    The error is no `Exception`, so that no library can take it for a network that is down.
    """
    getaddrinfo, connect, connect_ex = (
        socket.getaddrinfo,
        socket.socket.connect,
        socket.socket.connect_ex,
    )

    def check(host: object) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if isinstance(name, str) and not name.startswith(LOCAL_HOSTS) and name != "":
            pytest.fail(f"a test tried to reach '{name}'; tests use no network")

    def checked_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    def checked_connect(self: socket.socket, address: Any) -> None:
        check(address[0] if isinstance(address, tuple) else None)  # no tuple: a local socket
        connect(self, address)

    def checked_connect_ex(self: socket.socket, address: Any) -> int:
        check(address[0] if isinstance(address, tuple) else None)
        return connect_ex(self, address)

    patch.setattr(socket, "getaddrinfo", checked_getaddrinfo)
    patch.setattr(socket.socket, "connect", checked_connect)
    patch.setattr(socket.socket, "connect_ex", checked_connect_ex)
