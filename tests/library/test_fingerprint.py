"""Is this the base? Exact within one dtype, exact at the lower of two precisions, tolerant of quantized weights."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build, randomize_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertForSequenceClassification, BertModel
from tuner_tester import fill_, state, tune

from bitfit_hf import BitFitConfig, base_mismatch
from bitfit_hf.errors import BaseModelMismatchError, ConfigError, DeltaFormatError
from bitfit_hf.storage.fingerprint import (
    QUANTIZED,
    TensorPrint,
    check_base,
    decode,
    differences,
    differing,
    fingerprint,
    plain_fingerprint,
)
from bitfit_hf.terms import find_biases, select_biases


def taken(model: nn.Module, **kwargs) -> dict:
    """The fingerprint of a model as it comes back from a file."""
    found = fingerprint(model, select_biases(model, **kwargs))
    assert found is not None
    return json.loads(json.dumps(found))


@pytest.fixture
def bert() -> nn.Module:
    return randomize_(build("bert-sequence"))


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES.values() if not a.bias_free])
def test_a_model_is_its_own_base(name):
    model = build(name)
    expected = taken(model, modules_to_save=[] if name == "traps" else None)
    assert differences(model, expected) == []
    assert differences(build(name), expected) == []
    with torch.no_grad():
        last = find_biases(model)[-1]
        model.get_submodule(last.module)._parameters[last.parameter].view(-1)[-1] += 1e-6
    assert len(differences(model, expected)) == 1


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES.values() if a.bias_free])
def test_added_biases_are_recognised_by_the_weights(name):
    model = build(name)
    expected = taken(model, add_missing_biases=True)
    assert expected["tensors"]
    assert all(tensor.endswith("weight") for tensor in expected["tensors"])
    assert differences(model, expected) == []
    assert len(differences(randomize_(build(name), std=1e-3), expected)) == len(expected["tensors"])


def test_it_is_taken_from_the_base_under_the_adapters(bert):
    expected = taken(bert)
    model = fill_(tune(ARCHITECTURES["bert-sequence"]))
    own = taken(model)
    assert own == taken(build("bert-sequence"))
    model.merge_adapter()
    assert taken(model) == own
    assert differences(model, own) == []
    assert differences(model, expected)


def test_every_single_value_of_a_bias_counts(bert):
    expected = taken(bert)
    vector = bert.bert.encoder.layer[1].intermediate.dense.bias
    for place in range(vector.numel()):
        with torch.no_grad():
            kept = vector[place].item()
            vector[place] += 1e-4
            (problem,) = differences(bert, expected)
            assert problem.startswith("bert.encoder.layer.1.intermediate.dense.bias differs")
            vector[place] = kept
    assert differences(bert, expected) == []


def test_a_sample_of_the_weights_counts(bert):
    expected = taken(bert)
    weight = bert.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight.mul_(1 + 1e-6)
    (problem,) = differences(bert, expected)
    assert problem.startswith("bert.encoder.layer.0.attention.self.query.weight differs by")


def test_only_what_is_tuned_counts(bert):
    expected = taken(bert, bias_terms="query")
    assert len(expected["tensors"]) == 4
    with torch.no_grad():
        bert.bert.pooler.dense.bias.add_(1)
        bert.classifier.weight.add_(1)
    assert differences(bert, expected) == []


def test_zero_biases_say_nothing_but_the_weights_do():
    first, second = build("bert-sequence", seed=1), build("bert-sequence", seed=2)
    for model in (first, second):
        nn.init.zeros_(model.bert.pooler.dense.bias)
        assert not any(bias.any() for name, bias in model.named_parameters() if name.endswith("bias"))
    problems = differences(second, taken(first))
    assert problems
    assert all("weight" in problem for problem in problems)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("there", DTYPES, ids=str)
@pytest.mark.parametrize("here", DTYPES, ids=str)
def test_dtypes_of_one_checkpoint_agree(there, here, bert):
    bert.to(torch.float32)
    expected = taken(copy_to(bert, there))
    assert differences(copy_to(bert, here), expected) == []
    other = randomize_(copy_to(bert, torch.float32), seed=8, std=0.02)
    problems = differences(copy_to(other, here), expected)
    assert len(problems) == len(expected["tensors"])


def copy_to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    copy = build("bert-sequence")
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


def test_a_rounded_sibling_is_told_apart_at_its_own_precision(bert):
    """One unit of bfloat16 in one bias is noticed between a float32 and a bfloat16 load."""
    expected = taken(bert)
    half = copy_to(bert, torch.bfloat16)
    with torch.no_grad():
        half.bert.pooler.dense.bias[3] *= 1 + 2**-7
    assert [problem.split()[0] for problem in differences(half, expected)] == ["bert.pooler.dense.bias"]


def test_a_fully_fine_tuned_sibling_is_refused():
    arch = ARCHITECTURES["bert-sequence"]
    model = randomize_(arch.build())
    expected = taken(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model(**arch.inputs(), **arch.labels()).loss.backward()
    optimizer.step()
    assert differences(model, expected)
    for dtype in (torch.bfloat16, torch.float16):
        optimizer.step()
        assert differences(copy_to(model, dtype), expected)


def test_quantized_weights_are_compared_by_a_tolerance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 32, generator=generator)
    original = TensorPrint.of(weight, whole=False)
    scale = weight.abs().max() / 7  # 4 bits, one block: coarser than any format in use
    quantized = TensorPrint.of((weight / scale).round() * scale, whole=False, dtype=QUANTIZED)
    assert original.difference(quantized) is None
    assert quantized.difference(original) is None
    other = TensorPrint.of(torch.randn(40, 32, generator=generator), whole=False, dtype=QUANTIZED)
    assert "after quantization" in original.difference(other)


def test_another_shape_is_named(bert):
    expected = taken(bert)
    bert.bert.pooler.dense = nn.Linear(32, 48)
    problems = differences(bert, expected)
    assert "bert.pooler.dense.bias has shape [48] instead of [32]" in problems


def test_what_is_missing_is_named(bert):
    expected = taken(bert)
    assert any("does not exist" in problem for problem in differences(build("roberta-sequence"), expected))
    bert.bert.pooler.dense.bias = None
    assert differences(bert, expected) == ["bert.pooler.dense.bias does not exist in this model"]


def test_values_that_are_not_at_hand_are_not_compared(bert):
    expected = taken(bert)
    with torch.device("meta"):
        empty = build("bert-sequence").to("meta")
    assert fingerprint(empty, select_biases(empty)) is None
    assert differences(empty, expected) == []


def test_offloaded_values_are_compared(bert):
    from accelerate import cpu_offload

    expected = taken(bert)
    cpu_offload(bert, execution_device="cpu")
    assert all(parameter.is_meta for parameter in bert.bert.parameters())
    assert differences(bert, expected) == []
    assert taken(bert) == expected
    other = randomize_(build("bert-sequence"), seed=4)
    cpu_offload(other, execution_device="cpu")
    assert len(differences(other, expected)) == len(expected["tensors"])


@pytest.mark.parametrize("there", DTYPES, ids=str)
def test_two_fingerprints_of_one_checkpoint_agree(there, bert):
    expected, other = taken(bert), taken(copy_to(bert, there))
    assert differing(expected, other) == ([], True)
    changed = copy_to(bert, there)
    with torch.no_grad():
        changed.bert.pooler.dense.bias[0] += 1
    assert differing(expected, taken(changed)) == (["bert.pooler.dense.bias"], True)
    assert differing(taken(bert, bias_terms="query"), taken(bert, bias_terms="key")) == ([], False)


# What is done about it -----------------------------------------------------------------------------------------------


@pytest.fixture
def other(bert) -> tuple[nn.Module, dict]:
    return randomize_(build("bert-sequence"), seed=5), taken(bert)


def test_a_mismatch_raises_and_names_tensors_sizes_and_remedies(other):
    model, expected = other
    before = state(model)
    with pytest.raises(BaseModelMismatchError) as caught:
        check_base(model, expected, delta_base="user/base")
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    for part in ("user/base", "36 of 36 tensors", "differs by", "and 28 more", "on_base_mismatch"):
        assert part in message, part
    assert state(model) == before


def test_policies(other):
    model, expected = other
    with pytest.warns(UserWarning, match="36 of 36"):
        check_base(model, expected, delta_base=None, on_mismatch="warn")
    check_base(model, expected, delta_base=None, on_mismatch="ignore")
    with base_mismatch("ignore"):
        check_base(model, expected, delta_base=None)
        with pytest.raises(BaseModelMismatchError):
            check_base(model, expected, delta_base=None, on_mismatch="raise")
        with base_mismatch("raise"), pytest.raises(BaseModelMismatchError):
            check_base(model, expected, delta_base=None)
        check_base(model, expected, delta_base=None)
    with pytest.raises(BaseModelMismatchError):
        check_base(model, expected, delta_base=None)


@pytest.mark.parametrize("missing", [None, {"format": 2, "tensors": {}}], ids=["null", "of no tensor"])
def test_a_check_that_cannot_be_made_is_a_warning(missing, bert):
    for policy in (None, "raise", "warn"):
        with pytest.warns(UserWarning, match=r"no `base_fingerprint`.*user/base.*not checked") as caught:
            check_base(bert, missing, delta_base="user/base", on_mismatch=policy)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(bert, missing, delta_base="user/base", on_mismatch="ignore")
        with base_mismatch("ignore"):
            check_base(bert, missing, delta_base="user/base")


def test_a_policy_ends_with_its_block_even_after_an_error(other):
    model, expected = other
    with pytest.raises(KeyError), base_mismatch("ignore"):
        raise KeyError
    with pytest.raises(BaseModelMismatchError):
        check_base(model, expected, delta_base=None)


def test_a_policy_is_the_thread_s_own(other):
    model, expected = other
    caught = []

    def check() -> None:
        try:
            check_base(model, expected, delta_base=None)
        except BaseModelMismatchError as error:
            caught.append(error)

    with base_mismatch("ignore"):
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    assert len(caught) == 1


@pytest.mark.parametrize("policy", ["Raise", "", None, 3, ["raise"]])
def test_an_unknown_policy_is_an_error(policy, other):
    model, expected = other
    with pytest.raises(ConfigError, match="one of"), base_mismatch(policy):
        pass
    if policy:
        with pytest.raises(ConfigError, match="one of"):
            check_base(model, expected, delta_base=None, on_mismatch=policy)


# The text ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=20),
    st.sampled_from(["float32", "bfloat16", "float16", "float64", QUANTIZED]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_print_survives_being_text(values, dtype, whole):
    print_ = TensorPrint.of(torch.tensor(values), whole=whole, dtype=dtype)
    assert TensorPrint.decode(print_.encode()) == print_
    assert json.loads(json.dumps(print_.encode())) == print_.encode()


DAMAGED = [
    {},
    {"format": 1},
    {"format": 3, "tensors": {}},
    {"format": True, "tensors": {}},
    {"format": "1", "tensors": {}},
    {"format": 1, "tensors": []},
    {"format": 1, "tensors": {"a": 3}},
    {"format": 1, "tensors": {"a": None}},
    {"format": 1, "tensors": {"a": ""}},
    {"format": 1, "tensors": {"a": "float32 3 - AAA"}},
    {"format": 1, "tensors": {"a": "float32 3 - !!!!"}},
    {"format": 1, "tensors": {"a": "float32 3 - AAAAAAA="}},
    {"format": 1, "tensors": {"a": "int3 3 - -"}},
    {"format": 1, "tensors": {"a": "float32 axb - -"}},
    {"format": 1, "tensors": {"a": "float32 -3 - -"}},
    {"format": 1, "tensors": {"a": "float32 3 abc -"}},
    {"format": 1, "tensors": {"a": "float32 3 - -"}},
    {"format": 1, "tensors": {"a": "float32 1 - AAAAAAAAAAA="}},
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=str)
def test_a_damaged_fingerprint_is_an_error(damaged, bert):
    with pytest.raises(DeltaFormatError, match="fingerprint"):
        decode(damaged)
    with pytest.raises(DeltaFormatError, match="fingerprint"):
        check_base(bert, damaged, delta_base=None)


GOOD = {"dtype": "float32", "shape": [2], "sample": [0.5, -1.0]}
DIGESTS = dict.fromkeys(("float32", "bfloat16", "float16"), "0123456789ab")
WRONG: list[Any] = [
    3,
    None,
    [],
    {},
    "float32 2 - AAAAAAAAAAA=",
    *({key: value for key, value in GOOD.items() if key != missing} for missing in GOOD),
    *(GOOD | {"dtype": value} for value in ("int3", 3, None, ["float32"])),
    *(GOOD | {"shape": value} for value in ([-2], ["2"], [2.0], [True], 2, None, [3], [2, 2])),
    *(GOOD | {"sample": value} for value in ([0.5], [0.5, 1, 2], ["x", 1], [None, 1], [[1], 1], 3, [10**400, 1])),
    *(
        GOOD | {"sha256": value}
        for value in ("0123456789ab", [1], {"float32": "0123456789ab"}, {**DIGESTS, "int8": ""})
    ),
    *(GOOD | {"sha256": DIGESTS | {"float32": value}} for value in (3, None, "", "0123456789AB", "0123456789abc")),
]


def test_plain_values_are_read():
    for values in (GOOD, GOOD | {"sha256": DIGESTS}, GOOD | {"sample": ["nan", "-inf"]}, GOOD | {"of_the_future": 1}):
        assert decode({"format": 2, "tensors": {"a": values}})["a"].shape == (2,)


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_damaged_plain_values_are_an_error(values, bert):
    damaged = {"format": 2, "tensors": {"bert.pooler.dense.bias": values}}
    with pytest.raises(DeltaFormatError, match=r"the fingerprint of 'bert.pooler.dense.bias' is damaged"):
        check_base(bert, damaged, delta_base=None)


def test_the_packed_format_of_development_versions_says_the_same(bert):
    folder = Path(__file__).parent / "regression" / "0.1.0.dev0"
    old = json.loads((folder / "delta" / "adapter_config.json").read_text())["base_fingerprint"]
    assert old["format"] == 1
    assert all(isinstance(text, str) for text in old["tensors"].values())
    plain = plain_fingerprint(old)
    assert plain["format"] == 2
    assert decode(plain) == decode(old)
    assert plain_fingerprint(plain) == plain
    base = BertModel.from_pretrained(folder / "base")
    model = BertForSequenceClassification(base.config)
    model.bert = base
    assert plain == taken(model, with_untrained_pooler=False)  # as it was then
    assert BitFitConfig(base_fingerprint=old).base_fingerprint == plain


@given(st.text(max_size=60) | st.from_regex(r"(float32|quantized) [0-9x]{1,9} [0-9a-f,-]{1,40} [A-Za-z0-9+/=-]{1,30}"))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_print_or_our_error(text):
    try:
        prints = decode({"format": 1, "tensors": {"a": text}})
    except DeltaFormatError:
        return
    (print_,) = prints.values()
    print_.difference(TensorPrint.of(torch.zeros(print_.shape if len(print_.shape) < 3 else (1,)), whole=True))


def test_a_fingerprint_is_small():
    model = build("bert-sequence")
    size = len(json.dumps(taken(model)))
    biases = len(find_biases(model))
    assert size < 500 * biases  # a bias and a weight, about 50 bytes each of which are the name


def test_a_fingerprint_is_plain_json(bert):
    """Numbers and hexadecimal digests, to be read without this library."""
    expected = taken(bert)
    bias = bert.bert.pooler.dense.bias
    found = expected["tensors"]["bert.pooler.dense.bias"]
    assert found.keys() == {"dtype", "shape", "sample", "sha256"}
    assert (found["dtype"], found["shape"]) == ("float32", [32])
    places = [i * 31 // 7 for i in range(8)]
    assert torch.equal(torch.tensor(found["sample"], dtype=torch.float32), bias[places])
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        data = bias.detach().to(dtype).view(torch.uint8).numpy().tobytes()
        assert found["sha256"][name] == hashlib.sha256(data).hexdigest()[:12]
    assert expected["tensors"]["bert.pooler.dense.weight"].keys() == {"dtype", "shape", "sample"}


def test_the_configuration_keeps_the_fingerprint_of_a_new_adapter():
    model = tune(ARCHITECTURES["bert-sequence"])
    config = model.peft_config["default"]
    assert isinstance(config, BitFitConfig)
    assert config.base_fingerprint == taken(build("bert-sequence"))
