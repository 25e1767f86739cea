"""encode_dead: the code that encode gives, and each token's best dead latents beside it."""

import pytest
import torch

from fastsae.testing import ADVERSARIAL, adversarial, assert_repeatable, assert_same, poisoned_empty, problem

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {"topk": None, "batchtopk": None, "groupmax": None, "threshold": torch.tensor(0.5)}
DEAD = {
    "none": lambda m: torch.zeros(m, dtype=torch.bool),
    "fewer than k_dead": lambda m: torch.arange(m) % 50 == 7,
    "some": lambda m: torch.arange(m) % 3 == 1,
    "all": lambda m: torch.ones(m, dtype=torch.bool),
}


def encode_dead(backend, p, rule, dead, k=4, k_dead=9, bias=True):
    args = p.x.contiguous(), p.W_enc, p.b_enc if bias else None, RULES[rule]
    k = 1 if rule == "groupmax" else k
    return torch.ops.fastsae.encode_dead(*args, dead, rule, k, k_dead, backend)


def second_code(results, n, k_dead, dead):
    """Sorted by latent, [N, K] each: values and indices of the second code."""
    values, indices, offsets = results[3:]
    kept = min(k_dead, int(dead.sum()))
    assert offsets.tolist() == [kept * row for row in range(n + 1)]
    assert len(values) == len(indices) == n * min(k_dead, len(dead))
    indices, order = indices[: n * kept].view(n, kept).sort(1)
    return values[: n * kept].view(n, kept).gather(1, order), indices


@pytest.mark.parametrize("pattern", DEAD)
@pytest.mark.parametrize("rule", RULES)
def test_both_codes(any_backend, rule, pattern):
    n, m, k_dead = 5, 257, 9
    p, dead = problem(n, 7, m, integers=True), DEAD[pattern](m)
    results = encode_dead(any_backend, p, rule, dead)
    k = {"threshold": 0, "groupmax": 1}.get(rule, 4)
    expected = torch.ops.fastsae.encode(*p.encoder, RULES[rule], None, rule, k, any_backend)
    for actual, alone in zip(results[:3], expected, strict=True):
        assert_same(actual, alone)
    values, indices = second_code(results, n, k_dead, dead)
    scores = (p.x @ p.W_enc.T + p.b_enc).masked_fill(~dead, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : values.shape[1]].sort(1).values
    assert_same(indices.long(), best)
    assert_same(values, scores.gather(1, best).relu())


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs(any_backend, name):
    n, m = 3, 100
    p, dead = adversarial(name, n, 2, m, 8), DEAD["some"](m)
    actual = second_code(encode_dead(any_backend, p, "topk", dead, k_dead=8), n, 8, dead)
    exact = second_code(encode_dead("reference", p, "topk", dead, k_dead=8), n, 8, dead)
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 20), (1, 1, 1), (2, 5, 20)], ids=str)
def test_odd_shapes_and_no_bias(any_backend, shape):
    n, d, m = shape
    p, dead = problem(n, d, m, integers=True), DEAD["some"](m)
    actual = encode_dead(any_backend, p, "topk", dead, k=1, k_dead=50, bias=False)
    expected = encode_dead("reference", p, "topk", dead, k=1, k_dead=50, bias=False)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert_same(a, b)
    for a, b in zip(*(second_code(r, n, 50, dead) for r in (actual, expected)), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_agree_and_no_place_in_use_is_left_unwritten(backend, rule):
    p, dead = problem(4, 7, 257), DEAD["some"](257)

    def run():
        results = encode_dead(backend, p, rule, dead)
        return *results[:3], *second_code(results, 4, 9, dead)

    assert_repeatable(run)
    with poisoned_empty():
        poisoned = run()
    for a, b in zip(poisoned, run(), strict=True):
        assert_same(a, b)
