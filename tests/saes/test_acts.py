import pytest
import torch

from sparsify.saes.acts import Acts, CacheActs, SAEActs


def test_acts_cannot_be_changed():
    acts = SAEActs(input=torch.zeros(3, 2), c=torch.zeros(3, 5), output=torch.zeros(3, 2))
    with pytest.raises(AttributeError):
        acts.c = torch.ones(3, 5)  # type: ignore[misc]  # what is tested


def test_acts_print_as_a_line_without_their_numbers():
    c = torch.tensor([[[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]]])  # 2 and 1 active: L0 1.5
    acts = SAEActs(input=torch.zeros(1, 2, 3), c=c, output=torch.zeros(1, 2, 5))
    cached = CacheActs(torch.zeros(1, 2, 6))
    line = "SAEActs(input=(1, 2, 3), c=(1, 2, 4), output=(1, 2, 5), L0=1.5)"
    assert str(acts) == line
    assert str(Acts({"blocks.1.hook_resid_pre": acts, "hook_embed": cached})) == (
        f"blocks.1.hook_resid_pre: {line}\nhook_embed: CacheActs(input=(1, 2, 6))"
    )
    assert str(Acts()) == "{}"
