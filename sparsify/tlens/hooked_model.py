"""Drives a TransformerLens model from one block to another, with hooks.

With `loading.py` and `native_model.py`, all that knows TransformerLens versions. 3.9 has
`HookedTransformer` and `TransformerBridge`, 4.x has the bridge alone. What differs is evened out
here:

- Starting at a block: the bridge of 3.9 cannot, that of 4.3 computes the blocks before the start
  too and throws the result away, and `HookedTransformer` forgets attention masks of padding and
  shortformer positions. So a pass begins with the tokens in all of them, and the blocks before the
  start are replaced, while it lasts, by one that returns the residual stream that was computed.
- Stopping before a block: the bridge calls the hooks at the start of that block. Where that is
  after the last block, it returns logits instead of the residual stream.
- Hook names: in the bridge `blocks.3.hook_resid_pre` is an alias, and its hook fires under another
  name. So hooks here are closures that know the name that was asked for.

The residual stream *between* two blocks has two hook points, `hook_resid_post` of the one and
`hook_resid_pre` of the other. When a pass starts or ends there, the block that owns the hook point
is not run, and the hook is called by `run` itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsify.kernels.unembedding import Unembedding
from sparsify.settings.base_config import UserError
from sparsify.tlens.fused_attention import FusedAttention
from sparsify.tlens.fused_blocks import FusedBlocks, fused_norm
from sparsify.tlens.hook_names import BLOCK_END, BLOCK_START
from sparsify.tlens.text import TokensOrText, as_tokens, flush_right, is_texts, padding_options

Hook = Callable[[Tensor], Tensor | None]
"""Takes the activation at a hook point. What it returns, if anything, replaces the activation."""

TLensModel = Any
"""A `HookedTransformer` or `TransformerBridge`, neither of which declares all its parts."""

TLENS_HAS_HOOKED_TRANSFORMER = int(version("transformer-lens").split(".")[0]) < 4


@dataclass(frozen=True)
class Prefix:
    """The part that several passes on the same tokens share."""

    tokens: Int[Tensor, "batch pos"]
    n_blocks: int = 0
    """Blocks that have run."""
    resid: Float[Tensor, "batch pos d_model"] | None = None
    """The residual stream behind them. None if there are none."""


class HookedModel:
    """A frozen `HookedTransformer` or `TransformerBridge` that can be run in parts."""

    def __init__(self, model: TLensModel) -> None:
        self.model = model
        self.is_bridge = not _is_hooked_transformer(model)
        self.n_blocks: int = model.cfg.n_layers
        self._n_more_outputs = self._count_more_outputs() if self.is_bridge else None
        # Set it to None to have TransformerLens compute all blocks.
        self.fused_blocks: FusedBlocks | FusedAttention | None = (
            FusedAttention(model) if self.is_bridge else FusedBlocks(model)
        )
        # Precision of matrix products in `run`. None: that of the weights.
        self.product_dtype: torch.dtype | None = None
        # Whether compiled kernels compute losses of the logits.
        self.is_compiled = False
        self._unembedding_agrees = self._compare_unembedding()

    def check_length(self, n_pos: int) -> None:
        """Raise a `UserError` if a sequence is longer than the model's context."""
        n_ctx = self.model.cfg.n_ctx
        if n_pos > n_ctx:
            raise UserError(
                f"tokens: a sequence of {n_pos} does not fit into the model's context of {n_ctx}; "
                "give shorter ones"
            )

    def prefix(self, tokens: Int[Tensor, "batch pos"], n_blocks: int) -> Prefix:
        """Run the first blocks, without hooks."""
        resid = self.run(Prefix(tokens), {}, n_blocks) if n_blocks > 0 else None
        return Prefix(tokens, n_blocks, resid)

    def run(
        self, prefix: Prefix, hooks: Mapping[str, Hook], stop: int, *, fused: bool = True
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the blocks after `prefix` up to `stop - 1`; return the residual stream after them.

        Args:
            prefix: The tokens, and the blocks that have run.
            hooks: By hook point. Those at the residual stream where the pass starts and ends are
                called too; no hook must lie before the start.
            stop: Block before which to stop; the number of blocks runs all of them.
            fused: Whether blocks may be fused, which is faster and equal except for rounding.
        """
        with ExitStack() as stack:
            if prefix.resid is not None:
                last = prefix.n_blocks - 1
                resid = self._call_between(prefix.resid, hooks, last, BLOCK_END)
                if stop == prefix.n_blocks:
                    return self._call_between(resid, hooks, stop, BLOCK_START)
                stack.enter_context(self._blocks_return(resid, prefix.n_blocks))
            stack.enter_context(self.hooked(hooks))
            if self.product_dtype is not None:
                device = prefix.tokens.device.type
                stack.enter_context(torch.autocast(device, self.product_dtype))
            if fused and self.fused_blocks is not None:
                stack.enter_context(self.fused_blocks.installed())
            if self.is_bridge and stop == self.n_blocks:
                return self._run_to_final_norm(prefix.tokens)
            resid = self.model(prefix.tokens, stop_at_layer=stop)
        # The bridge has called these hooks.
        return resid if self.is_bridge else self._call_between(resid, hooks, stop, BLOCK_START)

    def run_with_logits(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the whole model, as its own `forward` computes them."""
        with self.hooked(hooks):
            return self.model(tokens)

    def generate(
        self,
        input: TokensOrText,
        hooks: Mapping[str, Hook],
        **kwargs: Any,  # what the model's `generate` takes
    ) -> str | list[str] | Int[Tensor, "batch new_pos"]:
        """The model's own `generate`, without its progress bar.

        It pads the shorter of several texts at their start, and masks that. So is done with the
        padding of tokens, at whichever end it is; they come back padded at their start.
        """
        kwargs = {"verbose": False, "max_new_tokens": 10, **kwargs}
        prompt = as_tokens(self.model, input)
        if isinstance(input, str) or is_texts(input):
            input = input if isinstance(input, str) else list(input)
            kwargs = {"padding_side": "left", **kwargs}
        else:
            input, n_pad = flush_right(self.model, prompt)
            kwargs = {**padding_options(self.model, input, n_pad), **kwargs}
        if kwargs["max_new_tokens"] < 1:
            raise UserError(f"max_new_tokens: {kwargs['max_new_tokens']} adds none; give 1 or more")
        # The last token is written, but not read.
        self.check_length(prompt.shape[-1] + kwargs["max_new_tokens"] - 1)
        if self.is_bridge:
            with self.hooked(hooks):
                return self.model.generate(input, **kwargs)
        # HookedTransformer.generate calls its embedding without the hook point behind it. And with
        # a cache it adds to the n-th token the position embedding of the (2n - 1)-th.
        if self.model.cfg.positional_embedding_type == "standard":
            kwargs.setdefault("use_past_kv_cache", False)
        splice = hooks.get("hook_embed")
        with self.hooked(hooks), ExitStack() as stack:
            if splice is not None:
                handle = self.model.embed.register_forward_hook(lambda *call: splice(call[-1]))
                stack.callback(handle.remove)
            return self.model.generate(input, **kwargs)

    @property
    def unembed(self) -> Unembedding:
        """Function from final residual streams to logits."""
        model, fused = self.model, self.fused_blocks
        # A model without norms has none here either.
        ln_final = getattr(model, "ln_final", nn.Identity())

        def norm(resid: Tensor) -> Tensor:
            if isinstance(fused, FusedBlocks) and fused.is_plain():
                return fused_norm(ln_final, resid)
            # TransformerLens's modules want a batch and a position dimension.
            return ln_final(resid.reshape(1, -1, resid.shape[-1])).reshape(resid.shape)

        bias = model.unembed.b_U
        # On a CPU adding a bias takes a pass over all logits, and many models have only zeros.
        if bias.device.type == "cpu" and not bias.any():
            bias = None
        transform = self._logit_transform()
        return Unembedding(model.unembed.W_U, bias, norm, transform, self.is_compiled)

    def check_unembedding(self) -> None:
        """Raise a `UserError` if `unembed` does not give the model's own logits."""
        if not self._unembedding_agrees:
            raise UserError(
                "tlens_model: its logits are not what its final norm and unembedding give, so the "
                "output of two passes cannot be compared; set loss.logits_kl and eval_data to null"
            )

    @torch.no_grad()
    def _compare_unembedding(self) -> bool:
        resids: list[Tensor] = []
        last = f"blocks.{self.n_blocks - 1}.hook_resid_post"
        last = "ln_final.hook_in" if self.is_bridge else last
        expected = self.run_with_logits(self._some_tokens(2), {last: resids.append})
        logits = self.unembed(resids[0]).to(expected)
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        return torch.allclose(logits, expected, rtol=tolerance, atol=tolerance)

    def _logit_transform(self) -> Callable[[Tensor], Tensor] | None:
        soft_cap = getattr(self.model.cfg, "output_logits_soft_cap", None) or 0.0
        if self.is_bridge:
            transform = self.model.adapter.apply_output_logits_transform
            # Most architectures have none.
            some_logits = torch.tensor([-100.0, -1.0, 0.5, 30.0])
            return None if torch.equal(transform(some_logits), some_logits) else transform
        return (lambda logits: soft_cap * torch.tanh(logits / soft_cap)) if soft_cap > 0 else None

    def probe(self, names: Iterable[str], setting: str) -> dict[str, tuple[int, ...]]:
        """Shape of one position's activation at each hook point, in the order in which they fire.

        Raises:
            UserError: A hook point does not fire, or its activation is not one vector, or one
                vector per head, for each position.
        """
        n_heads = self.model.cfg.n_heads
        # Attention patterns have a head dimension where others have the position.
        n_pos = 2 if n_heads != 2 else 3
        shapes: dict[str, tuple[int, ...]] = {}

        def note_shape(name: str) -> Hook:
            return lambda act: shapes.update({name: tuple(act.shape)})

        hooks = {name: note_shape(name) for name in names}
        try:
            with torch.no_grad():
                self.run_with_logits(self._some_tokens(n_pos), hooks)
        except ValueError as error:
            # TransformerLens refuses hook points that a switch of the model turns off.
            raise UserError(f"{setting}: {error}") from None
        for name in hooks:
            shape = shapes.get(name)
            if name.startswith(("ln_final", "unembed", "hook_unembed")):
                raise UserError(
                    f"{setting}: '{name}' lies behind the last block, where no SAE is spliced in; "
                    f"the last hook point is 'blocks.{self.n_blocks - 1}.hook_resid_post'"
                )
            if shape is None:
                raise UserError(
                    f"{setting}: hook point '{name}' exists but never fires in this model"
                )
            if shape[1] != n_pos or len(shape) not in (3, 4):
                raise UserError(
                    f"{setting}: '{name}' has shape {shape} for {n_pos} tokens; an SAE needs one "
                    "vector per token, as at hook_resid_pre, hook_mlp_out, mlp.hook_post or hook_z"
                )
        return {name: shape[2:] for name, shape in shapes.items()}

    def hooked(self, hooks: Mapping[str, Hook]):  # noqa: ANN201 (TransformerLens's context manager)
        """A context in which the model has `hooks`; they are gone after it, whatever happens."""
        return self.model.hooks(
            fwd_hooks=[(name, _as_tlens_hook(hook)) for name, hook in hooks.items()]
        )

    def _run_to_final_norm(self, tokens: Tensor) -> Tensor:
        def leave(resid: Tensor) -> None:
            raise _ReachedFinalNorm(resid)

        try:
            with self.hooked({"ln_final.hook_in": leave}):
                self.model(tokens)
        except _ReachedFinalNorm as reached:
            return reached.resid
        raise AssertionError("the bridge ran without reaching its final norm")

    @contextmanager
    def _blocks_return(self, resid: Tensor, n: int) -> Iterator[None]:
        """A context in which the first `n` blocks do nothing but return `resid`."""
        resid = resid.clone()  # some Hugging Face models write to it in place
        more = self._n_more_outputs
        output = resid if more is None else (resid, *more * [None])
        blocks = self.model.blocks[:n]
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: output
        try:
            yield
        finally:
            for block in blocks:
                del vars(block)["forward"]

    def _count_more_outputs(self) -> int | None:
        """Number of things that a block returns after the residual stream. None: not a tuple."""
        outputs: list[object] = []
        block = self.model.blocks[0]
        handle = block.register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            with torch.no_grad():
                self.model(self._some_tokens(1))
        finally:
            handle.remove()
        (output,) = outputs
        return len(output) - 1 if isinstance(output, tuple) else None

    def _some_tokens(self, n_pos: int) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.zeros(1, n_pos, dtype=torch.long, device=device)

    def _call_between(
        self, resid: Tensor, hooks: Mapping[str, Hook], block: int, names: tuple[str, ...]
    ) -> Tensor:
        for name in names:
            if (hook := hooks.get(f"blocks.{block}.{name}")) is not None:
                replaced = hook(resid)
                resid = resid if replaced is None else replaced
        return resid


class _ReachedFinalNorm(Exception):  # noqa: N818 (not an error, but a way out)
    """Carries the final residual stream out of a bridge before it makes logits."""

    def __init__(self, resid: Tensor) -> None:
        super().__init__()
        self.resid = resid


def _as_tlens_hook(call: Hook) -> Callable[..., Tensor | None]:
    return lambda act, hook: call(act)  # TransformerLens gives its hook point by that name


def _is_hooked_transformer(model: nn.Module) -> bool:
    if not TLENS_HAS_HOOKED_TRANSFORMER:
        return False
    from transformer_lens import HookedTransformer

    return isinstance(model, HookedTransformer)
