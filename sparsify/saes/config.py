"""Configs of the SAE kinds. `sparsify.saes.build` turns one into a module."""

from typing import Annotated, Literal

from pydantic import Field

from sparsify.base_config import BaseConfig


class ReLUSAEConfig(BaseConfig):
    """An SAE with a ReLU and decoder columns of unit norm (Braun et al. 2024)."""

    kind: Literal["relu"] = "relu"
    """Tells the kinds apart."""

    dict_size_to_input_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Dictionary elements per dimension of the activation; their product is rounded down."""


# A second kind makes this a union, discriminated by `kind`.
SAEConfig = ReLUSAEConfig
