"""row_update: Adam on rows, against torch.optim.Adam and the steps that idle rows missed, one by one."""

import math

import pytest
import torch

from fastsae.testing import assert_close, assert_repeatable, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")

BETA1, BETA2, EPS, LR = 0.9, 0.999, 1e-8, 3e-3


def row_update(state, rows, grad, coast, step, backend, unit_norm=False, betas=(BETA1, BETA2), eps=EPS):
    weight, *its = state
    torch.ops.fastsae.row_update(
        weight,
        None,
        its,
        rows,
        grad,
        coast,
        clock_at(step, betas, eps),
        *betas,
        eps,
        unit_norm,
        0,
        0,
        backend,
    )


def clock_at(step, betas=(BETA1, BETA2), eps=EPS, proceed=1):
    correction = math.sqrt(1 - betas[1] ** step)
    return torch.tensor(
        [step, LR * correction / (1 - betas[0] ** step), eps * correction, proceed], dtype=torch.float64
    )


def state(m, d, dtype=torch.float32, seed=0):
    """Weights, moments as after some steps, and the step each row was last brought up to date at."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, d, generator=generator)
    exp_avg, exp_avg_sq = torch.randn(m, d, generator=generator), torch.rand(m, d, generator=generator) + 0.1
    wide = torch.promote_types(dtype, torch.float32)
    return weight.to(dtype), exp_avg.to(wide), exp_avg_sq.to(wide), torch.full((m,), 6, dtype=torch.int32)


def copies(tensors, dtype=None):
    return tuple(t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype) for t in tensors)


def adam(weight, exp_avg, exp_avg_sq, last_step, grad, step, lr=LR, betas=(BETA1, BETA2), eps=EPS):
    """torch.optim.Adam's step from the given state, in the dtype of the moments."""
    parameter = torch.nn.Parameter(weight.to(exp_avg.dtype, copy=True))
    parameter.grad = grad.to(exp_avg.dtype)
    optimizer = torch.optim.Adam([parameter], lr, betas, eps)
    optimizer.state[parameter] = {
        "step": torch.tensor(step - 1.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    optimizer.step()
    moments = optimizer.state[parameter]
    return parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"]


def assert_state(actual, eager, exact):
    for name, a, e, x in zip(("weight", "exp_avg", "exp_avg_sq"), actual, eager, exact, strict=False):
        assert_close(a, e.to(a.dtype), x, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("every_row", [True, False])
@pytest.mark.parametrize(("m", "d"), [(1, 1), (5, 7), (50, 24)])
def test_a_step_is_adams(any_backend, m, d, every_row, dtype):
    before = state(m, d, dtype)
    rows = None if every_row else torch.arange(0, m, 3)
    mine = slice(None) if every_row else rows
    grad = torch.randn(len(before[0][mine]), d, generator=torch.Generator().manual_seed(1))
    after = copies(before)
    row_update(after, rows, grad, None, 7, any_backend)
    picked = [t[mine] for t in before]
    eager, exact = adam(*picked, grad, 7), adam(*copies(picked, torch.float64), grad.double(), 7)
    assert_state([t[mine] for t in after], eager, exact)
    touched = torch.zeros(m, dtype=torch.bool)
    touched[mine] = True
    assert after[3].tolist() == [7 if t else 6 for t in touched]
    for new, old in zip(after, before, strict=True):
        assert_same(new[~touched], old[~touched])


@pytest.mark.parametrize("step", [1, 2, 1000, 100_000])
def test_bias_correction_at_every_age(exact_backend, step):
    before = state(5, 7, torch.float64)
    after, grad = copies(before), torch.randn(5, 7, dtype=torch.float64)
    row_update(after, None, grad, None, step, exact_backend)
    for new, expected in zip(after, adam(*before, grad, step), strict=False):
        torch.testing.assert_close(new, expected, rtol=1e-13, atol=1e-13)


def coast_table(steps, lrs, betas):
    """C(t) of the docstring for each step of last touch t, summed term by term."""
    beta1, beta2 = betas
    r = beta1 / math.sqrt(beta2)
    term = lambda u, t: lrs[u - 1] * r ** (u - t) * math.sqrt(1 - beta2**u) / (1 - beta1**u)  # noqa: E731
    owed = [sum(term(u, t) for u in range(t + 1, steps + 1)) for t in range(steps + 1)]
    return torch.tensor(owed, dtype=torch.float64)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9), (0.0, 0.999)], ids=str)
@pytest.mark.parametrize("then", ["a step", "nothing"])
def test_missed_steps_are_made_up_as_adam_would_have_taken_them(exact_backend, then, betas):
    """Rows idle for 0 to 39 steps under a changing learning rate, against Adam with zero gradients.

    The closed form takes eps, and v's share of it, as they were at the last touch: exact as eps goes to 0.
    """
    steps, m, d, eps = 40, 41, 3, 1e-30
    lrs = [LR * (1 + math.sin(u / 5)) for u in range(1, steps + 1)]
    before = state(m, d, torch.float64)
    before[3].copy_(torch.arange(m).clamp(min=1))
    expected = [t.clone() for t in before[:3]]
    for row in range(m):
        for u in range(int(before[3][row]) + 1, steps + 1):
            one = [t[row : row + 1] for t in expected]
            for t, new in zip(
                one, adam(*one, None, torch.zeros(1, d), u, lrs[u - 1], betas, eps), strict=True
            ):
                t.copy_(new)
    grad = None
    if then == "a step":
        grad = torch.randn(m, d, dtype=torch.float64)
        expected = adam(*expected, None, grad, steps + 1, LR, betas, eps)
    after = copies(before)
    step = steps if grad is None else steps + 1
    row_update(after, None, grad, coast_table(steps, lrs, betas), step, exact_backend, betas=betas, eps=eps)
    for new, old in zip(after, expected, strict=False):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-12)
    assert (after[3] == step).all()


def test_nothing_owed_nothing_moves(any_backend):
    coast = torch.ones(8, dtype=torch.float64)
    for behind in ([], [0, 3]):
        before = state(5, 7)
        before[3][behind] = 4
        after = copies(before)
        row_update(after, None, None, coast, 6, any_backend)
        for new, old in zip(after[:3], before, strict=False):
            assert (new != old).any(1).nonzero().flatten().tolist() == behind
        assert after[3].tolist() == [6] * 5


def test_rows_never_touched_stay(any_backend):
    weight, *rest = state(5, 7)
    before = weight.clone()
    exp_avg, exp_avg_sq, last_step = (t.zero_() for t in rest)
    coast = torch.ones(8, dtype=torch.float64)
    row_update((weight, exp_avg, exp_avg_sq, last_step), None, None, coast, 6, any_backend)
    assert_same(weight, before)
    assert not exp_avg.any()
    assert (last_step == 6).all()


@pytest.mark.parametrize("every_row", [True, False])
def test_unit_norm_is_projection_then_step_then_length_one(exact_backend, every_row):
    before = state(7, 5, torch.float64)
    before[0].div_(before[0].norm(dim=1, keepdim=True))
    rows = None if every_row else torch.arange(7)
    grad = torch.randn(7, 5, dtype=torch.float64)
    after = copies(before)
    row_update(after, rows, grad, None, 7, exact_backend, unit_norm=True)
    unit = before[0]
    weight, *moments = adam(*before, grad - unit * (grad * unit).sum(1, keepdim=True), 7)
    expected = weight / weight.norm(dim=1, keepdim=True)
    for new, old in zip(after, (expected, *moments), strict=False):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


def test_a_zero_row_of_a_unit_norm_weight_stays_finite(any_backend):
    """A transcoder's decoder starts at 0."""
    weight, exp_avg, exp_avg_sq, last_step = (torch.zeros_like(t) for t in state(3, 5))
    grad = torch.zeros(3, 5)
    grad[1] = 1
    row_update((weight, exp_avg, exp_avg_sq, last_step), None, grad, None, 1, any_backend, unit_norm=True)
    assert weight[0].tolist() == [0.0] * 5
    assert weight[1].norm().item() == pytest.approx(1)


def test_rows_of_a_view_are_updated_in_place(any_backend):
    """The optimizer hands over consecutive rows as views of the whole."""
    whole, alone = state(9, 4), copies(t[3:6] for t in state(9, 4))
    grad = torch.randn(3, 4)
    row_update([t[3:6] for t in whole], None, grad, None, 7, any_backend)
    row_update(alone, None, grad, None, 7, any_backend)
    for t, expected, before in zip(whole, alone, state(9, 4), strict=True):
        assert_same(t[3:6], expected)
        assert_same(t[6:], before[6:])


def test_nothing_is_done_where_the_clock_says_so(any_backend):
    before = state(5, 7)
    after, clock = copies(before), clock_at(9, proceed=0)
    arguments = None, torch.ones(5, 7), torch.ones(10, dtype=torch.float64), clock, BETA1, BETA2, EPS, True
    torch.ops.fastsae.row_update(after[0], None, list(after[1:]), *arguments, 0, 0, any_backend)
    for new, old in zip(after, before, strict=True):
        assert_same(new, old)


def test_a_row_id_that_is_not_a_row_is_passed_over(any_backend):
    """As the unused places that transpose fills with n_latents."""
    before, rows, grad = state(5, 7), torch.tensor([1, 3, 5, 5]), torch.randn(4, 7)
    after, expected = copies(before), copies(before)
    row_update(after, rows, grad, None, 7, any_backend)
    row_update(expected, rows[:2], grad[:2], None, 7, any_backend)
    for new, old in zip(after, expected, strict=True):
        assert_same(new, old)


def test_two_runs_agree_to_the_bit(backend, two_threads):
    rows, grad, coast = torch.arange(0, 257, 3), torch.randn(86, 24), torch.rand(8, dtype=torch.float64)

    def run():
        tensors = state(257, 24)
        row_update(tensors, rows, grad, coast, 9, backend, unit_norm=True)
        return tensors

    assert_repeatable(run)
