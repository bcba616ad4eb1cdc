"""Loss of a language model of source text, in units that do not depend on its tokenizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.tlens.native_model import TrainableModel


@dataclass(frozen=True)
class TextLoss:
    """Loss over the scored tokens: all but the first of each sequence, which has no context."""

    nats_per_token: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int

    @classmethod
    def from_nats(
        cls, nats: float, targets: Int[Tensor, "..."], token_bytes: Int[Tensor, " d_vocab"]
    ) -> "TextLoss":
        """Make it from the summed loss of predicting `targets`."""
        n_bytes = int(token_bytes[targets].sum())
        bits_per_byte = nats / math.log(2) / n_bytes
        return cls(nats / targets.numel(), bits_per_byte, targets.numel(), n_bytes)


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " d_vocab"]:
    """Bytes of text each token of a byte-level BPE stands for; special tokens stand for none."""
    # Byte-level BPE writes every byte as one character.
    lengths = torch.tensor(
        [len(text) for text in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    )
    lengths[torch.tensor(tokenizer.all_special_ids)] = 0
    return lengths


@torch.inference_mode()
def text_loss(
    model: TrainableModel,
    batches: Iterable[Int[Tensor, "batch pos"]],
    token_bytes: Int[Tensor, " d_vocab"],
) -> TextLoss:
    """Loss of `model` on sequences that are each scored without what came before them.

    The cost of predicting an end of text counts, though it stands for no byte.
    """
    nats, targets = 0.0, []
    device = next(model.parameters()).device
    for batch in batches:
        tokens = batch.to(device)
        logits = model(tokens[:, :-1])
        targets.append(tokens[:, 1:])
        nats += F.cross_entropy(logits.flatten(0, 1), targets[-1].flatten(), reduction="sum").item()
    return TextLoss.from_nats(nats, torch.cat(targets).cpu(), token_bytes)
