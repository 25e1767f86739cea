"""The command line: parse, call, print. A command that fails says why in one sentence."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastsae.checks import FastSAEError, reject
from fastsae.files import write_json

app = typer.Typer(
    help="Train and study sparse autoencoders of any width.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()
_STOPPED = 130

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]


def main() -> None:
    """Entry point of ``fastsae``: expected errors become one sentence on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastsae").setLevel(logging.INFO)
    try:
        app()
    except (FastSAEError, OSError) as error:
        print(f"fastsae: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(_STOPPED) from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped demo.")] = False,
) -> None:
    """Train 16,384 latents on a real transformer's activations on real text, offline, in minutes on a CPU.

    Example: fastsae demo && open runs/demo/report.html
    """
    from fastsae.training.options import OPTIONS_FILE, RunOptions, read_yaml

    options = DEMO | {"out": str(out)}
    RunOptions(**options)  # nothing is replaced by a demo that can't run
    if out.exists() and any(out.iterdir()) and not resume:
        file = out / OPTIONS_FILE
        found = read_yaml(file) if file.exists() else {}
        if any(found.get(name) != value for name, value in DEMO.items()):
            reject("out", f"{out}, which holds other files than a demo's", "a new or empty folder")
        shutil.rmtree(out)
    _run(options, resume)


DEMO: dict[str, Any] = {
    "model": "minilm",
    "hook": "encoder.layer.3",
    "text": "python-docs",
    "tokens": 286_720,
    "batch_size": 1024,
    "latents": 16_384,
    "k": 32,
    "lr": 3e-3,
    "auxk": 1 / 8,
    "checkpoint_every": 100,
}


@app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Run directory.")],
    model: Annotated[str | None, typer.Option(help="transformers id or path, or 'minilm'.")] = None,
    hook: Annotated[
        list[str] | None, typer.Option(help="Module path, e.g. encoder.layer.3; repeatable.")
    ] = None,
    target_hook: Annotated[
        str | None, typer.Option(help="Module path of a transcoder's target, which --hook's is the input of.")
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            help="autoencoder (for each hook one, in OUT/HOOK), transcoder, skip_transcoder or crosscoder"
            " (of all hooks); default: transcoder with --target-hook, else autoencoder."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="File, folder or dataset, or 'python-docs'; repeatable.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="[n, d_in] .safetensors or .npy, in place of the above.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; beyond the data it is repeated.")
    ] = None,
    latents: Annotated[int, typer.Option(help="Size of the dictionary.")] = 16_384,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 32,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Published settings, before which flags and --config come: scaling-monosemanticity,"
            " anthropic-april-2024, anthropic-january-2025, openai-topk, gemma-scope-jumprelu, batchtopk or"
            " matryoshka."
        ),
    ] = None,
    activation: Annotated[
        str,
        typer.Option(
            help="topk, batchtopk, groupmax, multitopk, hierarchicaltopk, matryoshka (over batchtopk),"
            " matryoshka_topk, jumprelu, relu or gated."
        ),
    ] = "topk",
    widths: Annotated[
        list[int] | None,
        typer.Option(help="Nested widths (matryoshka) or budgets (hierarchicaltopk); repeatable."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="What thresholds start with (jumprelu); default: so that k latents fire."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the straight-through band (jumprelu); default: threshold / 4.")
    ] = None,
    penalty: Annotated[
        str | None,
        typer.Option(
            help="l1, decoder_norm_l1, tanh, l0, target_l0 or none; default: decoder_norm_l1 (relu), l1"
            " (gated), target_l0 of k (jumprelu), else none."
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The penalty's coefficient; default 5, of tanh 10, of l0 1.")
    ] = None,
    pre_activation: Annotated[
        float, typer.Option(help="Coefficient of the pre-activation loss (jumprelu).")
    ] = 0.0,
    auxk: Annotated[
        float | None, typer.Option(help="Coefficient of AuxK; default 1/32 where k is fixed, else none (0).")
    ] = None,
    k_aux: Annotated[
        int | None, typer.Option(help="AuxK's latents per token; default near d_in / 2.")
    ] = None,
    dead_after: Annotated[int | None, typer.Option(help="Silent tokens that make a latent dead.")] = None,
    normalization: Annotated[
        str, typer.Option(help="none, scalar (E|x|^2 = d), unit_scalar (1), mean_norm or layer_norm.")
    ] = "scalar",
    subtract_b_dec: Annotated[
        bool | None, typer.Option(help="Encode x - b_dec; default by activation.")
    ] = None,
    unit_norm_decoder: Annotated[
        bool | None, typer.Option(help="Keep decoder rows at length 1; default by activation.")
    ] = None,
    initial: Annotated[str, typer.Option(help="Initial weights: tied or uniform.")] = "tied",
    batch_size: Annotated[int, typer.Option(help="Tokens per batch.")] = 4096,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; default 2e-4 / sqrt(latents / 16384).")
    ] = None,
    beta1: Annotated[float, typer.Option(help="Adam's.")] = 0.9,
    beta2: Annotated[float, typer.Option(help="Adam's.")] = 0.999,
    eps: Annotated[float, typer.Option(help="Adam's.")] = 1e-8,
    warmup: Annotated[
        float, typer.Option(help="Share of the run (above 1: steps) with rising learning rate.")
    ] = 0.05,
    decay: Annotated[
        float, typer.Option(help="Share of the run, at its end, with falling learning rate.")
    ] = 0.2,
    sparsity_warmup: Annotated[
        float, typer.Option(help="Share of the run (above 1: steps) with rising sparsity coefficient.")
    ] = 0.05,
    threshold_rate: Annotated[
        float, typer.Option(help="Thresholds' learning rate (jumprelu), as a multiple of --lr.")
    ] = 1.0,
    clip: Annotated[float | None, typer.Option(help="Most that the norm of all gradients may be.")] = None,
    resample_every: Annotated[
        int | None, typer.Option(help="Steps between resamplings of dead latents.")
    ] = None,
    mode: Annotated[str, typer.Option(help="RowAdam: dense, lazy or deferred.")] = "deferred",
    held_out: Annotated[int, typer.Option(help="Tokens kept for the final metrics.")] = 16_384,
    context: Annotated[int, typer.Option(help="Tokens per window of text.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, split and order.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[int, typer.Option(help="Steps between log rows.")] = 10,
    on_nan: Annotated[str, typer.Option(help="A batch with NaN: skip or stop.")] = "skip",
    backend: Annotated[str, typer.Option(help="auto, reference, torch, triton or cuda.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    weight_format: Annotated[
        str, typer.Option(help="float32, split32 (fp32 as bf16 and what it lacks) or bfloat16.")
    ] = "float32",
    state_dtype: Annotated[
        str,
        typer.Option(help="Adam's moments: float32, bfloat16, int8, int8_row (8, 4, 2, 1 bytes a weight)."),
    ] = "float32",
    cache_dir: Annotated[str | None, typer.Option(help="Where activations are kept between runs.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also log to TensorBoard.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Also log to this Weights & Biases project.")] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options; flags come before it.")
    ] = None,
) -> None:
    """Train a dictionary on a model's activations (or on a file of them) and report what it learned.

    Several --hook train a dictionary each, in OUT/HOOK, with one pass over the model; with --structure
    crosscoder one of all. --target-hook makes it a transcoder, from --hook's activations to the target's.

    Example: fastsae train --model minilm --hook encoder.layer.3 --text docs/ --latents 16384 --k 32 --out
    runs/docs
    """
    from fastsae.training.options import OPTIONS_FILE, read_yaml
    from fastsae.training.recipes import recipe_options

    options = {name: value for name, value in ctx.params.items() if name not in ("config", "resume")}
    options["out"] = str(out)
    sources = {name: ctx.get_parameter_source(name) for name in options}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    if resume and not given - {"out"} and not (out / OPTIONS_FILE).exists():
        reject("resume", f"{out}, which holds no run of `fastsae train`", "the folder of one")
    for file in (config, out / OPTIONS_FILE if resume and (out / OPTIONS_FILE).exists() else None):
        if file is not None:
            found = {name: value for name, value in read_yaml(file).items() if name not in given}
            options |= found
            given |= found.keys()
    if options["recipe"] is not None:
        published = recipe_options(options["recipe"])
        options |= {name: value for name, value in published.items() if name not in given}
    options["widths"] = list(options["widths"] or []) or None
    for name in ("text", "hook"):
        values = options[name]
        if isinstance(values, tuple | list):  # as the parser gives repeated flags
            options[name] = list(values) if len(values) > 1 else values[0] if values else None
    _run(options, resume)


@app.command("eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    activations: Annotated[
        str | None, typer.Option(help="Evaluate on this file instead of the held-out tokens.")
    ] = None,
    synthetic: Annotated[
        Path | None,
        typer.Option(help="Compare with the true features behind this file, on fresh tokens of them."),
    ] = None,
    in_model: Annotated[
        bool, typer.Option(help="Also put the reconstruction in the place of the activations, in the model.")
    ] = False,
    texts: Annotated[int, typer.Option(min=1, help="Windows of text for --in-model.")] = 64,
    json_path: Json = None,
) -> None:
    """Measure a trained dictionary: FVU, L0, dead share, cosine, relative norm.

    With --synthetic: how much it found of features that are known: MMCS, MCC, F1, shrinkage.

    \b
    python -c "from fastsae.evaluate import *; \\
      write_activations('synth.safetensors', SyntheticDictionary(), 1_000_000)"
    fastsae train --activations synth.safetensors --out runs/synth \\
      --latents 128 --k 3 --batch-size 512 --lr 3e-3
    fastsae eval runs/synth --synthetic synth.safetensors

    With --in-model: what the run's model loses when the reconstruction takes the place of its activations, on
    windows of the run's text beyond what it was trained on, if there are any (texts_unseen), else on the
    text's last. Of a causal language model the loss recovered and the KL divergence, of an encoder the change
    of its mean-pooled embedding.

    Example: fastsae eval runs/demo --json metrics.json
    """
    if synthetic is not None:
        if activations is not None:
            reject("synthetic", f"'{synthetic}' beside --activations", "one of the two")
        if in_model:
            reject("synthetic", f"'{synthetic}' beside --in-model", "one of the two")
        from fastsae.evaluate import SyntheticDictionary, score
        from fastsae.sae import SAE

        truth = SyntheticDictionary.open(synthetic)
        _show("true features", score(SAE.load(directory), truth).to_dict(), json_path)
        return
    from fastsae.training.run import evaluate_run

    inside: dict[str, Any] = {}
    if in_model:
        from fastsae.training.in_model import evaluate_run_in_model

        inside = evaluate_run_in_model(directory, texts)
    found = evaluate_run(directory, activations).to_dict() | inside
    _show("held-out tokens" if activations is None else activations, found, json_path)


@app.command()
def plan(
    d_in: Annotated[int, typer.Option(help="Width of the activations.")],
    latents: Annotated[int, typer.Option(help="Size of the dictionary.")],
    d_out: Annotated[int | None, typer.Option(help="Width of a transcoder's target; default d_in.")] = None,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 32,
    batch: Annotated[int, typer.Option(help="Tokens per batch.")] = 4096,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    weight_format: Annotated[str, typer.Option(help="float32, split32 or bfloat16.")] = "float32",
    state_dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int8_row.")] = "float32",
    auxk: Annotated[bool, typer.Option(help="With AuxK, as train has it by default.")] = False,
    mode: Annotated[str, typer.Option(help="RowAdam: dense, lazy or deferred.")] = "deferred",
    dtype: Annotated[
        str, typer.Option(help="Of activations, and of float32 weights: float32, bfloat16 or float16.")
    ] = "float32",
    gpu: Annotated[
        str | None, typer.Option(help="h200, h100 or a100: what fits, and a step's least time.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Say what memory and time a training run needs, before anything is allocated.

    Example: fastsae plan --d-in 4096 --latents 1048576 --k 64 --batch 8192 --gpu h200 --weight-format split32
    """
    from fastsae.training.plan import plan_run

    found = plan_run(
        d_in, latents, k, batch, gpu, d_out=d_out, accumulate=accumulate, weight_format=weight_format,
        state_dtype=state_dtype, auxk=auxk, mode=mode, dtype=dtype,
    )  # fmt: skip
    hidden = ("formats", *(name for name in found if name.endswith("_bytes")))
    _show("plan", {name: value for name, value in found.items() if name not in hidden}, None)
    if "formats" in found:
        _show("weight format/state dtype", {name: _line(its) for name, its in found["formats"].items()}, None)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_path, found)


def _line(its: dict[str, Any]) -> str:
    """A format's row in the plan's table."""
    return (
        f"{its['bytes_per_weight']:.2f} bytes a weight, at most {its['largest_latents']:,} latents: "
        f"{'fits' if its['fits'] else 'does not fit'}"
    )


@app.command()
def doctor(json_path: Json = None) -> None:
    """Say what is installed and which backends work here, with the reason for each that doesn't.

    Example: fastsae doctor
    """
    from fastsae.backends import diagnose

    _show("doctor", diagnose(), json_path)


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench(ctx: typer.Context) -> None:
    """Measure this machine: the fused step and its operators beside what others do."""
    from fastsae.benchmarks.__main__ import main as run_benchmarks

    if code := run_benchmarks(ctx.args, prog="fastsae bench"):
        raise SystemExit(code)


def _run(options: dict[str, Any], resume: bool) -> None:
    from fastsae.training.options import RunOptions
    from fastsae.training.run import run

    parsed = RunOptions(**options)
    metrics, folders = run(parsed, resume=resume), [one.out for one in parsed.dictionaries()]
    if metrics is None:
        where = ", ".join(f"{folder}/checkpoints" for folder in folders)
        console.print(f"stopped; a checkpoint is in {where}: continue with --resume")
        raise SystemExit(_STOPPED)
    for folder, its in zip(folders, metrics.values() if len(folders) > 1 else [metrics], strict=True):
        _show(folder, its, None)
        console.print(f"what it learned: {Path(folder) / 'report.html'}")


def _show(title: str, rows: dict[str, Any], json_path: Path | None) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, _text(value))
    console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_path, rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
