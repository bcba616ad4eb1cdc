"""Edits: the effect of interventions on what SAEs write in a spliced pass.

With c the code of an SAE on a token, c' the code after all interventions, D the decoder and d_j the
direction of element j, scaled to unit norm, an SAE writes

    output' = base + D c' - D c + sum over steering of amount * sum over its elements j of d_j
    base    = output, or the activation that it replaces if the SAE's error is added back

The activation is output + error, where the error is what the SAE does not reconstruct, computed
again in each pass. So with errors added and no intervention every SAE writes the activation, and
the spliced pass is the raw one; an intervention then acts on the model as it was (Marks et al.
2024, arXiv:2403.19647). Only differences of D c enter, so what else an output holds (a bias, a
transcoder's skip) stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.saes.acts import SAEActs
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention
from sparsify.splicing.sae_dict import SAEDict


class Edit:
    """Interventions, and added errors, in one pass or in those that generate one batch.

    To generate, a model is run once for each new token. A hook then sees the whole sequence again,
    or, where keys and values are cached, only the token that was added; in either case what it sees
    ends with that token. So a hook point's first call shows how long the sequence was, and each
    later one is a token further.

    Args:
        interventions: Done one after another, so that of two values the later holds.
        saes: SAEs by position, one for each intervention.
        positions: Positions whose SAE takes part in the pass.
        add_error: Whether each SAE's error is added back, on all tokens.
        n_new_tokens: Tokens that may be generated. None: nothing is generated.

    Raises:
        UserError: An intervention fits neither the SAEs nor the pass. Whether tokens lie outside
            the sequence shows in the pass, which raises it too.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        saes: SAEDict,
        positions: Sequence[str],
        *,
        add_error: bool,
        n_new_tokens: int | None = None,
    ) -> None:
        for intervention in interventions:
            _check_fits(intervention, saes, positions, is_generating=n_new_tokens is not None)
        self.interventions = interventions
        self.saes = saes
        self.add_error = add_error
        # The last new token is written, but not read.
        self.n_more_tokens = max(0, (n_new_tokens or 0) - 1)
        self.n_read: dict[str, int] = {}

    @property
    def names_tokens(self) -> bool:
        """Whether an intervention is restricted to some tokens."""
        return any(intervention.tokens is not None for intervention in self.interventions)

    def __call__(self, position: str, acts: SAEActs) -> SAEActs:
        """Activations to splice in instead of `acts`, in which nothing is changed."""
        here = [one for one in self.interventions if one.position == position]
        base = acts.target if self.add_error else acts.output
        if not here:
            return replace(acts, output=base)
        n_shown = acts.c.shape[1]
        is_first = position not in self.n_read
        self.n_read[position] = n_shown if is_first else self.n_read[position] + 1
        start = self.n_read[position] - n_shown
        sae, c, steering = self.saes[position], acts.c.clone(), torch.zeros_like(base)
        with torch.autocast(c.device.type, enabled=False):
            for one in here:
                if is_first:
                    check_tokens(one.tokens, n_shown + self.n_more_tokens, "interventions: tokens")
                rows = _rows(one.tokens, start, n_shown).to(c.device)
                elements = torch.tensor(one.elements, device=c.device)
                place = (slice(None), rows[:, None], elements)
                if one.kind == "steer":
                    steering[:, rows] += one.amount * sae.dict_elements[elements].sum(dim=0)
                else:
                    c[place] = one.amount * c[place] if one.kind == "scale" else one.amount
            change = sae.decode_beside(c, acts.input) - sae.decode_beside(acts.c, acts.input)
            output = base + change + steering
        return replace(acts, c=c, output=output)


def _check_fits(
    intervention: Intervention, saes: SAEDict, positions: Sequence[str], *, is_generating: bool
) -> None:
    position = intervention.position
    if position not in positions:
        raise UserError(
            f"interventions: the SAE at '{position}' takes no part in this pass; add it to "
            "sae_positions, or leave the intervention out"
        )
    n_dict = saes[position].n_dict
    if outside := [j for j in intervention.elements if not 0 <= j < n_dict]:
        raise UserError(
            f"interventions: elements: the SAE at '{position}' has no element {outside[0]}; "
            f"give 0 to {n_dict - 1}"
        )
    first = min(intervention.tokens or [0])
    if is_generating and first < 0:
        raise UserError(
            f"interventions: tokens: {first} counts from the end of the sequence, which moves "
            "while it is generated; count from its start"
        )


def check_tokens(tokens: Iterable[int] | None, n_pos: int, setting: str) -> None:
    """Raise a `UserError` if a sequence of `n_pos` tokens does not have them. None: all it has."""
    for token in tokens or ():
        if not -n_pos <= token < n_pos:
            raise UserError(
                f"{setting}: there is no token {token} in a sequence of {n_pos}; give "
                f"{-n_pos} to {n_pos - 1}"
            )


def _rows(tokens: tuple[int, ...] | None, start: int, n_shown: int) -> Int[Tensor, " row"]:
    """Rows that tokens have in an activation whose first row belongs to token `start`."""
    if tokens is None:
        return torch.arange(n_shown)
    places = {token - start if token >= 0 else token + n_shown for token in tokens}
    return torch.tensor(sorted(places & set(range(n_shown))), dtype=torch.long)
