"""The one door for SAEs: a local path, a repository of the hub, or a run of wandb."""

import os
import re
from pathlib import Path
from types import ModuleType

from sparsify.formats import (
    ai_safety_foundation,
    dictionary_learning,
    eai_sparsify,
    gemma_scope,
    native,
    neel_nanda,
    openai,
    sae_lens,
)
from sparsify.formats.loaded import LoadedSAEs
from sparsify.settings.base_config import UserError
from sparsify.settings.secrets import one_line

FORMATS: dict[str, ModuleType] = {
    "sparsify": native,
    "saelens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "eai_sparsify": eai_sparsify,
    "gemma_scope": gemma_scope,
    "ai_safety_foundation": ai_safety_foundation,
    "neel_nanda": neel_nanda,
    "openai": openai,
}
"""Modules with `recognises(path)` and `read(path)`, by name, in the order of asking."""

WRITERS: dict[str, ModuleType] = {
    name: FORMATS[name] for name in ("saelens", "dictionary_learning", "eai_sparsify", "neel_nanda")
}
"""Those that also have `write(loaded, folder)`."""

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
WANDB_ID = re.compile(r"wandb:([\w.-]+/[\w.-]+/[\w.-]+)")
HUB_FILES = (".json", ".yaml", ".safetensors", ".pt", ".npz")
MAX_SHOWN = 8


def load(source: str | Path) -> LoadedSAEs:
    """Load the SAEs of a source in any known format, which its contents tell.

    Nothing that a file holds is executed.

    Args:
        source: A file or folder; `user/repo` or `user/repo:sub/folder` of the Hugging Face hub; or
            `wandb:entity/project/run_id`.

    Raises:
        UserError: There is no such source, it is in no known format, it is damaged, or it has what
            this package cannot represent.
    """
    path = locate(source)
    for module in FORMATS.values():
        if module.recognises(path):
            return LoadedSAEs(module.read(path))
    raise UserError(_not_recognised(path))


def locate(source: str | Path) -> Path:
    """Return the local path of a source, which is downloaded first if it is elsewhere.

    Raises:
        UserError: There is none.
    """
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        return path
    text = str(source)
    if ".." in re.split("[:/]", text):  # would lead out of the folder of what is downloaded
        raise UserError(f"{text}: there is no such file or folder; check the path")
    if match := WANDB_ID.fullmatch(text):
        return _download_run(match[1])
    if (match := HUB_ID.fullmatch(text)) and text[:1] not in (".", "/", "~"):
        return _download_repository(match[1], match[2])
    raise UserError(
        f"{text}: there is no such file or folder; give one, a repository of the hub as "
        "user/repo:sub/folder, or a run as wandb:entity/project/run_id"
    )


def _download_repository(repository: str, folder: str | None) -> Path:
    from huggingface_hub import snapshot_download

    below = f"{folder.strip('/')}/" if folder else ""
    patterns = [f"{below}*{suffix}" for suffix in HUB_FILES]
    if Path(below).suffix or (folder and folder.endswith(HUB_FILES)):
        patterns = [folder or ""]
    try:
        root = Path(snapshot_download(repository, allow_patterns=patterns))
    # The hub client passes on whatever went wrong below it.
    except Exception as error:
        raise UserError(
            f"{repository}: cannot be had from the hub ({one_line(error)[:300]}); check the name "
            "and the network, or give a local folder"
        ) from error
    path = root / (folder or "")
    if not path.exists():
        raise UserError(f"{repository}: has no '{folder}'; look at its files on the hub")
    return path


def cache_folder() -> Path:
    """Return the folder for downloads of runs: `SAE_CACHE_DIR`, or one in the user's cache."""
    given = os.environ.get("SAE_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(given or f"{base}/sparsify"))


def _download_run(run_id: str) -> Path:
    from sparsify.formats.wandb_runs import download_run

    return download_run(run_id, cache_folder())


def _not_recognised(path: Path) -> str:
    known = (
        "a run of sparsify or e2e_sae (final_config.yaml and samples_N), SAELens (cfg.json and "
        "sae_weights.safetensors), dictionary_learning (ae.pt and config.json), EleutherAI "
        "sparsify (cfg.json and sae.safetensors), Gemma Scope (params.npz or params.safetensors), "
        "OpenAI (one .pt file), Neel Nanda (name.pt and name_cfg.json)"
    )
    if not path.is_dir():
        return f"{path}: is in no known format; known are {known}"
    names = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    inside = [
        name for name in names if any(module.recognises(path / name) for module in FORMATS.values())
    ]
    if inside:
        return f"{path}: holds several SAEs; name one: {_some(inside)}"
    found = f"holds {_some(names)}" if names else "is empty"
    return f"{path}: {found}, which is no known format; known are {known}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more
