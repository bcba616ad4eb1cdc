"""A trigram language model: the baseline that a trained transformer has to beat clearly."""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from sparsify.scripts.train_tlens.evaluation import TextLoss

Ids = NDArray[np.int64]


class TrigramModel:
    """Interpolated trigrams with Witten-Bell smoothing.

    The probability of a token after a context mixes its relative frequency there with the
    probability under the next shorter context, down to the uniform distribution. A context seen n
    times with t different successors trusts its own counts with weight n / (n + t) (Witten and Bell
    1991, doi:10.1109/18.87000, method C).

    Args:
        sequences: Training tokens; no trigram reaches from one sequence into the next.
        d_vocab: Number of token ids.
    """

    def __init__(self, sequences: Ids, d_vocab: int) -> None:
        self.d_vocab = d_vocab
        self._orders = [
            _Order(*_grams(sequences, n_context, d_vocab), d_vocab) for n_context in range(3)
        ]

    def text_loss(self, sequences: Ids, token_bytes: Int[Tensor, " d_vocab"]) -> TextLoss:
        """Loss on all tokens but the first of each sequence, as for the transformer."""
        nats = sum(-np.log(self._probs(sequences[:, :pos], sequences[:, pos])).sum()
                   for pos in range(1, sequences.shape[1]))  # fmt: skip
        targets = torch.from_numpy(sequences[:, 1:])
        return TextLoss.from_nats(float(nats), targets, token_bytes)

    def _probs(self, before: Ids, tokens: Ids) -> NDArray[np.float64]:
        """Probability of each token after the tokens before it, of which the last two count."""
        probs = np.full(len(tokens), 1 / self.d_vocab)
        for n_context, counts in enumerate(self._orders[: before.shape[1] + 1]):
            context = _number(before[:, before.shape[1] - n_context :], self.d_vocab)
            probs = counts.interpolate(context, tokens, probs)
        return probs


class _Order:
    """Counts of n-grams of one order, as sorted arrays that are searched."""

    def __init__(self, contexts: Ids, successors: Ids, d_vocab: int) -> None:
        self.d_vocab = d_vocab
        self.grams, self.gram_counts = np.unique(
            contexts * d_vocab + successors, return_counts=True
        )
        gram_contexts = self.grams // d_vocab
        self.contexts, first, self.n_successors = np.unique(
            gram_contexts, return_index=True, return_counts=True
        )
        self.context_counts = np.add.reduceat(self.gram_counts, first)

    def interpolate(
        self, contexts: Ids, successors: Ids, shorter: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        n = _lookup(self.contexts, self.context_counts, contexts)
        t = _lookup(self.contexts, self.n_successors, contexts)
        n_gram = _lookup(self.grams, self.gram_counts, contexts * self.d_vocab + successors)
        # An unseen context (n = t = 0) leaves the shorter one's probability as it is.
        return (n_gram + t * shorter + (n == 0) * shorter) / (n + t + (n == 0))


def _grams(sequences: Ids, n_context: int, d_vocab: int) -> tuple[Ids, Ids]:
    """Context number and successor of every token that has `n_context` tokens before it."""
    n_pos = sequences.shape[1]
    windows = [sequences[:, k : n_pos - n_context + k].reshape(-1) for k in range(n_context + 1)]
    contexts = np.stack(windows, axis=1)[:, :-1]
    return _number(contexts, d_vocab), windows[-1]


def _number(contexts: Ids, d_vocab: int) -> Ids:
    """One number for each row of tokens."""
    numbers = np.zeros(len(contexts), dtype=np.int64)
    for column in contexts.T:
        numbers = numbers * d_vocab + column
    return numbers


def _lookup(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """Value of each wanted key, zero where there is none."""
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
