"""The Matryoshka SAE of Bussmann et al. 2025 (arXiv:2503.17547).

A batch-top-k SAE whose prefixes are dictionaries of their own: in addition to the output of all
elements, that of the first m is trained, for several m,

    output_m = D[:, :m] c[:m] + b_dec

so that general elements come first and more special ones do not split them. The loss is the sum of
the errors of all outputs. Where an error is that of the whole model, each output would take a
spliced pass, so one is drawn for each sequence.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparsify.saes.acts import SAEActs
from sparsify.saes.batch_topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """Nested prefixes of a batch-top-k dictionary.

    Args:
        d_act: Width of the activation.
        n_dict: Dictionary elements.
        k: Elements active on a token, on average.
        prefix_sizes: Elements in each of the smaller dictionaries, ascending.
        d_out: As in `LinearSAE`.
    """

    def __init__(
        self, d_act: int, n_dict: int, k: int, prefix_sizes: list[int], d_out: int | None = None
    ) -> None:
        super().__init__(d_act, n_dict, k, d_out)
        self.prefix_sizes = prefix_sizes
        self.other_weights = (1.0,) * len(prefix_sizes)

    def other_output(self, acts: SAEActs, index: int) -> Float[Tensor, "*sample d_out"]:
        """The activation that the elements of a prefix stand for alone."""
        size = self.prefix_sizes[index]
        part = F.linear(acts.c[..., :size], self.used_elements[:size].T, self.decoder.bias)
        return self.output_of(part, acts.input)
