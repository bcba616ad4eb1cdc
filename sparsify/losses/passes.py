"""Record of the forward passes of a training step, from which loss terms are computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsify.kernels.unembedding import Unembedding
from sparsify.losses.kept import NO_TARGET, counted_targets
from sparsify.saes.acts import CacheActs, SAEActs
from sparsify.saes.base import SAE


@dataclass(frozen=True)
class Passes:
    """The raw and the spliced pass of one batch, as far as the loss terms need them.

    If no term needs a spliced pass, there is none, and each SAE has read the raw activation.
    """

    orig_acts: dict[str, Float[Tensor, "..."]]
    """Raw activations by position."""

    new_acts: dict[str, SAEActs | CacheActs]
    """Activations of the spliced pass by position: of the SAEs, and others that a term needs."""

    orig_resid: Float[Tensor, "*sample d_model"] | None = None
    """Residual stream of the raw pass before the final norm. None if no term needs its logits."""

    new_resid: Float[Tensor, "*sample d_model"] | None = None
    """The same of the spliced pass. None if no term needs logits."""

    unembed: Unembedding | None = None
    """Final norm and unembedding. None if no term needs logits."""

    next_tokens: Int[Tensor, "*sample"] | None = None
    """The token after each position, `NO_TARGET` where the prediction does not count. None if no
    term needs logits."""

    saes: Mapping[str, SAE] = field(default_factory=dict)
    """The SAEs by position, for terms that use their weights."""

    others: tuple[tuple[float, "Passes"], ...] = ()
    """The same passes with other outputs of the SAEs, each after the weight of its errors."""

    dead: Mapping[str, Bool[Tensor, " n_dict"]] = field(default_factory=dict)
    """True for each element that counts as dead, by position. Empty if no term needs it."""

    @property
    def sae_acts(self) -> dict[str, SAEActs]:
        """The entries of `new_acts` that an SAE made."""
        return {name: acts for name, acts in self.new_acts.items() if isinstance(acts, SAEActs)}

    def arriving(self, position: str) -> Float[Tensor, "..."]:
        """The activation of the spliced pass at a position, before an SAE there replaces it."""
        acts = self.new_acts[position]
        return acts.target if isinstance(acts, SAEActs) else acts.input

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return next(iter(self.new_acts.values())).input.shape[:-1].numel()

    @property
    def n_predictions(self) -> int:
        """Predictions of the next token that count. A GPU is waited for."""
        return 0 if self.next_tokens is None else int((self.next_tokens != NO_TARGET).sum())

    @property
    def is_masked(self) -> bool:
        """Whether tokens were left out, so that predictions are no fixed share of what is kept."""
        return self.next_tokens is not None and self.next_tokens.ndim == 1

    def only(self, kept: Bool[Tensor, "batch pos"]) -> "Passes":
        """The rows where `kept` is true, in one dimension."""
        next_tokens = self.next_tokens
        if next_tokens is not None:
            next_tokens = counted_targets(next_tokens, kept)[kept]

        def pick(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[kept]

        return replace(
            self,
            orig_acts={name: act[kept] for name, act in self.orig_acts.items()},
            new_acts={name: acts.only(kept) for name, acts in self.new_acts.items()},
            orig_resid=pick(self.orig_resid),
            new_resid=pick(self.new_resid),
            next_tokens=next_tokens,
            others=tuple((weight, passes.only(kept)) for weight, passes in self.others),
        )
