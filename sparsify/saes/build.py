"""From the config of an SAE to the module."""

from sparsify.base_config import UserError
from sparsify.saes.base import SAE
from sparsify.saes.config import SAEConfig
from sparsify.saes.relu import ReLUSAE
from sparsify.secrets import one_line


def build_sae(config: SAEConfig, d_act: int) -> SAE:
    """A new SAE, initialised from torch's global random state.

    Args:
        config: Kind and size.
        d_act: Width of the activation that the SAE reads.

    Raises:
        UserError: The ratio leaves no dictionary element.
    """
    ratio = config.dict_size_to_input_ratio
    n_dict = int(ratio * d_act)
    if n_dict < 1:
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} is less than one "
            f"dictionary element; set it to {1 / d_act:.2g} or more"
        )
    try:
        return ReLUSAE(d_act, n_dict)
    except (RuntimeError, TypeError) as error:  # TypeError: more than torch can count
        raise UserError(
            f"dict_size_to_input_ratio: {ratio} of an activation of width {d_act} makes {n_dict} "
            f"dictionary elements, which do not fit into memory; lower it ({one_line(error)[:300]})"
        ) from None
