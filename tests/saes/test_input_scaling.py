"""What SAEs of other tools do differently: scaled inputs, free norms, no centring, a skip."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.kernels import sparse
from sparsify.losses.dead import aux_k
from sparsify.saes.base import NewElements
from sparsify.saes.build import build_sae
from sparsify.saes.config import KINDS, LinearSAEConfig
from sparsify.saes.linear import LinearSAE
from sparsify.settings.base_config import UserError

LINEAR = {
    "relu": {},
    "relu_tied_bias": {},
    "topk": {"k": 5},
    "batch_topk": {"k": 5},
    "groupmax": {"k": 8},
    "jumprelu": {"bandwidth": 0.1, "initial_threshold": 0.05},
    "gated": {},
    "matryoshka": {"k": 5, "prefix_shares": [0.25, 0.5]},
}
VARIANTS: list[dict[str, Any]] = [
    {"input_scaling": "layer_norm"},
    {"input_scaling": "constant_norm", "centred": False},
    {"decoder_norm": "free", "centred": True},
    {"decoder_norm": "free", "input_scaling": "layer_norm", "skip": True},
]


def build(kind: str, d_act: int = 16, **settings: Any) -> LinearSAE:
    config = {"dict_size_to_input_ratio": 2.0, **LINEAR[kind], **settings}
    sae = build_sae(KINDS[kind].model_validate(config), d_act)
    assert isinstance(sae, LinearSAE)
    return sae


def with_random_parameters(sae: LinearSAE) -> LinearSAE:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    sae.restore_constraints()
    return sae.double()


@pytest.mark.parametrize(
    ("settings", "c", "output"),
    [
        # x = (1, 3): mean 2, standard deviation sqrt(2) (divided by d - 1 = 1), so scaled to
        # (-1, 1) / sqrt(2) = (-0.70711, 0.70711) but for 1e-5 in the divisor. Element (0.6, 0.8)
        # reads 0.2 * 0.70711 = 0.14142; written are (0.6, 0.8) * 0.14142 * sqrt(2) + 2.
        ({"input_scaling": "layer_norm"}, 0.14142, [2.12, 2.16]),
        # |x| = sqrt(10), so scaled to x * sqrt(2 / 10): 3.0 * 0.44721 = 1.34164. Undone by
        # sqrt(5): (0.6, 0.8) * 3.
        ({"input_scaling": "constant_norm"}, 1.34164, [1.8, 2.4]),
        # The element as it is, (1.2, 1.6), reads 6 and writes 6 (1.2, 1.6).
        ({"decoder_norm": "free"}, 6.0, [7.2, 9.6]),
        # The skip adds (x_2, 0).
        ({"skip": True}, 3.0, [4.8, 2.4]),
    ],
)
def test_variants_match_hand_computation(settings: dict[str, Any], c: float, output: list[float]):
    sae = build("relu_tied_bias", d_act=2, dict_size_to_input_ratio=0.5, **settings)
    element = torch.tensor([[0.6, 0.8]]) * (2 if "decoder_norm" in settings else 1)
    with torch.no_grad():
        sae.decoder.elements.copy_(element)
        sae.affine.weight.copy_(element)
        if sae.skip is not None:
            sae.skip.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    acts = sae(torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(acts.c, torch.tensor([[c]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(acts.output, torch.tensor([output]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("kind", LINEAR)
def test_active_entries_alone_give_the_same_values_and_gradients(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    sae = with_random_parameters(build(kind, **settings))
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        acts = sae(x)
        loss = (acts.c + 1).square().mean() + (acts.output - 1).square().mean()
        wanted = [x, *sae.parameters()]
        grads = torch.autograd.grad(loss, wanted)
        return [acts.c, acts.output, *(grad.to_dense() for grad in grads)]

    dense = results()
    monkeypatch.setattr(sparse, "MIN_DENSE_SIZE", 0)
    monkeypatch.setattr(sparse, "MAX_ACTIVE_SHARE", 1.0)
    torch.testing.assert_close(results(), dense, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("kind", LINEAR)
def test_the_output_is_what_the_code_stands_for_beside_its_input(
    kind: str, settings: dict[str, Any]
):
    sae = with_random_parameters(build(kind, **settings)).eval()
    x = 3 + 2 * torch.randn(7, 16, dtype=torch.float64)
    acts = sae(x)
    skipped = 0.0 if sae.skip is None else sae.skip(x)
    torch.testing.assert_close(acts.c, sae.encode(x))
    torch.testing.assert_close(acts.output, sae.decode_beside(acts.c, x) + skipped)
    # The parts that elements write add up to what differs from an empty code.
    written = sae.written_by(acts.c, torch.arange(sae.n_dict), x)
    empty = sae.decode_beside(torch.zeros_like(acts.c), x) + skipped
    torch.testing.assert_close(acts.output, empty + written)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_scaled_input_of_another_length_has_the_same_code(kind: str):
    sae = with_random_parameters(build(kind, input_scaling="constant_norm")).eval()
    x = torch.randn(7, 16, dtype=torch.float64)
    acts, longer = sae(x), sae(5 * x)
    torch.testing.assert_close(longer.c, acts.c)
    torch.testing.assert_close(longer.output, 5 * acts.output)


def test_zeros_are_scaled_to_zeros():
    for scaling in ("layer_norm", "constant_norm"):
        sae = build("topk", input_scaling=scaling)
        x = torch.zeros(2, 16, requires_grad=True)
        acts = sae(x)
        acts.output.sum().backward()
        assert x.grad is not None
        assert acts.output.isfinite().all()
        assert x.grad.isfinite().all()


def test_free_elements_keep_their_norm_and_a_penalty_counts_it():
    # c = (2, 0), element norms (3, 1): the penalty reads (6, 0).
    sae = build("relu_tied_bias", d_act=2, dict_size_to_input_ratio=1.0, decoder_norm="free")
    with torch.no_grad():
        sae.decoder.elements.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        sae.affine.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    sae.restore_constraints()
    acts = sae(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(acts.penalised, torch.tensor([[6.0, 0.0]]))
    acts.penalised.sum().backward()
    # d (c |e|) / d e = c e / |e|; nothing is projected away.
    sae.project_gradients()
    expected = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(sae.decoder.elements.grad, expected)
    torch.testing.assert_close(sae.dict_elements, torch.eye(2))


@pytest.mark.parametrize("settings", VARIANTS)
def test_dead_elements_learn_what_is_left_out_in_the_scale_of_the_input(settings: dict[str, Any]):
    # An SAE whose dead elements write exactly what its others leave out has no such loss.
    sae = with_random_parameters(build("relu_tied_bias", **settings))
    x = 4 * torch.randn(6, 16, dtype=torch.float64)
    dead = torch.zeros(sae.n_dict, dtype=torch.bool)
    dead[-3:] = True
    acts = sae(x)
    index = dead.nonzero().flatten()
    c = acts.c.clone()
    c[:, index] = 0
    pre_acts = sae.pre_acts_of(x, index).relu()
    assert pre_acts.any()
    output = sae.output_of(sae.decode(c), x)
    sleeping = type(acts)(input=x, c=c, output=output)
    target = type(acts)(
        input=x, c=c, output=output, replaced=output + sae.written_by(pre_acts, index, x)
    )
    assert aux_k(sae, sleeping, dead, 3) > 0.01
    assert aux_k(sae, target, dead, 3) < 1e-12


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_reset_element_reads_its_input_and_writes_its_target(settings: dict[str, Any]):
    sae = with_random_parameters(build("relu_tied_bias", **settings))
    x, target = torch.randn(2, 3, 16, dtype=torch.float64)
    index = torch.tensor([4, 9, 1])
    sae.reset_elements(NewElements(index, x, target, x.mean(dim=0)))
    own = sae.pre_acts_of(x, index)
    assert (own.diagonal() > 0).all()
    if sae.is_centred:
        assert own.argmax(dim=1).tolist() == [0, 1, 2]
    missing = target - sae.output_of(sae.decode(torch.zeros(3, sae.n_dict).double()), x)
    written = sae.written_by(torch.eye(3).double(), index, x)
    along = torch.nn.functional.cosine_similarity(written, missing)
    torch.testing.assert_close(along, torch.ones(3).double())


def test_any_kind_can_read_elsewhere_but_not_subtract_what_it_writes():
    config = KINDS["jumprelu"].model_validate({"dict_size_to_input_ratio": 2, **LINEAR["jumprelu"]})
    sae = build_sae(config, d_act=16, d_out=3)
    assert sae(torch.randn(5, 16)).output.shape == (5, 3)
    centred = config.model_copy(update={"centred": True})
    with pytest.raises(UserError, match=r"saes\.centred: true has no meaning where SAEs read"):
        build_sae(centred, d_act=16, d_out=16)


def test_all_linear_kinds_have_these_settings():
    linear = {name for name, config in KINDS.items() if issubclass(config, LinearSAEConfig)}
    assert linear == {*LINEAR, "transcoder"}
