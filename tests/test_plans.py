"""Plans against the paper's formulas."""

from __future__ import annotations

import pytest

from blue_callbacks import LayerUpdate, layer_updates


def test_boundary_writes_first_and_last_layer_with_targets_of_their_own():
    assert layer_updates("boundary", [4, 5, 6, 7, 8]) == [
        LayerUpdate(4, 4, 1),
        LayerUpdate(8, 8, 1),
    ]


def test_boundary_of_a_single_layer_writes_it_once():
    assert layer_updates("boundary", [5]) == [LayerUpdate(5, 5, 1)]


def test_even_shares_leave_an_equal_part_to_every_layer():
    """If each layer removes its share of what is left, all layers contribute the same (Eq. 6)."""
    left, contributions = 1.0, []
    for step in layer_updates("even", [4, 5, 6, 7, 8]):
        assert step.target_layer == 8
        contributions.append(step.share * left)
        left -= contributions[-1]
    assert contributions == pytest.approx([0.2] * 5)
    assert left == pytest.approx(0.0)


def test_square_root_shares_are_one_over_the_root_of_the_layers_that_are_left():
    """PMET's distribution of the residual (Li et al. 2024)."""
    updates = layer_updates("square_root", [4, 5, 6, 7, 8])
    assert [update.layer for update in updates] == [4, 5, 6, 7, 8]
    assert {update.target_layer for update in updates} == {8}
    squares = [1 / update.share**2 for update in updates]
    assert squares == pytest.approx([5, 4, 3, 2, 1])


def test_baselines():
    assert layer_updates("computed", [1, 2]) == [LayerUpdate(1, 1, 1), LayerUpdate(2, 2, 1)]
    assert layer_updates("first", [1, 2, 3]) == [LayerUpdate(1, 1, 1)]
    assert layer_updates("last", [1, 2, 3]) == [LayerUpdate(3, 3, 1)]


@pytest.mark.parametrize(
    ("plan", "layers", "said"),
    [
        ("evn", [1], "the plans are"),
        ("even", [], "distinct"),
        ("even", [2, 1], "ascending"),
        ("even", [1, 1], "distinct"),
        ("even", [-1, 1], "negative"),
    ],
)
def test_what_is_refused(plan, layers, said):
    with pytest.raises(ValueError, match=said):
        layer_updates(plan, layers)
