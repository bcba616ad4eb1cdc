"""The transcoder of Dunefsky et al. 2024 (arXiv:2406.11944).

    c = relu(W_enc input + b_enc), or the k largest entries of it
    output = D c + b_dec (+ W_skip input)

It reads one hook point and writes another, such as the input and the output of an MLP, so that the
elements stand for what the part between them computes. Its output takes the place of that part's.
The input is not centred, as the decoder's bias belongs to another hook point. The skip is that of
Paulo et al. 2025 (arXiv:2501.18823).
"""

from jaxtyping import Float
from torch import Tensor

from sparsify.saes.linear import LinearSAE
from sparsify.saes.topk import keep_largest


class Transcoder(LinearSAE):
    """Reads one hook point and writes another.

    The encoder starts as any `nn.Linear` does.

    Args:
        d_act: Width of the activation that is read.
        n_dict: Dictionary elements.
        d_out: Width of the activation that is written.
        k: Elements active on a token. None: as many as are above zero.
    """

    def __init__(self, d_act: int, n_dict: int, d_out: int, k: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.k = k

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The k largest pre-activations, or those above zero, and zeros."""
        return pre_acts.relu_() if self.k is None else keep_largest(pre_acts, self.k)
