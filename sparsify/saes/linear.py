"""Base class of the kinds whose encoder and decoder are affine maps.

Dimensions as in `sparsify.saes.base`.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.kernels.sparse import decode_active, find_active
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE, NewElements
from sparsify.saes.input_scaling import Scale, scale_of, scaled, unscaled
from sparsify.saes.scaling_names import InputScaling

RESET_ENCODER_SCALE = 0.2
"""Norm of a reset element's encoder row, relative to the others' mean (Bricken et al. 2023)."""


class Decoder(nn.Module):
    """`nn.Linear(n_dict, d_out)` with an orthogonal weight, stored one dictionary element per row.

    An element thus lies in one piece of memory, and a gradient can be that of some elements alone.
    In a state dict the weight is that of `nn.Linear`.
    """

    def __init__(self, d_out: int, n_dict: int) -> None:
        super().__init__()
        linear = nn.Linear(n_dict, d_out)
        nn.init.orthogonal_(linear.weight)
        self.elements = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias
        self.register_state_dict_post_hook(_store_columns)
        self.register_load_state_dict_pre_hook(_load_columns)

    @property
    def weight(self) -> Float[Tensor, "d_out n_dict"]:
        """The elements as columns: a view, which shares their memory."""
        return self.elements.T

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the elements to unit norm."""
        self.elements.div_(self.elements.norm(dim=1, keepdim=True).clamp_(min=1e-12))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take the part along each element, of unit norm, out of its gradient."""
        gradient = self.elements.grad
        if gradient is None:
            return
        rows, elements = gradient, self.elements
        if gradient.is_sparse:
            rows, elements = gradient._values(), elements[gradient._indices()[0]]
        rows.addcmul_(elements, torch.linalg.vecdot(rows, elements)[:, None], value=-1)


def _store_columns(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object
) -> None:  # `Any`: as torch declares it
    # Safetensors takes no tensor whose memory is in another order than its dimensions.
    weight = state_dict.pop(f"{prefix}elements").T.contiguous()
    # The bias last, as in `nn.Linear`.
    state_dict |= {f"{prefix}weight": weight, f"{prefix}bias": state_dict.pop(f"{prefix}bias")}


def _load_columns(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object
) -> None:  # `Any`: as torch declares it
    if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
        state_dict[f"{prefix}elements"] = weight.T.contiguous()


class LinearSAE(SAE):
    """Kind of SAE that only has to say how its code is made of pre-activations.

        pre_acts = W_enc (input - b_dec) + b_enc
        c        = activate(pre_acts)
        output   = D c + b_dec

    `LinearSAEConfig` has what may differ: no centring, a free norm of the elements, a scaling of
    the input (which the output undoes), a skip from input to output, another hook point as input.

    Elements keep unit norm: what would change it is taken out of their gradient, and they are
    scaled back after each step (Bricken et al. 2023, "Towards Monosemanticity"). The decoder starts
    from directions that are as orthogonal as there is room for, the encoder as its transpose, or
    as any `nn.Linear` if it reads another hook point, and both biases at zero (Gao et al. 2024,
    arXiv:2406.04093).

    Args:
        d_act: Width of the activation that is read.
        n_dict: Dictionary elements.
        d_out: Width of the activation at another hook point, which is written. None: what is read
            is written.
    """

    is_centred: bool = True
    """The decoder's bias is subtracted before encoding. Never if another hook point is read."""

    decoder_norm: Literal["held", "scaled", "free"] = "held"
    """Elements are held at unit norm, or have any norm and are scaled to it when they are used, or
    have any norm and are used as they are."""

    input_scaling: InputScaling = "none"
    """Scaling of each token that is read, undone where it is written back."""

    code_is_pre_acts: ClassVar[bool] = True
    """Each active entry of the code is its pre-activation, so that active elements alone are
    decoded and differentiated where it pays. A kind that changes it, as by a square, says False."""

    keeps_pre_acts: bool = False
    """Pre-activations are kept for a loss that reads them."""

    def __init__(self, d_act: int, n_dict: int, d_out: int | None = None) -> None:
        super().__init__(d_act, n_dict, d_out)
        self.encoder: nn.Module = nn.Linear(d_act, n_dict)
        self.decoder = Decoder(self.d_out, n_dict)
        self.skip: nn.Linear | None = None
        """Leads directly from the input to the output. Not a part of the code."""
        self.reads_elsewhere = d_out is not None
        """Reads another hook point than it writes."""
        if self.reads_elsewhere:
            self.is_centred = False
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set the parameters, from a decoder that is orthogonal, to where training starts."""
        self.decoder.normalise()
        if not self.reads_elsewhere:
            self.affine.weight.copy_(self.decoder.elements)
        self.affine.bias.zero_()
        self.decoder.bias.zero_()

    @property
    def affine(self) -> nn.Linear:
        """The encoder's affine map."""
        assert isinstance(self.encoder, nn.Linear)
        return self.encoder

    @abstractmethod
    def activate(
        self, pre_acts: Float[Tensor, "*sample n_dict"]
    ) -> Float[Tensor, "*sample n_dict"]:
        """The code made of pre-activations, whose memory it may take.

        Where an entry of the code is not zero, it is the pre-activation itself; a kind for which
        that is not so has a `forward` of its own.
        """

    def add_skip(self) -> None:
        """Add a matrix from the input to the output, which starts at zero."""
        self.skip = nn.Linear(self.d_act, self.d_out, bias=False)
        nn.init.zeros_(self.skip.weight)

    def centred(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample d_act"]:
        """Input of the encoder's affine map: scaled, and less the decoder's bias if centred."""
        read = scaled(input, scale_of(input, self.input_scaling))
        return read - self.decoder.bias if self.is_centred else read

    def pre_acts_of(
        self, input: Float[Tensor, "*sample d_act"], index: Int[Tensor, " some"]
    ) -> Float[Tensor, "*sample some"]:
        """Pre-activations of some elements, whose gradient reaches these alone."""
        return F.linear(
            self.centred(input).detach(), self.affine.weight[index], self.affine.bias[index]
        )

    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """Non-negative activations of the dictionary elements."""
        return self.activate(self.affine(self.centred(input)))

    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_out"]:
        """Sum of the dictionary elements, weighted by `c`, plus the decoder's bias."""
        return F.linear(c, self.used_elements.T, self.decoder.bias)

    def decode_beside(
        self, c: Float[Tensor, "*sample n_dict"], input: Float[Tensor, "*sample d_act"]
    ) -> Float[Tensor, "*sample d_out"]:
        """What `decode` returns, in the scale of the input."""
        return unscaled(self.decode(c), self._scale_written(input))

    def written_by(
        self,
        c: Float[Tensor, "*sample some"],
        index: Int[Tensor, " some"],
        input: Float[Tensor, "*sample d_act"],
    ) -> Float[Tensor, "*sample d_out"]:
        """The part of the output that some elements alone write."""
        part = F.linear(c, self.used_elements[index].T)
        scale = self._scale_written(input)
        return part if scale is None else part * scale.factor

    def output_of(
        self, decoded: Float[Tensor, "*sample d_out"], input: Float[Tensor, "*sample d_act"]
    ) -> Float[Tensor, "*sample d_out"]:
        """What is written, from what a code stands for: in the input's scale, plus the skip."""
        output = unscaled(decoded, self._scale_written(input))
        return output if self.skip is None else output + self.skip(input)

    def _scale_written(self, input: Float[Tensor, "*sample d_act"]) -> Scale | None:
        # Another hook point has a scale of its own.
        return None if self.reads_elsewhere else scale_of(input, self.input_scaling)

    def acts_of(
        self,
        input: Float[Tensor, "*sample d_act"],
        c: Float[Tensor, "*sample n_dict"],
        decoded: Float[Tensor, "*sample d_out"] | None = None,
        **others: Tensor | None,
    ) -> SAEActs:
        """The activations of a pass, from a code and, unless it is None, what it stands for."""
        output = self.output_of(self.decode(c) if decoded is None else decoded, input)
        free = self.decoder_norm == "free"
        norms = self.decoder.elements.norm(dim=1) if free else None
        return SAEActs(input=input, c=c, output=output, norms=norms, **others)

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction, computed from active elements if it pays."""
        centred = self.centred(input)
        pre_acts = self.affine(centred)
        c = self.activate(pre_acts)
        kept = pre_acts if self.keeps_pre_acts else None
        entries = find_active(c, self.d_act) if self.code_is_pre_acts else None
        if entries is None:
            return self.acts_of(input, c, pre_acts=kept)
        c, decoded = decode_active(
            entries,
            c,
            centred,
            self.affine.weight,
            self.affine.bias,
            self.decoder.elements,
            self.decoder.bias,
            is_unit_norm=self.decoder_norm != "scaled",
            row_sparse_grads=self.row_sparse_grads,
        )
        return self.acts_of(input, c, decoded, pre_acts=kept)

    @property
    def used_elements(self) -> Float[Tensor, "n_dict d_out"]:
        """The decoder's elements as `decode` uses them."""
        elements = self.decoder.elements
        return F.normalize(elements, dim=1) if self.decoder_norm == "scaled" else elements

    @property
    def dict_elements(self) -> Float[Tensor, "n_dict d_out"]:
        """The decoder's elements, of unit norm."""
        elements = self.decoder.elements
        return elements if self.decoder_norm == "held" else F.normalize(elements, dim=1)

    def project_gradients(self) -> None:
        """Take out of the decoder's gradient what would change the norm of its elements."""
        if self.decoder_norm == "held":
            self.decoder.project_gradient()

    def restore_constraints(self) -> None:
        """Scale the decoder's elements to unit norm."""
        if self.decoder_norm == "held":
            self.decoder.normalise()

    def element_parameters(self) -> list[nn.Parameter]:
        """The encoder's weight and bias, and the decoder's elements."""
        encoder = list(self.affine.parameters())
        return [*encoder, self.decoder.elements]

    @torch.no_grad()
    def reset_elements(self, new: NewElements) -> None:
        """Reset elements so that each reads an input and writes its target.

        As in Bricken et al. 2023 the encoder's rows get a fifth of the mean norm of the other rows,
        here with those of dead elements for which there was no input, and the encoder's bias is
        zero there. Unlike there, directions are those of inputs and targets less the decoder's
        bias. If the encoder does not subtract that, the mean input takes its place, and the
        encoder's bias is what subtracting it comes to. Elements of free norm get the others' mean.
        A skip's part of the target is not written by elements.
        """
        scaling = scale_of(new.inputs, self.input_scaling)
        inputs, targets, mean_input = scaled(new.inputs, scaling), new.targets, new.mean_input
        if self.skip is not None:
            targets = targets - self.skip(new.inputs)
        if scaling is not None:
            mean_input = inputs.mean(dim=0)
        if (written := self._scale_written(new.inputs)) is not None:
            targets = targets if written.shift is None else targets - written.shift
            targets = targets / written.factor
        others = torch.ones(self.n_dict, dtype=torch.bool, device=new.index.device)
        others[new.index] = False
        others = others if others.any() else ~others
        scale = RESET_ENCODER_SCALE * self.affine.weight[others].norm(dim=1).mean()
        free = self.decoder_norm == "free"
        norm = self.decoder.elements[others].norm(dim=1).mean() if free else 1.0
        centre = self.decoder.bias if self.is_centred else mean_input
        rows = scale * F.normalize(inputs - centre, dim=1)
        self.affine.weight[new.index] = rows
        self.affine.bias[new.index] = 0.0 if self.is_centred else -(rows @ centre)
        self.decoder.elements[new.index] = norm * F.normalize(targets - self.decoder.bias, dim=1)
