"""How weights and states are held: exact bits, rounding that is right on average, updates in each format
against fp32's."""

import pytest
import torch

import fastsae
from fastsae import SAE, SAEConfig, TopK
from fastsae.formats import (
    BLOCK,
    STATE_DTYPES,
    WEIGHT_FORMATS,
    join,
    new_state,
    pack,
    random_bits,
    read_rows,
    split,
    unpack,
    write_rows,
)  # fmt: skip
from fastsae.optim import RowAdam
from fastsae.sae import initial_rows
from fastsae.testing import assert_same
from fastsae.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(m, d, spread=3.0, seed=0):
    """fp32 of many magnitudes and both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator) * torch.exp(spread * torch.randn(m, d, generator=generator))


def as_floats(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


# split32


def test_split32_keeps_every_bit():
    odd = as_floats([0, 1, -(2**31), 0x7F7FFFFF, 0x7F800000, 0x00800000, 0x3F808000, 0x3F807FFF, -0x3F807FFF])
    for w in (numbers(50, 300, 20), odd[None]):
        assert_same(join(*split(w)), w)


def test_the_plane_is_the_nearest_bf16():
    w = numbers(50, 300)
    assert_same(split(w)[0], w.bfloat16())
    assert split(as_floats([0x3F808000]))[0].item() > 1  # a tie goes away from 0, so that the rest fits int16


# Random numbers


def test_random_bits_depend_on_seed_step_row_and_column_alone():
    rows = torch.tensor([3, 7, 2**31 - 1])
    whole = random_bits(5, 9, rows, 40)
    for some, part in zip(random_bits(5, 9, rows[1:], 17), whole, strict=True):
        assert torch.equal(some, part[1:, :17])
    for other in (random_bits(6, 9, rows, 40), random_bits(5, 10, rows, 40), random_bits(5, 9, rows + 1, 40)):
        assert all((a != b).float().mean() > 0.99 for a, b in zip(other, whole, strict=True))


def test_random_bits_are_even_and_unrelated():
    """Means, variances and correlations of 2^18 numbers, each within five standard errors."""
    n, rows, width = 2**18, torch.arange(512), 512
    first = torch.stack([t.flatten() for t in random_bits(0, 1, rows, width)])
    others = [
        random_bits(1, 1, rows, width)[0],
        random_bits(0, 2, rows, width)[0],
        random_bits(0, 1, rows + 512, width)[0],
    ]
    grid = first[0].view(512, 512)
    moved = [grid.roll(1, 0).flatten(), grid.roll(1, 1).flatten()]
    u = torch.stack([*first, *(t.flatten() for t in others), *moved]).double() / 2**16 - 0.5
    assert (first >= 0).all()
    assert (first < 2**16).all()
    assert u.mean(1).abs().max() < 5 * (1 / 12 / n) ** 0.5
    assert (u.var(1) - 1 / 12).abs().max() < 5 * (1 / 180 / n) ** 0.5
    assert (torch.corrcoef(u) - torch.eye(len(u))).abs().max() < 5 / n**0.5


# Codes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [1, 7, BLOCK, BLOCK + 1, 700])
def test_a_code_is_one_of_the_two_numbers_around(signed, width):
    x = numbers(40, width, 1.0)
    x = x if signed else x.square()
    bits = random_bits(0, 1, torch.arange(40), width)[1]
    codes, scale = pack(x, bits, signed=signed)
    assert codes.dtype == scale.dtype == torch.uint8
    assert scale.shape == (40, -(-width // BLOCK))
    got = unpack(codes, scale, signed=signed)
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    below = (magnitude >> 20) << 20
    near = (got.view(torch.int32) & 0x7FFFFFFF) - below
    largest = torch.nn.functional.pad(x.abs(), (0, -width % BLOCK)).view(40, -1, BLOCK).amax(2)
    held = x.abs() >= largest.repeat_interleave(BLOCK, 1)[:, :width] * 2.0 ** (-13 if signed else -29)
    assert held.float().mean() > 0.9
    assert ((near == 0) | (near == 1 << 20))[held].all()
    assert (got.sign() == x.sign())[held].all()
    # what is on the grid stays there
    assert_same(unpack(*pack(got, bits.flip(1), signed=signed), signed=signed)[held], got[held])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_right_on_average(signed):
    """Over 4096 roundings, within five standard errors: the widest step is an eighth."""
    x = numbers(1, 200, 0.5) if signed else numbers(1, 200, 0.5).square()
    x = x.expand(4096, 200).contiguous()
    bits = random_bits(0, 1, torch.arange(4096), 200)[2]
    got = unpack(*pack(x, bits, signed=signed), signed=signed).double().mean(0)
    error = (got - x[0]) / x[0].abs()
    assert error.abs().max() < 5 * 0.125 / 2 / 4096**0.5


def test_codes_at_the_ends_of_their_range():
    bits = torch.full((1, 4), 0xFFFF)
    x = torch.tensor([[1.0, 2.0**-40, -(2.0**-40), 0.0]])
    codes, scale = pack(x, bits, signed=True)
    assert unpack(codes, scale, signed=True)[0, 1:].tolist() == [0, 0, 0]  # far below the largest
    v = torch.tensor([[1.0, 2.0**-40, 2.0**-149, 0.0]])
    got = unpack(*pack(v, bits, signed=False), signed=False)[0]
    assert got[1] == got[2] > 0  # Adam divides by its root: never 0
    assert got[3] == 0
    zero = torch.zeros(2, 4)
    assert not unpack(*pack(zero, bits.expand(2, 4), signed=True), signed=True).any()
    largest = torch.full((1, 4), torch.finfo(torch.float32).max)
    assert (
        unpack(*pack(largest, torch.zeros(1, 4, dtype=torch.int32), signed=True), signed=True)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("kind", STATE_DTYPES)
def test_bytes_of_a_state(kind):
    m, d = 6, 300
    expected = {"float32": 8 * d, "bfloat16": 4 * d, "int8": 2 * d + 2 * 2, "int8_row": d + 2 + 4}
    state = new_state(torch.empty(m, d, dtype=torch.bfloat16), kind)
    assert sum(t.numel() * t.element_size() for t in state) == m * (expected[kind] + 4)
    assert not any(t.any() for t in state)


@pytest.mark.parametrize("kind", STATE_DTYPES)
@pytest.mark.parametrize("weights", ["float32", "split32", "bfloat16"])
def test_rows_are_written_where_they_were_read(weights, kind):
    w, m, v = numbers(9, 300), numbers(9, 300, seed=1), numbers(9, 300, seed=2).square()
    plane, rest = (
        split(w) if weights == "split32" else (w.bfloat16() if weights == "bfloat16" else w.clone(), None)
    )
    state, rows = new_state(plane, kind), torch.tensor([1, 4, 8])
    others = torch.tensor([0, 2, 3, 5, 6, 7])
    second = v.mean(1, keepdim=True) if kind == "int8_row" else v
    before = plane.clone()
    write_rows(plane, rest, state, rows, (w[rows], m[rows], second[rows]), 5, 0)
    got = read_rows(plane, rest, state, rows)
    for actual, expected, step in zip(
        got, (w[rows], m[rows], second[rows]), (2**-7, 1 / 8, 1 / 8), strict=True
    ):
        assert ((actual - expected).abs() <= step * expected.abs() + expected.abs().max() * 2**-13).all()
    if weights != "bfloat16":
        assert_same(got[0], w[rows])
    assert_same(plane[others], before[others])
    assert not any(t[others].any() for t in state)
    assert state[2].tolist() == [0, 5, 0, 0, 5, 0, 0, 0, 5]


# Updates


def update(weight, remainder, state, grad, step, backend, rows=None, unit_norm=False, coast=None, first=0):
    correction = (1 - 0.999**step) ** 0.5
    clock = torch.tensor(
        [step, 1e-2 * correction / (1 - 0.9**step), 1e-8 * correction, 1], dtype=torch.float64
    )
    torch.ops.fastsae.row_update(
        weight, remainder, state, rows, grad, coast, clock, 0.9, 0.999, 1e-8, unit_norm, 3, first, backend
    )


def held(w, weights, kind):
    plane, rest = (
        split(w) if weights == "split32" else (w.bfloat16() if weights == "bfloat16" else w.clone(), None)
    )
    return plane, rest, new_state(plane, kind)


PAIRS = [(w, s) for w in WEIGHT_FORMATS for s in STATE_DTYPES]


@pytest.mark.parametrize(("weights", "kind"), PAIRS)
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("every_row", [False, True])
def test_an_update_is_fp32s_rounded_once(backend, weights, kind, unit_norm, every_row):
    """From what the format holds, an update in fp64; the result is within a step of the format of it."""
    if backend == "triton" and weights == "bfloat16":
        pytest.skip("bf16 stores are wrong in Triton's interpreter")
    w, grads = numbers(9, 300, 0.3), [numbers(9, 300, 1.0, seed) for seed in (1, 2, 3)]
    w = torch.nn.functional.normalize(w, dim=1) if unit_norm else w
    rows = None if every_row else torch.tensor([0, 3, 8])
    mine = slice(None) if every_row else rows
    plane, rest, state = held(w, weights, kind)
    for step, grad in enumerate(grads, 1):
        before = [t.double() for t in read_rows(plane, rest, state, rows)]
        exact = before[0].clone(), None, new_state(before[0], "float32")
        exact[2][0].copy_(before[1])
        exact[2][1].copy_(before[2].expand(before[1].shape))
        if kind == "int8_row":  # one number for the row: the root of the mean square
            g = grad[mine].double()
            if unit_norm:
                unit = torch.nn.functional.normalize(before[0], dim=1)
                g = g - unit * (g * unit).sum(1, keepdim=True)
            m, v = 0.9 * before[1] + 0.1 * g, 0.999 * before[2] + 0.001 * g.square().mean(1, keepdim=True)
            correction = (1 - 0.999**step) ** 0.5
            new = before[0] - 1e-2 * correction / (1 - 0.9**step) * m / (v.sqrt() + 1e-8 * correction)
            exact = (torch.nn.functional.normalize(new, dim=1) if unit_norm else new), None, [m, v]
        else:
            update(*exact, grad[mine].double(), step, "reference", unit_norm=unit_norm)
        update(plane, rest, state, grad[mine], step, backend, rows, unit_norm)
        got = read_rows(plane, rest, state, rows)
        step_of = {"float32": 2**-21, "split32": 2**-21, "bfloat16": 2**-7, "int8": 1 / 8, "int8_row": 1 / 8}
        second = 2**-21 if kind == "int8_row" else step_of[kind]
        steps = step_of[weights], step_of[kind], second
        for name, actual, expected, relative in zip(
            ("weight", "exp_avg", "exp_avg_sq"), got, (exact[0], *exact[2][:2]), steps, strict=True
        ):
            floor = expected.abs().max() * (2**-13 if relative == 1 / 8 and name == "exp_avg" else 2**-20)
            error = (actual.double() - expected).abs() - relative * expected.abs() - floor
            assert error.max() <= 0, (name, step)


@pytest.mark.parametrize(("weights", "kind"), PAIRS)
def test_backends_round_alike(weights, kind):
    """The portable backend's bytes are the oracle's, unless an fp32 sum's last bit decides a rounding."""
    results = []
    for backend in ("reference", "torch"):
        plane, rest, state = held(numbers(50, 300, 0.3), weights, kind)
        for step in range(1, 6):
            update(
                plane, rest, state, numbers(50, 300, 1.0, step), step, backend, coast=torch.ones(9).double()
            )
        results.append([t for t in (plane, rest, *state) if t is not None])
    for name, (mine, its) in enumerate(zip(*results, strict=True)):
        if mine.dtype in (torch.bfloat16, torch.uint8):
            assert (mine != its).float().mean() < 0.02, name


@pytest.mark.parametrize(("weights", "kind"), PAIRS)
def test_blocks_of_rows_round_as_the_whole(backend, weights, kind):
    """A slice knows by ``first`` which rows it is."""
    if backend == "triton" and weights == "bfloat16":
        pytest.skip("bf16 stores are wrong in Triton's interpreter")
    grad = numbers(6, 300, 1.0, 5)
    whole = held(numbers(6, 300, 0.3), weights, kind)
    update(*whole, grad, 1, backend)
    plane, rest, state = held(numbers(6, 300, 0.3), weights, kind)
    for lo in (0, 4):
        part = [None if t is None else t[lo : lo + 4] for t in (plane, rest)]
        update(*part, [t[lo : lo + 4] for t in state], grad[lo : lo + 4], 1, backend, first=lo)
    for a, b in zip((plane, rest, *state), (whole[0], whole[1], *whole[2]), strict=True):
        if a is not None:
            assert_same(a, b)


# The optimizer


def dictionary(weight_format="float32", d=24, m=96, **options):
    torch.manual_seed(0)
    return SAE(SAEConfig(d, m, TopK(4), **options), weight_format=weight_format)


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_split32_holds_the_same_weights_as_fp32_bit_for_bit(mode, state_dtype):
    """The same 100 gradients, of the same rows: only how the weight is held differs."""
    saes = [dictionary("float32"), dictionary("split32")]
    optimizers = [RowAdam(sae, lr=1e-2, mode=mode, state_dtype=state_dtype) for sae in saes]
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        rows = torch.randperm(96, generator=generator)[:20]
        for name in ("W_enc", "W_dec"):
            grad = torch.zeros(96, 24).index_copy_(0, rows, torch.randn(20, 24, generator=generator))
            for sae in saes:
                getattr(sae, name).grad = grad.to(torch.bfloat16).to(getattr(sae, name).dtype)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.flush_()
    for name in ("W_enc", "W_dec"):
        assert_same(saes[1].full_precision(name), saes[0].full_precision(name))
        assert_same(getattr(saes[1], name).detach(), split(saes[0].full_precision(name))[0])
    assert not torch.equal(saes[0].W_enc, dictionary("float32").W_enc)


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize(("weights", "kind"), PAIRS)
def test_every_pair_of_formats_trains(weights, kind, mode):
    """The fused step reaches, in each format, the loss that fp32 reaches."""
    generator = torch.Generator().manual_seed(2)
    features = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)
    data = [torch.rand(64, 48, generator=generator).sub(0.9).relu().mul(10) @ features for _ in range(150)]

    def train(weight_format, state_dtype):
        sae = dictionary(weight_format)
        optimizer = RowAdam(sae, lr=3e-3, mode=mode, state_dtype=state_dtype)
        losses = [train_step(sae, optimizer, x)["fvu"].item() for x in data]
        return sum(losses[-20:]) / 20, losses[0]

    last, first = train(weights, kind)
    fp32, _ = train("float32", "float32")
    assert fp32 < 0.5 * first
    assert last < 1.1 * fp32


def test_small_updates_are_not_lost_in_bf16():
    """A thousand steps of a hundredth of bf16's spacing each: rounding to nearest would stand still."""
    param = torch.nn.Parameter(torch.ones(64, 64).bfloat16())
    optimizer = RowAdam([param], lr=1e-4, mode="dense")
    for _ in range(1000):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = 1 - param.detach().double().mean()
    assert moved == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int8_row"])
def test_running_averages_follow_in_narrow_states(state_dtype):
    """exp_avg_sq decays by a thousandth a step, far below a code's step of an eighth."""
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = RowAdam([param], lr=0.0, mode="dense", state_dtype=state_dtype)
    for step in range(1500):
        param.grad = torch.full_like(param, 1.0 if step < 500 else 1e-6)
        optimizer.step()
    state = optimizer.state[param]
    held_sq = state["exp_avg_sq"].float()
    if state_dtype == "int8":
        held_sq = unpack(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)
    assert held_sq.mean().item() == pytest.approx((1 - 0.999**500) * 0.999**1000, rel=0.03)


@pytest.mark.parametrize(("weights", "kind"), PAIRS)
def test_the_seed_decides_the_rounding_and_nothing_else_does(weights, kind):
    def run(seed):
        sae = dictionary(weights)
        optimizer = RowAdam(sae, lr=1e-2, state_dtype=kind, seed=seed)
        for i in range(5):
            torch.manual_seed(i)
            train_step(sae, optimizer, torch.randn(32, 24))
        return sae.full_precision("W_dec")

    assert_same(run(0), run(0))
    assert torch.equal(run(0), run(1)) == (weights != "bfloat16" and kind == "float32")


@pytest.mark.parametrize("kind", STATE_DTYPES)
def test_states_on_the_host_give_the_same_run(kind):
    """On a CPU they are where the weights are; what a GPU adds is in tests/test_gpu.py."""
    results = []
    for host_states in (False, True):
        sae = dictionary("split32")
        optimizer = RowAdam(sae, lr=1e-2, state_dtype=kind, host_states=host_states)
        for i in range(5):
            torch.manual_seed(i)
            train_step(sae, optimizer, torch.randn(32, 24))
        results.append(sae.full_precision("W_dec"))
    assert_same(*results)
    with pytest.raises(ValueError, match="host_states: got True, expected False in mode 'dense'"):
        RowAdam(dictionary(), mode="dense", host_states=True)


@pytest.mark.parametrize("mode", ["dense", "deferred"])
@pytest.mark.parametrize(("weights", "kind"), PAIRS)
def test_resume_is_exact_to_the_bit(weights, kind, mode):
    """A copy of module and optimizer through their state dicts goes on as the original does."""

    def steps(sae, optimizer, which):
        for i in which:
            torch.manual_seed(i)
            train_step(sae, optimizer, torch.randn(8, 24))

    sae = dictionary(weights)
    optimizer = RowAdam(sae, lr=1e-2, mode=mode, state_dtype=kind, seed=4)
    steps(sae, optimizer, range(6))
    again = dictionary(weights)
    resumed = RowAdam(again, lr=1e-3, mode=mode, state_dtype=kind)
    steps(again, resumed, range(40, 42))  # its own states are overwritten
    storage = resumed.state[again.W_enc]["exp_avg"].data_ptr()
    again.load_state_dict(sae.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[again.W_enc]["exp_avg"].data_ptr() == storage
    for pair in ((sae, optimizer), (again, resumed)):
        steps(*pair, range(6, 12))
        pair[1].flush_()
    for name, t in sae.state_dict().items():
        assert_same(again.state_dict()[name], t, name)
    for name in ("W_enc", "b_enc", "W_dec"):
        ours, its = optimizer.state[getattr(sae, name)], resumed.state[getattr(again, name)]
        assert ours.keys() == its.keys()
        for part, t in ours.items():
            assert_same(its[part], t, part)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_dictionary_keeps_its_format_in_files_and_casts(weights, tmp_path):
    sae = dictionary(weights)
    optimizer = RowAdam(sae, lr=1e-2)
    for i in range(3):
        train_step(sae, optimizer, torch.randn(32, 24, generator=torch.Generator().manual_seed(i)))
    sae.save(tmp_path)
    optimizer.flush_()
    again = fastsae.load(tmp_path)
    assert again.weight_format == weights
    for name, t in sae.state_dict().items():
        assert_same(again.state_dict()[name], t, name)
    other = fastsae.load(tmp_path, weight_format="split32")
    assert_same(other.full_precision("W_dec"), sae.full_precision("W_dec"))
    if weights == "float32":
        return
    cast = again.to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert (cast.W_enc.dtype, cast.b_enc.dtype) == (torch.bfloat16, torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 24).to(dtype)
        assert cast(x).dtype == cast.encode(x).dtype == dtype


@pytest.mark.parametrize("config", [{}, {"d_out": 5, "unit_norm_decoder": True}], ids=str)
def test_initial_weights_are_the_same_however_they_are_sharded(config):
    whole = initial_rows(SAEConfig(8, 3000, TopK(2), **config), 0, 3000, seed=7)
    for lo, hi in ((0, 1), (1000, 1030), (1024, 2048), (2999, 3000), (5, 2500)):
        part = initial_rows(SAEConfig(8, 3000, TopK(2), **config), lo, hi, seed=7)
        for some, all_ in zip(part, whole, strict=True):
            assert_same(some, all_[lo:hi])
    sae = SAE(SAEConfig(8, 3000, TopK(2), **config), device="meta", weight_format="split32")
    sae.to_empty(device="cpu").reset_parameters(seed=7)
    assert_same(sae.full_precision("W_enc"), whole[0])
    assert_same(sae.full_precision("W_dec"), whole[1])
    assert not sae.silent_tokens.any()
    assert len(whole[0].unique(dim=0)) == 3000


def test_the_ordinary_loop_trains_every_format():
    for weights in WEIGHT_FORMATS:
        sae = dictionary(weights)
        optimizer = RowAdam(sae, lr=1e-2)
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(30):
            out = sae(x, return_loss=True)
            out.loss.backward()
            sae.constrain_gradients_()
            optimizer.step()
            optimizer.zero_grad()
            sae.constrain_weights_()
            losses.append(out.loss.item())
        assert losses[-1] < 0.8 * losses[0]
        lengths = sae.full_precision("W_dec").norm(dim=1)
        assert (lengths - 1).abs().max() < (1e-2 if weights == "bfloat16" else 1e-5)
