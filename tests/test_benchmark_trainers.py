"""Contestants of the benchmarks: that each takes the step it says, and what is made of their runs."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsae import SAE, AuxK, SAEConfig, TopK
from fastsae.benchmarks import measure, quality, trainers
from fastsae.benchmarks.cases import Shape
from fastsae.benchmarks.trainers import Run, Trainer, Unavailable, build, check, phases
from fastsae.optim import RowAdam
from fastsae.training import TrainConfig, train_step
from fastsae.training import Trainer as OurTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = Shape(N=64, D=16, M=128, k=4)
OWN = ["fastsae", "fastsae split32/int8", "dense"]
PEERS = ["sparsify", "sparsify adam", "sae_lens", "dictionary_learning", "overcomplete"]


def tokens(n, seed=0, d=TOY.D):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, d, generator=torch.Generator().manual_seed(1))
    return 3 * torch.randn(n, 8, generator=generator) @ mixing + 1


def peer(name, **options):
    """The contestant, or a skip where its library isn't here."""
    try:
        return build(name, TOY, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("sample", [None, tokens(256)], ids=["raw", "sample"])
@pytest.mark.parametrize("name", OWN)
def test_own_contestants_are_what_they_say(name, sample):
    with torch.no_grad():  # as benchmarks run
        check(build(name, TOY, steps=20, sample=sample), TOY, tokens(64))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("sample", [None, tokens(256)], ids=["raw", "sample"])
@pytest.mark.parametrize("name", PEERS)
def test_peers_are_what_they_say(name, sample, capsys):
    trainer = peer(name, steps=20, sample=sample)
    with torch.no_grad():
        check(trainer, TOY, tokens(64))
    parts = phases(trainer, tokens(64))
    assert min(parts.values()) >= 0
    assert parts["backward_ms"] > 0
    assert parts["optimizer_ms"] > 0
    assert capsys.readouterr() == ("", "")


def fake(step=lambda x: None, code=None, x_hat=None):
    """A contestant whose first latent is always on, and whose step does ``step``."""
    first = torch.zeros(TOY.M).index_fill(0, torch.tensor([0]), 1.0)
    return Trainer(
        step,
        code or (lambda x: first.expand(len(x), TOY.M)),
        x_hat or (lambda x: torch.zeros_like(x)),
        name="fake",
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"code": lambda x: torch.ones(len(x), TOY.M)}, "128 active latents on a token, k = 4"),
        ({"code": lambda x: torch.zeros(len(x), TOY.M)}, "0 active latents"),
        ({"code": lambda x: torch.ones(len(x), 4)}, r"a code of shape \(64, 4\)"),
        ({"x_hat": lambda x: x[:1]}, r"a reconstruction of shape \(1, 16\)"),
        ({"x_hat": lambda x: x * torch.nan}, "squared error of nan"),
        ({}, "squared error of"),  # it doesn't learn
    ],
)
def test_a_wrong_contestant_is_refused(wrong, message):
    with pytest.raises(AssertionError, match=f"fake: .*{message}|{message}"):
        check(fake(**wrong), TOY, tokens(64))


def test_a_contestant_that_learns_passes():
    share = [0.0]
    learns = fake(lambda x: share.append(share[-1] + 0.1), x_hat=lambda x: share[-1] * x)
    check(learns, TOY, tokens(64))


def test_what_cannot_be_built(monkeypatch):
    with pytest.raises(ValueError, match="name: got 'mine', expected one of 'fastsae'"):
        build("mine", TOY, steps=20)
    with pytest.raises(ValueError, match="steps"):
        build("dense", TOY, steps=9)

    def missing(distribution):
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(trainers, "version", missing)
    for name in PEERS:
        with pytest.raises(Unavailable, match=r"isn't installed \(pip install -e .\[peers\]\)"):
            build(name, TOY, steps=20)

    def broken(module):
        print("a banner")
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(trainers, "version", lambda distribution: "1.2")
    monkeypatch.setattr(trainers, "import_module", broken)
    with pytest.raises(Unavailable, match=r"overcomplete 1.2 can't be imported: RuntimeError: .* exist"):
        build("overcomplete", TOY, steps=20)


def test_the_schedule_is_the_trainers():
    sae = SAE(SAEConfig(4, 8, TopK(2)))
    ours = OurTrainer(sae, [], TrainConfig(n_steps=100, lr=0.5))
    shares = []
    for ours.step in range(100):
        shares.append(ours._lr() / 0.5)
    assert [Run(100).share(done) for done in range(100)] == pytest.approx(shares)
    assert min(Run(100).share(done) for done in range(300)) == 0


def test_dense_is_the_ordinary_loop():
    """Of SAE, with its own constraints and torch's Adam, on inputs that need no normalisation."""
    torch.manual_seed(0)
    sae = SAE(SAEConfig(TOY.D, TOY.M, TopK(TOY.k)))
    weights = [t.detach().clone() for t in sae.parameters()]
    batches = [tokens(64, seed) for seed in range(5)]
    batches = [x * (TOY.D / x.square().sum(1).mean()).sqrt() for x in batches]
    sae.b_dec.data = batches[0].mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    contestant = trainers.dense(TOY, "cpu", Run(10, 1e-2), weights=weights)
    for x in batches:
        contestant.step(x)
        sae(x, return_loss=True).loss.backward()
        sae.constrain_gradients_()
        adam.step()
        sae.constrain_weights_()
        adam.zero_grad()
    for got, want in zip(weights, sae.parameters(), strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(weights[2].norm(dim=1), torch.ones(TOY.M))
    assert torch.allclose(contestant.reconstruct(batches[1]), sae(batches[1]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_compiled_dense_is_dense():
    plain, compiled = (build(name, TOY, steps=20, lr=1e-2) for name in ("dense", "dense compiled"))
    for seed in range(3):
        plain.step(tokens(64, seed))
        compiled.step(tokens(64, seed))
    assert torch.allclose(plain.reconstruct(tokens(8)), compiled.reconstruct(tokens(8)), atol=1e-3)


def test_ours_is_the_fused_step_read_up_to_date():
    trainer = build("fastsae", TOY, steps=10, lr=1e-2, sample=tokens(256))
    torch.manual_seed(0)
    auxk = AuxK(1 / 8, dead_after=10 * TOY.N // 28)
    sae = SAE(SAEConfig(TOY.D, TOY.M, TopK(TOY.k), losses=(auxk,), normalization="scalar"))
    opt = RowAdam(sae.calibrate_(tokens(256)), lr=1e-2)
    for done in range(10):
        x = tokens(4, done)  # few tokens: most latents are idle
        trainer.step(x)
        for group in opt.param_groups:
            group["lr"] = 1e-2 * Run(10).share(done)
        train_step(sae, opt, x)
    x, stale = tokens(64), sae(tokens(64))
    opt.flush_()
    assert torch.equal(trainer.reconstruct(x), sae(x))
    assert not torch.allclose(stale, sae(x), atol=1e-3)


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_phases_are_told_apart(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            clock.spend(3)
            return grad

    class Optimizer:
        def step(self):
            clock.spend(5)

    weight, optimizer, extra = nn.Parameter(torch.ones(())), Optimizer(), [0, 10, 0]

    def step(x):
        clock.spend(2 + extra.pop())
        Slow.apply(weight).backward()
        clock.spend(1)
        optimizer.step()
        clock.spend(0.5)

    trainer = dataclasses.replace(fake(step), optimizer=optimizer)
    backward = torch.Tensor.backward
    assert phases(trainer, tokens(4)) == {
        "forward_ms": 2000, "backward_ms": 3000, "optimizer_ms": 5000, "other_ms": 1500,
    }  # fmt: skip
    assert torch.Tensor.backward is backward
    assert "step" not in vars(optimizer)


def test_phases_of_ours(monkeypatch):
    trainer, clock = build("fastsae", TOY, steps=20), Clock()
    monkeypatch.setattr(measure, "time", clock)
    operators = torch.ops.fastsae
    for name, seconds in (("decode_error", 2), ("row_step", 3), ("row_update", 5)):
        original = getattr(operators, name)

        def slow(*args, original=original, seconds=seconds):
            clock.spend(seconds)
            return original(*args)

        monkeypatch.setattr(operators, name, slow)
    assert phases(trainer, tokens(64), repeats=1) == {
        "forward_ms": 2000, "backward_ms": 8000, "optimizer_ms": None, "other_ms": 0,
    }  # fmt: skip
    assert operators.row_update is slow


def test_quality_is_as_defined():
    trainer, x = build("dense", TOY, steps=20), tokens(50)
    trainer.step(x)
    got = quality.evaluate(trainer, x, batch=7)
    code, error = trainer.encode(x), (trainer.reconstruct(x) - x).double()
    assert got["fvu"] == pytest.approx(float(error.square().sum() / (x - x.mean(0)).double().square().sum()))
    assert got["l0"] == pytest.approx(float((code != 0).sum() / 50))
    assert got["dead_share"] == pytest.approx(float((code == 0).all(0).float().mean()))
    assert 0 < got["dead_share"] < 1


@pytest.fixture
def activations(monkeypatch):
    """A store in memory in place of the demo's."""
    store = tokens(2000)
    monkeypatch.setattr(quality, "cached_activations", lambda *args, **options: store)
    return store


def rows_of(names, **options):
    said = []
    rows = quality.quality_rows(
        names, latents=128, k=4, tokens=1280, batch_size=64, say=said.append, **options
    )
    assert said == rows
    json.dumps(rows)
    return rows


def test_quality_rows(activations, monkeypatch):
    def fails(shape, device, run):
        raise KeyError("no such thing")

    def unavailable(shape, device, run):
        raise Unavailable("theirs isn't installed")

    monkeypatch.setitem(trainers.TRAINERS, "broken", fails)
    monkeypatch.setitem(trainers.TRAINERS, "sparsify", unavailable)
    monkeypatch.setitem(
        trainers.TRAINERS, "dense", lambda s, device, run: trainers.dense(s, device, Run(20, 1e-2))
    )
    rows = rows_of(["fastsae", "broken", "sparsify", "dense"], lrs={"fastsae": 1e-2})
    ours, broken, missing, dense, *seconds = rows
    assert [row["at"] for row in rows] == ["equal tokens"] * 4 + ["equal seconds"] * 2
    assert [row["backend"] for row in seconds] == ["fastsae", "dense"]
    assert len({tuple(row) for row in rows}) == 1  # one schema
    assert (broken["failed"], broken["note"]) == (True, "failed: KeyError: 'no such thing'")
    assert (missing["failed"], missing["note"]) == (False, "skipped: theirs isn't installed")
    assert broken["fvu"] is missing["fvu"] is missing["lr"] is None
    for row in (ours, dense):
        shape = {name: row[name] for name in ("N", "D", "M", "k")}
        assert (row["op"], row["dtype"], shape) == (
            "quality",
            "float32",
            {"N": 64, "D": 16, "M": 128, "k": 4},
        )
        assert (row["lr"], row["tokens"], row["l0"], row["failed"]) == (1e-2, 1280, 4, False)
        spent, seen, fvu = zip(*row["curve"], strict=True)
        assert list(seen) == [64, 128, 320, 512, 640, 768, 960, 1152, 1280]
        assert list(spent) == sorted(spent)
        assert row["seconds"] == spent[-1]
        assert 0 < fvu[-1] < 0.5 * fvu[0]
        assert row["fvu"] == pytest.approx(fvu[-1])  # on the same tokens here
        assert row["note"].endswith("; on 200 held-out tokens")


def test_equal_seconds(activations, monkeypatch):
    clock, batches = Clock(), {}
    monkeypatch.setattr(measure, "time", clock)

    def contestant(name, seconds):
        def make(shape, device, run):
            seen = batches[name] = []

            def step(x):
                seen.append(x)
                clock.spend(seconds)

            def x_hat(x):
                clock.spend(1000)  # evaluations aren't counted
                return (1 - 2.0 ** -len(seen)) * x

            return fake(step, x_hat=x_hat)

        monkeypatch.setitem(trainers.TRAINERS, name, make)

    for name, seconds in (("slow", 4.0), ("fast", 1.0), ("crawling", 30.0)):
        contestant(name, seconds)
    rows = rows_of(["slow", "fast", "crawling"], lrs={})
    assert [row["seconds"] for row in rows[:3]] == [80, 20, 600]
    slow, fast, crawling = rows[3:]
    assert (slow["tokens"], slow["seconds"]) == (5 * 64, 20)
    assert slow["fvu"] == pytest.approx(2.0**-10 * fast["fvu"] / 2.0**-40, rel=1e-2)
    assert slow["note"].endswith("; its learning rate had not fully decayed by then")
    assert (fast["tokens"], fast["seconds"]) == (1280, 20)
    assert fast["note"] == "on at most 4,096 held-out tokens"
    assert (crawling["tokens"], crawling["fvu"]) == (None, None)
    assert crawling["note"] == "not yet evaluated after 20.0 s"
    for x, y, z in zip(*batches.values(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


# That a peer's contestant is the peer itself: the same batches through the library's own loop give the same
# weights.

BATCHES = [tokens(64, seed) for seed in range(10)]


def trained(name, sample=None):
    trainer = peer(name, steps=10, lr=1e-2, sample=sample)
    for x in BATCHES:
        trainer.step(x)
    return trainer.reconstruct(tokens(32))


@pytest.mark.filterwarnings("default")
def test_dictionary_learning_is_its_own_loop(capsys):
    got = trained("dictionary_learning", BATCHES[0])
    from dictionary_learning.trainers import top_k
    from dictionary_learning.training import trainSAE

    made = []

    class Recorded(top_k.TopKTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.dead_feature_threshold = 10 * 64 // 28
            made.append(self)

    torch.manual_seed(0)
    config = {
        "trainer": Recorded, "steps": 10, "activation_dim": TOY.D, "dict_size": TOY.M, "k": TOY.k, "layer": 0,
        "lm_name": "", "lr": 1e-2, "warmup_steps": 1, "decay_start": 8, "device": "cpu",
    }  # fmt: skip
    norm = BATCHES[0].square().sum(1).mean().sqrt()
    trainSAE([x / norm for x in BATCHES], [config], steps=10, device="cpu")
    with torch.no_grad():
        assert torch.allclose(got, norm * made[0].ae(tokens(32) / norm), atol=1e-4)
    with FakeTensorMode():  # as torch.compile does, which nnsight's changes to torch would break
        assert (torch.ones(2) + 1).shape == (2,)


@pytest.mark.filterwarnings("default")
def test_sae_lens_is_its_own_loop(capsys):
    got = trained("sae_lens", torch.cat(BATCHES))
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=TOY.D, d_sae=TOY.M, k=TOY.k, normalize_activations="expected_average_only_in"
    )
    options = SAETrainerConfig(
        640, 64, lr=1e-2, lr_end=1e-3, lr_warm_up_steps=1, lr_decay_steps=2, dead_feature_window=1,
        n_batches_for_norm_estimate=10,
    )  # fmt: skip
    sae = SAETrainer(options, sae_lens.TopKTrainingSAE(config), iter([*BATCHES, *BATCHES])).fit()
    with torch.no_grad():
        assert torch.allclose(got, sae(tokens(32)), atol=1e-3)


@pytest.mark.filterwarnings("default")
def test_overcomplete_is_its_own_loop():
    got = trained("overcomplete")
    from overcomplete.sae import TopKSAE, train_sae

    torch.manual_seed(0)
    sae = TopKSAE(TOY.D, TOY.M, top_k=TOY.k)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, Run(10).share)
    mse = lambda x, x_hat, *_: (x - x_hat).square().mean()  # noqa: E731
    train_sae(sae, BATCHES, mse, adam, schedule, nb_epochs=1, monitoring=0)
    with torch.no_grad():
        assert torch.equal(got, sae.eval()(tokens(32))[2])


class OneLayer(nn.Module):
    """A language model for sparsify's Trainer, whose layer gives the batches' activations, a token each."""

    device, config = torch.device("cpu"), SimpleNamespace(num_hidden_layers=1)

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding.from_pretrained(torch.cat(BATCHES))
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self):
        return self

    def forward(self, input_ids):
        return self.layer(input_ids)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "optimizer"), [("sparsify", "signum"), ("sparsify adam", "adam")])
def test_sparsify_is_its_own_loop(name, optimizer, tmp_path, capsys):
    got = trained(name)
    import sparsify

    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=TOY.M, k=TOY.k), batch_size=64, hookpoints=["layer"],
        optimizer=optimizer, lr=1e-2, lr_warmup_steps=1, log_to_wandb=False, save_dir=str(tmp_path),
    )  # fmt: skip
    precision = torch.get_float32_matmul_precision()
    ids = [{"input_ids": torch.tensor([i])} for i in range(640)]
    sparsify.Trainer(config, ids, OneLayer()).fit()
    torch.set_float32_matmul_precision(precision)
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "unnamed" / "layer")
    with torch.no_grad():
        assert torch.allclose(got, coder(tokens(32)).sae_out, atol=1e-4)
