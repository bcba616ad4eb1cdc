import re
from typing import Any

import pytest

from sparsify.settings.base_config import UserError
from sparsify.tlens.hook_names import first_block, matching_hook_names, stop_block

pytestmark = pytest.mark.model

Names = list[str]


@pytest.fixture(params=["tiny_model", "tiny_bridge"])
def known(request: pytest.FixtureRequest) -> Names:
    model: Any = request.getfixturevalue(request.param)
    return list(model.hook_dict)


@pytest.fixture
def twelve_blocks() -> Names:
    """Blocks 1, 10 and 11 have names that begin alike."""
    return [f"blocks.{i}.{name}" for i in range(12) for name in ("hook_resid_pre", "attn.hook_z")]


def test_part_of_a_name_means_it_in_every_block(known: Names):
    expected = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
    assert matching_hook_names(["hook_resid_pre"], known, "saes.sae_positions") == expected


def test_full_name_means_itself(known: Names):
    names = ["blocks.2.mlp.hook_post", "blocks.0.attn.hook_z", "hook_embed"]
    assert matching_hook_names(names, known, "saes.sae_positions") == names


def test_several_parts_must_follow_each_other(known: Names):
    names = matching_hook_names(["mlp.hook_post"], known, "saes.sae_positions")
    assert names == [f"blocks.{i}.mlp.hook_post" for i in range(3)]
    with pytest.raises(UserError, match=r"no hook point 'blocks\.mlp'"):
        matching_hook_names(["blocks.mlp"], known, "saes.sae_positions")


def test_numbers_of_blocks_match_as_a_whole(twelve_blocks: Names):
    names = matching_hook_names(["blocks.1"], twelve_blocks, "saes.sae_positions")
    assert "blocks.1.hook_resid_pre" in names
    assert {name.split(".")[1] for name in names} == {"1"}
    all_blocks = matching_hook_names(["hook_resid_pre"], twelve_blocks, "saes.sae_positions")
    assert len(all_blocks) == 12


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("hook_resid_prе", "hook_resid_pre"),  # a Cyrillic letter
        ("resid_pre", "hook_resid_pre"),
        ("blocks.3.hook_resid_pre", r"blocks\.\d\.hook_resid_pre"),
    ],
)
def test_pattern_that_matches_nothing_is_rejected(known: Names, pattern: str, nearest: str):
    with pytest.raises(UserError, match=rf"^sae: the model has no .*'; did you mean '{nearest}'\?"):
        matching_hook_names([pattern], known, "sae")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["hook_resid_pre", "blocks.1.hook_resid_pre"],
            "'blocks.1.hook_resid_pre' repeats 'blocks.1.hook_resid_pre', which 'hook_resid_pre'",
        ),
        (
            ["blocks.1.hook_resid_pre", "hook_resid_pre"],
            "'hook_resid_pre' repeats 'blocks.1.hook_resid_pre', which 'blocks.1.hook_resid_pre'",
        ),
    ],
)
def test_patterns_that_overlap_are_rejected(known: Names, patterns: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        matching_hook_names(patterns, known, "sae_positions")


@pytest.mark.parametrize(
    ("name", "first", "stop"),
    [
        ("hook_embed", 0, 0),
        ("blocks.0.hook_resid_pre", 0, 0),
        ("blocks.1.hook_resid_pre", 1, 1),
        ("blocks.1.attn.hook_z", 1, 2),
        ("blocks.1.hook_resid_mid", 1, 2),
        ("blocks.1.hook_resid_post", 2, 2),
        ("blocks.2.mlp.hook_post", 2, 3),
        ("blocks.2.hook_resid_post", 3, 3),
    ],
)
def test_blocks_that_a_hook_point_needs(name: str, first: int, stop: int):
    assert (first_block(name), stop_block(name)) == (first, stop)
