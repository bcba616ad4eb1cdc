"""What a source of SAEs holds: the SAEs by hook point, and what the files say about them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsify.saes.base import SAE
from sparsify.saes.config import SAEConfig
from sparsify.settings.base_config import UserError

UNKNOWN_POSITION = "unknown"


@dataclass(frozen=True)
class Origin:
    """What the files of an SAE say about where it belongs. None: they do not say."""

    format: str
    """Name of the format."""

    model_name: str | None = None
    """Model whose activations it was trained on, as the files call it."""

    processing: Literal["folded", "raw"] | None = None
    """Whether layer norms of that model were folded and its weights centred."""

    n_ctx: int | None = None
    """Tokens in a sequence."""

    adds_bos: bool | None = None
    """Whether sequences began with the BOS token."""

    dataset: str | None = None
    """Text that it was trained on."""

    stored_metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the files give about the SAE."""

    notes: Sequence[str] = ()
    """What was converted or left out, and what no file says."""

    details: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the files, in plain data, as the format writes them."""


@dataclass(frozen=True)
class LoadedSAE:
    """One SAE of a source."""

    sae: SAE
    config: SAEConfig
    """Its kind and settings, from which an SAE of the same shape is built."""
    position: str
    """Hook point where it writes, as TransformerLens names it, or `unknown`."""
    read_position: str
    """Hook point that it reads: the same, except for transcoders."""
    origin: Origin


class LoadedSAEs(Mapping[str, SAE]):
    """SAEs by the hook point where they write.

    Args:
        entries: The SAEs, at different hook points.

    Raises:
        UserError: Two are at the same one.
    """

    def __init__(self, entries: Sequence[LoadedSAE]) -> None:
        self.entries = {entry.position: entry for entry in entries}
        if len(self.entries) < len(entries):
            positions = [entry.position for entry in entries]
            twice = next(name for name in positions if positions.count(name) > 1)
            raise UserError(
                f"there are several SAEs at {twice}; name the folder or file of one of them"
            )

    def __getitem__(self, position: str) -> SAE:
        return self.entries[position].sae

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        lines = (
            f"{name}: {entry.config.kind}, {entry.sae.d_act} -> {entry.sae.n_dict} elements, from "
            f"{entry.origin.format}"
            for name, entry in self.entries.items()
        )
        return "\n".join(lines) or "no SAEs"
