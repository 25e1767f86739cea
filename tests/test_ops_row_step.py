"""row_step: backward and optimizer in one, against the formulas' autograd gradients and torch.optim.Adam."""

import pytest
import torch

from fastsae.testing import (
    NeverWaits,
    assert_close,
    assert_repeatable,
    assert_same,
    poisoned_empty,
    problem,
    random_code,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS, EPS, LR, STEP = (0.9, 0.999, 0.8, 0.99, 0.95, 0.995), (1e-8, 1e-7, 1e-6), 3e-3, 7
NAMES = ("W_enc", "b_enc", "W_dec")
PARTS = ("exp_avg", "exp_avg_sq", "last_step")


def clock(i, step=STEP, proceed=1):
    beta1, beta2 = BETAS[2 * i : 2 * i + 2]
    correction = (1 - beta2**step) ** 0.5
    return torch.tensor(
        [step, LR * correction / (1 - beta1**step), EPS[i] * correction, proceed], dtype=torch.float64
    )


class Case:
    """Operands of one call; what ``run`` changes is a copy."""

    def __init__(self, n, d_in, m, d_out=None, dtype=torch.float32, l1=0.0, unit_norm=False, every=(0, 0, 0),
                 frozen=(), aux=False, coast=False, proceed=1):  # fmt: skip
        p = problem(n, d_in, m, d_out=d_out)
        self.weights = [t.to(dtype) for t in (p.W_enc, p.b_enc, p.W_dec)]
        generator = torch.Generator().manual_seed(1)
        rows = (2 if aux else 1) * n
        code = random_code(rows, m, spare=3)
        self.code = code.values.to(dtype), code.indices, code.offsets
        self.code[0][1::9] *= -1  # a code's value may be negative; then its pre-activation has no gradient
        self.x = p.x.to(dtype)
        self.error = torch.randn(rows, p.W_dec.shape[1], generator=generator).to(dtype)
        self.scale, self.l1 = torch.rand(rows, generator=generator) + 0.5, l1
        wide = torch.promote_types(dtype, torch.float32)
        self.states = []
        for i, weight in enumerate(self.weights):
            shape = (m, weight[0].numel())
            moments = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
            last = torch.arange(m).remainder(STEP).int()
            self.states.append([] if NAMES[i] in frozen else [*(t.to(wide) for t in moments), last])
        table = torch.rand(STEP + 1, generator=generator, dtype=torch.float64)
        self.coasts = [table if coast else None] * 3
        self.clocks = [clock(i, proceed=proceed) for i in range(3)]
        self.every, self.unit_norm = [bool(e) for e in every], unit_norm

    def to(self, dtype):
        """The same numbers in another dtype; the states and ``scale`` in what sums over it run in."""
        case, wide = object.__new__(Case), torch.promote_types(dtype, torch.float32)
        case.__dict__.update(self.__dict__)
        case.weights = [t.to(dtype) for t in self.weights]
        case.code = (self.code[0].to(dtype), *self.code[1:])
        case.x, case.error, case.scale = self.x.to(dtype), self.error.to(dtype), self.scale.to(wide)
        case.states = [[t.to(wide) if t.is_floating_point() else t for t in s] for s in self.states]
        return case

    def run(self, backend, op=None):
        """Everything that the call changes, by name, and what it returns."""
        weights = [t.clone() for t in self.weights]
        states = [[t.clone() for t in state] for state in self.states]
        arguments = (
            *weights, None, None, *states, self.coasts, self.clocks, list(BETAS), list(EPS), [0] * 3,
            self.every, self.unit_norm, *self.code, self.x, self.error, self.scale, self.l1,
        )  # fmt: skip
        pull = op(*arguments) if op else torch.ops.fastsae.row_step(*arguments, backend)
        named = dict(zip(NAMES, weights, strict=True))
        for name, state in zip(NAMES, states, strict=True):
            if state:
                named |= {f"{part} of {name}": t for part, t in zip(PARTS, state, strict=True)}
        return named | {"pull": pull}


def assert_matches_reference(case, backend, op=None):
    """By :func:`assert_close`: the oracle in fp64 is exact, in the operands' dtype it is eager's."""
    actual = case.run(backend, op)
    eager, exact = case.run("reference"), case.to(torch.float64).run("reference")
    for name, t in actual.items():
        if t.is_floating_point():
            assert_close(t, eager[name], exact[name].double(), name)
        else:
            assert_same(t, exact[name], name)
    return actual


VARIANTS = {
    "plain": {},
    "unit norm": {"unit_norm": True},
    "l1": {"l1": 0.3},
    "auxiliary rows": {"aux": True, "l1": 0.3},
    "another width out": {"d_out": 5},
    "coast": {"coast": True, "unit_norm": True},
    "every row": {"every": (1, 1, 1), "coast": True},
    "every decoder row": {"every": (0, 0, 1), "unit_norm": True},
    "every encoder row and bias": {"every": (1, 1, 0)},
    "W_enc frozen": {"frozen": ("W_enc",)},
    "W_dec and b_enc frozen": {"frozen": ("W_dec", "b_enc"), "l1": 0.3},
    "nothing trained": {"frozen": NAMES},
    "skipped": {"proceed": 0},
}


def usable(backend, dtype):
    """Skip what Triton's interpreter gets wrong (bf16) and its kernels don't do (fp64)."""
    if backend == "triton":
        from fastsae.backends.triton.support import interpreting

        if dtype == torch.float64 or (dtype == torch.bfloat16 and interpreting()):
            pytest.skip(f"triton: no {dtype} here")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(any_backend, variant):
    assert_matches_reference(Case(9, 7, 23, **VARIANTS[variant]), any_backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(any_backend, dtype):
    usable(any_backend, dtype)
    assert_matches_reference(Case(9, 7, 23, dtype=dtype, unit_norm=True, l1=0.3), any_backend)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (2, 3, 50), (33, 24, 40)], ids=str)
def test_shapes(any_backend, shape):
    """No token; one of everything; more places for rows than latents that fire; latents with many tokens."""
    assert_matches_reference(Case(*shape, unit_norm=True, coast=True), any_backend)


def test_against_autograd(any_backend):
    """From moments of 0, exp_avg is the gradient times 1 - beta1."""
    usable(any_backend, torch.float64)
    case = Case(9, 7, 23, d_out=5, dtype=torch.float64, l1=0.3)
    for state in case.states:
        for t in state[:2]:
            t.zero_()
    leaves = [t.clone().requires_grad_() for t in case.weights]
    W_enc, b_enc, W_dec = leaves
    values, indices, offsets = case.code
    stored = int(offsets[-1])
    rows = torch.arange(9).repeat_interleave(offsets.diff())
    columns, given = indices[:stored].long(), values[:stored]
    pre = (case.x @ W_enc.T + b_enc)[rows, columns]
    # the given values, with the gradient of pre where they are positive
    entries = given + torch.where(given > 0, pre - pre.detach(), 0)
    code = torch.zeros(9, 23, dtype=torch.float64).index_put((rows, columns), entries)
    upstream = case.scale.double()[:, None] * case.error
    loss = ((code @ W_dec) * upstream).sum() + 0.3 * (code * W_dec.norm(dim=1)).sum()
    grads = torch.autograd.grad(loss, leaves)
    actual = case.run(any_backend)
    for i, (name, grad) in enumerate(zip(NAMES, grads, strict=True)):
        torch.testing.assert_close(actual[f"exp_avg of {name}"].view_as(grad), (1 - BETAS[2 * i]) * grad)
    torch.testing.assert_close(actual["pull"], grads[1] @ case.weights[0])


def test_nothing_is_written_where_the_clock_says_so(any_backend):
    case = Case(9, 7, 23, proceed=0, every=(1, 0, 1), coast=True, unit_norm=True)
    actual = case.run(any_backend)
    for i, name in enumerate(NAMES):
        assert_same(actual[name], case.weights[i], name)
        for part, t in zip(PARTS, case.states[i], strict=True):
            assert_same(actual[f"{part} of {name}"], t)


def test_only_latents_that_fire_are_touched(any_backend):
    case = Case(2, 3, 200, unit_norm=True, coast=True)
    values, indices, offsets = case.code
    stored = int(offsets[-1])
    live = torch.zeros(200, dtype=torch.bool)
    live[indices[:stored][values[:stored] != 0].long()] = True
    assert 0 < live.sum() < 200
    actual = case.run(any_backend)
    for i, name in enumerate(NAMES):
        assert_same(actual[name][~live], case.weights[i][~live], name)
        assert (actual[f"last_step of {name}"] == STEP).eq(live | (case.states[i][2] == STEP)).all()


def test_two_runs_agree_and_no_place_is_left_unwritten(backend, two_threads):
    case = Case(33, 24, 40, unit_norm=True, l1=0.3, coast=True)
    assert_repeatable(lambda: case.run(backend).values())
    expected = case.run(backend)
    with poisoned_empty():
        actual = case.run(backend)
    for name, t in actual.items():
        assert_same(t, expected[name], name)


@pytest.fixture
def triton_step(monkeypatch):
    """Triton's launcher: tokens in pairs, columns in eights, runs above four in pieces, two programs."""
    from fastsae.backends.triton import rows, support
    from fastsae.kernels import row_grads, row_step

    if not support.interpreting():
        pytest.skip("Triton on CPU tensors needs TRITON_INTERPRET=1")
    monkeypatch.setattr(row_grads, "SPLIT", 4)
    decoder = row_step.DecoderStepConfig(BLOCK_J=4, num_warps=1)
    encoder = row_step.EncoderStepConfig(BLOCK_J=2, most_columns=8, programs=2)
    monkeypatch.setattr(row_step, "DECODER", {(80, 9999): decoder})
    monkeypatch.setattr(row_step, "ENCODER", {(80, 9999): encoder})
    return rows.row_step


@pytest.mark.parametrize("variant", VARIANTS)
def test_triton_in_small_tiles_with_a_host_that_never_waits(triton_step, variant):
    case = Case(14, 11, 9, **VARIANTS[variant])
    runs = case.code[1][: int(case.code[2][-1])].bincount()
    assert (runs > 4).sum() > 2  # these are cut in pieces

    def step(*arguments):
        with poisoned_empty(), NeverWaits():
            return triton_step(*arguments)

    actual = assert_matches_reference(case, None, step)
    for name, t in case.run(None, step).items():
        assert_same(t, actual[name], name)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (2, 3, 50)], ids=str)
def test_triton_at_the_edges(triton_step, shape):
    """No token; one of everything; more places for rows than latents that fire."""
    for every in ((0, 0, 0), (1, 1, 1)):
        assert_matches_reference(Case(*shape, unit_norm=True, coast=True, every=every), None, triton_step)


def test_triton_in_half_precision(triton_step):
    case = Case(9, 11, 15, dtype=torch.float16, unit_norm=True, l1=0.3, aux=True)
    assert_matches_reference(case, None, triton_step)
