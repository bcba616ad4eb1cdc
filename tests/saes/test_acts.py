import pytest
import torch

from sparsify.saes.acts import SAEActs


def test_acts_cannot_be_changed():
    acts = SAEActs(input=torch.zeros(3, 2), c=torch.zeros(3, 5), output=torch.zeros(3, 2))
    with pytest.raises(AttributeError):
        acts.c = torch.ones(3, 5)  # type: ignore[misc]  # what is tested
