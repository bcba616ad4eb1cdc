"""What the forward passes of one training step leave behind for the loss terms."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sparsify.kernels.unembedding import Unembedding
from sparsify.saes.acts import CacheActs, SAEActs


@dataclass(frozen=True)
class Runs:
    """The raw and the spliced run of one batch, as far as the loss terms need them.

    If no term needs a spliced run there is none, and each SAE has read the raw activation.
    """

    orig_acts: dict[str, Float[Tensor, "..."]]
    """Raw activations by position."""

    new_acts: dict[str, SAEActs | CacheActs]
    """Activations of the spliced run by position: an SAE's, or a hook point's that a term needs."""

    orig_resid: Float[Tensor, "*sample d_model"] | None = None
    """Residual stream of the raw run before the final norm. None if no term needs logits."""

    new_resid: Float[Tensor, "*sample d_model"] | None = None
    """The same of the spliced run."""

    unembed: Unembedding | None = None
    """Final norm and unembedding. None if no term needs logits."""

    @property
    def sae_acts(self) -> dict[str, SAEActs]:
        """The entries of `new_acts` that an SAE made."""
        return {name: acts for name, acts in self.new_acts.items() if isinstance(acts, SAEActs)}
