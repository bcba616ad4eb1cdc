"""SAEs by hook point."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsify.saes.acts import Acts, SAEActs
from sparsify.saes.base import SAE
from sparsify.settings.base_config import UserError


def sae_key(position: str) -> str:
    """Name of an SAE's module and of its weights in a checkpoint: "-" replaces each "."."""
    return position.replace(".", "-")


def position_of(key: str) -> str:
    """Hook point whose `sae_key` is `key`."""
    return key.replace("-", ".")  # no hook point has a "-" in its name


class SAEDict(nn.ModuleDict):
    """SAEs by hook point: `saes["blocks.3.hook_resid_post"]`.

    The keys that it lists are those of the weights, `blocks-3-hook_resid_post`, as the name of a
    module has no dot. Both forms find an SAE.
    """

    def __getitem__(self, key: str) -> SAE:
        sae = super().__getitem__(sae_key(key))
        assert isinstance(sae, SAE)
        return sae

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(sae_key(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(sae_key(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(sae_key(key))

    def at(self, position: str) -> SAE:
        """The SAE at a hook point, as `self[position]`."""
        return self[position]

    def read(
        self,
        position: str,
        act: Float[Tensor, "batch pos ..."],
        replaced: Float[Tensor, "batch pos ..."] | None = None,
    ) -> SAEActs:
        """Activations of the SAE at a hook point. Heads of what it reads, if any, are flattened.

        The SAE computes in its own precision, whatever that of the model is.

        Args:
            position: Where the SAE writes.
            act: Activation that it reads.
            replaced: Activation where it writes. None: `act`.
        """
        sae = self[position]
        parameter = next(sae.parameters(), None)
        act = act.flatten(start_dim=2)
        with torch.autocast(act.device.type, enabled=False):
            acts = sae(act if parameter is None else act.to(parameter))
        if replaced is None:
            return acts
        return replace(acts, replaced=replaced.flatten(start_dim=2).to(acts.output))

    def read_given(self, reads: Mapping[str, str], given: Mapping[str, Tensor]) -> Acts:
        """Activations of SAEs that read given activations, without a model.

        Args:
            reads: The hook point that each SAE reads, by the one where it writes.
            given: Activations by hook point, among them all that SAEs read and replace.

        Raises:
            UserError: One of them is missing.
        """
        acts = Acts()
        for position, source in reads.items():
            if missing := sorted({source, position} - set(given)):
                raise UserError(f"orig_acts: has no activation for {', '.join(missing)}; give it")
            replaced = None if source == position else given[position]
            acts[position] = self.read(position, given[source], replaced)
        return acts
