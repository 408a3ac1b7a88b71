"""Feedback among rows, against the rule written out row by row."""

import pytest
import torch
from schemes import gaussian, make_codec

from quern.core.machine.parallel import Workers
from quern.quantization.calibration.outputs import MOST_JUDGES, OutputStatistics, bytes_of
from quern.quantization.rounding.row_feedback import OutputHessian, RowFeedback
from quern.quantization.row_damping import DAMPINGS, damped

ROWS, COLUMNS = 12, 20
DAMPING = 0.1


def output_hessian() -> torch.Tensor:
    gradients = gaussian(40, ROWS, 1) @ (torch.eye(ROWS) + 0.5 * gaussian(ROWS, ROWS, 2))
    return gradients.T @ gradients


def whole_hessian(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(ROWS)


@pytest.mark.parametrize("sets", [(12,), (1,) * 12, (4, 4, 4), (5, 7), (3, 1, 8)])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_set_is_rounded_towards_what_loses_least(sets, reverse):
    """With the errors of all rows before it fixed, no other target of a set has a smaller tr(G E H E^T), for any H."""
    order = torch.arange(ROWS).flip(0) if reverse else torch.arange(ROWS)
    hessian, weight = output_hessian(), gaussian(ROWS, COLUMNS)[order]
    whole = whole_hessian(hessian)[order][:, order]
    feedback = RowFeedback(OutputHessian([hessian.triu()], DAMPING), order, COLUMNS, Workers(1))
    error, start = torch.zeros(ROWS, COLUMNS, dtype=torch.float64), 0
    for rows in sets:
        stop = start + rows
        due = feedback.due(rows)
        # All rows behind the set are still free, so they count by what they can make up for.
        left = whole[:stop, :stop]
        if stop < ROWS:
            behind = whole[stop:, stop:]
            left = left - whole[:stop, stop:] @ torch.linalg.solve(behind, whole[stop:, :stop])
        best = torch.linalg.solve(left[start:, start:], left[start:, :start] @ error[:start])
        assert torch.allclose(due.double(), best, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))
        stored = (weight[start:stop] + due).round()
        error[start:stop] = (weight[start:stop] - stored).double()
        feedback.got_wrong(weight[start:stop] - stored)
        start = stop


def test_rows_that_have_nothing_to_do_with_each_other_get_nothing():
    feedback = RowFeedback(OutputHessian([torch.eye(ROWS)], DAMPING), torch.arange(ROWS), COLUMNS, Workers(1))
    feedback.got_wrong(gaussian(5, COLUMNS))
    assert not feedback.due(7).any()


def statistics(gradients: torch.Tensor, judges: torch.Tensor) -> OutputStatistics:
    found = OutputStatistics.of(ROWS, torch.device("cpu"))
    for part, judge in ((gradients, False), (judges, True)):
        found.add(part, judge, Workers(1))
    return found


def test_what_judges_say_is_left_is_what_feedback_leaves_of_their_loss():
    """Against errors that are drawn and fed on row by row."""
    mixing = torch.eye(ROWS) + 0.5 * gaussian(ROWS, ROWS, 2)
    gradients, judges = gaussian(4000, ROWS, 1) @ mixing, gaussian(500, ROWS, 5) @ mixing
    weight = gaussian(ROWS, COLUMNS, 6) * torch.logspace(-0.5, 0, ROWS)[:, None]
    found = statistics(gradients, judges)
    codec = make_codec({"bits": 4, "symmetric": True, "granularity": "channel"})
    outputs, left = damped(found, weight, codec, Workers(1))
    assert outputs is not None
    assert outputs.damping == DAMPINGS[0]
    own = torch.randn(ROWS, 20000, generator=torch.Generator().manual_seed(7)) * weight.square().mean(1).sqrt()[:, None]
    feedback = RowFeedback(outputs, torch.arange(ROWS), own.shape[1], Workers(1))
    error = torch.empty_like(own)
    for row in range(ROWS):  # rounded towards w + due, off by its own error: W - Q is that error less what was due
        error[row] = own[row] - feedback.due(1)[0]
        feedback.got_wrong(error[row][None])
    ratio = (judges @ error).square().sum() / (judges @ own).square().sum()
    assert float(ratio) == pytest.approx(left, rel=0.05)  # of 20,000 draws
    assert left < 0.85


@pytest.mark.parametrize("judges", [torch.zeros(0, ROWS), torch.zeros(9, ROWS), gaussian(9, ROWS, 8)])
def test_without_judges_that_gain_there_is_none(judges):
    """The last ones know nothing of the one direction that all others have."""
    gradients = gaussian(30, 1, 3) * gaussian(1, ROWS, 4)
    codec = make_codec({"bits": 4, "symmetric": True, "granularity": "channel"})
    found = damped(statistics(gradients, judges), gaussian(ROWS, COLUMNS), codec, Workers(1))
    assert found == (None, 1.0)


def test_no_more_tokens_judge_than_are_wanted():
    found = OutputStatistics.of(ROWS, torch.device("cpu"))
    for _ in range(5):
        found.add(gaussian(1000, ROWS), True, Workers(1))
    assert sum(map(len, found.judges)) == 2048
    assert not found.hessians[0].any()


def test_parts_of_a_large_matrix_know_nothing_of_each_other(monkeypatch):
    """Sets may lie in two parts; the rule within each is that of a matrix of its rows alone."""
    monkeypatch.setattr("quern.quantization.calibration.outputs.MOST_ROWS", 7)
    gradients, weight = (
        gaussian(40, ROWS, 1) @ (torch.eye(ROWS) + 0.5 * gaussian(ROWS, ROWS, 2)),
        gaussian(ROWS, COLUMNS),
    )
    found = statistics(gradients, gaussian(5, ROWS, 4))
    assert [len(one) for one in found.hessians] == [6, 6]
    assert bytes_of(ROWS) == 4 * (2 * 6 * 6 + ROWS * MOST_JUDGES)
    # The first product of the two is the reference's, with sets that end where parts do.
    alone = [
        RowFeedback(OutputHessian([one.clone()], DAMPING), torch.arange(6), COLUMNS, Workers(1))
        for one in found.hessians
    ]
    feedback = RowFeedback(OutputHessian(found.hessians, DAMPING), torch.arange(ROWS), COLUMNS, Workers(1))
    for start, stop in ((0, 4), (4, 9), (9, 12)):
        due = feedback.due(stop - start)
        expected = []
        for part, own in enumerate(alone):
            first, last = max(start, 6 * part), min(stop, 6 * part + 6)
            if first < last:
                expected.append(own.due(last - first))
                own.got_wrong(weight[first:last])
        assert torch.equal(due, torch.cat(expected))
        feedback.got_wrong(weight[start:stop])


def test_judges_look_at_every_part(monkeypatch):
    monkeypatch.setattr("quern.quantization.calibration.outputs.MOST_ROWS", 7)
    gradients = gaussian(400, 2, 3) @ gaussian(2, ROWS, 4)
    codec = make_codec({"bits": 4, "symmetric": True, "granularity": "channel"})
    outputs, left = damped(statistics(gradients[8:], gradients[:8]), gaussian(ROWS, COLUMNS), codec, Workers(1))
    assert outputs is not None
    assert left < 0.9
