"""What interventions do to what an SAE writes in a spliced pass.

With c the code of an SAE on a token, c' the code after all changes, D the decoder and d_j the
direction of element j, scaled to unit norm, an SAE writes

    output' = base + D c' - D c + sum over steering of amount * sum over its elements j of d_j
    base    = output, or the activation that it replaces if the SAE's error is added back

The activation is output + error, where the error is what the SAE does not reconstruct, computed
again in each pass. So with errors added and no change every SAE writes the activation, and the
spliced pass is the raw one; a change then acts on the model as it was (Marks et al. 2024,
arXiv:2403.19647). Only differences of D c enter, so what else an output holds (a bias, a
transcoder's skip) stays.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from sparsify.saes.acts import SAEActs
from sparsify.settings.base_config import UserError
from sparsify.splicing.interventions import Intervention
from sparsify.splicing.sae_dict import SAEDict

Edit = Callable[[str, SAEActs], SAEActs]
"""`edit(position, acts)`: what is to be spliced in instead of what the SAE there made."""


def edit_of(
    interventions: Sequence[Intervention],
    saes: SAEDict,
    positions: Sequence[str],
    *,
    add_error: bool,
    n_new_tokens: int | None = None,
) -> Edit | None:
    """What does all that to a run, one sequence of calls long. None: nothing changes.

    Args:
        interventions: Done one after another, so that of two values the later holds.
        saes: SAEs by position, one for each intervention.
        positions: Positions whose SAE takes part in the run.
        add_error: Whether each SAE's error is added back, on all tokens.
        n_new_tokens: Tokens that the run may generate. None: it generates none.

    Raises:
        UserError: An intervention fits neither the SAEs nor the run. `Edits` finds out on the way
            whether tokens lie outside the sequence.
    """
    for intervention in interventions:
        position = intervention.position
        if position not in positions:
            raise UserError(
                f"interventions: the SAE at '{position}' takes no part in this run; add it to "
                "sae_positions, or leave the intervention out"
            )
        n_dict = saes.at(position).n_dict
        if outside := [j for j in intervention.elements if not 0 <= j < n_dict]:
            raise UserError(
                f"interventions: elements: the SAE at '{position}' has no element {outside[0]}; "
                f"give 0 to {n_dict - 1}"
            )
        first = min(intervention.tokens or [0])
        if n_new_tokens is not None and first < 0:
            raise UserError(
                f"interventions: tokens: {first} counts from the end of the sequence, which moves "
                "while it is generated; count from its start"
            )
    if not interventions and not add_error:
        return None
    return Edits(interventions, saes, add_error, n_more_tokens=max(0, (n_new_tokens or 0) - 1))


class Edits:
    """Changes what SAEs make in one run, or in the runs that generate one batch of sequences.

    To generate, a model is run once for each new token. A hook then sees the whole sequence again,
    or, where keys and values are cached, only the token that was added; in either case what it sees
    ends with that token. So a hook point's first call shows how long the sequence was, and each
    later one is a token further.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        saes: SAEDict,
        add_error: bool,
        n_more_tokens: int,
    ) -> None:
        self.interventions = interventions
        self.saes = saes
        self.add_error = add_error
        self.n_more_tokens = n_more_tokens  # the last new token is written, but not read
        self.n_read: dict[str, int] = {}

    def __call__(self, position: str, acts: SAEActs) -> SAEActs:
        """What the SAE at a position is to have made. Nothing is changed in place."""
        here = [one for one in self.interventions if one.position == position]
        base = acts.target if self.add_error else acts.output
        if not here:
            return replace(acts, output=base)
        n_shown = acts.c.shape[1]
        is_first = position not in self.n_read
        self.n_read[position] = n_shown if is_first else self.n_read[position] + 1
        start = self.n_read[position] - n_shown
        sae, c, steering = self.saes.at(position), acts.c.clone(), torch.zeros_like(base)
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
            output = base + (sae.decode(c) - sae.decode(acts.c)) + steering
        return replace(acts, c=c, output=output)


def check_tokens(tokens: Iterable[int] | None, n_pos: int, setting: str) -> None:
    """Raise a `UserError` if a sequence of `n_pos` tokens does not have them. None: all it has."""
    for token in tokens or ():
        if not -n_pos <= token < n_pos:
            raise UserError(
                f"{setting}: there is no token {token} in a sequence of {n_pos}; give "
                f"{-n_pos} to {n_pos - 1}"
            )


def _rows(tokens: tuple[int, ...] | None, start: int, n_shown: int) -> Int[Tensor, " row"]:
    """Which rows of an activation are meant, the first of which belongs to token `start`."""
    if tokens is None:
        return torch.arange(n_shown)
    places = {token - start if token >= 0 else token + n_shown for token in tokens}
    return torch.tensor(sorted(places & set(range(n_shown))), dtype=torch.long)
