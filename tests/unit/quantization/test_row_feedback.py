"""Feedback among rows, against the rule written out row by row."""

import pytest
import torch
from schemes import gaussian

from quern.core.machine.parallel import Workers
from quern.quantization.rounding.row_feedback import DAMPING, RowFeedback

ROWS, COLUMNS = 12, 20


def output_hessian() -> torch.Tensor:
    gradients = gaussian(40, ROWS, 1) @ (torch.eye(ROWS) + 0.5 * gaussian(ROWS, ROWS, 2))
    return gradients.T @ gradients


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(ROWS)


@pytest.mark.parametrize("sets", [(12,), (1,) * 12, (4, 4, 4), (5, 7), (3, 1, 8)])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_set_is_rounded_towards_what_loses_least(sets, reverse):
    """With the errors of all rows before it fixed, no other target of a set has a smaller tr(G E H E^T), for any H."""
    order = torch.arange(ROWS).flip(0) if reverse else torch.arange(ROWS)
    hessian, weight = output_hessian(), gaussian(ROWS, COLUMNS)[order]
    whole = damped(hessian)[order][:, order]
    feedback = RowFeedback(hessian.triu(), order, Workers(1))
    error, start = torch.zeros(ROWS, COLUMNS, dtype=torch.float64), 0
    for rows in sets:
        stop = start + rows
        due = feedback.due(rows, COLUMNS)
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
    feedback = RowFeedback(torch.eye(ROWS), torch.arange(ROWS), Workers(1))
    feedback.got_wrong(gaussian(5, COLUMNS))
    assert not feedback.due(7, COLUMNS).any()
