"""The transcoder of Dunefsky et al. 2024 (arXiv:2406.11944).

    c = relu(W_enc input + b_enc), or the k largest entries of it
    output = D c + b_dec (+ W_skip input)

It reads one hook point and writes another, such as the input and the output of an MLP, so that the
elements stand for what the part between them computes. Its output takes the place of that part's.
The input is not centred, as the decoder's bias belongs to another hook point. The skip is that of
Paulo et al. 2025 (arXiv:2501.18823).
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsify.saes.acts import SAEActs
from sparsify.saes.base import NewElements
from sparsify.saes.linear import LinearSAE
from sparsify.saes.topk import keep_largest


class Transcoder(LinearSAE):
    """Reads one hook point and writes another.

    The encoder starts as any `nn.Linear` does, the skip at zero. The skip is not a part of the
    code, so `decode` leaves it out.

    Args:
        d_act: Width of the activation that is read.
        n_dict: Dictionary elements.
        d_out: Width of the activation that is written.
        k: Elements active on a token. None: as many as are above zero.
        has_skip: A matrix leads directly from the input to the output.
    """

    is_centred: ClassVar[bool] = False

    def __init__(
        self, d_act: int, n_dict: int, d_out: int, k: int | None = None, *, has_skip: bool = False
    ) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.k = k
        self.skip = nn.Linear(d_act, d_out, bias=False) if has_skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    @torch.no_grad()
    def initialise(self) -> None:
        """Bring the elements to unit norm."""
        self.decoder.normalise()
        self.affine.bias.zero_()
        self.decoder.bias.zero_()

    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The k largest pre-activations, or those above zero, and zeros."""
        return pre_acts.relu_() if self.k is None else keep_largest(pre_acts, self.k)

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and the output."""
        acts = super().forward(input)
        if self.skip is None:
            return acts
        return replace(acts, output=acts.output + self.skip(input))

    @torch.no_grad()
    def reset_elements(self, new: NewElements) -> None:
        """Reset elements so that each writes what the skip leaves of its target."""
        if self.skip is not None:
            new = replace(new, targets=new.targets - self.skip(new.inputs))
        super().reset_elements(new)
