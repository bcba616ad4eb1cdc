"""What `--dry-run` checks before SAEs are trained."""

from sparsify.data.loader import check_tokenizer
from sparsify.losses.loss import total_loss
from sparsify.runs.disk import check_disk
from sparsify.runs.preflight import (
    Check,
    check_long_enough,
    common_checks,
    run_checks,
    time_steps,
)
from sparsify.runs.resume import explained_misfit
from sparsify.runs.saved import add_saes, load_model
from sparsify.runs.text import find_tokenizer, load_eval_batches, open_text
from sparsify.scripts.train_tlens_saes.config import Config
from sparsify.scripts.train_tlens_saes.parts import (
    Parts,
    check_suits,
    trained_parameters,
)
from sparsify.scripts.train_tlens_saes.train import find_checkpoint
from sparsify.scripts.train_tlens_saes.trainer import Trainer
from sparsify.tlens.loading import resolve_device
from sparsify.training.compilation import compile_kernels
from sparsify.training.finite import check_loss
from sparsify.training.forward_plan import derive_plan
from sparsify.training.memory import check_memory, estimate_memory, explained_out_of_memory, remedy
from sparsify.training.precision import set_precision
from sparsify.training.random_state import set_seed


def preflight(config: Config) -> bool:
    """Check all that training needs, and print what was found; returns whether all is well."""
    set_seed(config.seed)
    parts = _CheckedParts(config)
    resume = () if config.resume is None else ("resume",)
    checks = [
        *common_checks(config),
        Check("model", parts.check_model),
        Check("SAEs", parts.check_saes, needs=("model",)),
        Check("loss", parts.check_plan, needs=("SAEs",)),
        Check("resume", parts.check_resume, needs=("SAEs",)),
        Check("tokenizer", parts.check_tokenizers, needs=("model",)),
        Check("train_data", parts.check_train_data, needs=("tokenizer",)),
        Check("eval_data", parts.check_eval_data, needs=("tokenizer",)),
        Check("memory", parts.check_memory, needs=("loss",)),
        Check("disk", parts.check_disk, needs=("save_dir", "SAEs")),
        Check("step", parts.check_step, needs=("loss", *resume, "train_data", "memory")),
    ]
    return run_checks([check for check in checks if check.name != "resume" or resume])


class _CheckedParts:
    """The parts of a run as `open_parts` opens them, one check after the other."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.n_samples_done = 0

    def check_model(self) -> str:
        self.device = resolve_device(self.config.device)
        self.tlens_model = load_model(self.config, self.device)
        cfg = self.tlens_model.cfg
        return (
            f"{self.config.tlens_model_name or self.config.tlens_model_path}: {cfg.n_layers} "
            f"blocks of width {cfg.d_model}, context {cfg.n_ctx:,}, vocabulary {cfg.d_vocab:,}, on "
            f"{self.device}"
        )

    def check_saes(self) -> str:
        self.model = add_saes(self.tlens_model, self.config)
        self.trained = trained_parameters(self.model)
        set_precision(self.model, self.config.mixed_precision)
        if self.config.compile:
            compile_kernels(self.model)
        saes = {position: self.model.saes.at(position) for position in self.model.raw_sae_positions}
        shown = [f"{name} ({sae.n_dict:,} elements of {sae.d_act:,})" for name, sae in saes.items()]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        n_trained = sum(parameter.numel() for parameter in self.trained)
        return f"{', '.join(shown[:3])}{more}: {n_trained:,} parameters to train"

    def check_plan(self) -> str:
        self.plan = derive_plan(self.model, self.config.loss)
        check_suits(self.config, self.model)
        terms = " + ".join(self.config.loss.terms())
        last = max(self.plan.raw_stop, self.plan.spliced_stop)
        end = f"of {self.model.hooked_model.n_blocks} blocks, {last} are run"
        if self.plan.is_local:
            return f"{terms}: a local mix; {end}"
        return f"{terms}; {end}, the first {self.plan.start} once for both passes"

    def check_resume(self) -> str:
        self.checkpoint = find_checkpoint(self.config)
        self.n_samples_done = self.checkpoint.n_samples
        return f"{self.checkpoint.run_dir}: goes on after {self.n_samples_done:,} samples"

    def check_tokenizers(self) -> str:
        d_vocab = self.tlens_model.cfg.d_vocab
        found = {}
        for data in (self.config.train_data, self.config.eval_data):
            if data is not None and not data.is_tokenized:
                tokenizer = check_tokenizer(data, find_tokenizer(data, self.tlens_model), d_vocab)
                name = data.tokenizer_name or "the model's own"
                found[name] = f"{name}: {len(tokenizer):,} tokens of a vocabulary of {d_vocab:,}"
        return ", ".join(found.values()) or "not used: the data are token ids"

    def check_train_data(self) -> str:
        # In this process, as a worker would have to be ended.
        self.loader = open_text(
            self.config, self.config.train_data, self.tlens_model, num_workers=0
        )
        self.tokens = next(iter(self.loader))
        n_samples = self.config.n_batches * self.config.batch_size
        return check_long_enough(self.config.train_data, self.loader, n_samples)

    def check_eval_data(self) -> str:
        if self.config.eval_data is None:
            return "null: there is no evaluation"
        n_samples = sum(map(len, load_eval_batches(self.config, self.tlens_model)))
        name = f"{self.config.eval_data.dataset_name} {self.config.eval_data.split}"
        return f"{name}: {n_samples:,} samples, eval_n_samples {self.config.eval_n_samples:,}"

    def check_memory(self) -> str:
        n_tokens = self.config.batch_size * self.config.train_data.n_ctx
        is_saved = self.config.save_dir is not None
        self.memory = estimate_memory(self.model, self.plan, n_tokens, is_saved=is_saved)
        return check_memory(self.memory, self.device, ("model", "SAEs"), remedy(self.memory))

    def check_disk(self) -> str:
        return check_disk(self.config, self.model.saes, self.trained, self.n_samples_done)

    def check_step(self) -> str:
        trainer = Trainer(self.config, Parts(self.model, self.plan, self.loader, []))
        if self.config.resume is not None:
            with explained_misfit(self.checkpoint):
                trainer.resume(self.checkpoint)

        def step() -> float:
            passes = trainer.run(self.tokens)
            loss, terms = total_loss(self.config.loss, passes, trainer.coefficients.factor)
            check_loss(loss, terms, self.tokens, self.n_samples_done, None, is_watched=True)
            loss.backward()
            trainer.model.zero_grad()
            return loss.item()

        with explained_out_of_memory(self.memory):
            return time_steps(step, self.config, self.n_samples_done)
