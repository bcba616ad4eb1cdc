"""The card of a trained language model: what it is, how good, and how it was made."""

from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparsify.runs.run_folder import write_text
from sparsify.scripts.train_tlens.config import Config
from sparsify.scripts.train_tlens.evaluation import TextLoss
from sparsify.settings.base_config import dump_yaml
from sparsify.tlens.native_model import TrainableModel

CARD_FILE = "README.md"


def write_card(
    folder: Path,
    config: Config,
    model: TrainableModel,
    tokenizer: PreTrainedTokenizerBase,
    loss: TextLoss,
    trigram_loss: TextLoss,
    n_samples: int,
) -> None:
    """Write `README.md` into the model's folder."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_tokens = n_samples * config.train_data.n_ctx
    samples = [sample_text(model, tokenizer, prompt) for prompt in config.prompts]
    lines = [
        f"# {config.run_name}",
        "",
        f"A language model of {n_parameters:,} parameters, trained on {n_tokens:,} tokens of "
        f"`{config.train_data.dataset_name}`, for use with TransformerLens.",
        "",
        f"| on `{config.eval_data.dataset_name}`, split `{config.eval_data.split}` "
        f"| bits per byte | nats per token |",
        "| --- | --- | --- |",
        f"| this model | {loss.bits_per_byte:.3f} | {loss.nats_per_token:.3f} |",
        f"| trigram model of the same training tokens | {trigram_loss.bits_per_byte:.3f} "
        f"| {trigram_loss.nats_per_token:.3f} |",
        "",
        f"Measured on {loss.n_tokens:,} tokens ({loss.n_bytes:,} bytes), in sequences of "
        f"{config.eval_data.n_ctx} tokens that are each scored without what came before them.",
        "",
        f"Architecture: `{config.model}`",
        "",
        f"Made with torch {torch.__version__}, transformer-lens {version('transformer-lens')} by "
        "`sparsify/scripts/train_tlens/run_train_tlens.py` with the settings",
        "",
        f"```yaml\n{dump_yaml(config)}```",
        "",
        "Samples at temperature 0.7, the prompt included:",
        *(f"\n```python\n{sample}\n```" for sample in samples),
    ]
    write_text(folder / CARD_FILE, "\n".join(lines) + "\n")


@torch.inference_mode()
def sample_text(
    model: TrainableModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    n_tokens: int = 120,
    temperature: float = 0.7,
) -> str:
    """`prompt`, taken as the beginning of a document, and what the model continues it with."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(prompt)]], device=device)
    for _ in range(n_tokens):
        resid = model.final_residual(tokens[:, -model.architecture.n_ctx :])
        probs = torch.softmax(model.unembed(resid[0, -1]) / temperature, dim=-1)
        token = torch.multinomial(probs, 1, generator=generator)
        if token.item() == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, token[None]], dim=1)
    return str(tokenizer.decode(tokens[0, 1:]))
