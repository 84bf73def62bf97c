"""The delta as a value: mapping, files, arithmetic, writing into a stock model and taking out again."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, build, output_tensors, randomize_
from peft import get_peft_model

from bitfit_hf import (
    AdapterNameError,
    BaseModelMismatchError,
    BiasDelta,
    BitFitConfig,
    DeltaFormatError,
    DeltaMismatchError,
    MergeError,
    load_delta,
)
from bitfit_hf.tuner.state import delta_parameters, head_tensors

# One of each kind of place that a delta can live in.
NAMES = [
    "bert-sequence",
    "roberta-sequence",
    "distilbert-sequence",
    "deberta-sequence",
    "gpt2-causal",
    "xlnet-sequence",
]
NAMES += ["vit-image", "t5-seq2seq", "bert-masked", "whisper-audio", "mlp"]


def find(prefix: str) -> str:
    """The architecture whose name begins with `prefix`."""
    return next(name for name in ARCHITECTURES if name.startswith(prefix))


def tuned(name: str, config: BitFitConfig | None = None, *, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """A model of the zoo with an adapter whose deltas and head are random."""
    model = get_peft_model(randomize_(build(name)), config or BitFitConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*delta_parameters(model, "default").values(), *head_tensors(model, "default").values()]:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * std)
    return model.eval()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def outputs(model: torch.nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return output_tensors(model(**ARCHITECTURES[name].inputs()))


def assert_close(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def assert_unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_on_a_stock_model_computes_what_the_adapter_computes(name, tmp_path):
    name = find(name)
    model = tuned(name, BitFitConfig(add_missing_biases=name.startswith("t5")))
    delta = BiasDelta.from_model(model)
    delta.save_pretrained(tmp_path)

    stock = randomize_(build(name))
    before, labels = snapshot(stock), getattr(getattr(stock, "config", None), "id2label", None)
    assert load_delta(stock, tmp_path) is stock
    assert_close(outputs(stock, name), outputs(model, name))
    assert not torch.equal(outputs(stock, name)[0], outputs(randomize_(build(name)), name)[0])

    BiasDelta.from_pretrained(tmp_path).remove_(stock)
    assert_unchanged(stock, before)
    assert getattr(getattr(stock, "config", None), "id2label", None) == labels


def test_mapping_holds_float32_copies_under_stock_names():
    model = tuned("bert-sequence")
    delta = BiasDelta.from_model(model)
    parameters = dict(build("bert-sequence").named_parameters())
    assert set(delta) == {name for name in parameters if name.endswith(".bias") and not name.startswith("classifier")}
    assert {name: tuple(tensor.shape) for name, tensor in delta.items()} == {
        name: tuple(parameters[name].shape) for name in delta
    }
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}
    assert delta.head.keys() == {"classifier.weight", "classifier.bias"}
    assert delta.num_parameters() == sum(parameters[name].numel() for name in delta)
    assert delta.num_parameters(head=True) == delta.num_parameters() + sum(t.numel() for t in delta.head.values())

    name = next(iter(delta))
    kept = delta[name].clone()
    with torch.no_grad():
        for tensor in delta_parameters(model, "default").values():
            tensor.add_(1.0)
    assert torch.equal(delta[name], kept), "the delta shares memory with the model"


def test_a_slice_has_its_own_length_and_lands_in_its_place():
    config = BitFitConfig(bias_terms=["query", "value"])
    model = tuned(find("gpt2-causal"), config)
    delta = BiasDelta.from_model(model)
    width = model.config.n_embd
    assert {tensor.numel() for tensor in delta.values()} == {2 * width}

    stock = randomize_(build(find("gpt2-causal")))
    before = snapshot(stock)
    delta.apply_(stock)
    for name, tensor in delta.items():
        change = stock.get_parameter(name) - before[name]
        assert torch.count_nonzero(change[width : 2 * width]) == 0
        torch.testing.assert_close(change[:width], tensor[:width], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(change[2 * width :], tensor[width:], atol=1e-6, rtol=1e-5)


def test_files_hold_exactly_the_tensors_and_come_back_bit_for_bit(tmp_path):
    delta = BiasDelta.from_model(tuned("roberta-sequence"))
    delta.save_pretrained(tmp_path)
    again = BiasDelta.from_pretrained(str(tmp_path))
    assert again.tensors().keys() == delta.tensors().keys()
    assert all(torch.equal(tensor, delta.tensors()[key]) for key, tensor in again.tensors().items())
    assert again.digest == delta.digest
    assert {path.name for path in tmp_path.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_gets_the_sum_rounded_once(dtype):
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    base = randomize_(build("bert-sequence"))
    stock = copy.deepcopy(base).to(dtype)
    half = snapshot(stock)
    delta.apply_(stock)
    for name, tensor in delta.items():
        assert torch.equal(stock.get_parameter(name), (half[name].float() + tensor).to(dtype))
    assert stock.classifier.weight.dtype == dtype
    delta.remove_(stock)
    assert_unchanged(stock, half)


# --- applying and removing ---


def test_several_deltas_add_up_and_leave_in_any_order():
    first = BiasDelta.from_model(tuned("bert-sequence", seed=1))
    second = BiasDelta.from_model(tuned("bert-sequence", seed=2))
    stock = randomize_(build("bert-sequence"))
    before = snapshot(stock)
    first.apply_(stock)
    only_first = snapshot(stock)
    second.apply_(stock)
    name = next(iter(first))
    assert torch.equal(stock.get_parameter(name), before[name] + first[name] + second[name])
    assert torch.equal(stock.classifier.weight, second.head["classifier.weight"])
    second.remove_(stock)
    assert_unchanged(stock, only_first)
    second.apply_(stock)
    first.remove_(stock)
    assert torch.equal(stock.get_parameter(name), before[name] + second[name])
    second.remove_(stock)
    assert_unchanged(stock, before)


def test_removing_what_was_not_applied_is_an_error():
    delta, other = (BiasDelta.from_model(tuned("bert-sequence", seed=seed)) for seed in (1, 2))
    stock = randomize_(build("bert-sequence"))
    with pytest.raises(DeltaMismatchError, match="not applied"):
        delta.remove_(stock)
    delta.apply_(stock)
    with pytest.raises(DeltaMismatchError, match="not applied"):
        other.remove_(stock)


def test_a_head_of_another_size_is_rebuilt_with_its_labels():
    labels = {0: "no", 1: "perhaps", 2: "yes", 3: "certainly"}
    model = tuned("bert-sequence", BitFitConfig(num_labels=4, id2label=labels))
    stock = randomize_(build("bert-sequence"))
    own = dict(stock.config.id2label)
    delta = BiasDelta.from_model(model)
    delta.apply_(stock)
    assert stock.config.id2label == labels
    assert stock.config.num_labels == stock.num_labels == 4
    assert_close(outputs(stock, "bert-sequence"), outputs(model, "bert-sequence"))
    delta.remove_(stock)
    assert stock.config.id2label == own
    assert stock.num_labels == len(own)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("bert-backbone", BaseModelMismatchError),
        ("roberta-sequence", BaseModelMismatchError),
        ("mlp", BaseModelMismatchError),
    ],
)
def test_another_model_is_refused_before_it_is_touched(target, error):
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    stock = randomize_(build(find(target)))
    before = snapshot(stock)
    with pytest.raises(error):
        delta.apply_(stock)
    assert_unchanged(stock, before)


def test_a_head_that_the_model_lacks_is_one_clear_error():
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    stock = randomize_(build("bert-sequence"))
    delta.head["extra.weight"] = torch.zeros(2)
    delta.config.modules_to_save = ["classifier", "extra"]
    before = snapshot(stock)
    with pytest.raises(DeltaMismatchError, match=r"extra has no place"):
        delta.apply_(stock)
    assert_unchanged(stock, before)


def test_a_mismatching_base_can_be_overridden():
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    other = randomize_(build("bert-sequence"), seed=7)
    before = snapshot(other)
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        delta.apply_(other)
    assert_unchanged(other, before)
    with pytest.warns(UserWarning, match="tensors differ"):
        delta.apply_(other, on_base_mismatch="warn")
    name = next(iter(delta))
    assert torch.equal(other.get_parameter(name), before[name] + delta[name])


def test_a_model_with_adapters_is_refused():
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    with pytest.raises(DeltaMismatchError, match="injected"):
        delta.apply_(tuned("bert-sequence"))


def test_a_bias_added_to_a_norm_cannot_be_written():
    config = BitFitConfig(bias_terms=["attention_layernorm", "query"], add_missing_biases=True)
    delta = BiasDelta.from_model(tuned(find("llama-causal"), config))
    stock = randomize_(build(find("llama-causal")))
    before = snapshot(stock)
    with pytest.raises(MergeError, match="computes without a bias"):
        delta.apply_(stock)
    assert_unchanged(stock, before)


# --- other sources ---


def test_a_model_without_the_adapter_is_refused():
    with pytest.raises(AdapterNameError, match="no BitFit adapter"):
        BiasDelta.from_model(build("bert-sequence"))
    with pytest.raises(AdapterNameError, match="'other'"):
        BiasDelta.from_model(tuned("bert-sequence"), "other")


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal", "vit-image", "deberta-sequence"])
def test_a_checkpoint_tuned_by_other_code_gives_its_delta(name):
    name = find(name)
    base = randomize_(build(name))
    other = copy.deepcopy(base)
    delta = BiasDelta.from_model(tuned(name, std=1e-3))
    delta.apply_(other)
    extracted = BiasDelta.from_models(base, other)
    assert set(extracted) == set(delta)
    rebuilt = copy.deepcopy(base)
    extracted.apply_(rebuilt)
    for key in delta:
        wanted, got = other.get_parameter(key), rebuilt.get_parameter(key)
        half_ulp = torch.finfo(torch.float32).eps * wanted.abs().clamp(min=1e-30)
        assert ((got - wanted).abs() <= half_ulp).all()
    largest = max((other.get_parameter(key) - rebuilt.get_parameter(key)).abs().max().item() for key in delta)
    assert extracted.extraction_error == pytest.approx(largest, abs=1e-12)
    assert all(torch.equal(extracted.head[key], tensor) for key, tensor in delta.head.items())


def test_checkpoints_whose_weights_differ_have_no_bias_delta():
    base = randomize_(build("bert-sequence"))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    with pytest.raises(DeltaMismatchError, match=r"output\.dense\.weight differs by"):
        BiasDelta.from_models(base, other)


@pytest.mark.parametrize("size", [1, 16, 64])
def test_checkpoints_whose_biases_have_other_shapes_have_no_bias_delta(size):
    """Only the bias differs, and one of a single value would be spread over all of them."""
    base = randomize_(build("bert-sequence"))
    other = copy.deepcopy(base)
    other.bert.pooler.dense.bias = torch.nn.Parameter(torch.zeros(size))
    for before, after, sizes in ((base, other, (size, 32)), (other, base, (32, size))):
        with pytest.raises(DeltaMismatchError) as caught:
            BiasDelta.from_models(before, after)
        assert f"bert.pooler.dense.bias has shape [{sizes[0]}], the base's [{sizes[1]}]" in str(caught.value)


# --- arithmetic ---


def test_arithmetic_is_that_of_the_tensors():
    a, b = (BiasDelta.from_model(tuned("bert-sequence", seed=seed)) for seed in (1, 2))
    for name in a:
        assert torch.equal((a + b)[name], a[name] + b[name])
        assert torch.equal((a - b)[name], a[name] - b[name])
        assert torch.equal((a * 0.5)[name], a[name] * 0.5)
        assert torch.equal((2 * a)[name], a[name] * 2)
        assert torch.equal((-a)[name], -a[name])
    with pytest.raises(TypeError):
        a * "2"
    with pytest.raises(TypeError):
        a + 1


def test_heads_are_kept_only_where_that_has_a_meaning():
    a, b = (BiasDelta.from_model(tuned("bert-sequence", seed=seed)) for seed in (1, 2))
    assert (3 * a).head.keys() == a.head.keys()
    both = a + b
    assert both.head == {}
    assert both.config.num_labels is None
    assert torch.equal((a + a).head["classifier.weight"], a.head["classifier.weight"])
    headless = a - b
    kept = headless + a
    assert torch.equal(kept.head["classifier.weight"], a.head["classifier.weight"])
    assert kept.config.num_labels == a.config.num_labels
    stock = randomize_(build("bert-sequence"))
    before = stock.classifier.weight.clone()
    headless.apply_(stock)
    assert torch.equal(stock.classifier.weight, before)


def test_deltas_of_different_terms_add_to_their_union(tmp_path):
    a = BiasDelta.from_model(tuned("bert-sequence", BitFitConfig(bias_terms="query"), seed=1))
    b = BiasDelta.from_model(tuned("bert-sequence", BitFitConfig(bias_terms="intermediate"), seed=2))
    total = a - b
    assert set(total) == set(a) | set(b)
    assert total.config.bias_terms == ["query", "intermediate"]
    total.save_pretrained(tmp_path)
    stock = randomize_(build("bert-sequence"))
    before = snapshot(stock)
    load_delta(stock, tmp_path)
    for name in b:
        assert torch.equal(stock.get_parameter(name), before[name] - b[name])


@pytest.mark.parametrize("order", ["query first", "query last"])
def test_a_sum_checks_the_base_for_the_biases_of_both(order, tmp_path):
    query, other = (
        BiasDelta.from_model(tuned("bert-sequence", BitFitConfig(bias_terms=term)))
        for term in ("query", "intermediate")
    )
    total = query + other if order == "query first" else other + query
    prints = [delta.config.base_fingerprint["tensors"] for delta in (query, other, total)]
    assert prints[0].keys().isdisjoint(prints[1])
    assert prints[2] == prints[0] | prints[1]
    total.save_pretrained(tmp_path)
    for name in (next(iter(query)), next(iter(other))):
        stock = randomize_(build("bert-sequence"))
        with torch.no_grad():
            stock.get_parameter(name)[0] += 1e-3
        with pytest.raises(BaseModelMismatchError, match=f"{name} differs"):
            load_delta(stock, tmp_path)
    load_delta(randomize_(build("bert-sequence")), tmp_path)


def test_deltas_of_different_bases_or_slices_cannot_be_added():
    a = BiasDelta.from_model(tuned("bert-sequence"))
    other = get_peft_model(randomize_(build("bert-sequence"), seed=9), BitFitConfig())
    with pytest.raises(BaseModelMismatchError, match="different bases"):
        a + BiasDelta.from_model(other)
    query, value = (
        BiasDelta.from_model(tuned(find("gpt2-causal"), BitFitConfig(bias_terms=term))) for term in ("query", "value")
    )
    with pytest.raises(DeltaMismatchError, match="slices"):
        query + value


# --- what a delta refuses to be made of ---


def test_tensors_have_to_be_those_of_the_configuration():
    delta = BiasDelta.from_model(tuned("bert-sequence"))
    tensors, name = dict(delta), next(iter(delta))

    def made(**changes):
        return BiasDelta(**{"tensors": tensors, "config": delta.config, "head": delta.head, **changes})

    made()
    with pytest.raises(DeltaFormatError, match="is missing"):
        made(tensors={key: value for key, value in tensors.items() if key != name})
    with pytest.raises(DeltaFormatError, match="other is not expected"):
        made(tensors={**tensors, "other": torch.zeros(3)})
    with pytest.raises(DeltaFormatError, match="has shape"):
        made(tensors={**tensors, name: torch.zeros(3)})
    with pytest.raises(DeltaFormatError, match="float16 instead of float32"):
        made(tensors={**tensors, name: tensors[name].half()})
    with pytest.raises(DeltaFormatError, match="NaN or Inf"):
        made(tensors={**tensors, name: tensors[name] * float("nan")})
    with pytest.raises(DeltaFormatError, match="the head's classifier is missing"):
        made(head={})
    with pytest.raises(DeltaFormatError, match=r"pooler\.weight is not expected"):
        made(head={**delta.head, "pooler.weight": torch.zeros(3)})
