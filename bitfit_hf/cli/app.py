"""The commands. Each imports what it needs when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError, OutputError
from .console import Command, CommandLine, OnMismatch, emit
from .options import Json, Quiet, Token

app = typer.Typer(
    name="bitfit",
    cls=CommandLine,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PICTURES = (".png", ".svg", ".pdf")


Force = Annotated[bool, typer.Option("--force", help="Replace the model or delta that is in the output folder.")]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write to.")]
Delta = Annotated[str, typer.Argument(metavar="DELTA", help="Folder or Hub repo of a delta.")]
DeltaRevision = Annotated[
    str | None, typer.Option("--delta-revision", help="Branch, tag or commit of the delta's repo.")
]
BaseRevision = Annotated[
    str | None,
    typer.Option(
        "--base-revision", help="Of the base's repo; by default the one that the delta pins, if it names it."
    ),
]
Task = Annotated[
    str | None,
    typer.Option("--task-type", help="PEFT's name of the task (SEQ_CLS, CAUSAL_LM, …), to choose the model class."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"bitfit {__version__}")
        raise typer.Exit()


@app.callback()
def bitfit(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train the biases of a model on a task; look at, share, serve and convert the result, a delta.

    A DELTA is a folder or a Hub repo; a folder of that name wins. Nothing is looked up on the Hub for a folder. A
    mistake ends with one line on stderr, and exit code 2 if it is in the command, else 1.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(cls=Command)
def inspect(
    name: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="A delta, or a base model.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the repo.")] = None,
    task_type: Task = None,
    largest: Annotated[int, typer.Option("--largest", min=0, help="How many of the largest changes to list.")] = 5,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Say what a delta holds, or what a base has to tune.

    Of a delta: its bias terms and parameter counts, the base with its revision, labels, the metrics on its card, the
    size of its files, and the largest changes. Of a base model, without its weights: bias parameters by term, the
    head, and the vectors that are not selected because nothing is known about them.

    \b
    Examples:
      bitfit inspect user/bert-base-rte-bitfit
      bitfit inspect ./rte --json
      bitfit inspect bert-base-uncased --task-type SEQ_CLS
    """
    from ..card.metrics import add_card
    from . import reports, tables
    from .checkpoints import build_on_meta, is_base, model_class, read_model_config
    from .deltas import read_delta

    if is_base(name, revision=revision, token=token):
        config = read_model_config(name, revision=revision, token=token)
        cls = model_class(config, name, task_type=task_type)
        values = reports.inspect_base(build_on_meta(config, cls, name), name)
        emit(values, as_json, tables.base_tables)
    else:
        delta, folder = read_delta(name, revision, token)
        add_card(folder, name, token=token)
        emit(reports.inspect_delta(delta, folder, name, largest=largest), as_json, tables.delta_tables)


@app.command(cls=Command)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or Hub repo of a delta.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or Hub repo of another.")],
    a_revision: Annotated[str | None, typer.Option("--a-revision", help="Of A's repo.")] = None,
    b_revision: Annotated[str | None, typer.Option("--b-revision", help="Of B's repo.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Compare two deltas by bias term and layer.

    For each, the mean absolute difference of the tuned biases and the cosine between the two deltas; what only one of
    them tunes; whether they have the same base; their heads.

    \b
    Examples:
      bitfit diff ./rte ./mrpc
      bitfit diff user/rte user/rte --a-revision v1 --b-revision v2 --json
    """
    from . import reports, tables
    from .deltas import read_delta

    values = reports.compare(read_delta(a, a_revision, token)[0], read_delta(b, b_revision, token)[0])
    emit(values, as_json, tables.diff_tables)


@app.command(cls=Command)
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub repo of the base model.")],
    delta: Delta,
    output: Folder,
    base_revision: BaseRevision = None,
    delta_revision: DeltaRevision = None,
    task_type: Task = None,
    on_base_mismatch: Annotated[
        OnMismatch, typer.Option("--on-base-mismatch", help="If the delta was trained on another checkpoint.")
    ] = OnMismatch.RAISE,
    force: Force = False,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write base and delta together as a stock checkpoint.

    It loads without bitfit_hf. It has the base's precision, the delta's head and labels, and the tokenizer files of
    the delta or else the base.

    \b
    Examples:
      bitfit merge bert-base-uncased user/bert-base-rte-bitfit -o bert-rte
      bitfit merge ./bert ./rte -o bert-rte --force
    """
    from peft import PeftModel

    from ..storage.fingerprint import base_mismatch
    from .checkpoints import copy_preprocessing, new_folder, preprocessing_folder
    from .deltas import base_revision as revision_of
    from .deltas import load_base, read_delta

    with new_folder(output, force=force) as folder:
        value, source = read_delta(delta, delta_revision, token)
        model = load_base(base, value, base_revision, task_type, token)
        of_base = preprocessing_folder(base, revision=revision_of(base, value, base_revision), token=token)
        with base_mismatch(on_base_mismatch.value):
            merged: Any = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
        merged.save_pretrained(folder)
        of_delta = preprocessing_folder(delta, revision=source.name, token=token)
        copy_preprocessing([of_delta, of_base], folder)
    values = {"output": str(output), "model_class": type(merged).__name__, "dtype": str(merged.dtype)[6:]}
    emit({**values, "files": sorted(os.listdir(output))}, as_json, brief=str(output) if quiet else None)


@app.command(cls=Command)
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub repo of the model before tuning.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder or Hub repo of the model after tuning.")],
    output: Folder,
    base_revision: Annotated[str | None, typer.Option("--base-revision", help="Of the base's repo.")] = None,
    tuned_revision: Annotated[str | None, typer.Option("--tuned-revision", help="Of the tuned model's repo.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Name of the base to write down, if BASE is a copy of it.")
    ] = None,
    force: Force = False,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a delta of a checkpoint that other code has tuned.

    Its biases and its head are taken; all other weights have to equal the base's. The largest error of `b_0 + δ` is
    printed; it is at most half a unit in the last place.

    \b
    Examples:
      bitfit extract bert-base-uncased ./their-bitfit-rte -o rte
      bitfit extract ./bert-copy ./tuned -o rte --base-model bert-base-uncased
    """
    from ..delta.value import BiasDelta
    from .checkpoints import check_output, is_local, load_model, model_class, read_model_config
    from .deltas import tell_if_nothing_changed

    output = check_output(output, force=force)
    cls = model_class(read_model_config(tuned, revision=tuned_revision, token=token), tuned)
    before = load_model(base, cls, revision=base_revision, token=token, complete=True)
    after = load_model(tuned, cls, revision=tuned_revision, token=token, complete=True)
    value = BiasDelta.from_models(before, after)
    tell_if_nothing_changed(value, before, base, tuned)
    local = os.path.abspath(base) if is_local(base) else base
    if base_model not in (None, base):
        value.config.revision = None  # a commit of BASE
    value.config.base_model_name_or_path = base_model or local
    value.save_pretrained(output)
    values = {
        "output": str(output),
        "model_class": cls.__name__,
        "base_model": value.config.base_model_name_or_path,
        "biases": value.num_parameters(),
        "head": value.num_parameters(head=True) - value.num_parameters(),
        "largest_error": value.extraction_error,
    }
    emit(values, as_json, brief=str(output) if quiet else None)


@app.command(cls=Command)
def export(
    name: Annotated[
        str, typer.Argument(metavar="DELTA|BASE", help="Folder or Hub repo of a delta; with --onnx of a base model.")
    ],
    output: Folder,
    stock: Annotated[bool, typer.Option("--stock", help="As a plain PEFT LoRA adapter (the default).")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="A base as one ONNX graph for all of its tasks.")] = False,
    onnx_adapter: Annotated[
        bool, typer.Option("--onnx-adapter", help="A task as an ONNX Runtime adapter, with its graph.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="With --onnx: most weights in 8 bits.")] = False,
    int8_all: Annotated[
        bool, typer.Option("--int8-all", help="With --onnx: all of them; faster, and less exact.")
    ] = False,
    add_missing_biases: Annotated[
        bool, typer.Option("--add-missing-biases", help="With --onnx: inputs for biases that the base does not have.")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Folder or Hub repo of the base; by default the one the delta names.")
    ] = None,
    base_revision: BaseRevision = None,
    delta_revision: DeltaRevision = None,
    task_type: Task = None,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a delta in a form that loads without bitfit_hf, or a base as the ONNX graph of a bank.

    As a LoRA adapter (--stock) stock peft and transformers load a delta with the same outputs; as an ONNX Runtime
    adapter (--onnx-adapter) stock onnxruntime does. The graph of a base (--onnx) runs all of its tasks:
    TaskBank(..., engine="onnxruntime", graph=DIR). Tokenizer files and the card come along.

    \b
    Examples:
      bitfit export user/bert-base-rte-bitfit -o rte-lora
      bitfit export ./rte --onnx-adapter --base ./bert -o rte-onnx
      bitfit export bert-base-uncased --onnx --int8 -o bert-graph
    """
    from . import exporting
    from .checkpoints import new_folder, preprocessing_folder
    from .deltas import base_revision as revision_of_base
    from .deltas import load_base, read_delta

    if stock + onnx + onnx_adapter > 1:
        raise typer.BadParameter("--stock, --onnx and --onnx-adapter are three formats; choose one.")
    if (int8 or int8_all or add_missing_biases) and not onnx:
        raise typer.BadParameter("--int8, --int8-all and --add-missing-biases go with --onnx.")
    with new_folder(output, force=force) as folder:
        if onnx:
            values = {
                "model_class": exporting.write_graph(
                    name,
                    folder,
                    int8=int8,
                    int8_all=int8_all,
                    add_missing_biases=add_missing_biases,
                    revision=base_revision,
                    token=token,
                )
            }
        else:
            delta, source = read_delta(name, delta_revision, token)
            base = base or delta.config.base_model_name_or_path
            if base is None:
                raise CheckpointError(f"{name} does not name its base; pass --base.")
            model = load_base(base, delta, base_revision, task_type, token)
            revision = revision_of_base(base, delta, base_revision)
            of_base = preprocessing_folder(base, revision=revision, token=token)
            if onnx_adapter:
                exporting.write_adapter(delta, model, folder, Path(name).name)
            else:
                exporting.write_stock(delta, model, folder)
            exporting.copy_companions(source, of_base, folder)
            values = {"base_model": base}
    emit({"output": str(output), **values, "files": sorted(os.listdir(output))}, as_json)


@app.command(cls=Command)
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a delta.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repo on the Hub, made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="If the repo is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's name on the Hub, if it was loaded from a folder.")
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Add stock/, which loads without bitfit_hf. Loads the base.")
    ] = False,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Push a delta and its model card to the Hub.

    The tokenizer files and the picture beside it go along, and nothing else.

    \b
    Examples:
      bitfit push ./rte user/bert-base-rte-bitfit
      bitfit push ./rte user/rte --base-model bert-base-uncased --private
    """
    from ..errors import DeltaNotFoundError
    from ..hub.push import push_to_hub

    if not folder.is_dir():
        raise DeltaNotFoundError(f"There is no folder {folder}.")
    commit = push_to_hub(
        folder,
        repo,
        private=private or None,
        revision=revision,
        token=token,
        commit_message=message,
        create_pr=create_pr,
        stock=stock,
        base_model=base_model,
    )
    values = {
        "repo": commit.repo_url.repo_id,
        "commit": commit.oid,
        "url": commit.commit_url,
        "pull_request": commit.pr_url,
    }
    emit(values, as_json, brief=(commit.pr_url or commit.commit_url) if quiet else None)


@app.command(cls=Command)
def plot(
    delta: Delta,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="The .png, .svg or .pdf to write.")],
    title: Annotated[str | None, typer.Option("--title", help="Written above the picture.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the repo.")] = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw how far each bias has moved (the paper's Figure 1).

    By term and layer. With --json the numbers that are drawn are printed too.

    \b
    Examples:
      bitfit plot user/bert-base-rte-bitfit -o rte.png
      bitfit plot ./rte -o rte.pdf --title RTE
    """
    from ..analysis import UNIT, bias_change
    from ..plot import plot_bias_change
    from .deltas import read_delta

    if output.suffix.lower() not in _PICTURES:
        raise OutputError(f"{output} has to end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}.")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; pass the file to write.")
    rows = bias_change(read_delta(delta, revision, token)[0])
    plot_bias_change(rows, output, title=title)
    drawn = {"unit": UNIT, "rows": [vars(row) for row in rows]} if as_json else {}
    emit({"output": str(output), **drawn}, as_json, brief=str(output) if quiet else None)
