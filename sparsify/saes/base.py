"""Base class of all kinds of SAE.

Dimensions: `*sample` is any leading batch and position dimensions, `d_act` the width of the
hooked activation, `d_out` that of the output (the same, except in a transcoder), `n_dict` the
number of dictionary elements.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.saes.acts import SAEActs


@dataclass(frozen=True)
class NewElements:
    """Activations from which dictionary elements are reset."""

    index: Int[Tensor, " some"]
    """Index of each element."""

    inputs: Float[Tensor, "some d_act"]
    """Activation that each is to read."""

    targets: Float[Tensor, "some d_out"]
    """Activation that each is to write."""

    mean_input: Float[Tensor, " d_act"]
    """Mean of all inputs."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder: `encode` makes a sparse code, `decode` an activation from it."""

    row_sparse_grads: bool = False
    """Gradients of matrices may be sparse COO tensors, which hold the rows of active elements
    alone. The optimizer must take them, as that of `build_adam` does."""

    is_fitted: ClassVar[bool] = False
    """`fit` sets what is used outside training, such as a threshold. Call it before such use."""

    other_weights: tuple[float, ...] = ()
    """Weight of each other output that is trained to stand in for the activation, such as that of
    a part of the dictionary. Errors of the output itself have weight 1."""

    def __init__(self, d_act: int, n_dict: int, d_out: int | None = None) -> None:
        super().__init__()
        self.d_act = d_act
        self.n_dict = n_dict
        self.d_out = d_out or d_act

    @property
    def is_trained(self) -> bool:
        """True if any of its parameters has a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @abstractmethod
    def encode(self, input: Float[Tensor, "*sample d_act"]) -> Float[Tensor, "*sample n_dict"]:
        """The sparse code `c` of an activation."""

    @abstractmethod
    def decode(self, c: Float[Tensor, "*sample n_dict"]) -> Float[Tensor, "*sample d_out"]:
        """The activation that a sparse code stands for."""

    def decode_beside(
        self, c: Float[Tensor, "*sample n_dict"], input: Float[Tensor, "*sample d_act"]
    ) -> Float[Tensor, "*sample d_out"]:
        """What `decode` returns, in the scale of an input, where a kind scales what it reads."""
        return self.decode(c)

    @property
    @abstractmethod
    def dict_elements(self) -> Float[Tensor, "n_dict d_out"]:
        """The directions that the code's entries write, each of unit norm."""

    def forward(self, input: Float[Tensor, "*sample d_act"]) -> SAEActs:
        """The input, its code and its reconstruction."""
        c = self.encode(input)
        return SAEActs(input=input, c=c, output=self.decode(c))

    def other_output(self, acts: SAEActs, index: int) -> Float[Tensor, "*sample d_out"]:
        """The other output whose weight is `other_weights[index]`."""
        raise IndexError(f"{type(self).__name__} has no other output {index}")

    def learn_from(self, acts: SAEActs) -> None:
        """Learn from a training batch what no gradient teaches."""

    def fit(self, inputs: Float[Tensor, "some d_act"]) -> None:
        """Fit what is used outside training to the weights, and to inputs as they are now."""

    def project_gradients(self) -> None:
        """Remove from the gradients what the constraints would undo. Before each step."""

    def restore_constraints(self) -> None:
        """Bring the parameters back to where the constraints hold. After each step."""

    @abstractmethod
    def element_parameters(self) -> list[nn.Parameter]:
        """Parameters with a row for each dictionary element."""

    @abstractmethod
    def reset_elements(self, new: NewElements) -> None:
        """Reset elements so that each reads an input and writes its target."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the modules of a model are in eval mode; then each is as it was."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
