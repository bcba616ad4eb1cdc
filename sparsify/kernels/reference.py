"""Plain versions of the kernels: full logits, gradients by autograd. Tests compare with these."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.unembedding import Unembedding


def full_kl(
    orig_resid: Float[Tensor, "*sample d_model"],
    new_resid: Float[Tensor, "*sample d_model"],
    unembed: Unembedding,
) -> Float[Tensor, ""]:
    """See `sparsify.kernels.chunked.chunked_kl`."""
    log_orig = F.log_softmax(unembed(orig_resid.detach()), dim=-1)
    log_new = F.log_softmax(unembed(new_resid), dim=-1)
    p_orig = log_orig.exp()
    log_ratio = (log_orig - log_new).masked_fill(p_orig == 0, 0.0)
    return (p_orig * log_ratio).sum(dim=-1).mean()


def full_cross_entropy(
    resid: Float[Tensor, "*sample d_model"], targets: Int[Tensor, "*sample"], unembed: Unembedding
) -> Float[Tensor, ""]:
    """See `sparsify.kernels.chunked.chunked_cross_entropy`."""
    logits = unembed(resid)
    return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())


def dense_relu_sae(
    input: Float[Tensor, "*sample d_act"],
    encoder_weight: Float[Tensor, "n_dict d_act"],
    encoder_bias: Float[Tensor, " n_dict"],
    elements: Float[Tensor, "n_dict d_act"],
    decoder_bias: Float[Tensor, " d_act"],
) -> tuple[Float[Tensor, "*sample n_dict"], Float[Tensor, "*sample d_act"]]:
    """The code and the output of a ReLU SAE, see `sparsify.kernels.sparse.decode_active`."""
    c = F.relu(F.linear(input, encoder_weight, encoder_bias))
    return c, F.linear(c, F.normalize(elements, dim=1).T, decoder_bias)
