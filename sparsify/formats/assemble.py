"""Makes an SAE of this package from the parts that all formats have, and takes it apart again.

Dimensions: `d_act` is the width of what is read, `d_out` of what is written, `n_dict` the number of
dictionary elements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsify.saes.build import build_sae
from sparsify.saes.config import KINDS, SAEConfig
from sparsify.saes.linear import LinearSAE
from sparsify.settings.base_config import UserError, validate_config

UNIT_TOLERANCE = 1e-5
"""Norms that differ from 1 by no more count as 1."""

SMALLEST_THRESHOLD = torch.finfo(torch.float32).tiny
"""Stands for thresholds of zero and below, which a ReLU before them makes meaningless."""


@dataclass(frozen=True)
class Parts:
    """The weights of an SAE with an affine encoder and decoder."""

    encoder: Float[Tensor, "n_dict d_act"]
    encoder_bias: Float[Tensor, " n_dict"]
    decoder: Float[Tensor, "n_dict d_out"]
    """One dictionary element per row."""
    decoder_bias: Float[Tensor, " d_out"]
    skip: Float[Tensor, "d_out d_act"] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """What a kind has beside these, by its name in the state dict."""

    @property
    def has_unit_norm(self) -> bool:
        """Whether all elements have unit norm, but for rounding."""
        norms = self.decoder.norm(dim=1)
        return bool(((norms - 1).abs() <= UNIT_TOLERANCE).all())


def assemble(
    source: str,
    kind: str,
    parts: Parts,
    *,
    reads_elsewhere: bool = False,
    **settings: Any,
) -> tuple[LinearSAE, SAEConfig]:
    """Return an SAE with the given weights, which are not copied where they fit, and its config.

    Args:
        source: What to call the files in messages.
        kind: Name of the kind.
        parts: The weights, in float32.
        reads_elsewhere: Whether it reads another hook point than it writes.
        **settings: Settings of the kind. `decoder_norm` follows from the weights.

    Raises:
        UserError: Shapes do not fit together, numbers are not finite, or a setting has no meaning.
    """
    n_dict, d_act = _check_shapes(source, parts, reads_elsewhere=reads_elsewhere)
    content = {
        "kind": kind,
        "dict_size_to_input_ratio": ratio_of(n_dict, d_act),
        "decoder_norm": "unit" if parts.has_unit_norm else "free",
        "skip": parts.skip is not None,
        **settings,
    }
    config = validate_config(KINDS[kind], content, source)
    with torch.device("meta"):  # initial weights would take longer than all else
        sae = build_sae(config, d_act, parts.decoder.shape[1] if reads_elsewhere else None)
    assert isinstance(sae, LinearSAE)
    encoder = "encoder.0" if "encoder.0.weight" in sae.state_dict() else "encoder"
    state = {
        f"{encoder}.weight": parts.encoder,
        f"{encoder}.bias": parts.encoder_bias,
        "decoder.weight": parts.decoder.T,
        "decoder.bias": parts.decoder_bias,
        **parts.others,
    }
    if parts.skip is not None:
        state["skip.weight"] = parts.skip
    sae.load_state_dict(state, assign=True)
    return sae, config


def ratio_of(n_dict: int, d_act: int) -> float:
    """Return the `dict_size_to_input_ratio` that makes `n_dict` elements of a width."""
    ratio = n_dict / d_act
    # Their product is rounded down.
    return ratio if int(ratio * d_act) == n_dict else math.nextafter(ratio, math.inf)


def parts_of(sae: LinearSAE) -> Parts:
    """Return the weights of an SAE, with its elements as it uses them, on the CPU."""
    known = {"encoder", "encoder.0", "decoder", "skip"}
    others = {
        name: tensor.detach().cpu()
        for name, tensor in sae.state_dict().items()
        if name.rpartition(".")[0] not in known
    }
    return Parts(
        encoder=sae.affine.weight.detach().cpu(),
        encoder_bias=sae.affine.bias.detach().cpu(),
        decoder=sae.used_elements.detach().cpu(),
        decoder_bias=sae.decoder.bias.detach().cpu(),
        skip=None if sae.skip is None else sae.skip.weight.detach().cpu(),
        others=others,
    )


def log_thresholds(threshold: Float[Tensor, " n_dict"]) -> Float[Tensor, " n_dict"]:
    """Return the logarithms that a `JumpReLUSAE` holds of thresholds."""
    return threshold.float().clamp(min=SMALLEST_THRESHOLD).log()


def thresholds_of(log_threshold: Float[Tensor, " n_dict"]) -> Float[Tensor, " n_dict"]:
    """Return thresholds of which `log_thresholds` makes exactly these logarithms, where there are.

    The exponential in float32 is a few units of rounding off, and its logarithm another number.
    """
    nearest = log_threshold.exp().clamp(min=SMALLEST_THRESHOLD)
    result, below, above = nearest.clone(), nearest, nearest
    fits = log_thresholds(result) == log_threshold
    for _ in range(MAX_NUDGES):
        below = torch.nextafter(below, torch.zeros_like(below))
        above = torch.nextafter(above, torch.full_like(above, math.inf))
        for candidate in (below, above):
            is_better = ~fits & (log_thresholds(candidate) == log_threshold)
            result = torch.where(is_better, candidate, result)
            fits |= is_better
    return result


MAX_NUDGES = 8
"""Units of rounding by which an exponential is moved to find the threshold it came from."""


def fold_norms(parts: Parts) -> Parts:
    """Return the parts of the same function with elements of unit norm: encoders take the norms."""
    norms = parts.decoder.norm(dim=1)
    safe = norms.clamp(min=1e-12)
    return Parts(
        encoder=parts.encoder * norms[:, None],
        encoder_bias=parts.encoder_bias * norms,
        decoder=parts.decoder / safe[:, None],
        decoder_bias=parts.decoder_bias,
        skip=parts.skip,
        others=parts.others,
    )


def _check_shapes(source: str, parts: Parts, *, reads_elsewhere: bool) -> tuple[int, int]:
    if parts.encoder.ndim != 2:
        raise UserError(
            f"{source}: the encoder has shape {tuple(parts.encoder.shape)}, not that of a matrix"
        )
    n_dict, d_act = parts.encoder.shape
    d_out = parts.decoder.shape[-1] if reads_elsewhere and parts.decoder.ndim == 2 else d_act
    wanted = {
        "the encoder's bias": (parts.encoder_bias, (n_dict,)),
        "the decoder": (parts.decoder, (n_dict, d_out)),
        "the decoder's bias": (parts.decoder_bias, (d_out,)),
    }
    if parts.skip is not None:
        wanted["the skip"] = (parts.skip, (d_out, d_act))
    for name, tensor in parts.others.items():
        wanted[name] = (tensor, (n_dict,) if tensor.ndim else ())
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, but the encoder, of {n_dict} "
                f"elements for activations of width {d_act}, needs {shape}; the file is damaged, "
                "or not what its config says"
            )
    tensors = {
        "the encoder": parts.encoder,
        **{name: tensor for name, (tensor, _) in wanted.items()},
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds numbers that are not finite; use another copy")
    return n_dict, d_act
