"""Attribution of a logit to active elements: gradient times activation in the spliced pass.

With c_j the activation of element j on a token, and L a logit, or the difference of two,

    attribution_j = c_j * dL / dc_j

is what L would lose if the element were ablated there, were L linear in c_j: the attribution
patching of Nanda 2023 and Syed et al. 2023 (arXiv:2310.10348) with zero in place of the corrupted
pass, on SAE elements as in Marks et al. 2024 (arXiv:2403.19647). One backward pass gives it for all
elements, where ablations take a forward pass for each.

The derivative is that of all that comes behind: the direct path to the logits and those through
later layers and later SAEs, whose codes and errors change as they do in a real ablation. What a
derivative cannot see is steps: elements that switch on or off, and the choice of a later codebook,
whose gradient is straight-through. Attributions to elements of one SAE may be added up; those to
one SAE and a later one overlap, as what the first does through the second is in both.

Dimensions as in `sparsify.saes.base`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsify.evaluation.batches import token_id
from sparsify.sae_transformer import SAETransformer
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE, eval_mode
from sparsify.settings.base_config import UserError
from sparsify.splicing.edits import check_tokens
from sparsify.tlens.hooked_model import HookedModel, Prefix
from sparsify.tlens.text import TokensOrText, as_tokens


@dataclass(frozen=True)
class Attribution:
    """The part of an element, on a token, in a logit."""

    position: str
    """The hook point where its SAE writes."""

    token: int
    """Place in the sequence, counted from 0."""

    element: int

    activation: float
    """Its entry in the code."""

    attribution: float
    """Activation times gradient, in units of the logit. Above zero it raises the logit."""


@dataclass(frozen=True)
class Attributions:
    """The parts of all active elements of one sequence in a logit."""

    logit: float
    """The logit, or difference of two, in the pass that was differentiated."""

    c: dict[str, Float[Tensor, "pos n_dict"]]
    """The code of each SAE by position."""

    values: dict[str, Float[Tensor, "pos n_dict"]]
    """Attributions in units of the logit; zero where the code is."""

    def top(self, n: int) -> list[Attribution]:
        """The n active elements whose attributions are furthest from zero, these first."""
        found: list[Attribution] = []
        for position, values in self.values.items():
            c = self.c[position]
            sizes = values.abs().where(c != 0, -1.0).flatten()
            for place in sizes.topk(min(n, int((c != 0).sum()))).indices.tolist():
                token, element = divmod(place, c.shape[1])
                at = token, element
                found.append(Attribution(position, *at, c[at].item(), values[at].item()))
        return sorted(found, key=lambda one: -abs(one.attribution))[:n]


def attribute_logit(
    model: SAETransformer,
    tokens: TokensOrText,
    vocab_id: int | str,
    *,
    minus: int | str | None = None,
    token: int = -1,
    sae_positions: Sequence[str] | str | None = "all",
    add_error: bool = False,
) -> Attributions:
    """Attributions of a logit to the active elements of SAEs, in eval mode.

    Args:
        model: Model and SAEs. Neither its gradients nor anything else of it is changed.
        tokens: One sequence: token ids, or a text, whose tokens are those of `to_tokens`.
        vocab_id: Token whose logit is attributed: its id, or its text if that is one token.
        minus: Token whose logit is subtracted, in the same way. None: none is.
        token: After which token of the sequence the logit is that of the next one, counted from 0,
            or from the end if negative.
        sae_positions: Positions whose SAE takes part. None or "all": each.
        add_error: Whether what SAEs do not reconstruct is added, so that the logit is that of the
            raw model, and later SAEs let through all that reaches them.

    Raises:
        UserError: There are several sequences, a position has no SAE, there is no such token or
            vocabulary id, a text is not one token, or the model has no tokenizer for a text.
    """
    positions = model.chosen(sae_positions)
    hooked = model.hooked_model
    hooked.check_unembedding()
    ids = as_tokens(model.tlens_model, tokens)
    vocab_id = token_id(model, vocab_id, "vocab_id")
    minus = None if minus is None else token_id(model, minus, "minus")
    _check(ids, token, [vocab_id, *([] if minus is None else [minus])], positions, hooked)
    seen: dict[str, SAEActs] = {}
    shifts: dict[str, Tensor] = {}

    def shift(position: str, acts: SAEActs) -> SAEActs:
        base = acts.target if add_error else acts.output
        seen[position] = acts
        shifts[position] = torch.zeros_like(base, requires_grad=True)
        return replace(acts, output=base + shifts[position])

    hooks = model.splice_hooks(positions, lambda position, acts: None, edit=shift)
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        # A clone, as tokens may come from inference mode.
        prefix = Prefix(ids.clone())
        resid = hooked.run(prefix, hooks, hooked.n_blocks)
        logits = hooked.unembed(resid[0, token])
        logit = logits[vocab_id] - (0.0 if minus is None else logits[minus])
        grads = torch.autograd.grad(logit, list(shifts.values()), materialize_grads=True)
        values = {
            position: code_attributions(model.saes.at(position), seen[position], grad)[0]
            for position, grad in zip(shifts, grads, strict=True)
        }
    c = {position: acts.c[0].detach() for position, acts in seen.items()}
    return Attributions(logit.item(), c, values)


def code_attributions(
    sae: SAE, acts: SAEActs, grad: Float[Tensor, "*sample d_out"]
) -> Float[Tensor, "*sample n_dict"]:
    """c_j * dL / dc_j, from the gradient of L by what the SAE writes."""
    with torch.enable_grad(), torch.autocast(acts.c.device.type, enabled=False):
        c = acts.c.detach().requires_grad_()
        (grad_c,) = torch.autograd.grad(sae.decode_beside(c, acts.input.detach()), c, grad)
    return c.detach() * grad_c


def _check(
    tokens: Int[Tensor, "batch pos"],
    token: int,
    vocab_ids: list[int],
    positions: list[str],
    model: HookedModel,
) -> None:
    if not positions:
        raise UserError("sae_positions: names no SAE to attribute to; give at least one")
    if len(tokens) != 1:
        raise UserError(
            f"tokens: have shape {tuple(tokens.shape)}; give one sequence, (1, position)"
        )
    model.check_length(tokens.shape[1])
    check_tokens([token], tokens.shape[1], "token")
    d_vocab = model.unembed.d_vocab
    if len(set(vocab_ids)) < len(vocab_ids):
        raise UserError(f"minus: is vocab_id itself, {vocab_ids[0]}; give another id, or None")
    for vocab_id in vocab_ids:
        if not 0 <= vocab_id < d_vocab:
            raise UserError(
                f"vocab_id: the vocabulary has no id {vocab_id}; give 0 to {d_vocab - 1}"
            )
