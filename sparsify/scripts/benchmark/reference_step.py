"""A training step the plain way, as the original system takes it. Slow on purpose.

Two full forward passes from the tokens (a local mix stops its only one behind the SAE), whole
logits, both log-softmaxed, a dense SAE whose decoder is normalised in each pass, float32, and
torch's Adam as it comes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.losses.loss import LossConfig
from sparsify.saes.base import SAE
from sparsify.tlens.hooked_model import TLensModel


class ReferenceStepper:
    """Trains a copy of an SAE."""

    def __init__(
        self, model: TLensModel, sae: SAE, position: str, loss: LossConfig, lr: float
    ) -> None:
        self.model = model
        self.position = position
        self.loss = loss
        weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        self.w_enc, self.b_enc, self.w_dec, self.b_dec = (
            nn.Parameter(weights[name])
            for name in ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
        )
        self.parameters = [self.w_enc, self.b_enc, self.w_dec, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=lr)

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step; returns the loss."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return self.float32_step(tokens)
        finally:
            torch.set_float32_matmul_precision(precision)

    def float32_step(self, tokens: Tensor) -> Tensor:
        """One optimizer step in the precision that is set; returns the loss."""
        loss = self.local_loss(tokens) if self.loss.out_to_in else self.spliced_loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.adam.step()
        self.adam.zero_grad()
        return loss.detach()

    def local_loss(self, tokens: Tensor) -> Tensor:
        """Sparsity and error at the SAE."""
        assert self.loss.out_to_in is not None
        acts: dict[str, Tensor] = {}
        block = int(self.position.split(".")[1])
        with torch.no_grad(), self.model.hooks(fwd_hooks=keep(acts, [self.position])):
            # One block more than is needed, as the hook point is inside it.
            self.model(tokens, stop_at_layer=block + 1)
        c, output = self.sae(acts[self.position])
        error = F.mse_loss(output, acts[self.position])
        return self.loss.out_to_in.coeff * error + self.sparsity(c)

    def spliced_loss(self, tokens: Tensor) -> Tensor:
        """Sparsity, KL of the output, and error at later hook points."""
        assert self.loss.logits_kl is not None
        later = self.loss.in_to_orig.hook_positions if self.loss.in_to_orig else []
        orig_acts: dict[str, Tensor] = {}
        new_acts: dict[str, Tensor] = {}
        codes: list[Tensor] = []

        def splice(act: Tensor, hook: object) -> Tensor:
            c, output = self.sae(act)
            codes.append(c)
            return output

        with torch.no_grad(), self.model.hooks(fwd_hooks=keep(orig_acts, later)):
            orig_logits = self.model(tokens)
        with self.model.hooks(fwd_hooks=[(self.position, splice), *keep(new_acts, later)]):
            new_logits = self.model(tokens)
        loss = self.sparsity(codes[0]) + self.loss.logits_kl.coeff * F.kl_div(
            F.log_softmax(new_logits.flatten(end_dim=-2), dim=-1),
            F.log_softmax(orig_logits.flatten(end_dim=-2), dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        if self.loss.in_to_orig is not None:
            for position in later:
                error = F.mse_loss(new_acts[position], orig_acts[position])
                loss = loss + self.loss.in_to_orig.position_coeff * error
        return loss

    def sae(self, act: Tensor) -> tuple[Tensor, Tensor]:
        """The code, and what is written."""
        c = F.relu(F.linear(act, self.w_enc, self.b_enc))
        return c, F.linear(c, F.normalize(self.w_dec, dim=0), self.b_dec)

    def sparsity(self, c: Tensor) -> Tensor:
        """The weighted L1 norm of the code per dimension of the activation."""
        assert self.loss.sparsity is not None
        norm = torch.norm(c, p=self.loss.sparsity.p_norm, dim=-1).mean()
        return self.loss.sparsity.coeff * norm / self.w_enc.shape[1]


def keep(acts: dict[str, Tensor], positions: list[str]) -> list[tuple[str, object]]:
    """TransformerLens hooks that put activations into `acts`, by the name asked for."""

    def keep_as(position: str) -> object:
        return lambda act, hook: acts.__setitem__(position, act)

    return [(position, keep_as(position)) for position in positions]
