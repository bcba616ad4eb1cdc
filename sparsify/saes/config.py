"""Configs of the SAE kinds. `sparsify.saes.build` turns one into a module."""

from typing import Literal

from sparsify.base_config import BaseConfig, PositiveFinite


class ReLUSAEConfig(BaseConfig):
    """An SAE with a ReLU and decoder columns of unit norm (Braun et al. 2024)."""

    kind: Literal["relu"] = "relu"
    """Tells the kinds apart."""

    dict_size_to_input_ratio: PositiveFinite
    """Dictionary elements per dimension of the activation; their product is rounded down."""


# A second kind makes this a union, discriminated by `kind`.
SAEConfig = ReLUSAEConfig
