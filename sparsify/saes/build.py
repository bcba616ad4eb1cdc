"""From the config of an SAE to the module."""

from sparsify.saes.base import SAE
from sparsify.saes.batch_topk import BatchTopKSAE
from sparsify.saes.codebook import CodebookSAE
from sparsify.saes.config import (
    BatchTopKSAEConfig,
    CodebookSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReLUSAEConfig,
    ReLUTiedBiasSAEConfig,
    SAEConfig,
    TopKSAEConfig,
    TranscoderConfig,
)
from sparsify.saes.gated import GatedSAE
from sparsify.saes.jumprelu import JumpReLUSAE
from sparsify.saes.matryoshka import MatryoshkaSAE
from sparsify.saes.relu import ReLUSAE
from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE
from sparsify.saes.topk import TopKSAE
from sparsify.saes.transcoder import Transcoder
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line


def build_sae(config: SAEConfig, d_act: int, d_out: int | None = None) -> SAE:
    """A new SAE, initialised from torch's global random state.

    Args:
        config: Kind and size.
        d_act: Width of the activation that the SAE reads.
        d_out: Width of the activation that a transcoder writes. None: `d_act`.

    Raises:
        UserError: The ratio leaves no dictionary element, or fewer than are to be active.
    """
    ratio = config.dict_size_to_input_ratio
    n_dict = int(ratio * d_act)
    if n_dict < 1:
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} is less than one "
            f"dictionary element; set it to {1 / d_act:.2g} or more"
        )
    for name in ("k", "multi_k"):
        if (getattr(config, name, None) or 0) > n_dict:
            raise UserError(
                f"saes.{name} ({getattr(config, name)}) is above the number of dictionary "
                f"elements, {n_dict} (dict_size_to_input_ratio {ratio} * {d_act}); lower it"
            )
    try:
        return _module(config, d_act, n_dict, d_out or d_act)
    except (RuntimeError, TypeError) as error:  # TypeError: more than torch can count
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} makes {n_dict} "
            f"dictionary elements, which do not fit into memory; lower it ({one_line(error)[:300]})"
        ) from None


def _module(config: SAEConfig, d_act: int, n_dict: int, d_out: int) -> SAE:
    match config:
        case ReLUSAEConfig():
            return ReLUSAE(d_act, n_dict)
        case ReLUTiedBiasSAEConfig():
            return ReLUTiedBiasSAE(d_act, n_dict)
        case TopKSAEConfig():
            return TopKSAE(d_act, n_dict, config.k, config.multi_k)
        case BatchTopKSAEConfig():
            return BatchTopKSAE(d_act, n_dict, config.k)
        case JumpReLUSAEConfig():
            return JumpReLUSAE(d_act, n_dict, config.bandwidth, config.initial_threshold)
        case GatedSAEConfig():
            return GatedSAE(d_act, n_dict)
        case MatryoshkaSAEConfig():
            sizes = [int(share * n_dict) for share in config.prefix_shares]
            if sizes[0] < 1 or len(set(sizes)) < len(sizes):
                raise UserError(
                    f"saes.prefix_shares ({config.prefix_shares}) of {n_dict} dictionary elements "
                    f"are {sizes}, which must be above 0 and different; leave some out"
                )
            return MatryoshkaSAE(d_act, n_dict, config.k, sizes)
        case CodebookSAEConfig():
            return CodebookSAE(d_act, n_dict, config.k)
        case TranscoderConfig():
            return Transcoder(d_act, n_dict, d_out, config.k, has_skip=config.skip)
