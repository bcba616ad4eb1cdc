import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from sparsify.losses.passes import Passes
from sparsify.runs.weight_files import load_state, save_state
from sparsify.saes.acts import SAEActs
from sparsify.saes.base import SAE
from sparsify.saes.batch_topk import BatchTopKSAE
from sparsify.saes.codebook import CodebookSAE
from sparsify.saes.gated import GatedSAE
from sparsify.saes.jumprelu import JumpReLUSAE
from sparsify.saes.linear import LinearSAE
from sparsify.saes.relu import ReLUSAE
from sparsify.saes.relu_tied_bias import ReLUTiedBiasSAE
from sparsify.saes.topk import TopKSAE
from sparsify.saes.transcoder import Transcoder
from sparsify.training.config import DeadElementsConfig, ResamplingConfig
from sparsify.training.dead_elements import DeadElements, resample
from sparsify.training.optimizers import build_adam

FIRST, SECOND = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"


def runs_of(*codes: list[list[int]]) -> Passes:
    """The code of each token, at the first position and at the second."""
    acts = {}
    for position, code in zip((FIRST, SECOND), codes, strict=False):
        c = torch.tensor([code], dtype=torch.float32)  # a batch of one sample
        acts[position] = SAEActs(torch.zeros(1, len(code), 2), c, torch.zeros(1, len(code), 2))
    return Passes({}, acts)


def counting(after_n_tokens: int, min_density: float = 0.0, *positions: str) -> DeadElements:
    config = DeadElementsConfig(after_n_tokens=after_n_tokens, min_density=min_density)
    return DeadElements(
        config, {position: TopKSAE(2, 4, k=1) for position in positions or (FIRST,)}
    )


def test_an_element_is_dead_once_it_has_not_fired_on_so_many_tokens():
    elements = counting(3)
    elements.update(runs_of([[0, 1, 0, 0], [1, 0, 0, 0]]))
    assert elements.n_since[FIRST].tolist() == [0, 0, 2, 2]
    assert elements.dead(FIRST).tolist() == [False] * 4
    elements.update(runs_of([[0, 0, 0, 5]]))
    assert elements.n_since[FIRST].tolist() == [1, 1, 3, 0]
    assert elements.dead(FIRST).tolist() == [False, False, True, False]
    elements.update(runs_of([[0, 0, 1, 0], [1, 0, 0, 0]]))  # it comes back, the second goes
    assert elements.dead(FIRST).tolist() == [False, True, False, False]
    assert elements.metrics() == {f"sparsity/train/dead_elements/{FIRST}": 1.0}


def test_an_element_that_fires_too_rarely_is_dead_until_the_end_of_the_next_stretch():
    elements = counting(4, 0.5)
    elements.update(runs_of([[1, 1, 0, 1], [0, 1, 0, 1]]))
    assert elements.dead(FIRST).tolist() == [False] * 4  # the stretch is not whole
    elements.update(runs_of([[0, 0, 1, 1], [0, 0, 0, 1]]))
    # Of four tokens they fired on 1, 2, 1, 4.
    assert elements.dead(FIRST).tolist() == [True, False, True, False]
    elements.update(runs_of([[1, 1, 0, 0]] * 3))
    assert elements.dead(FIRST).tolist() == [True, False, True, False]
    elements.update(runs_of([[1, 1, 0, 0]]))
    # Now on 4, 4, 0, 0 of four.
    assert elements.dead(FIRST).tolist() == [False, False, True, True]


def test_runs_are_marked_with_the_dead_elements_of_each_sae():
    elements = counting(1, 0.0, FIRST, SECOND)
    passes = runs_of([[1, 0, 0, 0]], [[0, 1, 1, 1]])
    elements.update(passes)
    dead = elements.marked(passes).dead
    assert {position: of_sae.tolist() for position, of_sae in dead.items()} == {
        FIRST: [False, True, True, True],
        SECOND: [True, False, False, False],
    }
    assert elements.marked(passes).new_acts is passes.new_acts


def test_forgotten_elements_count_as_if_they_had_just_fired():
    elements = counting(2, 0.9)
    elements.update(runs_of([[0, 1, 0, 1], [0, 0, 0, 1]]))
    assert elements.dead(FIRST).tolist() == [True, True, True, False]
    elements.forget(FIRST, torch.tensor([True, True, False, False]))
    assert elements.dead(FIRST).tolist() == [False, False, True, False]
    assert elements.n_since[FIRST].tolist() == [0, 0, 2, 0]


def test_forgotten_elements_are_not_rare_for_what_they_did_before():
    elements = counting(4, 0.5)
    elements.update(runs_of([[0, 1, 0, 1]] * 3))
    elements.forget(FIRST, torch.tensor([True, False, False, False]))
    elements.update(runs_of([[1, 0, 0, 1]]))
    # The first fired on the one token of the stretch that it has seen.
    assert elements.dead(FIRST).tolist() == [False, False, True, False]


def test_a_resumed_count_goes_on_as_it_would_have(tmp_path: Path):
    batches = [(torch.rand(3, 4) < 0.2).int().tolist() for _ in range(20)]
    whole, first, second = (counting(7, 0.15) for _ in range(3))
    for batch in batches[:10]:
        whole.update(runs_of(batch))
        first.update(runs_of(batch))
    second.load_state_dict(load_state(save_state(tmp_path, 1, first.state_dict())))
    seen = set()
    for batch in batches[10:]:
        assert second.dead(FIRST).equal(whole.dead(FIRST))
        seen.add(tuple(whole.dead(FIRST).tolist()))
        for elements in (whole, second):
            elements.update(runs_of(batch))
    assert second.n_since[FIRST].equal(whole.n_since[FIRST])
    assert len(seen) > 2  # the counts decided something


def test_resampling_that_never_comes_is_rejected():
    with pytest.raises(ValueError, match=r"until_n_samples \(4\) is below every_n_samples \(5\)"):
        ResamplingConfig(every_n_samples=5, until_n_samples=4)


N_DICT, N_TOKENS, WORST = 12, 10, 7


def with_skip(sae: LinearSAE) -> LinearSAE:
    sae.add_skip()
    return sae


DEAD = torch.zeros(N_DICT, dtype=torch.bool).index_fill_(0, torch.tensor([1, 5, 6]), True)
KINDS: dict[str, Callable[[], SAE]] = {
    "relu": lambda: ReLUSAE(5, N_DICT),
    "relu_tied_bias": lambda: ReLUTiedBiasSAE(5, N_DICT),
    "topk": lambda: TopKSAE(5, N_DICT, k=2),
    "batch_topk": lambda: BatchTopKSAE(5, N_DICT, k=2),
    "jumprelu": lambda: JumpReLUSAE(5, N_DICT, bandwidth=0.5, initial_threshold=0.1),
    "gated": lambda: GatedSAE(5, N_DICT),
    "codebook": lambda: CodebookSAE(5, N_DICT, k=2),
    "transcoder": lambda: with_skip(Transcoder(5, N_DICT, 3)),
}


@pytest.fixture(params=KINDS)
def sae(request: pytest.FixtureRequest) -> SAE:
    return KINDS[request.param]()


def train(sae: SAE, n_steps: int) -> Optimizer:
    """Adam of the SAE, with a state for every element."""
    optimizer = build_adam(sae.parameters(), lr=1e-2)
    for _ in range(n_steps):
        for parameter in sae.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    sae.zero_grad()
    sae.restore_constraints()
    return optimizer


def badly_reconstructed(sae: SAE) -> SAEActs:
    """Of ten tokens one has an error that dwarfs those of the others."""
    input = 1 + torch.randn(2, N_TOKENS // 2, 5)
    acts = sae(input)
    target = acts.output.detach() + 1e-3 * torch.randn_like(acts.output)
    target.flatten(end_dim=1)[WORST] += 100 * torch.randn(sae.d_out)
    if sae.d_out != sae.d_act:
        return SAEActs(input, acts.c, acts.output, replaced=target)
    return SAEActs(target, acts.c, acts.output)


def snapshot(sae: SAE, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and what Adam knows of them."""
    tensors = {
        name: value.detach().clone()
        for name, value in (*sae.named_parameters(), *sae.named_buffers())
    }
    for name, parameter in sae.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value.clone()
    return tensors


def test_resampling_changes_dead_elements_alone_and_adam_forgets_them(sae: SAE):
    optimizer, acts = train(sae, 3), badly_reconstructed(sae)
    before = snapshot(sae, optimizer)
    resample(sae, acts, DEAD, optimizer)
    after = snapshot(sae, optimizer)
    for name, value in before.items():
        if value.ndim == 0 or len(value) != N_DICT:
            assert after[name].equal(value), name
            continue
        assert after[name][~DEAD].equal(value[~DEAD]), name
        assert not (after[name] == value)[DEAD].any(), name
        if name.endswith(("exp_avg", "exp_avg_sq")):
            assert not after[name][DEAD].any(), name


def test_new_elements_read_and_write_the_input_that_is_badly_reconstructed(sae: SAE):
    optimizer, acts = train(sae, 3), badly_reconstructed(sae)
    one = torch.zeros_like(DEAD).index_fill_(0, DEAD.nonzero()[0], True)
    assert resample(sae, acts, one, optimizer).equal(one)
    inputs, targets = acts.input.flatten(end_dim=1), acts.target.flatten(end_dim=1)
    if isinstance(sae, CodebookSAE):
        mean_length = sae.codes[~one].norm(dim=1).mean()
        expected = F.normalize(targets[WORST], dim=0) * mean_length
        torch.testing.assert_close(sae.codes[one], expected.expand(1, -1))
        return
    assert isinstance(sae, LinearSAE)
    skipped = sae.get_submodule("skip")(inputs[WORST]) if isinstance(sae, Transcoder) else 0
    written = F.normalize(targets[WORST] - sae.decoder.bias - skipped, dim=0)
    torch.testing.assert_close(sae.decoder.elements[one], written.expand(1, -1))
    # A fifth of the norm of the others, in the direction of the input from the middle.
    centre = sae.decoder.bias if sae.is_centred else inputs.mean(dim=0)
    read = inputs[WORST] - centre
    norm = 0.2 * sae.affine.weight[~one].norm(dim=1).mean()
    expected = norm * F.normalize(read, dim=0)
    torch.testing.assert_close(sae.affine.weight[one], expected.expand(1, -1))
    pre_acts = sae.pre_acts_of(inputs[WORST], one.nonzero().flatten())
    torch.testing.assert_close(pre_acts, (norm * read.norm()).expand(1))


def test_new_elements_start_with_what_all_started_with():
    jumprelu = JumpReLUSAE(5, N_DICT, bandwidth=0.5, initial_threshold=0.3)
    gated = GatedSAE(5, N_DICT)
    for sae in (jumprelu, gated):
        resample(sae, badly_reconstructed(sae), DEAD, train(sae, 3))
    assert jumprelu.log_threshold[DEAD].tolist() == pytest.approx([math.log(0.3)] * 3)
    assert gated.log_scale[DEAD].tolist() == [0.0] * 3
    assert gated.magnitude_bias[DEAD].tolist() == [0.0] * 3


def test_inputs_are_drawn_by_the_square_of_their_squared_error():
    sae, dead = CodebookSAE(2, 2, k=1), torch.tensor([False, True])
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2**0.5]])  # squared errors 1 and 2: chances 1 and 4
    acts, optimizer = (
        SAEActs(inputs, torch.zeros(2, 2), torch.zeros(2, 2)),
        build_adam(sae.parameters(), lr=1e-3),
    )
    n_seconds = 0
    for _ in range(1000):
        resample(sae, acts, dead, optimizer)
        n_seconds += int(sae.codes[1, 1] > 0)
    # The standard deviation of the share is 0.013.
    assert n_seconds / 1000 == pytest.approx(0.8, abs=0.06)


def test_no_two_new_elements_are_equal():
    sae, dead = TopKSAE(3, 9, k=2), torch.arange(9) > 0
    same = torch.randn(1, 3)
    inputs = torch.cat([100 * same, 100 * same, torch.randn(4, 3)])
    acts = SAEActs(inputs, torch.zeros(6, 9), torch.zeros(6, 3))
    made_anew = resample(sae, acts, dead, build_adam(sae.parameters(), lr=1e-3))
    # Eight are dead, but five inputs are different.
    assert made_anew.sum() == 5
    assert not (made_anew & ~dead).any()
    assert len(sae.decoder.elements[made_anew].unique(dim=0)) == 5


def test_without_dead_elements_nothing_changes(sae: SAE):
    optimizer, acts = train(sae, 2), badly_reconstructed(sae)
    before = snapshot(sae, optimizer)
    resample(sae, acts, torch.zeros_like(DEAD), optimizer)
    after = snapshot(sae, optimizer)
    assert all(after[name].equal(value) for name, value in before.items())


def test_an_sae_whose_elements_are_all_dead_is_made_anew(sae: SAE):
    resample(sae, badly_reconstructed(sae), torch.ones_like(DEAD), train(sae, 2))
    for parameter in sae.parameters():
        assert parameter.isfinite().all()
