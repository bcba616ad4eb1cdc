"""The shapes and loss mixes that are timed, and the techniques that can be left out."""

from dataclasses import dataclass
from typing import Any

MODES = ("local", "e2e", "downstream")
"""Loss mixes: sparsity with the error at the SAE, with the output's KL, or with KL and the error at
the start of every later block."""

TECHNIQUES = {
    "shared-prefix": "what comes before the first SAE runs once",
    "chunked-kl": "no whole logits, and the gradient of the KL in their place",
    "fused-blocks": "fused attention, norms and activations",
    "sparse-sae": "decoding and gradients from active entries alone",
    "row-sparse-adam": "gradients of active rows alone, and fused Adam",
    "sum-of-code": "the L1 term as a sum",
}
"""Techniques that `--without` leaves out, by name."""


@dataclass(frozen=True)
class Shape:
    """A batch, a model with random weights, and an SAE on the residual stream before a block."""

    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    batch_size: int
    n_ctx: int
    block: int
    ratio: float
    """Dictionary elements per dimension of the residual stream."""
    needs_gpu: bool = False

    @property
    def n_dict(self) -> int:
        """Number of dictionary elements."""
        return int(self.ratio * self.d_model)

    @property
    def n_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.n_ctx

    @property
    def position(self) -> str:
        """Hook point of the SAE."""
        return f"blocks.{self.block}.hook_resid_pre"

    def tlens_settings(self) -> dict[str, Any]:  # of different types
        """Settings of the model, for either kind of TransformerLens model."""
        return {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
            "d_mlp": 4 * self.d_model,
            "d_vocab": self.d_vocab,
            "n_ctx": self.n_ctx,
            "act_fn": "gelu_new",
            "seed": 0,
        }

    def loss(self, mode: str) -> dict[str, Any]:  # the fields of a LossConfig
        """The loss of a mix, with coefficients near those of the paper."""
        sparsity = {"coeff": 1.0}
        if mode == "local":
            return {"sparsity": sparsity, "out_to_in": {"coeff": 1.0}}
        if mode == "e2e":
            return {"sparsity": sparsity, "logits_kl": {"coeff": 1.0}}
        later = [f"blocks.{block}.hook_resid_pre" for block in range(self.block + 1, self.n_layers)]
        return {
            "sparsity": sparsity,
            "logits_kl": {"coeff": 0.5},
            "in_to_orig": {"hook_positions": later, "total_coeff": 2.5},
        }


SHAPES = {
    "tiny": Shape(4, 128, 4, 4096, batch_size=32, n_ctx=128, block=2, ratio=16.0),
    "stories": Shape(8, 64, 16, 50257, batch_size=4, n_ctx=256, block=4, ratio=50.0),
    "gpt2": Shape(12, 768, 12, 50257, batch_size=2, n_ctx=128, block=6, ratio=60.0),
    "gpt2-full": Shape(
        12, 768, 12, 50257, batch_size=16, n_ctx=1024, block=6, ratio=60.0, needs_gpu=True
    ),
}
