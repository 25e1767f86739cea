"""Metrics and top examples against plain dense computations."""

import json
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae import SAE, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from fastsae.code import SparseCode
from fastsae.data.store import collect
from fastsae.evaluate import Evaluation, evaluate, top_examples

D, M, N = 12, 48, 301


def make(activation, *, dtype=torch.float32, seed=0, **options) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(D, M, activation, **options), dtype=dtype)
    with torch.no_grad():
        sae.W_enc.normal_(std=0.3)
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.3)
        sae.W_dec.normal_(std=0.4)
        if sae.config.normalization == "scalar":
            sae.norm_scale.fill_(0.7)
    return sae


def data(n=N, seed=1, width=D) -> torch.Tensor:
    return 2 + torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def dense_metrics(sae, x, target) -> dict[str, float]:
    """The definitions of Evaluation, by the dense code, in numpy and fp64."""
    sae.eval()
    with torch.no_grad():
        f, x_hat = sae.encode(x).double().numpy(), sae(x).double().numpy()
    t = target.double().numpy()
    norm, norm_hat = np.linalg.norm(t, axis=1), np.linalg.norm(x_hat, axis=1)
    fvu = ((t - x_hat) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": (f > 0).sum() / len(f),
        "dead_share": (~(f > 0).any(0)).mean(),
        "n_silent": (~(f > 0).any(0)).sum(),
        "n_latents": f.shape[1],
        "cosine": ((t * x_hat).sum(1) / norm / norm_hat).mean(),
        "relative_norm": (norm_hat / norm).mean(),
        "tokens": len(t),
        "skipped_tokens": 0,
    }


@pytest.mark.parametrize("normalization", ["none", "scalar", "layer_norm"])
@pytest.mark.parametrize("activation", [TopK(3), JumpReLU(0.8), ReLU()])
def test_metrics_equal_the_dense_computation(activation, normalization, exact_backend):
    sae = make(activation, normalization=normalization)
    sae.backend = exact_backend
    x = data()
    # ragged batches, an empty one, and leading dimensions
    batches = [x[:7], x[7:7], x[7:100].view(3, 31, D), x[100:]]
    result = evaluate(sae, iter(batches))
    assert result.to_dict() == pytest.approx(dense_metrics(sae, x, x), rel=1e-5)
    counts = (sae.encode(x) > 0).sum(0, dtype=torch.int32)
    assert torch.equal(result.firing_counts, counts)
    assert result.firing_counts.dtype == torch.int32
    assert 1 < result.l0 < M


def test_a_transcoder_is_measured_against_its_target():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(D, M, TopK(3), d_out=5))
    torch.nn.init.normal_(sae.W_dec)
    x, target = data(), data(seed=2, width=5)
    result = evaluate(sae, [(x[:99], target[:99]), (x[99:], target[99:])])
    assert result.to_dict() == pytest.approx(dense_metrics(sae, x, target), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"batches: got x \[301, 12\], target \[301, 12\], expected .* \[n, 5\]"
    ):
        evaluate(sae, [x])


@pytest.mark.parametrize("activation", [ReLU(), TopK(3)])
def test_silent_latents_and_l0_by_hand(activation):
    """TopK's entries of value 0 aren't firing."""
    sae = SAE(SAEConfig(4, 4, activation))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 0, 0, -1], [2.0, 3, 0, -1]])
    result = evaluate(sae, [x[:1], x[1:]])
    assert result.firing_counts.tolist() == [2, 1, 0, 0]
    assert (result.n_silent, result.dead_share, result.l0) == (2, 0.5, 1.5)
    # errors: 1 each, about the mean (1.5, 1.5, 0, -1): 2 * (0.25 + 2.25)
    assert result.fvu == pytest.approx(2 / 5)
    assert result.explained_variance == pytest.approx(3 / 5)


def test_variance_survives_a_mean_far_from_zero():
    """One pass of sum of squares less squared sum would be off by about 0.1 here."""
    sae = make(TopK(3), dtype=torch.float64)
    x = data().double() + 1e8
    with torch.no_grad():
        sae.b_dec.fill_(1e8)
    result = evaluate(sae, x.split(50))
    x_hat = sae(x).detach()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result.fvu == pytest.approx(float(fvu), rel=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_nan_are_left_out_and_counted(bad):
    sae, x, target = make(TopK(3)), data(), data(seed=3)
    clean = evaluate(sae, [(x[2:], target[2:])])
    x[0, 3], target[1, 0] = bad, bad
    result = evaluate(sae, [(x[:40], target[:40]), (x[40:], target[40:])])
    assert (result.tokens, result.skipped_tokens) == (N - 2, 2)
    assert torch.equal(result.firing_counts, clean.firing_counts)
    assert result.fvu == pytest.approx(clean.fvu, rel=1e-6)


def test_batchtopk_is_measured_by_its_threshold_whatever_the_batches():
    sae, x = make(BatchTopK(3)), data()
    sae.threshold.fill_(1.5)
    sae.train()
    whole, parts = evaluate(sae, [x]), evaluate(sae, x.split(13))
    assert sae.training
    assert whole.to_dict() == pytest.approx(parts.to_dict(), rel=1e-6)
    scores = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert torch.equal(whole.firing_counts, (scores > 1.5).sum(0))
    assert whole.l0 != pytest.approx(3, abs=0.01)  # the batch's own rule keeps 3 per token
    sae.eval()
    evaluate(sae, [x])
    assert not sae.training


def test_the_mode_comes_back_after_an_error():
    sae = make(TopK(3)).train()
    with pytest.raises(ValueError, match="batches"):
        evaluate(sae, [data(width=D + 1)])
    assert sae.training


def test_entries_beyond_the_last_offset_are_ignored(monkeypatch):
    sae, x = make(JumpReLU(0.8)), data()
    expected, inner = evaluate(sae, [x]), sae.encode_sparse

    def padded(x):
        code = inner(x)
        values = torch.cat([code.values, torch.ones(9)])
        indices = torch.cat([code.indices, torch.arange(9, dtype=torch.int32)])
        return SparseCode(values, indices, code.offsets, code.n_latents)

    monkeypatch.setattr(sae, "encode_sparse", padded)
    result = evaluate(sae, [x])
    assert torch.equal(result.firing_counts, expected.firing_counts)
    assert result.fvu == pytest.approx(expected.fvu)


def test_inputs_of_another_dtype_are_compared_as_they_came():
    sae, x = make(TopK(3)).to(torch.bfloat16), data()
    result = evaluate(sae, [x])
    with torch.no_grad():
        error = (x.double() - sae(x.bfloat16()).double()).square().sum()
    assert result.fvu == pytest.approx(float(error / (x - x.mean(0)).double().square().sum()), rel=1e-6)


def test_zeros_have_no_direction():
    sae, x = make(TopK(3)), data()
    some, more = evaluate(sae, [x]), evaluate(sae, [torch.cat([x, torch.zeros(5, D)])])
    assert more.tokens == some.tokens + 5
    assert more.cosine == pytest.approx(some.cosine)
    assert more.relative_norm == pytest.approx(some.relative_norm)


def test_to_dict_is_json():
    result = evaluate(make(TopK(3)), [data()])
    numbers = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert numbers["fvu"] == result.fvu
    assert "firing_counts" not in numbers
    assert isinstance(numbers["tokens"], int)
    constant = evaluate(make(TopK(3)), [torch.zeros(4, D)]).to_dict()
    assert constant["fvu"] is None
    assert constant["cosine"] is None
    json.dumps(constant, allow_nan=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: got no finite tokens"),
        ([torch.full((3, D), torch.nan)], r"no finite tokens \(3 with NaN or Inf\)"),
        ([torch.zeros(0, D)], "no finite tokens"),
        ([torch.zeros(3, D + 1)], rf"\[3, {D + 1}\].*\[n, {D}\]"),
        ([(data(4), data(5))], "batches"),
        ([data(4).long()], "int64"),
        ([{"a": data(4)}], "dict"),
        ([(data(4), data(4), data(4))], "expected floating"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(make(TopK(3)), batches)


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_never_a_dense_code():
    n, m = 512, 32_768
    sae = SAE(SAEConfig(8, m, TopK(4)))
    x = data(n, width=8)
    with _Largest() as largest:
        evaluate(sae, [x])
        top_examples(sae, x, torch.arange(n) % 7, decode_token=str, batch_size=n)
    assert 0 < largest.elements <= n * m // 4


# -- examples ------------------------------------------------------------------------------------------------


def brute_force(sae, x, tokens, n_examples, window):
    """By latent: its distinct places (value, place), strongest first; its mean; its score."""
    with torch.no_grad():
        f = sae.eval().encode(x).double()
    f[~x.isfinite().all(1)] = 0
    length = sae.W_dec.detach().double().norm(dim=1)
    found = {}
    for latent in range(f.shape[1]):
        fired = f[:, latent].nonzero().flatten().tolist()
        groups = defaultdict(list)
        for place in fired:
            near = range(place - 2, place + 3)
            inside = [0 <= p < len(x) and p // window == place // window for p in near]
            key = tuple(int(tokens[p]) if ok else None for p, ok in zip(near, inside, strict=True))
            groups[key].append((-float(f[place, latent]), place))
        best = sorted(min(group) for group in groups.values())
        if len(best) >= n_examples:
            top = -np.mean([value for value, _ in best[:n_examples]])
            mean = float(f[fired, latent].mean())
            score = top * float(length[latent]) * np.log2(top / mean)
            found[latent] = ([(-v, p) for v, p in best], mean, len(fired) / len(x), score)
    return found


def token_stream(n, vocabulary=5, seed=4):
    """Few kinds of tokens, and one passage that comes again and again."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.int32)
    for start in range(20, n - 8, 40):
        ids[start : start + 8] = np.arange(8) % vocabulary
    return ids


@pytest.mark.parametrize("window", [16, 1000])
@pytest.mark.parametrize("activation", [TopK(4), JumpReLU(1.2)])
def test_examples_are_the_strongest_distinct_places(activation, window):
    n, n_examples = 700, 3
    sae, x, tokens = make(activation), data(n), token_stream(n, vocabulary=60)
    x[5] = torch.nan
    expected = brute_force(sae, x, tokens, n_examples, window)
    got = top_examples(
        sae,
        x,
        tokens,
        decode_token=str,
        n_latents=M,
        n_examples=n_examples,
        context=0,
        batch_size=64,
        window=window,
    )
    assert len(got) > M // 5
    for latent in got:
        best, mean, share, score = expected[latent.latent]
        assert [example.position for example in latent.examples] == [place for _, place in best[:n_examples]]
        values = [example.activation for example in latent.examples]
        assert values == pytest.approx([value for value, _ in best[:n_examples]], rel=1e-5)
        assert (latent.mean_activation, latent.share) == pytest.approx((mean, share), rel=1e-5)
        assert latent.score == pytest.approx(score, rel=1e-3, abs=1e-5)


def test_repeated_passages_count_once():
    """Five tokens in turn: nine different places, four of them at the ends of the text."""
    sae, n = make(TopK(4)), 600
    tokens = np.arange(n) % 5
    x = data(5)[tokens] + 0.01 * data(n, seed=9)  # the activation depends on the token
    got = top_examples(sae, x, tokens, decode_token=str, n_examples=1, context=2)
    assert got
    assert not top_examples(sae, x, tokens, decode_token=str, n_examples=10, context=2)


def one_latent_per_direction(rows) -> SAE:
    sae = SAE(SAEConfig(len(rows), len(rows), ReLU()))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(len(rows)))
        sae.W_dec.copy_(torch.eye(len(rows)))
    return sae


def fire(n, latents) -> torch.Tensor:
    """Activations [n, len(latents)] from {place: value} for each latent."""
    x = torch.zeros(n, len(latents))
    for i, places in enumerate(latents):
        for place, value in places.items():
            x[place, i] = value
    return x


def test_choice_of_latents():
    n = 20_000
    tokens = np.arange(n) % 1000 + 100  # all places distinct in a window of 5, if far less than 1000 apart
    spots = [range(100 * i + 50, 100 * i + 50 + 7 * 20, 7) for i in range(6)]
    peak = {p: (9.0 if j < 3 else 1.0) for j, p in enumerate(spots[0])}
    flat = dict.fromkeys(spots[1], 9.0)
    weak = {p: (0.9 if j < 3 else 0.1) for j, p in enumerate(spots[2])}
    rare = {spots[3][0]: 50.0, spots[3][1]: 50.0}  # too few places
    everywhere = {p: (90.0 if p < 4000 else 1.0) for p in range(3000, 9000)}  # outside SHARES
    same = {p: (8.0 if j < 3 else 1.0) for j, p in enumerate(spots[0])}  # the tokens of the first
    one_token = {p: (3.0 if j < 3 else 1.0) for j, p in enumerate(spots[5])}
    for p in one_token:
        tokens[p] = 7
    sae = one_latent_per_direction(range(7))
    x = fire(n, [peak, flat, weak, rare, everywhere, same, one_token])
    got = top_examples(sae, x, tokens, decode_token=str, n_examples=3, n_latents=7)
    # one kind of token first in each turn, then by score; the ubiquitous last
    assert [latent.latent for latent in got] == [6, 0, 2, 1, 4]
    assert got[1].score == pytest.approx(9 * np.log2(9 / (44 / 20)))
    assert top_examples(sae, x, tokens, decode_token=str, n_examples=3, n_latents=2) == got[:2]


def test_decoder_length_counts():
    n = 20_000
    tokens = np.arange(n) % 1000
    shape = [{100 + 7 * j + s: (2.0 if j < 3 else 1.0) for j in range(20)} for s in (0, 3)]
    sae = one_latent_per_direction(range(2))
    with torch.no_grad():
        sae.W_dec[1] *= 10
    got = top_examples(sae, fire(n, shape), tokens, decode_token=str, n_examples=3)
    assert [latent.latent for latent in got] == [1, 0]
    assert got[0].score == pytest.approx(10 * got[1].score)


def test_context_neighbours_and_their_activations():
    n, window = 20_000, 8
    tokens = np.arange(n)
    places = {4000: 9.0, 4001: 8.5, 4007: 8.0, 4008: 7.5, 4080: 7.0, 6000: 4.0}
    sae = one_latent_per_direction(range(1))
    [latent] = top_examples(
        sae,
        fire(n, [places]),
        tokens,
        decode_token=lambda i: f"<{i}>",
        n_examples=3,
        context=4,
        window=window,
    )
    # 4001 lies within the context of 4000, and 4008 within that of 4007
    first, second, third = latent.examples
    assert (first.position, second.position, third.position) == (4000, 4007, 4080)
    assert first.tokens == ("<4000>", "<4001>", "<4002>", "<4003>", "<4004>")
    assert (first.at, first.activations) == (0, (9.0, 8.5, 0.0, 0.0, 0.0))
    assert second.tokens == ("<4003>", "<4004>", "<4005>", "<4006>", "<4007>")
    assert (second.at, second.activations) == (4, (0.0, 0.0, 0.0, 0.0, 8.0))
    assert latent.mean_activation == pytest.approx(44 / 6)
    assert latent.share == 6 / n


def test_a_rule_of_the_batch_does_not_lose_an_example():
    """BatchTopK with no threshold yet: among the rows of the contexts, a weak example may fall out."""
    torch.manual_seed(0)
    sae = SAE(SAEConfig(3, 3, BatchTopK(1)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    x = fire(4, [{1: 1.0}, {2: 5.0}, {2: 6.0}])
    got = top_examples(sae, x, np.arange(4), decode_token=str, n_examples=1, context=0, batch_size=2)
    assert {each.latent: each.examples[0].activations for each in got} == {0: (1.0,), 1: (5.0,)}


def test_examples_do_not_depend_on_batches_or_on_the_container(tmp_path):
    n = 700
    sae, x, tokens = make(TopK(4)).train(), data(n), token_stream(n)
    options = {"decode_token": str, "n_latents": 9, "n_examples": 3}
    first = top_examples(sae, x, tokens, batch_size=1024, **options)
    assert sae.training
    again = top_examples(sae, x, tokens, batch_size=1024, **options)
    assert again == first
    path = tmp_path / "x.npy"
    np.save(path, x.numpy())
    store = collect([x], tmp_path / "store")
    mapped = np.load(path, mmap_mode="r")
    for activations, batch_size in ((x, 1), (mapped, 50), (store, 333)):
        other = top_examples(sae, activations, torch.from_numpy(tokens), batch_size=batch_size, **options)
        assert [each.latent for each in other] == [each.latent for each in first]
        positions = [[e.position for e in each.examples] for each in other]
        assert positions == [[e.position for e in each.examples] for each in first]
    mapped._mmap.close()


def test_nothing_to_show():
    sae = make(TopK(4))
    assert top_examples(sae, torch.zeros(0, D), np.zeros(0, int), decode_token=str) == []
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    assert top_examples(sae, data(), np.zeros(N, int), decode_token=str) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(N - 1, int)}, r"tokens: got int64 \[300\], expected integers \[301\]"),
        ({"tokens": np.zeros(N)}, "tokens: got float64"),
        ({"activations": torch.zeros(N, D + 1)}, "x: got shape"),
        ({"n_examples": 0}, "n_examples"),
        ({"n_latents": 1.5}, "n_latents"),
        ({"window": 0}, "window"),
        ({"context": -1}, "context"),
        ({"sae": None}, "sae"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"sae": make(TopK(4)), "activations": data(), "tokens": np.zeros(N, int), "decode_token": str}
    arguments |= change
    with pytest.raises((ValueError, TypeError), match=message):
        top_examples(**arguments)


def test_progress_bars(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # elsewhere there is no bar
    sae, x = make(TopK(3)), data()
    assert isinstance(evaluate(sae, [x], progress=True), Evaluation)
    top_examples(sae, x, np.zeros(N, int), decode_token=str, progress=True)
    shown = capsys.readouterr().err
    assert "1/1" in shown
    assert "301/301" in shown
    evaluate(sae, [x])
    top_examples(sae, x, np.zeros(N, int), decode_token=str)
    assert capsys.readouterr().err == ""
