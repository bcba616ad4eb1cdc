"""Formulas of an evaluation's metrics, as functions of tensors.

Functions of activations or log-probabilities give one value per token, so that a caller can sum
them over any batches and divide once. The others turn such sums and means into the final number.

Dimensions: `*sample` is any leading batch and position dimensions, `token` the same flattened,
`d_act` the width of the hooked activation, `n_dict` the number of dictionary elements.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.losses.kept import NO_TARGET


def l2_ratio(
    output: Float[Tensor, "*sample d_act"], target: Float[Tensor, "*sample d_act"]
) -> Float[Tensor, "*sample"]:
    """||output|| / ||target|| of each token, NaN where the target is zero.

    At least 0; 1 is best, below 1 the SAE shrinks what it stands for. Braun et al. 2024
    (arXiv:2405.12241, Table 5) report its mean over tokens.
    """
    target_norm = torch.linalg.vector_norm(target, dim=-1)
    ratio = torch.linalg.vector_norm(output, dim=-1) / target_norm
    return ratio.where(target_norm > 0, math.nan)


def squared_distance(
    a: Float[Tensor, "*sample d_act"], b: Float[Tensor, "#*sample d_act"]
) -> Float[Tensor, "*sample"]:
    """||a - b||^2 of each token, summed over the activation's dimensions."""
    return (a - b).square().sum(dim=-1)


def explained_variance(sum_of_errors: float, sum_of_deviations: float) -> float:
    """1 - sum ||output - target||^2 / sum ||target - mean||^2, sums and mean over all tokens.

    At most 1, for a perfect reconstruction; 0 is as good as always writing the mean, below 0
    is worse. The share of the variance that Gao et al. 2024 (arXiv:2406.04093) call 1 - normalised
    MSE, and SAEBench (arXiv:2503.09532) `explained_variance`.

    It says little of an SAE that was trained end to end without a reconstruction term: such SAEs
    leave out what the model does not use, and reach far below zero (Braun et al. 2024, Fig. 12).

    Args:
        sum_of_errors: `squared_distance` of output and target, summed over tokens.
        sum_of_deviations: `squared_distance` of target and mean target, summed over tokens. Where
            it is 0 the result is NaN.
    """
    return 1 - sum_of_errors / sum_of_deviations if sum_of_deviations > 0 else math.nan


def unexplained_per_token(
    errors: Float[Tensor, "*sample"], deviations: Float[Tensor, "*sample"]
) -> Float[Tensor, "*sample"]:
    """||output - target||^2 / ||target - mean||^2 of each token; 0 is a perfect reconstruction.

    One minus its mean over tokens is what the original system of Braun et al. 2024 calls explained
    variance, with the mean of a batch where we take that of all tokens; at most 1, higher is
    better. Unlike in `explained_variance`, a token close to the mean weighs as much as one that is
    far from it, so a few of them can decide the result; SAEBench keeps the formula as
    `explained_variance_legacy`. Use it to compare with old runs only.
    """
    return errors / deviations


def standard_deviation(total: float, total_of_squares: float, n: int) -> float:
    """Standard deviation of a sample of `n` values, from their sum and that of their squares.

    NaN for fewer than two values. Not negative: rounding of the difference is cut off at 0.
    """
    if n < 2:
        return math.nan
    variance = (total_of_squares - n * (total / n) ** 2) / (n - 1)
    return max(variance, 0.0) ** 0.5


def cross_entropy(
    log_probs: Float[Tensor, "token d_vocab"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """-log p(target) of each token in nats; at least 0, lower is better.

    Args:
        log_probs: Log-probabilities of the next token.
        targets: The token that did follow. `NO_TARGET` where none did; the value there is 0.
    """
    return F.nll_loss(log_probs, targets, ignore_index=NO_TARGET, reduction="none")


def kl_divergence(
    orig_log_probs: Float[Tensor, "*sample d_vocab"],
    new_log_probs: Float[Tensor, "*sample d_vocab"],
) -> Float[Tensor, "*sample"]:
    """KL(orig || new) of each token: sum of p_orig * (log p_orig - log p_new) over the vocabulary.

    In nats. At least 0, where the two distributions are the same. The order is that of the original
    system's code; the paper's notation (Braun et al. 2024, arXiv:2405.12241) says the reverse. A
    token of p_orig = 0 adds nothing; with p_orig > 0 and p_new = 0 the divergence is infinite.
    """
    p_orig = orig_log_probs.exp()
    log_ratio = (orig_log_probs - new_log_probs).masked_fill(p_orig == 0, 0.0)
    return torch.linalg.vecdot(p_orig, log_ratio)


def top1_agreement(
    orig_log_probs: Float[Tensor, "*sample d_vocab"],
    new_log_probs: Float[Tensor, "*sample d_vocab"],
) -> Bool[Tensor, "*sample"]:
    """True where both models find the same next token most likely.

    Its mean over tokens lies between 0 and 1; higher is better.
    """
    return orig_log_probs.argmax(dim=-1) == new_log_probs.argmax(dim=-1)


def recovered_fraction(ce_raw: float, ce_spliced: float, ce_ablated: float) -> float:
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_raw): the share of a loss that the SAEs avert.

    Ablation replaces the activations that the SAEs stand in for by something that says nothing, and
    so loses what they were good for. 1 is as good as the raw model, 0 as bad as the ablation, below
    0 is worse; above 1 the spliced model is better than the raw one. "Loss recovered" of Bricken et
    al. 2023 (Towards Monosemanticity) and SAEBench (arXiv:2503.09532) for ablation to zero. Zeros
    are far from anything that the later layers know, which flatters an SAE; the mean activation is
    the stricter baseline.

    NaN if the ablation loses nothing, so that there is nothing to recover.
    """
    lost = ce_ablated - ce_raw
    return (ce_ablated - ce_spliced) / lost if lost > 0 else math.nan
