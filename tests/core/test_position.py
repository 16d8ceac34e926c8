import pytest
import torch

from golden import case, far
from model.position import MODES, grid_ids, reference_ids, rotary_angles, rotate


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="'x' is none of d, h, w, o"):
        reference_ids((4, 4), [(2, 2)], "x")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_reference_ids_equal_the_official_ones(mode, count):
    golden = case("uno")
    cells = lambda name: tuple(side // 2 for side in golden[name].shape[2:])  # noqa: E731
    placed = reference_ids(cells("noise"), [cells(f"ref{i}") for i in range(1, count + 1)], mode)
    assert len(placed) == count
    for i, ids in enumerate(placed, 1):
        assert torch.equal(ids, golden[f"refs{count}.pe_{mode}.ref{i}_ids"][0])


def test_no_references_need_no_ids():
    assert reference_ids((4, 6), []) == []


def test_diagonal_references_share_no_row_or_column_with_the_target_or_each_other():
    target, *others = [grid_ids(4, 6), *reference_ids((4, 6), [(3, 5), (2, 2)])]
    rows, columns = set(target[:, 1].tolist()), set(target[:, 2].tolist())
    for ids in others:
        assert not rows & set(ids[:, 1].tolist()) and not columns & set(ids[:, 2].tolist())
        rows |= set(ids[:, 1].tolist())
        columns |= set(ids[:, 2].tolist())


def test_scale_multiplies_the_offset_alone():
    (once,), (twice,) = reference_ids((4, 6), [(2, 2)]), reference_ids((4, 6), [(2, 2)], scale=2)
    assert torch.equal(twice - once, torch.tensor([0.0, 4, 6]).expand(4, 3))


def test_grid_ids_run_row_by_row():
    assert grid_ids(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_rotation_depends_on_relative_position_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64).float()

    def score(row):
        turn = [rotary_angles(torch.tensor([[[0.0, r, 2.0]]]), (4, 14, 14)) for r in (row, row + 3)]
        return (rotate(q, turn[0]) * rotate(k, turn[1])).sum()

    assert far(score(1), score(400)) < 1e-4


def test_angles_are_float64_inside():
    cos = rotary_angles(torch.tensor([[[0.0, 4000.0, 0.0]]]), (4, 14, 14))[..., 0]
    want = torch.cos(4000 * 10_000 ** -(torch.arange(0, 14, 2, dtype=torch.float64) / 14))
    assert far(cos[0, 0, 0, 2:9], want) < 1e-7
