"""Builds an SAE from its config."""

from sparsify.saes.base import SAE
from sparsify.saes.config import LinearSAEConfig, SAEConfig
from sparsify.saes.linear import LinearSAE
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line


def build_sae(config: SAEConfig, d_act: int, d_out: int | None = None) -> SAE:
    """Return a new SAE, initialised from torch's global random state.

    Args:
        config: Kind and size.
        d_act: Width of the activation that the SAE reads.
        d_out: Width of the activation at another hook point, which it writes. None: it writes
            where it reads.

    Raises:
        UserError: The ratio leaves no dictionary element, fewer than are to be active, or more than
            fit into memory, or a setting of the kind does not suit their number.
    """
    ratio = config.dict_size_to_input_ratio
    n_dict = int(ratio * d_act)
    if n_dict < 1:
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} is less than one "
            f"dictionary element; set it to {1 / d_act:.2g} or more"
        )
    for name, count in config.element_counts.items():
        if count is not None and count > n_dict:
            raise UserError(
                f"saes.{name} ({count}) is above the number of dictionary elements, {n_dict} "
                f"(dict_size_to_input_ratio {ratio} * {d_act}); lower it"
            )
    try:
        sae = config.build(d_act, n_dict, d_out)
        if isinstance(config, LinearSAEConfig):
            _adapt(sae, config)
        return sae
    except (RuntimeError, TypeError) as error:  # TypeError: more than torch can count
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} makes {n_dict} "
            f"dictionary elements, which do not fit into memory; lower it ({one_line(error)[:300]})"
        ) from None


def _adapt(sae: SAE, config: LinearSAEConfig) -> None:
    assert isinstance(sae, LinearSAE), "the config of another kind derives from SAEConfig"
    sae.input_scaling = config.input_scaling
    if config.centred is not None:
        sae.is_centred = config.centred
    if sae.is_centred and sae.reads_elsewhere:
        raise UserError(
            "saes.centred: true has no meaning where SAEs read another hook point than they "
            "write, whose middle the decoder's bias is; remove it"
        )
    if config.decoder_norm == "free":
        sae.decoder_norm = "free"
    if config.skip:
        sae.add_skip()
