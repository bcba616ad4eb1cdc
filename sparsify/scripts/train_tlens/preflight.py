"""What `--dry-run` checks before a language model is trained."""

from sparsify.data.loader import check_tokenizer
from sparsify.runs.disk import check_disk
from sparsify.runs.preflight import (
    Check,
    check_long_enough,
    common_checks,
    run_checks,
    time_steps,
)
from sparsify.runs.resume import checkpoint_to_go_on_from, explained_misfit
from sparsify.scripts.train_tlens.config import Config
from sparsify.scripts.train_tlens.train import (
    KEPT_SETTINGS,
    MODEL_FOLDER,
    make_tokenizer,
    next_token_loss,
    open_data,
)
from sparsify.tlens.native_model import TrainableModel
from sparsify.tlens.tokenizers import load_tokenizer
from sparsify.training.finite import check_loss
from sparsify.training.memory import check_memory, n_bytes

MAX_TOKENIZER_CHUNKS = 20
"""Of the training text, on which a tokenizer is trained to try it: 5 MB."""


def preflight(config: Config) -> bool:
    """Check all that training needs, and print what was found; returns whether all is well."""
    parts = _CheckedParts(config)
    resume = () if config.resume is None else ("resume",)  # which brings its tokenizer
    checks = [
        *common_checks(config),
        Check("model", parts.check_model),
        Check("resume", parts.check_resume, needs=("model",)),
        Check("tokenizer", parts.check_tokenizer, needs=resume),
        Check("train_data", parts.check_train_data, needs=("tokenizer",)),
        Check("eval_data", parts.check_eval_data, needs=("tokenizer",)),
        Check("memory", parts.check_memory, needs=("model",)),
        Check("disk", parts.check_disk, needs=("save_dir", "model")),
        Check("step", parts.check_step, needs=("model", "train_data", "memory")),
    ]
    return run_checks([check for check in checks if check.name != "resume" or resume])


class _CheckedParts:
    """The parts of a run, opened one check after the other."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.n_samples_done = 0

    def check_model(self) -> str:
        self.model = TrainableModel(self.config.model, seed=self.config.seed)
        self.parameters = list(self.model.parameters())
        n_parameters = sum(parameter.numel() for parameter in self.parameters)
        cfg = self.config.model
        return (
            f"{n_parameters:,} parameters: {cfg.n_layers} blocks of width {cfg.d_model}, context "
            f"{cfg.n_ctx:,}, vocabulary {cfg.d_vocab:,}, on cpu"
        )

    def check_resume(self) -> str:
        checkpoint = checkpoint_to_go_on_from(self.config, KEPT_SETTINGS)
        with explained_misfit(checkpoint):
            self.model.load_state_dict(checkpoint.weights)
        self.n_samples_done, self.run_dir = checkpoint.n_samples, checkpoint.run_dir
        return f"{checkpoint.run_dir}: goes on after {checkpoint.n_samples:,} samples"

    def check_tokenizer(self) -> str:
        if self.config.resume is not None:
            origin, self.tokenizer = (
                "the run's own",
                load_tokenizer(str(self.run_dir / MODEL_FOLDER)),
            )
        elif self.config.tokenizer is not None:
            origin = "trained on up to 5 MB of train_data, to try it"
            self.tokenizer = make_tokenizer(self.config, MAX_TOKENIZER_CHUNKS)
        else:
            origin, self.tokenizer = (
                self.config.train_data.tokenizer_name,
                make_tokenizer(self.config),
            )
        d_vocab = self.config.model.d_vocab
        for data in (self.config.train_data, self.config.eval_data):
            check_tokenizer(data, self.tokenizer, d_vocab)
        return f"{origin}: {len(self.tokenizer):,} tokens of a vocabulary of {d_vocab:,}"

    def check_train_data(self) -> str:
        # In this process, as a worker would have to be ended.
        loader = open_data(self.config, self.config.train_data, self.tokenizer, num_workers=0)
        self.tokens = next(iter(loader))
        n_samples = self.config.n_batches * self.config.batch_size
        return check_long_enough(self.config.train_data, loader, n_samples)

    def check_eval_data(self) -> str:
        data = self.config.eval_data
        first = next(iter(open_data(self.config, data, self.tokenizer, num_workers=0)))
        n_batch, n_ctx = first.shape
        return f"{data.dataset_name} {data.split}: a batch of {n_batch:,} samples of {n_ctx} tokens"

    def check_memory(self) -> str:
        cfg, n_tokens = self.config.model, self.config.batch_size * self.config.train_data.n_ctx
        weights = n_bytes(self.parameters)
        # What the backward pass needs of a block: what its linear maps and norms read, queries and
        # keys also rotated, what attention gives, and the MLP before and behind its activation.
        block_floats = 11 * cfg.d_model + 2 * cfg.d_mlp
        terms = {
            "model": weights,
            "gradients": weights,
            "optimizer": 2 * weights,
            "block activations": 4 * n_tokens * cfg.n_layers * block_floats,
        }
        settings = "batch_size (keep effective_batch_size), train_data.n_ctx, or the model's sizes"
        return check_memory(terms, "cpu", ("model",), settings)

    def check_disk(self) -> str:
        return check_disk(self.config, self.model, self.parameters, self.n_samples_done)

    def check_step(self) -> str:
        def step() -> float:
            loss = next_token_loss(self.model, self.tokens)
            check_loss(loss, {}, self.tokens, self.n_samples_done, None, is_watched=True)
            loss.backward()
            self.model.zero_grad()
            return loss.item()

        return time_steps(step, self.config, self.n_samples_done)
