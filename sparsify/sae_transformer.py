"""A TransformerLens model with SAEs spliced into chosen hook points."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.saes.acts import Acts, SAEActs
from sparsify.saes.base import eval_mode
from sparsify.saes.build import build_sae
from sparsify.saes.config import ReLUSAEConfig, SAEConfig
from sparsify.settings.base_config import UserError, validate_config
from sparsify.splicing.edits import Edit
from sparsify.splicing.hooks import cache_hooks, check_fired, keep_hooks, splice_hooks
from sparsify.splicing.interventions import Intervention
from sparsify.splicing.positions import act_widths, reads_of
from sparsify.splicing.sae_dict import SAEDict
from sparsify.tlens.hook_names import check_hook_names, stop_block
from sparsify.tlens.hooked_model import Hook, HookedModel, Prefix, TLensModel


class SAETransformer(nn.Module):
    """A frozen language model, and trainable SAEs that can stand in for its activations.

    Args:
        tlens_model: `HookedTransformer` or `TransformerBridge`. Its parameters are frozen.
        raw_sae_positions: Full names of the hook points that get an SAE, or a single one. An
            activation with a dimension for heads (`hook_z`) is flattened over heads.
        dict_size_to_input_ratio: Dictionary elements per dimension of the activation, for ReLU
            SAEs. None: `sae` is given.
        sae: Config of the SAEs, one for all positions. None: `dict_size_to_input_ratio` is given.
        read_positions: For transcoders, the hook point that each reads, in the order of
            `raw_sae_positions`, where they write. None: SAEs read where they write.

    Raises:
        UserError: A position repeats, is not a hook point, or has no activation vector per token,
            what a transcoder reads does not come before what it writes, or both or none of
            `dict_size_to_input_ratio` and `sae` are given.
    """

    def __init__(
        self,
        tlens_model: TLensModel,
        raw_sae_positions: Sequence[str] | str,
        dict_size_to_input_ratio: float | None = None,
        *,
        sae: SAEConfig | None = None,
        read_positions: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        if (dict_size_to_input_ratio is None) == (sae is None):
            raise UserError("give either dict_size_to_input_ratio or sae, and not both")
        if dict_size_to_input_ratio is not None:
            sizes = {"dict_size_to_input_ratio": dict_size_to_input_ratio}
            sae = validate_config(ReLUSAEConfig, sizes, "the SAE")
        assert sae is not None
        self.tlens_model: TLensModel = tlens_model.eval().requires_grad_(False)
        self.hooked_model = HookedModel(tlens_model)
        positions = _names(raw_sae_positions, [])
        reads = reads_of(sae, positions, _names(read_positions, []))
        widths = act_widths(self.hooked_model, positions, reads)
        self.raw_sae_positions = [position for position in widths if position in positions]
        self.reads = {position: reads[position] for position in self.raw_sae_positions}
        """The hook point that each SAE reads, which is where it writes but for a transcoder."""
        self.saes = SAEDict(
            {
                position: build_sae(sae, d_act=widths[self.reads[position]], d_out=widths[position])
                for position in self.raw_sae_positions
            }
        )
        self.saes.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model is, and its SAEs."""
        return next(self.tlens_model.parameters()).device

    def forward_raw(
        self,
        tokens: Int[Tensor, "batch pos"],
        run_entire_model: bool = True,
        final_layer: int | None = None,
        cache_positions: Sequence[str] | str | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"] | None, dict[str, Tensor]]:
        """Run the model as it was.

        Args:
            tokens: Token ids.
            run_entire_model: Whether to go on to the logits.
            final_layer: Block before which to stop if not `run_entire_model`. None: as soon as all
                activations are there.
            cache_positions: Hook points to keep besides the SAEs' own. None: no others.

        Returns:
            Logits, None if the run stopped before; the activation at each hook point.
        """
        self.hooked_model.check_length(tokens.shape[-1])
        acts: dict[str, Tensor] = {}
        positions = [*self.reads.values(), *self.raw_sae_positions, *_names(cache_positions, [])]
        check_hook_names(positions, self.tlens_model.hook_dict, "cache_positions")
        hooks = keep_hooks(positions, acts)
        logits = None
        if run_entire_model:
            logits = self.hooked_model.run_with_logits(tokens, hooks)
        else:
            stops = map(stop_block, positions)
            stop = max(stops) if final_layer is None else final_layer
            self.hooked_model.run(Prefix(tokens), hooks, stop, fused=False)
        if final_layer is None:
            check_fired(positions, acts)
        return logits, acts

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"] | None,
        sae_positions: Sequence[str] | str | None = None,
        cache_positions: Sequence[str] | str | None = None,
        orig_acts: Mapping[str, Tensor] | None = None,
        *,
        interventions: Sequence[Intervention] | Intervention = (),
        add_error: bool = False,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"] | None, Acts]:
        """Run the model with SAEs in place of activations.

        Args:
            tokens: Token ids. May be None if `orig_acts` is given.
            sae_positions: Positions whose SAE takes part. None or "all": each.
            cache_positions: Hook points to keep besides. None: no others.
            orig_acts: Raw activations by position. The model is then not run at all: each SAE reads
                its own entry, and there are no logits.
            interventions: Changes to what SAEs write, one after another.
            add_error: Whether what an SAE does not reconstruct is added to what it writes.

        Returns:
            Logits; by hook point, what each SAE read, its code and what it wrote, as they are after
            the interventions, or at `cache_positions` what passed, as `.input`, with heads flat.
        """
        positions = self.chosen(sae_positions)
        edit = self.edit(positions, interventions, add_error)
        if orig_acts is not None:
            if edit is not None:
                raise UserError(
                    "orig_acts: leaves out the pass, which interventions and add_error change; "
                    "give tokens alone, or none of these"
                )
            reads = {position: self.reads[position] for position in positions}
            return None, self.saes.read_given(reads, orig_acts)
        if tokens is None:
            raise ValueError("tokens may only be None if orig_acts is given")
        self.hooked_model.check_length(tokens.shape[-1])
        others = _names(cache_positions, [])
        check_hook_names(others, self.tlens_model.hook_dict, "cache_positions")
        acts = Acts()
        hooks = self.splice_hooks(positions, acts.__setitem__, cache_hooks(others, acts), edit)
        logits = self.hooked_model.run_with_logits(tokens, hooks)
        check_fired(others, acts)
        return logits, acts

    # No inference mode: what a model extends or caches in a call must serve training too.
    @torch.no_grad()
    def generate(
        self,
        input: str | Int[Tensor, "batch pos"],
        sae_positions: Sequence[str] | str | None = "all",
        *,
        interventions: Sequence[Intervention] | Intervention = (),
        add_error: bool = False,
        max_new_tokens: int = 10,
        **kwargs: Any,  # what TransformerLens's generate takes
    ) -> str | Int[Tensor, "batch new_pos"]:
        """Continue a text or tokens, as TransformerLens's `generate` does.

        Args:
            input: Prompt.
            sae_positions: Positions whose SAE takes part, or "all". None: the model as it was.
            interventions: As in `forward`. Their tokens are counted from the start of the prompt,
                its BOS token included, and on through what is generated.
            add_error: As in `forward`.
            max_new_tokens: How many tokens to add at most.
            **kwargs: Passed on: `temperature`, `top_k`, `do_sample`, ...
        """
        positions = self.chosen([] if sae_positions is None else sae_positions)
        edit = self.edit(positions, interventions, add_error, max_new_tokens)
        hooks = self.splice_hooks(positions, lambda position, acts: None, edit=edit)
        with eval_mode(self):
            return self.hooked_model.generate(input, hooks, max_new_tokens=max_new_tokens, **kwargs)

    def train(self, mode: bool = True) -> "SAETransformer":
        """Set the mode of the SAEs; the frozen model stays as it is used, without dropout."""
        super().train(mode)
        self.tlens_model.eval()
        return self

    def to_tokens(self, text: str | list[str]) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, with a BOS token where the model's tokenizer has one."""
        return self.tlens_model.to_tokens(text)

    def _apply(self, *args: Any, **kwargs: Any) -> "SAETransformer":  # what nn.Module takes
        # `to`, `cuda`, `double`, ... all move and cast by this method.
        super()._apply(*args, **kwargs)
        parameter = next(self.tlens_model.parameters())
        # TransformerLens makes tokens and caches where its config says the model is.
        self.tlens_model.cfg.device = str(parameter.device)
        self.tlens_model.cfg.dtype = parameter.dtype
        return self

    @staticmethod
    def from_local_path(path: str | Path, device: str = "cpu") -> "SAETransformer":
        """The model of a run folder, with its newest checkpoint, or of one checkpoint in it.

        Raises:
            UserError: There is no run, checkpoint or device, or they do not fit together.
        """
        from sparsify.runs.saved import load_run

        return load_run(Path(path), device)

    def splice_hooks(
        self,
        positions: Iterable[str],
        observe: Callable[[str, SAEActs], None],
        others: Mapping[str, Hook] = MappingProxyType({}),
        edit: Callable[[str, SAEActs], SAEActs] | None = None,
    ) -> dict[str, Hook]:
        """Hooks that put SAEs in place, and show what each did as it happens.

        Nothing else is kept: what `observe` does not keep is freed at once. What an SAE made is
        first changed by `edit`, if there is one.
        """

        def read(position: str, act: Tensor, replaced: Tensor | None) -> SAEActs:
            acts = self.saes.read(position, act, replaced)
            if edit is not None:
                acts = edit(position, acts)
            observe(position, acts)
            return acts

        return splice_hooks(
            {position: self.reads[position] for position in positions}, read, others
        )

    def chosen(self, sae_positions: Sequence[str] | str | None) -> list[str]:
        """Positions whose SAE takes part, each of which has one. None or "all": each."""
        every = self.raw_sae_positions
        positions = every if sae_positions == "all" else _names(sae_positions, every)
        self._check_have_saes(positions)
        return positions

    def edit(
        self,
        positions: Sequence[str],
        interventions: Sequence[Intervention] | Intervention,
        add_error: bool,
        n_new_tokens: int | None = None,
    ) -> Edit | None:
        """An `Edit` for one pass with the SAEs at `positions`. None: there is nothing to do."""
        if isinstance(interventions, Intervention):
            interventions = [interventions]
        if not interventions and not add_error:
            return None
        self._check_have_saes([one.position for one in interventions], "interventions")
        return Edit(
            interventions, self.saes, positions, add_error=add_error, n_new_tokens=n_new_tokens
        )

    def _check_have_saes(self, positions: Iterable[str], setting: str = "sae_positions") -> None:
        for position in positions:
            if position not in self.raw_sae_positions:
                raise UserError(
                    f"{setting}: there is no SAE at '{position}', only at "
                    f"{', '.join(self.raw_sae_positions)}"
                )


def _names(positions: Sequence[str] | str | None, default: list[str]) -> list[str]:
    if positions is None:
        return default
    return [positions] if isinstance(positions, str) else list(positions)
