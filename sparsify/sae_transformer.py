"""A TransformerLens model with SAEs spliced into chosen hook points."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.saes.acts import Acts, SAEActs
from sparsify.saes.base import SAE, eval_mode
from sparsify.saes.build import build_sae
from sparsify.saes.config import ReLUSAEConfig, SAEConfig, check_reads
from sparsify.settings.base_config import UserError, validate_config
from sparsify.settings.paths import with_home
from sparsify.splicing.edits import Edit
from sparsify.splicing.hooks import cache_hooks, check_fired, keep_hooks, splice_hooks
from sparsify.splicing.interventions import Intervention
from sparsify.splicing.positions import (
    act_widths,
    as_names,
    check_fits,
    check_have_saes,
    reads_of,
)
from sparsify.splicing.sae_dict import SAEDict
from sparsify.tlens.hook_names import check_hook_names, stop_block
from sparsify.tlens.hooked_model import Hook, HookedModel, Prefix, TLensModel
from sparsify.tlens.text import TokensOrText, as_tokens, check_equal_lengths
from sparsify.tlens.tlens_names import TLensNames, as_model


class SAETransformer(nn.Module, TLensNames):
    """A frozen language model, and trainable SAEs that can stand in for its activations.

    Args:
        tlens_model: `HookedTransformer` or `TransformerBridge`, or the name of a model, which is
            then loaded with folded layer norms. Its parameters are frozen.
        raw_sae_positions: Full names of the hook points that get an SAE, or a single one. An
            activation with a dimension for heads (`hook_z`) is flattened over heads.
        dict_size_to_input_ratio: Dictionary elements per dimension of the activation, for ReLU
            SAEs. None: `sae` is given.
        sae: Config of the SAEs, one for all positions. None: `dict_size_to_input_ratio` is given.
        saes: SAEs that are there already, for all positions. None: new ones are made.
        read_positions: The hook point that each SAE reads, in the order of `raw_sae_positions`,
            where they write. None: SAEs read where they write, which transcoders do not.

    Raises:
        UserError: There is no such model, a position repeats, is not a hook point, or has no
            activation vector per token, what an SAE reads elsewhere does not come before what
            it writes, not just one of `dict_size_to_input_ratio`, `sae` and `saes` is given, or
            those that are given do not fit.
    """

    def __init__(
        self,
        tlens_model: TLensModel | str,
        raw_sae_positions: Sequence[str] | str,
        dict_size_to_input_ratio: float | None = None,
        *,
        sae: SAEConfig | None = None,
        saes: Mapping[str, SAE] | None = None,
        read_positions: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        if [dict_size_to_input_ratio, sae, saes].count(None) != 2:
            raise UserError("give one of dict_size_to_input_ratio, sae and saes")
        if dict_size_to_input_ratio is not None:
            sizes = {"dict_size_to_input_ratio": dict_size_to_input_ratio}
            sae = validate_config(ReLUSAEConfig, sizes, "the SAE")
        self.tlens_model = as_model(tlens_model).eval().requires_grad_(False)
        self.hooked_model = HookedModel(self.tlens_model)
        positions = as_names(raw_sae_positions)
        if sae is not None:
            check_reads(sae, as_names(read_positions))
        if saes is not None and set(saes) != set(positions):
            raise UserError(
                f"saes: are at {', '.join(saes)}, but raw_sae_positions are {', '.join(positions)}"
            )
        reads = reads_of(positions, as_names(read_positions))
        widths = act_widths(self.hooked_model, positions, reads)
        self.raw_sae_positions = [position for position in widths if position in positions]
        self.reads = {position: reads[position] for position in self.raw_sae_positions}
        """The hook point that each SAE reads: the one where it writes, or another before it."""
        self.saes = SAEDict()
        for position, read in self.reads.items():
            d_act, d_out = widths[read], None if read == position else widths[position]
            if sae is not None:
                self.saes[position] = build_sae(sae, d_act, d_out)
            elif saes is not None:
                check_fits(saes[position], position, d_act, d_out)
                self.saes[position] = saes[position]
        self.saes.to(self.device)

    def forward_raw(
        self,
        tokens: TokensOrText,
        run_entire_model: bool = True,
        final_layer: int | None = None,
        cache_positions: Sequence[str] | str | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"] | None, dict[str, Tensor]]:
        """Run the model without SAEs.

        Args:
            tokens: Token ids, or text as in `forward`.
            run_entire_model: Whether to run as far as the logits.
            final_layer: Block before which to stop if not `run_entire_model`. None: as soon as all
                activations are there.
            cache_positions: Hook points to keep in addition to the SAEs' own. None: no others.

        Returns:
            Logits, None if the pass stopped before; the activation at each hook point.
        """
        ids = self._read_tokens(tokens)
        acts: dict[str, Tensor] = {}
        positions = [*self.reads.values(), *self.raw_sae_positions, *as_names(cache_positions)]
        check_hook_names(positions, self.hook_dict, "cache_positions")
        hooks = keep_hooks(positions, acts)
        logits = None
        if run_entire_model:
            logits = self.hooked_model.run_with_logits(ids, hooks)
        else:
            stop = max(map(stop_block, positions)) if final_layer is None else final_layer
            self.hooked_model.run(Prefix(ids), hooks, stop, fused=False)
        if final_layer is None:
            check_fired(positions, acts)
        return logits, acts

    def forward(
        self,
        tokens: TokensOrText | None,
        sae_positions: Sequence[str] | str | None = "all",
        cache_positions: Sequence[str] | str | None = None,
        orig_acts: Mapping[str, Tensor] | None = None,
        *,
        interventions: Sequence[Intervention] | Intervention = (),
        add_error: bool = False,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"] | None, Acts]:
        """Run the model with SAEs in place of activations.

        Args:
            tokens: Token ids, as a tensor of any integer type or as lists; or one text or several,
                of which the shorter are padded at their end. May be None if `orig_acts` is given.
            sae_positions: Positions whose SAE takes part. "all" or None: each. Empty: none.
            cache_positions: Hook points to keep in addition. None: no others.
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
        ids = self._read_tokens(tokens)
        others = as_names(cache_positions)
        check_hook_names(others, self.hook_dict, "cache_positions")
        acts = Acts()
        hooks = self.splice_hooks(positions, acts.__setitem__, cache_hooks(others, acts), edit)
        logits = self.hooked_model.run_with_logits(ids, hooks)
        check_fired(others, acts)
        return logits, acts

    def run_with_cache(
        self,
        tokens: TokensOrText,
        *,
        sae_positions: Sequence[str] | str | None = "all",
        names_filter: Sequence[str] | str | Callable[[str], bool] | None = None,
        **kwargs: Any,  # what TransformerLens's run_with_cache takes
    ) -> tuple[Any, Any]:
        """Logits of the pass with SAEs, and its activations as TransformerLens caches them.

        Where an SAE writes, the cache holds what it wrote. `forward` also returns its code.

        Args:
            tokens: As in `forward`.
            sae_positions: As in `forward`.
            names_filter: Hook points to cache, or a function that is true for them. None: all.
            **kwargs: Passed on: `remove_batch_dim`, `return_type`, ...
        """
        if names_filter is not None and not callable(names_filter):
            names_filter = as_names(names_filter)
            check_hook_names(names_filter, self.hook_dict, "names_filter")
        ids, hooks = self._read_tokens(tokens), self.splice_hooks(self.chosen(sae_positions))
        with self.hooked_model.hooked(hooks):
            return self.tlens_model.run_with_cache(ids, names_filter=names_filter, **kwargs)

    # No inference mode: what a model extends or caches in a call must serve training too.
    @torch.no_grad()
    def generate(
        self,
        input: TokensOrText,
        sae_positions: Sequence[str] | str | None = "all",
        *,
        interventions: Sequence[Intervention] | Intervention = (),
        add_error: bool = False,
        max_new_tokens: int = 10,
        **kwargs: Any,  # what TransformerLens's generate takes
    ) -> str | list[str] | Int[Tensor, "batch new_pos"]:
        """Continue texts or tokens, as TransformerLens's `generate` does.

        Args:
            input: Prompt, or several. Texts may differ in length, and so may tokens that are padded
                as by `to_tokens`: each prompt is continued as it would be alone. Tokens come back
                padded at their start.
            sae_positions: As in `forward`. Empty: the model without SAEs.
            interventions: As in `forward`. Their tokens are counted from the start of the prompt,
                its BOS token included, and on through what is generated.
            add_error: As in `forward`.
            max_new_tokens: How many tokens to add at most.
            **kwargs: Passed on: `temperature`, `top_k`, `do_sample`, ...
        """
        positions = self.chosen(sae_positions)
        edit = self.edit(positions, interventions, add_error, max_new_tokens)
        if edit is not None and edit.names_tokens:
            check_equal_lengths(self.tlens_model, input)
        hooks = self.splice_hooks(positions, edit=edit)
        with eval_mode(self):
            return self.hooked_model.generate(input, hooks, max_new_tokens=max_new_tokens, **kwargs)

    def train(self, mode: bool = True) -> "SAETransformer":
        """Set the mode of the SAEs; the frozen model stays as it is used, without dropout."""
        super().train(mode)
        self.tlens_model.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> "SAETransformer":  # what nn.Module takes
        # `to`, `cuda`, `double`, ... all move and cast by this method.
        super()._apply(*args, **kwargs)
        parameter = next(self.tlens_model.parameters())
        # TransformerLens makes tokens and caches where its config says the model is.
        self.cfg.device = str(parameter.device)
        self.cfg.dtype = parameter.dtype
        return self

    @staticmethod
    def from_local_path(
        path: str | Path, device: str = "cpu", *, trust_remote_code: bool = False
    ) -> "SAETransformer":
        """The model of a run folder, with its newest checkpoint, or of one checkpoint in it.

        Args:
            path: The folder or checkpoint.
            device: Where to put the model.
            trust_remote_code: Whether Python code that comes with the run's model on the hub may
                be executed. The run cannot say so itself.

        Raises:
            UserError: There is no run, checkpoint or device, or they do not fit together.
        """
        # `runs` builds on this module, which knows it only here, for the name that users type.
        from sparsify.runs.saved import load_run

        path = Path(with_home(str(path)))
        return load_run(path, device, trust_remote_code=trust_remote_code)

    @staticmethod
    def from_pretrained(
        source: str | Path,
        tlens_model: TLensModel | str | None = None,
        device: str = "cpu",
        *,
        trust_remote_code: bool = False,
    ) -> "SAETransformer":
        """The model with the SAEs of any source that `sparsify.formats.load` takes.

        Args:
            source: A run, file or folder of this or another tool, `user/repo:sub/folder` of the
                hub, or `wandb:entity/project/run_id`.
            tlens_model: The model, or its name, as which it is loaded with the processing that
                the SAEs expect. None: the one that the files name.
            device: Where to put it.
            trust_remote_code: Whether Python code that comes with the model on the hub may be
                executed.

        Raises:
            UserError: The source is not there or in no known format, the files do not say where
                the SAEs belong, or they were trained in another model than is given.
        """
        from sparsify.formats.models import model_with_saes

        return model_with_saes(source, tlens_model, device, trust_remote_code=trust_remote_code)

    @staticmethod
    def from_wandb(run_id: str, device: str = "cpu") -> "SAETransformer":
        """The model of a run that was logged to wandb, `entity/project/run_id`.

        Raises:
            UserError: There is no such run, or wandb cannot be reached.
        """
        return SAETransformer.from_pretrained(f"wandb:{run_id}", device=device)

    def splice_hooks(
        self,
        positions: Iterable[str],
        observe: Callable[[str, SAEActs], None] | None = None,
        others: Mapping[str, Hook] = MappingProxyType({}),
        edit: Callable[[str, SAEActs], SAEActs] | None = None,
    ) -> dict[str, Hook]:
        """Hooks that put SAEs in place, and show `observe` what each did as it happens.

        Nothing else is kept: what `observe` does not keep is freed at once. What an SAE made is
        first replaced by what `edit` returns for it, if there is one.
        """

        def read(position: str, act: Tensor, replaced: Tensor | None) -> SAEActs:
            acts = self.saes.read(position, act, replaced)
            if edit is not None:
                acts = edit(position, acts)
            if observe is not None:
                observe(position, acts)
            return acts

        reads = {position: self.reads[position] for position in positions}
        return splice_hooks(reads, read, others)

    def chosen(self, sae_positions: Sequence[str] | str | None) -> list[str]:
        """Positions whose SAE takes part, each of which has one. "all" or None: each."""
        if sae_positions is None or sae_positions == "all":
            return self.raw_sae_positions
        check_have_saes(as_names(sae_positions), self.raw_sae_positions, "sae_positions")
        return as_names(sae_positions)

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
        writes = [intervention.position for intervention in interventions]
        check_have_saes(writes, self.raw_sae_positions, "interventions")
        return Edit(
            interventions, self.saes, positions, add_error=add_error, n_new_tokens=n_new_tokens
        )

    def _read_tokens(self, input: TokensOrText) -> Int[Tensor, "batch pos"]:
        tokens = as_tokens(self.tlens_model, input)
        self.hooked_model.check_length(tokens.shape[-1])
        return tokens
