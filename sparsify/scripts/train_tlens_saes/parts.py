"""The parts of a run: what is opened of all that its config names, before anything is trained."""

from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.data.loader import TokenLoader
from sparsify.runs.saved import build_sae_transformer
from sparsify.runs.text import load_eval_batches, open_text
from sparsify.sae_transformer import SAETransformer
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.settings.base_config import UserError
from sparsify.tlens.loading import resolve_device
from sparsify.training.compilation import compile_kernels
from sparsify.training.forward_plan import ForwardPlan, derive_plan
from sparsify.training.precision import set_precision
from sparsify.training.random_state import set_seed


@dataclass(frozen=True)
class Parts:
    """What a run works with."""

    model: SAETransformer
    plan: ForwardPlan
    loader: TokenLoader
    eval_batches: list[Tensor]
    """The same for every evaluation."""


def open_parts(config: Config) -> Parts:
    """The parts that a config names.

    Raises:
        UserError: One is not there, or they do not suit each other.
    """
    set_seed(config.seed)
    model = build_sae_transformer(config, resolve_device(config.device))
    set_precision(model, config.mixed_precision)
    check_suits(config, model)
    if config.compile:
        compile_kernels(model)
    return Parts(
        model=model,
        plan=derive_plan(model, config.loss),
        loader=open_text(config, config.train_data, model.tlens_model),
        eval_batches=load_eval_batches(config, model.tlens_model),
    )


def check_suits(config: Config, model: SAETransformer) -> None:
    """Raise a `UserError` if a model cannot be evaluated, or has too few elements."""
    if config.eval_data is not None:
        model.hooked_model.check_unembedding()
    target = config.loss.sparsity.target_l0 if config.loss.sparsity else None
    for position in model.raw_sae_positions:
        n_dict = model.saes.at(position).n_dict
        if target is not None and target > n_dict:
            raise UserError(
                f"loss.sparsity.target_l0 ({target:g}) is above the number of dictionary elements "
                f"at '{position}', {n_dict}; lower it"
            )


def trained_parameters(model: SAETransformer) -> list[nn.Parameter]:
    """The SAEs' parameters that are not frozen.

    Raises:
        UserError: There are none.
    """
    parameters = [p for p in model.saes.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(
            "saes.retrain_saes: false leaves nothing to train, since all SAEs come from "
            "pretrained_sae_paths; set it to true"
        )
    return parameters
