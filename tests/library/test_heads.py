"""Which modules are the new task head, class by class, against lists written down from the modeling files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HEAD_KINDS, LABELS, build, shared, snapshot
from expected_heads import EXPECTED
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from bitfit_hf.errors import BitFitError, NoMatchError, UnknownHeadError
from bitfit_hf.terms import SavedNames, find_biases, head_modules, part_of, part_tensors

# More classes of the same families, built with their default config and without memory.
MORE_CLASSES: dict[str, list[str]] = {
    "RobertaForQuestionAnswering": ["qa_outputs"],
    "RobertaForMultipleChoice": ["classifier"],
    "XLMRobertaForTokenClassification": ["classifier"],
    "DistilBertForTokenClassification": ["classifier"],
    "DistilBertForQuestionAnswering": ["qa_outputs"],
    "DistilBertForMultipleChoice": ["pre_classifier", "classifier"],
    "ElectraForTokenClassification": ["classifier"],
    "ElectraForQuestionAnswering": ["qa_outputs"],
    "ElectraForMultipleChoice": ["sequence_summary.summary", "classifier"],
    "AlbertForTokenClassification": ["classifier"],
    "AlbertForQuestionAnswering": ["qa_outputs"],
    "AlbertForMultipleChoice": ["classifier"],
    "DebertaForTokenClassification": ["classifier"],
    "DebertaV2ForQuestionAnswering": ["qa_outputs"],
    "DebertaV2ForMultipleChoice": ["pooler.dense", "classifier"],
    "MPNetForQuestionAnswering": ["qa_outputs"],
    "MPNetForMultipleChoice": ["classifier"],
    "ModernBertForTokenClassification": ["head.dense", "head.norm", "classifier"],
    "ModernBertForQuestionAnswering": ["head.dense", "head.norm", "classifier"],
    "GPT2ForTokenClassification": ["classifier"],
    "GPT2ForQuestionAnswering": ["qa_outputs"],
    "GPTNeoXForSequenceClassification": ["score"],
    "GPTNeoXForTokenClassification": ["classifier"],
    "GPTNeoXForQuestionAnswering": ["qa_outputs"],
    "OPTForSequenceClassification": ["score"],
    "OPTForQuestionAnswering": ["qa_outputs"],
    "BloomForSequenceClassification": ["score"],
    "BloomForTokenClassification": ["classifier"],
    "BartForQuestionAnswering": ["qa_outputs"],
    "XLNetForTokenClassification": ["classifier"],
    "XLNetForMultipleChoice": ["sequence_summary.summary", "logits_proj"],
    "XLNetForQuestionAnsweringSimple": ["qa_outputs"],
    "XLNetForQuestionAnswering": [
        "start_logits.dense",
        "end_logits.dense_0",
        "end_logits.LayerNorm",
        "end_logits.dense_1",
        "answer_class.dense_0",
        "answer_class.dense_1",
    ],
    "Wav2Vec2ForSequenceClassification": ["projector", "classifier"],
    "HubertForSequenceClassification": ["projector", "classifier"],
    "ASTForAudioClassification": ["classifier.layernorm", "classifier.dense"],
    "Dinov2ForImageClassification": ["classifier"],
    "DeiTForImageClassification": ["classifier"],
    "ElectraForMaskedLM": [],
    "AlbertForMaskedLM": [],
    "DebertaV2ForMaskedLM": [],
    "MPNetForMaskedLM": [],
    "XLNetLMHeadModel": [],
    "T5EncoderModel": [],
    "WhisperModel": [],
}


def meta(class_name: str) -> PreTrainedModel:
    model_class = getattr(transformers, class_name)
    config = model_class.config_class()
    for setting in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, setting):
            setattr(config, setting, 1)
    with torch.device("meta"):
        return model_class(config)


def test_every_architecture_has_an_expectation():
    assert EXPECTED.keys() == ARCHITECTURES.keys()
    assert {name for name, head in EXPECTED.items() if head} == {
        name for name, arch in ARCHITECTURES.items() if arch.kind in HEAD_KINDS
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_of_every_architecture(name):
    assert head_modules(shared(name)) == EXPECTED[name]


@pytest.mark.parametrize("class_name", MORE_CLASSES)
def test_head_of_more_classes(class_name):
    assert head_modules(meta(class_name)) == MORE_CLASSES[class_name]


@pytest.mark.parametrize("name", [name for name, head in EXPECTED.items() if head])
def test_head_leaves_hold_parameters_and_end_in_the_labels(name):
    """No leaf has a child with parameters of its own, and together they are all that is outside the backbone."""
    model, head = shared(name), head_modules(shared(name))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    held = set()
    for path in head:
        if path not in modules:
            assert path in parameters
            held.add(path)
            continue
        leaf = modules[path]
        assert not [child for child in leaf.children() if list(child.parameters())]
        held |= {f"{path}.{parameter}" for parameter, _ in leaf.named_parameters()}
    assert held
    outputs = model.get_submodule(head[-1])
    assert outputs.out_features == {"question": 2, "choice": 1}.get(ARCHITECTURES[name].kind, LABELS)
    if model.base_model is not model:
        backbone = {id(parameter) for parameter in model.base_model.parameters()}
        assert held == {key for key, parameter in model.named_parameters() if id(parameter) not in backbone}


@pytest.mark.parametrize("name", [name for name, head in EXPECTED.items() if head])
def test_head_and_biases_do_not_overlap(name):
    head = set(head_modules(shared(name)))
    assert not head & {bias.module for bias in find_biases(shared(name), add_missing_biases=True)}


# Parameters that lie in no module ------------------------------------------------------------------------------------

# By the modeling files, with `use_weighted_layer_sum=True` where a class has that option. Each class's whole head.
FREE_PARAMETERS: dict[str, list[str]] = {
    "Wav2Vec2ForSequenceClassification": ["layer_weights", "projector", "classifier"],
    "Wav2Vec2ForAudioFrameClassification": ["layer_weights", "classifier"],
    "HubertForSequenceClassification": ["layer_weights", "projector", "classifier"],
    "WavLMForSequenceClassification": ["layer_weights", "projector", "classifier"],
    "WhisperForAudioClassification": ["layer_weights", "projector", "classifier"],
    "TapasForQuestionAnswering": ["output_weights", "column_output_weights", "output_bias", "column_output_bias"],
    # In a part of the head that is no leaf.
    "BrosSpadeELForTokenClassification": ["entity_linker.dummy_node", "entity_linker.query", "entity_linker.key"],
}


def weighted(class_name: str) -> PreTrainedModel:
    model_class = getattr(transformers, class_name)
    config = model_class.config_class()
    for setting in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, setting):
            setattr(config, setting, 1)
    if hasattr(config, "use_weighted_layer_sum"):
        config.use_weighted_layer_sum = True
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize("class_name", FREE_PARAMETERS)
def test_a_head_s_parameters_outside_of_modules(class_name):
    model = weighted(class_name)
    head = head_modules(model)
    assert head == FREE_PARAMETERS[class_name]
    assert all(part_of(bias.name, head) is None for bias in find_biases(model))
    tensors = part_tensors(model, head)
    if model.base_model is not model:
        backbone = {id(parameter) for parameter in model.base_model.parameters()}
        assert tensors.keys() == {key for key, p in model.named_parameters() if id(p) not in backbone}
    assert all(tensor is dict(model.named_parameters())[name] for name, tensor in tensors.items())


def test_without_the_weighted_sum_there_is_no_such_part():
    assert head_modules(meta("Wav2Vec2ForSequenceClassification")) == ["projector", "classifier"]


class TaggerWithTransitions(PreTrainedModel):
    """The transitions between tags, as in a CRF, held by the model itself; and the embeddings under another name."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _supports_sdpa = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.transitions = nn.Parameter(torch.zeros(config.num_labels, config.num_labels))
        self.shared = self.bert.embeddings.word_embeddings.weight
        self.post_init()


class TaggerForTokenClassification(TaggerWithTransitions):
    """The same under a name that says that its head is new."""


def test_a_crf_s_transitions():
    config = ARCHITECTURES["bert-token"].build().config
    assert head_modules(TaggerForTokenClassification(config)) == ["transitions", "classifier"]
    with pytest.raises(UnknownHeadError, match="transitions, shared, bert, classifier"):
        head_modules(TaggerWithTransitions(config))
    named = head_modules(TaggerWithTransitions(config), modules_to_save=["classifier", "transitions"])
    assert named == ["transitions", "classifier"]


def test_modules_to_save_name_parameters_too():
    model = shared("vit-image")
    assert head_modules(model, modules_to_save=["cls_token"]) == ["vit.embeddings.cls_token", "classifier"]
    assert head_modules(model, modules_to_save=["vit.embeddings"]) == [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection",
        "classifier",
    ]
    with pytest.raises(NoMatchError, match=r"patch_embeddings\.projection\.weight"):
        head_modules(model, modules_to_save=["patch_embeddings.projection.weight"])


# The task type -------------------------------------------------------------------------------------------------------

TASK_TYPES = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "backbone": "FEATURE_EXTRACTION",
}


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch.kind in TASK_TYPES])
def test_the_task_type_agrees_with_the_class(name):
    """Naming the task changes nothing where the class already says it; an enum member is as good as its name."""
    from peft import TaskType

    task_type = TASK_TYPES[ARCHITECTURES[name].kind]
    assert head_modules(shared(name), task_type=task_type) == EXPECTED[name]
    assert head_modules(shared(name), task_type=TaskType(task_type)) == EXPECTED[name]


# modules_to_save -----------------------------------------------------------------------------------------------------


def test_modules_to_save_add_to_the_head_in_definition_order():
    assert head_modules(shared("bert-sequence"), modules_to_save=["pooler"]) == ["bert.pooler.dense", "classifier"]
    assert head_modules(shared("llama-causal_lm"), modules_to_save=["lm_head"]) == ["lm_head"]


def test_modules_to_save_expand_to_leaves():
    assert head_modules(shared("roberta-sequence"), modules_to_save=["classifier"]) == EXPECTED["roberta-sequence"]
    assert head_modules(shared("bert-sequence"), modules_to_save=["bert.encoder.layer.1.output"]) == [
        "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.1.output.LayerNorm",
        "classifier",
    ]


def test_modules_to_save_name_the_head_of_a_plain_module():
    assert head_modules(shared("mlp"), modules_to_save=["last"]) == ["last"]
    assert head_modules(shared("mlp"), modules_to_save=["last", "batch_norm"]) == ["batch_norm", "last"]


def test_what_is_in_the_head_anyway_is_listed_once():
    assert head_modules(shared("bert-sequence"), modules_to_save=["classifier", "bert.pooler", "pooler"]) == [
        "bert.pooler.dense",
        "classifier",
    ]


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-sequence", "t5-sequence"])
def test_names_that_peft_adds_by_itself_may_be_absent(name, task_type):
    """For sequence classification PEFT appends `classifier` and `score`; no model has both."""
    head = head_modules(shared(name), task_type=task_type, modules_to_save=["classifier", "score"])
    assert head == EXPECTED[name]


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(NoMatchError, match="no_such_module") as caught:
        head_modules(shared("bert-sequence"), modules_to_save=["pooler", "no_such_module"])
    assert "modules_to_save" in str(caught.value)


def test_a_module_without_parameters_is_an_error():
    """`dropout` exists and has nothing to train."""
    with pytest.raises(NoMatchError, match="dropout"):
        head_modules(shared("bert-sequence"), modules_to_save=["bert.embeddings.dropout"])


@pytest.mark.parametrize("modules_to_save", [5, [5], {"classifier": 1}])
def test_modules_to_save_of_the_wrong_type(modules_to_save):
    with pytest.raises(BitFitError, match="modules_to_save"):
        head_modules(shared("bert-sequence"), modules_to_save=modules_to_save)


# Classes that no rule knows ------------------------------------------------------------------------------------------


class OwnBackboneForSequenceClassification(PreTrainedModel):
    """Its layers are its own, so nothing tells the new head from the pre-trained rest."""

    config_class = BertConfig
    base_model_prefix = ""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.body = nn.Linear(4, 4)
        self.scorer = nn.Linear(4, 2)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scorer(self.body(x))


class WithBackboneForSequenceClassification(PreTrainedModel):
    """A user's class that names its backbone, as transformers asks for: the rule for any class applies."""

    config_class = BertConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder = BertModel(config)
        self.head = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.GELU(), nn.Linear(8, config.num_labels))
        self.post_init()


def test_a_class_that_is_its_own_backbone_is_an_error_that_names_the_remedy():
    model = OwnBackboneForSequenceClassification(BertConfig())
    for task_type in (None, "SEQ_CLS"):
        with pytest.raises(UnknownHeadError) as caught:
            head_modules(model, task_type=task_type)
        assert "OwnBackboneForSequenceClassification" in str(caught.value)
        assert "modules_to_save" in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_naming_the_head_helps():
    model = OwnBackboneForSequenceClassification(BertConfig())
    assert head_modules(model, modules_to_save=["scorer"]) == ["scorer"]


def test_a_user_s_class_with_a_backbone():
    config = ARCHITECTURES["bert-sequence"].build().config
    model = WithBackboneForSequenceClassification(config)
    assert head_modules(model, with_untrained_pooler=False) == ["head.0", "head.2"]
    assert head_modules(model) == ["encoder.pooler.dense", "head.0", "head.2"]


def test_a_subclass_is_treated_like_its_parent():
    """Users subclass stock models to change a loss; the head is still the parent's."""

    class MyWhisper(transformers.WhisperForAudioClassification):
        pass

    model = MyWhisper(shared("whisper-audio").config)
    assert head_modules(model) == EXPECTED["whisper-audio"]


# Wrapped models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-sequence", "whisper-audio", "t5-question"])
def test_paths_are_those_of_the_stock_model(name):
    """The head under PEFT's `modules_to_save`, below a `PeftModel`, and compiled."""
    from peft import LoraConfig, get_peft_model

    target = {"whisper-audio": "q_proj", "t5-question": "q"}.get(name, "query")
    tuned = get_peft_model(build(name), LoraConfig(target_modules=[target], modules_to_save=EXPECTED[name]))
    assert head_modules(tuned) == head_modules(tuned.base_model.model) == EXPECTED[name]
    assert head_modules(torch.compile(build(name))) == EXPECTED[name]


def test_looking_changes_nothing():
    model = build("bert-sequence")
    before = snapshot(model)
    head_modules(model, modules_to_save=["pooler"])
    assert snapshot(model) == before


# What PEFT appends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda names: pickle.loads(pickle.dumps(names))])
def test_saved_names_take_none_of_peft_s(copied):
    names = SavedNames(["pooler", "classifier"])
    names.extend(["classifier", "score"])
    names.extend(["last"])
    assert names == ["pooler", "classifier", "last"]
    twin = copied(names)
    assert twin == names
    assert type(twin) is SavedNames
    twin.append("score")
    assert names == ["pooler", "classifier", "last"]
    assert json.loads(json.dumps(twin)) == ["pooler", "classifier", "last", "score"]


@pytest.mark.parametrize(
    ("names", "tensors", "expected"),
    [
        (["classifier", "classifier", "score"], ["classifier.weight"], ["classifier"]),
        (["pooler", "classifier", "score"], ["pooler.bias"], ["pooler"]),
        (["pooler", "classifier", "score"], ["pooler.bias", "score.weight"], ["pooler", "score"]),
        (["score.out_proj", "classifier", "score"], ["score.out_proj.weight"], ["score.out_proj"]),
        (["qa_outputs", "qa_outputs"], ["qa_outputs.weight"], ["qa_outputs"]),
        (
            ["start.dense", "end.dense", "qa_outputs"],
            ["start.dense.bias", "end.dense.bias"],
            ["start.dense", "end.dense"],
        ),
        # Parts of a head whose tensors are missing stay, so that they are missed.
        (["classifier"], [], ["classifier"]),
        (["qa_outputs"], [], ["qa_outputs"]),
        (["pooler", "classifier"], ["pooler.bias"], ["pooler", "classifier"]),
        (["classifier", "classifier", "score"], [], ["classifier"]),
    ],
)
def test_what_earlier_versions_wrote_into_a_file(names, tensors, expected):
    assert SavedNames(names).without_peft_names(tensors) == expected


def test_peft_s_names_are_the_head_of_a_plain_module():
    """Whether PEFT appends them before it injects (sequence classification) or after (the other two)."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier, self.qa_outputs = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    heads = {task: head_modules(Plain(), task_type=task) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")}
    assert heads == {"SEQ_CLS": ["classifier"], "TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}
    assert head_modules(Plain()) == []
