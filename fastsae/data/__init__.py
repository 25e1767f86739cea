"""Activations to train on: text, a model's hooks, a shuffle buffer, an on-disk store.

A model's activations once, from disk ever after::

    store = cached_activations("minilm", "encoder.layer.3", "python-docs")    # computed, or found there
    train, held_out = split_rows(len(store), held_out=16_384, seed=0)
    for x in Batches(store, 1024, rows=train, n_tokens=1_000_000): ...        # [1024, 384] float32

Several hooks in one pass over the model, batches as dicts by hook::

    stores = cached_activations("minilm", ["encoder.layer.2", "encoder.layer.3"], "python-docs")
    for x in Batches(stores, 1024): ...                                       # {hook: [1024, 384]}, same rows

Straight from the model, with nothing on the disk::

    model, tokenizer = load_model("minilm")
    stream = ModelActivations(model, tokenizer, "encoder.layer.3", "python-docs")    # x [n, 384], ids [n]
    for x in ShuffleBuffer(stream, 1024): ...

``collect`` writes any stream to a folder of your choice, and ``open_activations`` opens such a folder or your
own ``.npy`` or ``.safetensors`` file. transformers and datasets are imported only when they are needed.
"""

from fastsae.data.activations import Activations, ModelActivations, load_model, special_ids
from fastsae.data.batches import Batches, split_rows
from fastsae.data.buffer import ShuffleBuffer
from fastsae.data.cache import cached_activations
from fastsae.data.hooks import replaced_output
from fastsae.data.store import ActivationStore, collect, open_activations
from fastsae.data.text import read_texts

__all__ = [
    "ActivationStore",
    "Activations",
    "Batches",
    "ModelActivations",
    "ShuffleBuffer",
    "cached_activations",
    "collect",
    "load_model",
    "open_activations",
    "read_texts",
    "replaced_output",
    "special_ids",
    "split_rows",
]
