"""RowAdam: torch.optim.Adam in dense mode, SparseAdam in lazy mode, Adam after the fact in deferred mode."""

import copy
import io
import math

import pytest
import torch

from fastsae import SAE, ReLU, SAEConfig, TopK
from fastsae.optim import RowAdam, row_adam
from fastsae.testing import assert_repeatable, assert_same
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["dense", "lazy", "deferred"]
M, D = 11, 5
# Row i of the matrix has a gradient at every EVERY[i]-th step, row 10 never.
EVERY = [1, 1, 2, 3, 7, 20, 50, 100, 150, 10_000]


def parameters(dtype=torch.float64):
    """A matrix, updated by rows, and a vector and a cube, updated as one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(M, D), (D,), (2, 3, 2)]
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def gradients(step, dtype=torch.float64, seed=0):
    """Gradients near 1 for :func:`parameters`; of the matrix only some rows."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    matrix = draw(M, D)
    matrix[[i for i, every in enumerate([*EVERY, math.inf]) if step % every]] = 0
    return [g.to(dtype) for g in (matrix, draw(D), draw(2, 3, 2))]


def rows_of(grad):
    """The same gradient as a row-sparse COO tensor."""
    rows = grad.ne(0).any(1).nonzero().flatten()
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)


def run(optimizer, params, steps, sparse=False, schedule=None, each=None):
    for step in steps:
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        for param, grad in zip(params, gradients(step, params[0].dtype), strict=True):
            param.grad = rows_of(grad) if sparse and param.ndim == 2 else grad
        optimizer.step()
        if each:
            each()


def copies(params):
    return [p.detach().clone() for p in params]


def schedule(step):
    """Warm-up, then a wave and a decay."""
    return 0.01 * min(1, step / 50) * (1 + 0.5 * math.sin(step / 9)) * 0.998**step


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9), (0.0, 0.99)], ids=str)
def test_dense_is_adam(exact_backend, betas):
    ours, theirs = parameters(), parameters()
    run(
        RowAdam(ours, 0.01, betas, mode="dense", backend=exact_backend),
        ours,
        range(1, 301),
        schedule=schedule,
    )
    run(torch.optim.Adam(theirs, 0.01, betas), theirs, range(1, 301), schedule=schedule)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (b - start).abs().max() > 0.05


def test_dense_is_adam_in_fp32(backend):
    ours, theirs, exact = (parameters(dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    run(RowAdam(ours, 0.01, mode="dense", backend=backend), ours, range(1, 301))
    for params in (theirs, exact):
        run(torch.optim.Adam(params, 0.01), params, range(1, 301))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        allowed = 2 * ((b - c).abs().max() + torch.finfo(torch.float32).eps * c.abs().max())
        assert (a - c).abs().max() <= allowed


@pytest.mark.parametrize(
    "betas", [(0.9, 0.999), (0.95, 0.9), (0.99, 0.9801)], ids=["", "b1 > sqrt b2", "b1 = sqrt b2"]
)
@pytest.mark.parametrize("steps", [7, 100, 650])
@pytest.mark.parametrize(("eps", "share"), [(1e-20, 1e-12), (1e-8, 1e-3)])
def test_deferred_and_flushed_is_adam(exact_backend, betas, steps, eps, share):
    """To a share of the distance travelled, which only eps keeps from 0: Adam's v decays towards it.

    Also over more steps than one table of learning rates holds.
    """
    ours, theirs = parameters(), parameters()
    path = [torch.zeros_like(p) for p in theirs]
    last = copies(theirs)

    def measure():
        for length, p, before in zip(path, theirs, last, strict=True):
            length += (p.detach() - before).abs()
            before.copy_(p.detach())

    optimizer = RowAdam(ours, 0.01, betas, eps, mode="deferred", backend=exact_backend)
    run(optimizer, ours, range(1, steps + 1), schedule=schedule)
    run(
        torch.optim.Adam(theirs, 0.01, betas, eps),
        theirs,
        range(1, steps + 1),
        schedule=schedule,
        each=measure,
    )
    idle = optimizer.row_steps(ours[0])
    assert idle.tolist() == [steps // every * every for every in EVERY] + [0]
    optimizer.flush_()
    assert (optimizer.row_steps(ours[0]) == steps).all()
    for a, b, length, start in zip(ours, theirs, path, parameters(), strict=True):
        assert ((a - b).abs() <= share * length).all()
        if a.ndim == 2:
            assert_same(a[-1], start[-1])
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # never idle: Adam itself


def test_deferred_rows_idle_for_long(exact_backend):
    """One gradient, then 600 steps of silence under a rate that is raised long after it."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(1, 3, dtype=torch.float64)) for _ in range(2))
    optimizers = RowAdam([ours], mode="deferred", backend=exact_backend), torch.optim.Adam([theirs])
    path = 0.0
    for step in range(1, 602):
        before = theirs.detach().clone()
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.tensor([[1.0, -2.0, 1e-4]]).double() * (step == 1)
            optimizer.param_groups[0]["lr"] = 0.1 if step > 30 else 0.001
            optimizer.step()
        path += (theirs.detach() - before).abs()
    optimizers[0].flush_()
    # eps weighs more in the smaller gradient: the closed form takes its share as it was at the touch
    assert ((ours - theirs).abs() <= torch.tensor([1e-5, 1e-5, 1e-3]) * path).all()


def test_deferred_in_fp32_stays_within_a_thousandth(backend):
    ours, theirs = parameters(torch.float32), parameters()
    run(optimizer := RowAdam(ours, 0.01, backend=backend), ours, range(1, 301), schedule=schedule)
    run(torch.optim.Adam(theirs, 0.01), theirs, range(1, 301), schedule=schedule)
    optimizer.flush_()
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        distance = (b - start).norm(dim=-1, keepdim=True)
        assert ((a - b).abs() <= 1e-3 * distance + 1e-6).all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9)], ids=str)
def test_lazy_is_sparse_adam(exact_backend, betas):
    """To eps, which SparseAdam doesn't correct for bias."""
    ours, theirs = parameters()[:1], parameters()[:1]
    run_rows = lambda optimizer, params: [  # noqa: E731
        (setattr(params[0], "grad", rows_of(gradients(step)[0])), optimizer.step()) for step in range(1, 301)
    ]
    run_rows(RowAdam(ours, 0.01, betas, eps=1e-20, mode="lazy", backend=exact_backend), ours)
    run_rows(torch.optim.SparseAdam(theirs, 0.01, betas, eps=1e-20), theirs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    assert_same(ours[0][-1], parameters()[0][-1])


@pytest.mark.parametrize("mode", MODES)
def test_row_sparse_gradients_are_dense_ones(exact_backend, mode):
    results = []
    for sparse in (False, True):
        params = parameters()
        optimizer = RowAdam(params, 0.01, mode=mode, backend=exact_backend)
        run(optimizer, params, range(1, 41), sparse=sparse)
        results.append([*copies(params), *optimizer.state[params[0]].values()])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_repeated_rows_add_up_and_rows_of_zeros_are_untouched(mode):
    results = []
    for rows, values in (([2, 0, 2], [1.0, 3.0, 4.0]), ([0, 2], [3.0, 5.0]), ([0, 1, 2], [3.0, 0.0, 5.0])):
        param = torch.nn.Parameter(torch.ones(4, 1))
        optimizer = RowAdam([param], mode=mode)
        grad = torch.sparse_coo_tensor([rows], torch.tensor(values)[:, None], (4, 1), check_invariants=True)
        param.grad = grad
        optimizer.step()
        results.append([param.detach(), optimizer.row_steps(param)])
    for other in results[1:]:
        assert_same(other[0], results[0][0])
        assert_same(other[1], results[0][1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_continues_to_the_bit(mode, dtype):
    """Pending rows stay pending, counters and moments keep their dtypes."""
    whole = parameters(dtype)
    optimizer = RowAdam(whole, 0.01, mode=mode)
    run(optimizer, whole, range(1, 301), schedule=schedule)
    saved, weights = io.BytesIO(), copies(whole)
    torch.save(optimizer.state_dict(), saved)
    run(optimizer, whole, range(301, 341), schedule=schedule)

    resumed = [torch.nn.Parameter(w) for w in weights]
    again = RowAdam(resumed, 0.5, (0.5, 0.5), eps=1, mode="lazy")
    saved.seek(0)
    again.load_state_dict(torch.load(saved, weights_only=True))
    if mode == "deferred":
        assert again.row_steps(resumed[0]).tolist() == [300 // every * every for every in EVERY] + [0]
    run(again, resumed, range(301, 341), schedule=schedule)
    for both in (optimizer, again):
        both.flush_()
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a, b)
        for name, t in optimizer.state[a].items():
            assert_same(t, again.state[b][name], name)
    assert optimizer.state[whole[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.row_steps(whole[0]).dtype == torch.int32


def test_a_loaded_state_is_a_copy():
    params = parameters()
    optimizer = RowAdam(params)
    run(optimizer, params, range(1, 4))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = RowAdam(others)
    other.load_state_dict(saved)
    run(other, others, range(4, 9))
    other.flush_()
    for index, state in saved["state"].items():
        for name, t in state.items():
            assert_same(t, before["state"][index][name])
    for group, old in zip(saved["param_groups"], before["param_groups"], strict=True):
        assert_same(group["coast"], old["coast"])


@pytest.mark.parametrize("mode", MODES)
def test_torchs_schedulers_drive_it(mode):
    results = []
    for driven in (True, False):
        params = parameters()
        optimizer = RowAdam(params, 0.01, mode=mode)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        rates = []

        def each(scheduler=scheduler, rates=rates, optimizer=optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()

        if driven:
            run(optimizer, params, range(1, 61), each=each)
            assert rates[-1] < 0.001
        else:
            by_hand = lambda step: 0.01 * (1 + math.cos(math.pi * (step - 1) / 60)) / 2  # noqa: E731
            run(RowAdam(params, 0.01, mode=mode), params, range(1, 61), schedule=by_hand)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_that_isnt_finite_changes_nothing(mode, number, sparse):
    params = parameters()
    optimizer = RowAdam(params, 0.01, mode=mode)
    run(optimizer, params, range(1, 6))
    before = copy.deepcopy([copies(params), optimizer.state_dict()])
    grads = gradients(6)
    grads[0][0, 2] = number
    for param, grad in zip(params, grads, strict=True):
        param.grad = rows_of(grad) if sparse and param.ndim == 2 else grad
    with pytest.raises(ValueError, match="grad: got a gradient with NaN or Inf, expected finite numbers"):
        optimizer.step()
    after = [copies(params), optimizer.state_dict()]
    a, b = (torch.utils._pytree.tree_leaves(t) for t in (after, before))
    for new, old in zip(a, b, strict=True):
        assert torch.equal(new, old) if isinstance(new, torch.Tensor) else new == old


@pytest.mark.parametrize("unit_norm", [False, True])
def test_flushing_twice_changes_nothing_more(backend, unit_norm):
    params = parameters(torch.float32)[:1]
    optimizer = RowAdam([{"params": params, "unit_norm": unit_norm}], 0.01, mode="deferred", backend=backend)
    optimizer.flush_()  # before the first step there is nothing to do
    assert_same(params[0], parameters(torch.float32)[0])
    for step in range(1, 38):
        params[0].grad = gradients(step, torch.float32)[0]
        optimizer.step()
    pending = params[0].detach().clone()
    optimizer.flush_()
    flushed = params[0].detach().clone()
    assert not torch.equal(flushed, pending)
    optimizer.flush_()
    assert_same(params[0], flushed)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_flush_does_nothing_in_the_other_modes(mode):
    params = parameters()
    optimizer = RowAdam(params, 0.01, mode=mode)
    run(optimizer, params, range(1, 38))
    before = copies(params)
    optimizer.flush_()
    for a, b in zip(params, before, strict=True):
        assert_same(a, b)


def test_flushing_now_and_then_leads_to_the_same_place():
    often, once = parameters(), parameters()
    optimizers = RowAdam(often, 0.01), RowAdam(once, 0.01)
    run(optimizers[0], often, range(1, 101), each=optimizers[0].flush_)
    run(optimizers[1], once, range(1, 101))
    optimizers[1].flush_()
    for a, b in zip(often, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_norm_decoder_keeps_its_length(mode):
    """RowAdam(sae) projects and renormalises by itself; beside constrain_* that changes nothing."""
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, TopK(2)), dtype=torch.float64)
    plain = copy.deepcopy(sae)
    optimizer, adam = RowAdam(sae, 0.01, mode=mode), torch.optim.Adam(plain.parameters(), 0.01)
    for step in range(20):
        x = torch.randn(7, D, generator=torch.Generator().manual_seed(step)).double()
        for module, opt in ((sae, optimizer), (plain, adam)):
            opt.zero_grad()
            module.training_forward(x).loss.backward()
            module.constrain_gradients_()
            opt.step()
            module.constrain_weights_()
        if mode == "dense":
            for a, b in zip(sae.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M).double())
    free = RowAdam(SAE(SAEConfig(D, M, ReLU())))
    assert not any(group["unit_norm"] for group in free.param_groups)


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_agree_to_the_bit(backend, two_threads, mode):
    def once():
        params = parameters(torch.float32)
        optimizer = RowAdam(params, 0.01, mode=mode, backend=backend)
        run(optimizer, params, range(1, 41))
        optimizer.flush_()
        return params

    assert_repeatable(once)


def test_groups_have_their_own_settings():
    ours, theirs = parameters(), parameters()
    groups = lambda p: [{"params": p[:1], "lr": 0.1}, {"params": p[1:], "betas": (0.5, 0.9)}]  # noqa: E731
    optimizer = RowAdam(groups(ours)[:1], 0.01, mode="dense")
    optimizer.add_param_group(groups(ours)[1])
    run(optimizer, ours, range(1, 21))
    run(torch.optim.Adam(groups(theirs), 0.01), theirs, range(1, 21))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_group_says_what_is_updated_by_rows():
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,)))
    optimizer = RowAdam(
        [{"params": [matrix], "row_sparse": False}, {"params": [vector], "row_sparse": True}],
        0.1,
        mode="lazy",
    )
    for value in (1.0, 0.0):
        matrix.grad, vector.grad = torch.full((3, 2), value), torch.tensor([value, 0.0, 0.0])
        optimizer.step()
    assert optimizer.row_steps(matrix).tolist() == [2, 2, 2]
    assert optimizer.row_steps(vector).tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_what_torchs_optimizers_take(mode):
    """Modules, plain leaves, numbers, gradients of any layout, none at all, a closure."""
    module = torch.nn.Linear(3, 4)
    leaf = torch.zeros(2, 3, requires_grad=True)
    number = torch.nn.Parameter(torch.tensor(2.0))
    unused = torch.nn.Parameter(torch.ones(2, 2))
    RowAdam(module, mode=mode)
    optimizer = RowAdam([*module.parameters(), leaf, number, unused], 0.1, mode=mode)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(1, 3)).sum() + (leaf * 3).sum() + number.square()
        loss.backward()
        leaf.grad = torch.full((3, 2), 3.0).T
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first
    assert number.item() == pytest.approx(1.8, abs=1e-3)
    assert torch.allclose(leaf, torch.full((2, 3), -0.2))
    assert unused.tolist() == [[1, 1], [1, 1]]
    assert unused not in optimizer.state
    saved = optimizer.state_dict()
    RowAdam([*module.parameters(), leaf, number, unused]).load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1}, ValueError, "lr: got -1, expected a number >= 0"),
        ({"lr": math.inf}, ValueError, "lr: got inf, expected a number >= 0"),
        ({"lr": "fast"}, TypeError, "lr: got str, expected a number"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]: got 1.0, expected a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]: got -0.1, expected a number >= 0"),
        ({"betas": (0.9,)}, ValueError, r"betas: got \(0.9,\), expected two numbers in \[0, 1\)"),
        ({"betas": 0.9}, TypeError, "betas: got float, expected two numbers"),
        ({"eps": -1e-8}, ValueError, "eps: got -1e-08, expected a number >= 0"),
        ({"mode": "eager"}, ValueError, "mode: got 'eager', expected one of 'dense', 'lazy', 'deferred'"),
        ({"state_dtype": "int4"}, ValueError, "state_dtype: got 'int4', expected one of"),
        ({"backend": "x"}, ValueError, "backend: got 'x', expected one of"),
    ],
)
def test_construction_refuses(change, error, message):
    with pytest.raises(error, match=message):
        RowAdam(parameters(), **change)


def test_gradients_that_arent_sparse_by_rows_are_refused():
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.sparse_coo_tensor([[0, 2], [1, 0]], [1.0, 1.0], (3, 2), check_invariants=True)
    with pytest.raises(
        ValueError, match="grad: got a COO tensor sparse in 2 dimensions, expected one sparse by rows"
    ):
        RowAdam([param]).step()


def test_a_foreign_parameter_is_refused():
    optimizer, foreign = RowAdam(parameters()), torch.nn.Parameter(torch.ones(3, 2))
    for use in (optimizer.row_steps, lambda p: optimizer.update_rows_(p, None, p)):
        with pytest.raises(
            ValueError, match="param: got a tensor of another optimizer, expected a parameter"
        ):
            use(foreign)
    assert foreign not in optimizer.state


# What the host needn't know


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9), (0.0, 0.999)], ids=str)
def test_the_coast_is_the_same_wherever_steps_are_counted(monkeypatch, betas):
    """On a host the table has the length it needs, and only what changes is gone through."""
    tables = []
    for on_host in (True, False):
        monkeypatch.setattr(row_adam, "_on_host", lambda t, on_host=on_host: on_host)
        monkeypatch.setattr(row_adam, "GRAPH_STEPS", 512)
        param = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = RowAdam([param], 0.01, betas)
        for step in range(300):
            param.grad = torch.ones(3, 2) * (step % 7 == 0)
            optimizer.step()
        tables.append(optimizer.param_groups[0]["coast"][:300])
    torch.testing.assert_close(*tables, rtol=1e-12, atol=0)


def test_a_table_saved_on_a_host_is_made_longer_elsewhere(monkeypatch):
    def run(steps, state=None):
        param = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = RowAdam([param], 0.01)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            param.grad = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]])
            optimizer.step()
        return optimizer

    state = run(20).state_dict()
    assert len(state["param_groups"][0]["coast"]) == 256
    monkeypatch.setattr(row_adam, "_on_host", lambda t: False)
    monkeypatch.setattr(row_adam, "GRAPH_STEPS", 300)
    assert len(run(1, state).param_groups[0]["coast"]) == 300
    assert len(run(400, state).param_groups[0]["coast"]) > 420


def test_steps_may_be_a_number_as_in_older_states():
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdam([param], 0.01)
    for _ in range(3):
        param.grad = torch.ones(3, 2)
        optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["steps"] = 3
    results = []
    for saved in (state, copy.deepcopy(optimizer).state_dict()):
        twin = torch.nn.Parameter(torch.ones(3, 2))
        again = RowAdam([twin], 0.01)
        again.load_state_dict(saved)
        twin.grad = torch.ones(3, 2)
        again.step()
        results.append(twin.detach())
        assert int(again.param_groups[0]["steps"]) == 4
    assert_same(*results)


def test_odd_groups_and_rates():
    """As torch's optimizers take them: a group without parameters, a rate in a tensor of one element."""
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": []}]
    one, other = RowAdam(groups, torch.tensor([0.01])), RowAdam([params[1]], 0.01)
    for optimizer, param in zip((one, other), params, strict=True):
        param.grad = torch.ones(3, 2)
        optimizer.step()
        optimizer.flush_()
    torch.testing.assert_close(*params)
    twin, copied = copy.deepcopy((params[1], other))
    for optimizer, param in ((other, params[1]), (copied, twin)):
        param.grad = torch.ones(3, 2)
        optimizer.step()
    assert_same(twin.detach(), params[1].detach())


@pytest.mark.parametrize("other", [(5, 2), (3, 3)], ids=str)
def test_a_state_of_another_size_is_refused(other):
    states = []
    for shape in ((3, 2), other):
        param = torch.nn.Parameter(torch.ones(shape))
        optimizer = RowAdam([param], 0.01)
        param.grad = torch.ones(shape)
        optimizer.step()
        states.append(optimizer.state_dict())
    before = optimizer.row_steps(param).clone()
    with pytest.raises(
        ValueError, match=r"state_dict: got exp_avg of parameter 0: \(3, 2\) in .*, expected \("
    ):
        optimizer.load_state_dict(states[0])
    with pytest.raises(ValueError, match="state_dict: got exp_avg of parameter 0: nothing"):
        optimizer.load_state_dict({**states[1], "state": {0: {"step": torch.ones(())}}})
    assert_same(optimizer.row_steps(param), before)


def test_a_scheduler_beside_the_fused_step_does_not_warn():
    sae = SAE(SAEConfig(4, 8, TopK(2)))
    optimizer = RowAdam(sae, 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        train_step(sae, optimizer, torch.ones(4, 4).cumsum(0))
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0.01
