"""Bias change and counts, against sums made by hand from the tensors' names; the picture, as numbers and as a file."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from architectures import HIDDEN, INTERMEDIATE, build
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification
from tuner_tester import fill_

from bitfit_hf import (
    AdapterNameError,
    BiasDelta,
    BitFitConfig,
    DeltaNotFoundError,
    MissingDependencyError,
    bias_change,
    plot_bias_change,
)
from bitfit_hf.analysis import BiasChange, BiasChangeRow, term_counts

# Written down from the paper and BERT's module names, not taken from the library.
BERT_LAYER = {
    "b_q": "attention.self.query.bias",
    "b_k": "attention.self.key.bias",
    "b_v": "attention.self.value.bias",
    "b_m1": "attention.output.dense.bias",
    "b_LN1": "attention.output.LayerNorm.bias",
    "b_m2": "intermediate.dense.bias",
    "b_m3": "output.dense.bias",
    "b_LN2": "output.LayerNorm.bias",
}


def tuned(name: str, **values) -> BiasDelta:
    return BiasDelta.from_model(fill_(get_peft_model(build(name), BitFitConfig(**values))))


def mean_abs(*tensors: torch.Tensor) -> float:
    return (sum(t.double().abs().sum() for t in tensors) / sum(t.numel() for t in tensors)).item()


def by_place(rows: BiasChange) -> dict[tuple, float]:
    found = {(row.stack, row.symbol, row.layer): row.value for row in rows}
    assert len(found) == len(rows)
    return found


# --- rows ---


def test_bert_rows_are_the_means_of_the_named_tensors():
    delta = tuned("bert-sequence")
    expected = {
        ("", symbol, layer): mean_abs(delta[f"bert.encoder.layer.{layer}.{tail}"])
        for symbol, tail in BERT_LAYER.items()
        for layer in (0, 1)
    }
    expected["", "embedding_layernorm", None] = mean_abs(delta["bert.embeddings.LayerNorm.bias"])
    expected["", "pooler", None] = mean_abs(delta["bert.pooler.dense.bias"])
    rows = bias_change(delta)
    assert by_place(rows) == pytest.approx(expected, rel=1e-12)
    assert len(expected) == 18
    assert [row.symbol for row in rows[::2]][:8] == list(BERT_LAYER)  # the order of the paper's figure
    assert {row.symbol: row.size for row in rows}["b_m2"] == INTERMEDIATE


def test_hand_computed_values():
    delta = tuned("bert-sequence", bias_terms="query")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
    first, second = tensors
    tensors[first][:4] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    tensors[second][0] = -0.5
    rows = bias_change(BiasDelta(tensors, config=delta.config, head=delta.head))
    assert rows == [
        BiasChangeRow("query", "b_q", 0, "", 10 / HIDDEN, HIDDEN),
        BiasChangeRow("query", "b_q", 1, "", 0.5 / HIDDEN, HIDDEN),
    ]
    assert rows.averages() == {("", "query"): 5.25 / HIDDEN}
    assert rows.largest(1) == [rows[0]]


def test_gpt2_fused_vector_is_taken_by_thirds():
    delta = tuned("gpt2-causal_lm")
    rows = by_place(bias_change(delta))
    for layer in (0, 1):
        fused = delta[f"transformer.h.{layer}.attn.c_attn.bias"]
        for third, symbol in enumerate(("b_q", "b_k", "b_v")):
            assert rows["", symbol, layer] == mean_abs(fused[third * HIDDEN : (third + 1) * HIDDEN])


def test_gpt2_slices_that_lie_apart():
    delta = tuned("gpt2-causal_lm", bias_terms=["b_q", "b_v"])  # first and last third
    rows = by_place(bias_change(delta))
    assert len(rows) == 4
    for layer in (0, 1):
        pair = delta[f"transformer.h.{layer}.attn.c_attn.bias"]
        assert pair.numel() == 2 * HIDDEN
        assert rows["", "b_q", layer] == mean_abs(pair[:HIDDEN])
        assert rows["", "b_v", layer] == mean_abs(pair[HIDDEN:])


def test_gpt_neox_heads_hold_query_key_and_value_in_turn():
    delta = tuned("gpt_neox-causal_lm")
    fused = delta["gpt_neox.layers.1.attention.query_key_value.bias"].view(4, 3, HIDDEN // 4)  # 4 heads
    rows = by_place(bias_change(delta))
    for index, symbol in enumerate(("b_q", "b_k", "b_v")):
        assert rows["", symbol, 1] == pytest.approx(mean_abs(fused[:, index]), rel=1e-12)


def test_tensors_of_one_term_and_layer_are_taken_together():
    delta = tuned("llama-causal_lm-biased")
    rows = bias_change(delta)
    pair = [delta[f"model.layers.1.mlp.{name}_proj.bias"] for name in ("gate", "up")]
    row = next(row for row in rows if (row.symbol, row.layer) == ("b_m2", 1))
    assert row.value == mean_abs(*pair)
    assert row.size == 2 * pair[0].numel()


def test_cross_attention_counts_with_attention_and_stacks_stay_apart():
    delta = tuned("bart-seq2seq_lm")
    rows = bias_change(delta)
    assert rows.stacks == ["encoder", "decoder"]
    values = by_place(rows)
    layer = "model.{}.layers.0.{}.q_proj.bias"
    assert values["encoder", "b_q", 0] == mean_abs(delta[layer.format("encoder", "self_attn")])
    assert values["decoder", "b_q", 0] == mean_abs(
        delta[layer.format("decoder", "self_attn")], delta[layer.format("decoder", "encoder_attn")]
    )


def test_added_biases_start_from_zero():
    delta = tuned("llama-causal_lm", add_missing_biases=True, bias_terms="query")
    assert by_place(bias_change(delta))["", "b_q", 0] == mean_abs(delta["model.layers.0.self_attn.q_proj.bias"])


def test_all_ways_of_naming_a_delta_agree(tmp_path):
    model = fill_(get_peft_model(build("bert-sequence"), BitFitConfig()))
    delta = BiasDelta.from_model(model)
    delta.save_pretrained(tmp_path)
    assert bias_change(model) == bias_change(delta) == bias_change(tmp_path) == bias_change(str(tmp_path))
    model.add_adapter("other", BitFitConfig(bias_terms="b_q"))
    assert [row.value for row in bias_change(model, "other")] == [0.0, 0.0]


def test_what_has_no_delta_is_an_error(tmp_path):
    with pytest.raises(AdapterNameError, match="no BitFit adapter"):
        bias_change(build("bert-sequence"))
    with pytest.raises(DeltaNotFoundError):
        bias_change(tmp_path)
    with pytest.raises(AdapterNameError, match="int, which has no delta"):
        bias_change(3)


def test_table_shows_every_row_and_the_averages():
    rows = bias_change(tuned("bert-sequence"))
    lines = rows.table().splitlines()
    assert lines[0].split() == ["term", "layer", "change", "size"]
    assert len(lines) == 1 + len(rows) + 8
    assert lines[3].split() == ["b_q", "mean", f"{rows.averages()['', 'query']:.6f}"]
    assert lines[-1].split() == ["pooler", "-", f"{rows[-1].value:.6f}", str(HIDDEN)]
    assert bias_change(tuned("bart-seq2seq_lm")).table().splitlines()[1].split()[:2] == ["encoder", "b_q"]
    assert BiasChange().table().split() == ["term", "layer", "change", "size"]


# --- counts ---


def test_counts_of_bert_base_are_the_papers():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    counts = term_counts(get_peft_model(model, BitFitConfig()).peft_config["default"])
    assert counts.biases == 102_912
    assert counts.terms["query"] == 12 * 768
    assert counts.terms["intermediate"] == 12 * 3072
    assert counts.terms["pooler"] == 768
    assert counts.head is None
    assert counts.total is None


def test_counts_with_and_without_head(tmp_path):
    delta = tuned("gpt2-sequence", bias_terms=["b_q", "b_m2"])
    counts = term_counts(delta)
    assert counts.terms == {"query": 2 * HIDDEN, "intermediate": 2 * INTERMEDIATE}
    assert counts.biases == delta.num_parameters()
    assert counts.head == 3 * HIDDEN  # `score` has no bias
    assert counts.total == delta.num_parameters(head=True)
    delta.save_pretrained(tmp_path)
    assert term_counts(tmp_path) == counts
    assert term_counts(tuned("gpt2-causal_lm")).head == 0


# --- the picture ---


def images(axis) -> list:
    return [image.get_array() for image in axis.images]


def tick_labels(axis) -> tuple[list[str], list[str]]:
    return tuple([label.get_text() for label in which()] for which in (axis.get_xticklabels, axis.get_yticklabels))


def test_picture_shows_the_rows():
    delta = tuned("bert-sequence")
    rows = bias_change(delta)
    figure = plot_bias_change(delta)
    axis = figure.axes[0]
    layers, last = images(axis)
    assert layers.shape == (10, 2)
    values = by_place(rows)
    for index, symbol in enumerate(BERT_LAYER):
        assert layers[index].tolist() == [values["", symbol, 0], values["", symbol, 1]]
    assert layers[8:].mask.all()  # embeddings and pooler are in no layer
    averages = rows.averages()
    assert last[:8, 0].tolist() == list(averages.values())
    assert last[8:, 0].tolist() == [rows[-2].value, rows[-1].value]
    columns, names = tick_labels(axis)
    assert columns == ["0", "1", "mean"]
    assert names == [rf"$b_{{\mathrm{{{symbol[2:]}}}}}$" for symbol in BERT_LAYER] + ["emb. LN", "pooler"]
    assert [text.get_text() for text in axis.texts] == [f"{row.value:.2g}" for row in rows[-2:]]
    # They stand to the right of the last cell, where no layer is, and within the panel.
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().transformed(axis.transData.inverted()) for text in axis.texts]
    assert all(axis.images[1].get_extent()[1] < box.x0 < box.x1 < axis.get_xlim()[1] for box in boxes)


def test_scale_is_that_of_the_layers():
    delta = tuned("bert-sequence")
    delta["bert.pooler.dense.bias"].fill_(1000.0)
    rows = bias_change(delta)
    figure = plot_bias_change(rows)
    largest = max(row.value for row in rows if row.layer is not None)
    assert {image.get_clim() for image in figure.axes[0].images} == {(0.0, largest)}
    assert figure.axes[-1].get_ylabel() == r"$\|b_0 - b_F\|_1\ /\ \dim(b)$"


def test_each_stack_has_a_panel():
    figure = plot_bias_change(tuned("bart-seq2seq_lm"), title="BART")
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title(loc="left") for axis in panels] == ["encoder", "decoder"]
    assert len({image.get_clim() for axis in panels for image in axis.images}) == 1
    assert figure.get_suptitle() == "BART"


def test_term_in_and_outside_layers_has_two_rows():
    rows = BiasChange(
        [BiasChangeRow("other", "other", 0, "", 1.0, 4), BiasChangeRow("other", "other", None, "", 9.0, 4)]
    )
    assert rows.averages() == {("", "other"): 1.0}
    axis = plot_bias_change(rows).axes[0]
    assert tick_labels(axis)[1] == ["other", "other (no layer)"]
    assert images(axis)[1][:, 0].tolist() == [1.0, 9.0]


@pytest.mark.parametrize("layers", [6, 12, 24, 48])
def test_picture_stays_readable(layers, tmp_path):
    rows = BiasChange(
        BiasChangeRow("query", "b_q", layer, stack, 0.001 * layer, 8)
        for stack in ("encoder", "decoder")
        for layer in range(layers)
    )
    figure = plot_bias_change(rows, tmp_path / "change.png")
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes[:2]:
        boxes = [label.get_window_extent(renderer) for label in axis.get_xticklabels() if label.get_text()]
        assert len(boxes) >= 7
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), "labels overlap"
        sizes = [label.get_fontsize() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        assert min(sizes) >= 10
    assert figure.get_size_inches()[0] < 16
    assert (tmp_path / "change.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "start"), [("x.svg", b"<?xml"), ("x.pdf", b"%PDF"), (".", b"\x89PNG")])
def test_file_format_is_that_of_the_name(name, start, tmp_path):
    plot_bias_change(tuned("bert-sequence", bias_terms="b_q"), tmp_path / name)
    (written,) = tmp_path.iterdir()
    assert written.name == (name if name != "." else "bias_change.png")
    assert written.read_bytes().startswith(start)


@pytest.mark.parametrize("rows", [BiasChange(), BiasChange([BiasChangeRow("pooler", "pooler", None, "", 0.0, 4)])])
def test_little_to_draw(rows, tmp_path):
    plot_bias_change(rows, tmp_path)
    assert (tmp_path / "bias_change.png").stat().st_size > 1000


def test_untrained_delta_is_drawn_in_white():
    delta = BiasDelta.from_model(get_peft_model(build("bert-sequence"), BitFitConfig()))
    assert {image.get_clim() for image in plot_bias_change(delta).axes[0].images} == {(0.0, 1.0)}


@pytest.mark.slow
def test_global_state_of_matplotlib_is_left_alone(tmp_path):
    code = """
import sys
import matplotlib
settings = repr(matplotlib.rcParams.copy())  # reading the backend's name would choose one
from bitfit_hf.analysis import BiasChange, BiasChangeRow
from bitfit_hf.plot import plot_bias_change
plot_bias_change(BiasChange([BiasChangeRow("query", "b_q", 0, "", 1.0, 4)]), sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert repr(matplotlib.rcParams.copy()) == settings
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'bitfit-hf[plot]'")) as caught:
        plot_bias_change(tuned("bert-sequence", bias_terms="b_q"))
    assert isinstance(caught.value, ImportError)
