"""What a configuration takes, refuses and keeps, as an argument and as an untrusted file."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from architectures import build
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from bitfit_hf import BiasDelta, BitFitConfig, BitFitModel
from bitfit_hf.errors import BitFitError, ConfigError, RegistrationError, UnknownTermError
from bitfit_hf.storage.files import digest
from bitfit_hf.terms import SYMBOLS, TERMS
from bitfit_hf.training_run import TrainingRun
from bitfit_hf.tuner import registration
from bitfit_hf.tuner.lifecycle import about_to_save, awaits_tensors, restore_given_base, tensors_loaded


def through_a_file(config: BitFitConfig, folder) -> BitFitConfig:
    config.save_pretrained(str(folder))
    loaded = PeftConfig.from_pretrained(str(folder))
    assert type(loaded) is BitFitConfig
    return loaded


# Arguments -----------------------------------------------------------------------------------------------------------


def test_everything_has_a_default():
    config = BitFitConfig()
    assert config.bias_terms == "all"
    assert config.task_type is None
    assert not awaits_tensors(config)
    assert config.peft_type == "BITFIT"
    assert not config.is_prompt_learning


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("all", "all"),
        (["all"], list(TERMS)),
        ("query", ["query"]),
        ("b_q", ["query"]),
        ("query+intermediate", ["query", "intermediate"]),
        (["b_m2", "b_q"], ["query", "intermediate"]),
        (("value", "query", "b_v"), ["query", "value"]),
        (list(SYMBOLS.values()), list(TERMS)),
    ],
)
def test_terms_are_kept_by_their_names(given, kept, tmp_path):
    config = BitFitConfig(bias_terms=given)
    assert config.bias_terms == kept
    assert through_a_file(config, tmp_path).bias_terms == kept


def test_an_unknown_term_names_the_valid_ones():
    with pytest.raises(UnknownTermError, match=r"querry.*query") as caught:
        BitFitConfig(bias_terms=["value", "querry"])
    assert isinstance(caught.value, ValueError)


def test_sets_tuples_and_ranges_become_lists(tmp_path):
    config = BitFitConfig(
        target_modules={"b", "a"}, exclude_modules=("x",), modules_to_save=("m",), layers_to_transform=range(2)
    )
    assert (config.target_modules, config.exclude_modules) == (["a", "b"], ["x"])
    assert (config.modules_to_save, config.layers_to_transform) == (["m"], [0, 1])
    loaded = through_a_file(config, tmp_path)
    assert (loaded.target_modules, loaded.layers_to_transform) == (["a", "b"], [0, 1])


WRONG = {
    "target_modules": [3, [3], {"a": 1}, True],
    "exclude_modules": [3, ["a", None]],
    "modules_to_save": ["classifier", [1], 3],
    "layers_to_transform": ["0", [0.5], True, [True], 1.0],
    "add_missing_biases": ["yes", 1, 0],
    "inference_mode": ["no", 3],
    "task_type": ["SEQ", 3, ["SEQ_CLS"], {}],
    "base_model_name_or_path": [3, ["bert"]],
    "revision": [3, {}],
    "num_labels": [0, -1, 2.0, "2", True, 10**12],
    "id2label": [["a"], {"x": "a"}, {"0": 1}, {"-1": "a"}, "a"],
    "problem_type": ["classification", 3, ["regression"]],
    "base_fingerprint": ["x", [1]],
    "bias_layout": ["x", {"a": 1}],
    "weights_digest": [3],
    "auto_mapping": ["x", 3],
    "bitfit_version": [3, [0, 1]],
    "bias_terms": [3, {"query": 1}, [3], None, [None], []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_of_the_wrong_type_is_named(name, value):
    with pytest.raises(BitFitError, match=name) as caught:
        BitFitConfig(**{name: value})
    assert isinstance(caught.value, (ValueError, TypeError))


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        BitFitConfig(target_modules=3, num_labels=0, add_missing_biases="x")
    assert all(name in str(caught.value) for name in ("target_modules", "num_labels", "add_missing_biases"))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", TaskType.TOKEN_CLS, "CAUSAL_LM"])
def test_task_types_are_peft_s(task_type, tmp_path):
    loaded = through_a_file(BitFitConfig(task_type=task_type), tmp_path)
    assert loaded.task_type == task_type


# Labels --------------------------------------------------------------------------------------------------------------


def test_label_numbers_are_integers_again_after_a_file(tmp_path):
    names = {index: f"name {index}" for index in range(12)}  # as text, "10" would come before "2"
    loaded = through_a_file(BitFitConfig(num_labels=12, id2label=names), tmp_path)
    assert loaded.id2label == names
    assert list(loaded.id2label) == list(names)
    assert loaded.num_labels == 12


def test_names_say_how_many_labels_there_are():
    assert BitFitConfig(id2label={"1": "b", "0": "a"}).num_labels == 2


@pytest.mark.parametrize(
    ("names", "number"), [({0: "a"}, 2), ({1: "a", 2: "b"}, 2), ({0: "a", 5: "b"}, None), ({}, 1), ({}, None)]
)
def test_names_that_do_not_fit_the_number_are_refused(names, number):
    with pytest.raises(ConfigError, match=r"id2label|num_labels"):
        BitFitConfig(id2label=names, num_labels=number)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_holds_plain_json(tmp_path):
    BitFitConfig(bias_terms="b_q", target_modules={"a"}, num_labels=2).save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "BITFIT"
    assert values["bias_terms"] == ["query"]
    assert isinstance(values["bitfit_version"], str)
    assert not any(name.startswith("_") or name == "pending" for name in values)


KEYS = {
    *("peft_type", "peft_version", "bitfit_version", "task_type", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "base_fingerprint", "base_num_parameters"),
    *("bias_terms", "target_modules", "exclude_modules", "layers_to_transform", "add_missing_biases", "bias_layout"),
    "train_untrained_pooler",
    *("modules_to_save", "num_labels", "id2label", "problem_type", "added_tokens", "base_vocab_size"),
    *("weights_digest", "run"),
}


def test_a_file_holds_exactly_these_keys(tmp_path):
    """A new field is named here, is optional, and `tests/library/regression/` gets a delta that has it."""
    BitFitConfig().save_pretrained(str(tmp_path / "new"))
    tuned = get_peft_model(build("bert-sequence"), BitFitConfig())
    tuned.save_pretrained(tmp_path / "stock")
    BiasDelta.from_model(tuned).save_pretrained(tmp_path / "ours")
    held = build("bert-sequence")
    held.add_adapter(BitFitConfig())
    held.save_pretrained(tmp_path / "in place")
    for way in ("new", "stock", "ours", "in place"):
        assert json.loads((tmp_path / way / "adapter_config.json").read_text()).keys() == KEYS, way
    old = Path(__file__).parent / "regression"
    files = list(old.glob("*/delta/adapter_config.json"))
    assert files
    assert all(json.loads(file.read_text()).keys() <= KEYS for file in files)


def test_fields_of_a_later_version_are_ignored_with_a_warning(tmp_path):
    BitFitConfig(bias_terms="query").save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_the_future": {"a": 1}}))
    with pytest.warns(UserWarning, match="of_the_future"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.bias_terms == ["query"]


def test_what_came_from_a_file_waits_for_its_tensors(tmp_path):
    loaded = through_a_file(BitFitConfig(), tmp_path)
    assert awaits_tensors(loaded)
    tensors_loaded(loaded)
    assert not awaits_tensors(loaded)
    assert loaded.weights_digest is None


def test_the_name_of_the_base_that_was_given_wins_over_the_path():
    config = BitFitConfig(base_model_name_or_path="user/base")
    config.base_model_name_or_path = "/home/somebody/base"  # as get_peft_model does
    restore_given_base(config)
    assert config.base_model_name_or_path == "user/base"
    config = BitFitConfig()
    config.base_model_name_or_path = "/home/somebody/base"
    restore_given_base(config)
    assert config.base_model_name_or_path == "/home/somebody/base"


def test_copies_are_configurations_of_their_own():
    config = BitFitConfig(id2label={0: "a", 1: "b"}, base_model_name_or_path="user/base")
    other = copy.deepcopy(config)
    assert other == config
    other.id2label[0] = "z"
    assert config.id2label[0] == "a"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_belongs_to_the_same_tensors(copied):
    values = BitFitConfig(
        run=TrainingRun(steps=3), weights_digest="sha256:00", base_model_name_or_path="a/b"
    ).to_dict()
    config = copied(BitFitConfig.from_peft_type(**values))
    about_to_save(config, {"a.bitfit_bias": torch.ones(2)})
    assert config.run is None  # it was read with other tensors
    config.base_model_name_or_path = "/home/somebody/base"
    saved = copied(config)
    restore_given_base(saved)
    assert saved.base_model_name_or_path == "a/b"
    assert saved.to_dict()["weights_digest"] == digest({"a.bitfit_bias": torch.ones(2)})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(set(WRONG) | {"peft_version", "run", "base_num_parameters"})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
@example({"id2label": {"0": "a"}, "num_labels": 10**9})
@example({"id2label": {"٣": "a"}})
@example({"layers_to_transform": 10**30})
@example({"num_labels": 3, "id2label": {}})
def test_any_json_is_a_configuration_or_one_of_our_errors(tmp_path, values):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BITFIT", **values}))
    try:
        config = PeftConfig.from_pretrained(str(tmp_path))
    except BitFitError:
        return
    assert isinstance(config, BitFitConfig)
    json.dumps(config.to_dict())


# Registration --------------------------------------------------------------------------------------------------------


def test_the_method_is_known_to_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BITFIT"] is BitFitConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["BITFIT"] is BitFitModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["BITFIT"] == "bitfit_"
    registration.register()  # a second time is harmless
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BITFIT"] is BitFitConfig


def test_a_bitfit_of_peft_s_own_is_an_error(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "BITFIT", PeftConfig)
    with pytest.raises(RegistrationError, match=r"peft .* BITFIT of its own .*bitfit_hf"):
        registration.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BITFIT"] is PeftConfig
