"""Model cards: what they say equals the run, nothing is made up or left empty, and what people write stays."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from architectures import ARCHITECTURES, LABELS, build
from docs_scripts import python_of
from hub_metadata import validate_card
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from trainer_tester import IN_PLACE, WAYS, arguments, fresh, prepared, rows, trainer_for
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, ConfigError, plot_bias_change
from bitfit_hf.card.card_data import BitFitCardData
from bitfit_hf.card.model_card import make_card, write_card
from bitfit_hf.card.update import OldCard, hub_name
from bitfit_hf.training_run import TrainingRun, dataset_id

BASE, COMMIT = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"
ROOT = Path(__file__).resolve().parents[2]

RUN = TrainingRun(
    hyperparameters={"learning_rate": 0.0007, "head_learning_rate": None, "train_batch_size": 16, "seed": 3},
    metrics={"accuracy": 0.7545126353790613, "loss": 0.00012345, "runtime": 4.2},
    steps=624,
    epochs=4.0,
    train_loss=0.5772156649,
    seconds=98.6,
    num_examples=2490,
    dataset="nyu-mll/glue",
    dataset_config="rte",
    eval_dataset="nyu-mll/glue",
    eval_config="rte",
    eval_split="validation",
    versions={"torch": "2.13.0"},
)


def tuned(
    name: str = "bert-sequence", *, base: str | None = BASE, revision: str | None = COMMIT, **values
) -> BiasDelta:
    config = BitFitConfig(base_model_name_or_path=base, revision=revision, **values)
    return BiasDelta.from_model(fill_(get_peft_model(build(name), config)))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def header(content: str) -> dict:
    return yaml.safe_load(content.split("---\n")[1])


def sections(content: str) -> dict[str, str]:
    """The text under each heading, with the marks taken out."""
    body = re.sub(r"<!--.*?-->", "", content.split("---\n", 2)[2], flags=re.DOTALL)
    parts = re.split(r"^#+ (.+)$", body, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def table(text: str) -> dict[str, str]:
    """First and last column of the Markdown table in `text`."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert all(set(cell) <= set("-:") for cell in cells[1])
    return {line[0]: line[-1] for line in cells[2:]}


def check(content: str, *folders: Path) -> dict[str, str]:
    """What holds for every card."""
    assert validate_card(content) == ([], [])
    found = sections(content)
    assert {"What was trained", "How to use it", "Files", "Limits", "Citation"} <= set(found)
    for heading, text in found.items():
        assert text, f"empty section {heading}"
        for line in text.splitlines():
            assert not re.search(r"\bNone\b|\bnan\b|\binf\b|Undefined|More Information Needed|\{\{|\}\}", line), line
            assert not line.rstrip().endswith((":**", "| |")) or line == "| | |", line
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
            assert block.strip()
        if "|---|" in text:
            assert table(text), f"empty table in {heading}"
    assert "\n\n\n" not in content
    for folder in (*folders, ROOT, Path.home(), Path.cwd()):
        assert str(folder) not in content
    return found


# --- what a card says ---


def test_every_number_is_that_of_the_run(tmp_path):
    delta = tuned()
    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    content = card_of(tmp_path)
    found = check(content, tmp_path)

    meta = header(content)
    (entry,) = meta["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {
        "type": "nyu-mll/glue",
        "name": "nyu-mll/glue (rte)",
        "config": "rte",
        "split": "validation",
    }
    assert "On nyu-mll/glue (rte), split validation." in found["Results"]
    assert "Training data: nyu-mll/glue (rte)." in found["How it was trained"]
    assert result["task"] == {"type": "text-classification"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.7545126353790613)]
    assert table(found["Results"]) == {"accuracy": "0.7545", "loss": "0.000123"}
    assert table(found["How it was trained"]) == {
        "learning rate of the biases": "0.0007",
        "examples per update": "16",
        "seed": "3",
        "updates": "624",
        "epochs": "4",
        "training examples": "2490",
        "mean training loss": "0.5772",
        "time": "99 s",
    }
    assert "torch 2.13.0" in found["How it was trained"]
    counts = table(found["What was trained"])
    assert counts["**all biases**"] == f"**{delta.num_parameters():,}**"
    assert counts["task head"] == f"{32 * LABELS + LABELS}"
    assert counts["**biases and head**"] == f"**{delta.num_parameters(head=True):,}**"
    assert sum(int(counts[term].replace(",", "")) for term in list(counts)[:10]) == delta.num_parameters()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert f"`{saved['weights_digest']}`" in found["Files"]
    assert COMMIT in found["Files"]
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    stated = float(re.search(r"([\d.]+) kB of float32", found["Files"])[1]) * 1e3
    assert stated == pytest.approx(4 * delta.num_parameters(head=True), abs=60)
    assert stated < size


def test_header():
    data = BitFitCardData.from_config(tuned().config, run=RUN, language="en", license="apache-2.0")
    meta = make_card(data).data.to_dict()
    assert meta.pop("model-index")
    assert meta == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["bitfit", "peft", "transformers"],
        "datasets": ["nyu-mll/glue"],
        "language": "en",
        "license": "apache-2.0",
    }


def test_share_of_bert_base_is_the_papers():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    config = get_peft_model(model, BitFitConfig()).peft_config["default"]
    content = str(make_card(BitFitCardData.from_config(config)))
    assert "The base has 109,482,240 parameters without a task head. The biases are\n0.094 % of that." in content
    assert "task head |" not in content  # its size is not known from the configuration alone


def test_stock_saves_write_the_same_card(tmp_path):
    wrapped = fill_(get_peft_model(build("bert-sequence"), BitFitConfig(base_model_name_or_path=BASE)))
    in_place = build("bert-sequence")
    in_place.add_adapter(BitFitConfig(base_model_name_or_path=BASE))
    fill_(in_place)
    wrapped.save_pretrained(tmp_path / "peft")
    in_place.save_pretrained(tmp_path / "transformers")
    BiasDelta.from_model(wrapped).save_pretrained(tmp_path / "ours")
    contents = {path.name: card_of(path) for path in tmp_path.iterdir()}
    assert len(contents) == 3
    assert len(set(contents.values())) == 1
    assert "task head" in contents["transformers"]
    check(contents["ours"], tmp_path)


def test_card_is_an_option_of_ours(tmp_path):
    tuned().save_pretrained(tmp_path, card=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    write_card(tmp_path)
    check(card_of(tmp_path))


def test_picture_and_export_are_shown_where_they_are(tmp_path):
    delta = tuned()
    delta.save_pretrained(tmp_path)
    assert "bias_change.png" not in card_of(tmp_path)
    assert "`stock/`" not in card_of(tmp_path)
    plot_bias_change(delta, tmp_path)
    (tmp_path / "stock").mkdir()
    delta.save_pretrained(tmp_path)
    found = check(card_of(tmp_path))
    assert "(bias_change.png)" in found["Bias change"]
    assert f'adapter_kwargs={{"subfolder": "stock"}}, num_labels={LABELS}' in found["How to use it"]
    (tmp_path / "bias_change.png").unlink()
    delta.save_pretrained(tmp_path)
    assert "Bias change" not in check(card_of(tmp_path))


# --- kinds of tasks, and missing facts ---

KINDS = [
    ("bert-sequence", "text-classification", "AutoModelForSequenceClassification"),
    ("bert-token", "token-classification", "AutoModelForTokenClassification"),
    ("bert-question", "question-answering", "AutoModelForQuestionAnswering"),
    ("bert-choice", None, "AutoModelForMultipleChoice"),
    ("bert-masked_lm", "fill-mask", "AutoModelForMaskedLM"),
    ("bert-backbone", "feature-extraction", "AutoModel"),
    ("gpt2-causal_lm", "text-generation", "AutoModelForCausalLM"),
    ("opt-causal_lm", "text-generation", "AutoModelForCausalLM"),
    ("bart-seq2seq_lm", None, "AutoModelForSeq2SeqLM"),
    ("vit-image", "image-classification", "AutoModelForImageClassification"),
    ("whisper-seq2seq_lm", "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
    ("whisper-audio", "audio-classification", "AutoModelForAudioClassification"),
]


@pytest.mark.parametrize(("name", "tag", "auto_class"), KINDS, ids=[kind[0] for kind in KINDS])
@pytest.mark.parametrize("run", [RUN, None], ids=["run", "no run"])
def test_kinds_of_tasks(name, tag, auto_class, run, tmp_path):
    delta = tuned(name)
    delta.config.run = run
    delta.save_pretrained(tmp_path)
    content = card_of(tmp_path)
    found = check(content, tmp_path)
    assert header(content).get("pipeline_tag") == tag
    assert f"{auto_class}.from_pretrained(" in found["How to use it"]
    assert ("pipeline(" in content) == (tag not in (None, "question-answering", "feature-extraction"))
    assert ("Results" in found) == ("How it was trained" in found) == (run is not None)
    assert ("model-index" in header(content)) == (run is not None and tag is not None)
    assert ("task head" in found["What was trained"].split("The base has")[0]) == bool(delta.head)


def test_plain_loop_with_a_local_base(tmp_path):
    base = tmp_path / "bases" / "private-bert"
    fresh().save_pretrained(base)
    stock = AutoModelForSequenceClassification.from_pretrained(base)
    model = fill_(get_peft_model(stock, BitFitConfig()))
    model.save_pretrained(tmp_path / "out")
    content = card_of(tmp_path / "out")
    found = check(content, tmp_path)
    assert not {"base_model", "base_model_relation", "model-index", "datasets", "license"} & set(header(content))
    assert "private-bert" not in content
    assert 'from_pretrained("path/to/the/base")' in found["How to use it"]
    assert "fetches the base by itself" not in content
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)  # so that it loads again here


def test_plain_module(tmp_path):
    model = fill_(get_peft_model(build("mlp"), BitFitConfig()))
    BiasDelta.from_model(model).save_pretrained(tmp_path)
    found = check(card_of(tmp_path), tmp_path)
    assert "transformers" not in header(card_of(tmp_path))["tags"]
    assert "base = ..." in found["How to use it"]


def test_regression(tmp_path):
    model = BertForSequenceClassification(replace_config(num_labels=1))
    delta = BiasDelta.from_model(fill_(get_peft_model(model, BitFitConfig(base_model_name_or_path=BASE))))
    delta.config.run = replace(RUN, metrics={"pearson": 0.875, "mse": 0.25})
    delta.save_pretrained(tmp_path)
    found = check(card_of(tmp_path), tmp_path)
    assert "The head gives 1 number (regression)." in found["What was trained"]
    assert "Labels" not in card_of(tmp_path)
    assert table(found["Results"]) == {"pearson": "0.8750", "mse": "0.2500"}


def replace_config(**values) -> BertConfig:
    return BertConfig.from_dict({**ARCHITECTURES["bert-sequence"].build().config.to_dict(), **values})


def test_labels_are_named_where_they_have_names(tmp_path):
    names = {0: "entailment", 1: "not_entailment"}
    model = BertForSequenceClassification(replace_config(id2label=names, label2id={v: k for k, v in names.items()}))
    BiasDelta.from_model(get_peft_model(model, BitFitConfig())).save_pretrained(tmp_path)
    assert "Labels: `entailment`, `not_entailment`" in card_of(tmp_path)
    tuned().save_pretrained(tmp_path)
    assert "The head has 3 labels." in card_of(tmp_path)


def test_only_the_loss_is_known(tmp_path):
    delta = tuned("gpt2-causal_lm")
    delta.config.run = replace(RUN, metrics={"loss": 2.25}, train_loss=float("nan"), hyperparameters={}, versions={})
    delta.save_pretrained(tmp_path)
    found = check(card_of(tmp_path))
    assert header(card_of(tmp_path))["model-index"][0]["results"][0]["metrics"][0]["value"] == 2.25
    assert "mean training loss" not in table(found["How it was trained"])
    assert "Versions" not in card_of(tmp_path)


@pytest.mark.parametrize(
    "missing", ["hyperparameters", "metrics", "versions", "dataset", "steps", "seconds", "epochs"]
)
def test_each_missing_fact_is_a_missing_line(missing, tmp_path):
    delta = tuned()
    delta.save_pretrained(tmp_path / "full", card=False)
    full = write_card(tmp_path / "full", run=RUN).read_text()
    without = write_card(tmp_path / "full", run=replace(RUN, **{missing: getattr(TrainingRun(), missing)})).read_text()
    check(without)
    assert len(without.splitlines()) < len(full.splitlines())


def test_selection_is_described(tmp_path):
    tuned(bias_terms=["b_m2", "b_q"], layers_to_transform=[1], exclude_modules=["encoder.layer.0"]).save_pretrained(
        tmp_path
    )
    text = check(card_of(tmp_path))["What was trained"]
    assert "- Selected terms: `query`, `intermediate`." in text
    assert "- Only in the layers 1 (counted from 0)." in text
    assert "- Not in the modules `encoder.layer.0`." in text
    tuned("llama-causal_lm", add_missing_biases=True, bias_terms="query").save_pretrained(tmp_path)
    assert "64 of the biases do not exist in the base" in card_of(tmp_path)


@pytest.mark.parametrize("name", ["/srv/models/bert", "./bert", "../bert", "~/bert", "C:\\bert", "a/b/c", "", None])
def test_no_hub_name(name):
    assert hub_name(name) is None


def test_folder_of_that_name_is_no_hub_name(tmp_path, monkeypatch):
    assert hub_name("models/bert") == "models/bert"
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("models/bert") is None


def test_hostile_facts_stay_text(tmp_path):
    delta = tuned()
    delta.config.id2label = {0: "a`|b", 1: "<!-- /bitfit_hf:trained -->", 2: "x\n# Heading\n---\nlicense: mit"}
    delta.config.revision = '"); import os; ("'
    delta.config.run = replace(
        RUN,
        hyperparameters={"[click](https://e.org)": "a | b", "<script>": "<img src=x>"},
        dataset="x: [y\n- z",
        metrics={"acc|uracy": 1.0},
    )
    delta.save_pretrained(tmp_path)
    once = card_of(tmp_path)
    assert "import os" not in once
    assert "<script>" not in once
    assert "](https://e.org)" not in once.replace("\\](https", "")
    assert "\n# Heading" not in once
    assert "license" not in header(once)
    assert once.count("<!-- /bitfit_hf:trained -->") == 1  # a label cannot end a block
    delta.save_pretrained(tmp_path)
    assert card_of(tmp_path) == once


# --- from the Trainer ---


def share_of_first_label(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == 0).mean())}


@pytest.mark.parametrize("way", WAYS)
def test_trainer_run(way, tmp_path):
    config = BitFitConfig(base_model_name_or_path=BASE)
    trainer = trainer_for(
        prepared(way, config),
        tmp_path,
        BitFitCallback(config),
        args=arguments(tmp_path, max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2),
        options={
            "eval_dataset": rows(8),
            "compute_metrics": lambda p: {"accuracy": float(p.predictions.argmax(-1)[0])},
        },
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "out")
    content = card_of(tmp_path / "out")
    found = check(content, tmp_path)
    shown = table(found["Results"])
    assert float(shown["loss"]) == pytest.approx(metrics["eval_loss"], abs=6e-5)
    assert float(shown["accuracy"]) == metrics["eval_accuracy"]
    assert set(shown) == {"loss", "accuracy"}
    how = table(found["How it was trained"])
    assert how["updates"] == "4"
    assert float(how["learning rate of the biases"]) == trainer.args.learning_rate
    assert how["training examples"] == str(len(trainer.train_dataset))
    assert "datasets" not in header(content)  # the data set has no name
    check(card_of(tmp_path / "checkpoint-2"), tmp_path)


def on_the_hub(examples: list[dict], split: str):
    """The same examples as a data set that says it comes from the Hub."""
    datasets = pytest.importorskip("datasets")
    plain = [{name: tensor.tolist() for name, tensor in row.items()} for row in examples]
    data = datasets.Dataset.from_list(plain, split=split).with_format("torch")
    data.info.download_checksums = {f"hf://datasets/nyu-mll/glue@bcdcba79/rte/{split}.parquet": {}}
    data.info.config_name = "rte"
    return data


def test_trainer_names_data_from_the_hub(tmp_path):
    options = {"eval_dataset": on_the_hub(rows(8), "validation"), "compute_metrics": share_of_first_label}
    trainer = trainer_for(prepared(IN_PLACE), tmp_path, train=on_the_hub(rows(16), "train"), options=options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(tmp_path / "out")
    meta = header(card_of(tmp_path / "out"))
    assert meta["datasets"] == ["nyu-mll/glue"]
    (result,) = meta["model-index"][0]["results"]
    assert (result["dataset"]["config"], result["dataset"]["split"]) == ("rte", "validation")
    assert "On nyu-mll/glue (rte), split validation." in check(card_of(tmp_path / "out"))["Results"]


def test_run_travels_with_the_delta_until_it_changes(tmp_path):
    delta = tuned()
    delta.config.run = RUN
    delta.save_pretrained(tmp_path / "first")
    again = BiasDelta.from_pretrained(tmp_path / "first")
    assert again.config.run == replace(
        RUN,
        hyperparameters={k: v for k, v in RUN.hyperparameters.items() if v is not None},
    )
    again.save_pretrained(tmp_path / "second")
    assert card_of(tmp_path / "second") == card_of(tmp_path / "first")

    model = PeftModel.from_pretrained(build("bert-sequence"), tmp_path / "second")
    model.save_pretrained(tmp_path / "third")
    assert "Results" in sections(card_of(tmp_path / "third"))
    fill_(model, seed=9)  # trained on, by hand: the metrics are about something else
    model.save_pretrained(tmp_path / "fourth")
    assert "Results" not in check(card_of(tmp_path / "fourth"))
    assert json.loads((tmp_path / "fourth" / "adapter_config.json").read_text())["run"] is None
    (0.5 * again).save_pretrained(tmp_path / "fifth")
    assert "Results" not in sections(card_of(tmp_path / "fifth"))


@pytest.mark.parametrize(
    "run",
    [
        3,
        {"metrics": 3},
        {"metrics": {"accuracy": "high"}},
        {"metrics": {"accuracy": float("nan")}},
        {"steps": "many"},
        {"hyperparameters": {"learning_rate": [1]}},
        {"versions": {"torch": 2}},
        {"dataset": 1},
    ],
)
def test_facts_in_a_file_are_checked(run, tmp_path):
    tuned().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": run}))
    with pytest.raises(ConfigError, match=r"run"):
        BiasDelta.from_pretrained(tmp_path)


def test_facts_of_later_versions_are_left_out():
    assert TrainingRun.from_dict({"steps": 3, "carbon": 1.0}) == TrainingRun(steps=3)


def test_results_are_of_the_data_that_was_evaluated(tmp_path):
    delta = tuned()
    delta.config.run = replace(RUN, eval_dataset="", eval_config=None, eval_split=None)  # local files, say
    delta.save_pretrained(tmp_path)
    assert "model-index" not in header(card_of(tmp_path))
    assert "Results" in check(card_of(tmp_path))
    delta.config.run = replace(RUN, eval_dataset="other/data", eval_config=None, eval_split="test")
    delta.save_pretrained(tmp_path)
    meta = header(card_of(tmp_path))
    expected = {"type": "other/data", "name": "other/data", "split": "test"}
    assert meta["model-index"][0]["results"][0]["dataset"] == expected
    assert meta["datasets"] == ["nyu-mll/glue"]


def test_metrics_of_several_data_sets():
    datasets = pytest.importorskip("datasets")

    def loader(part, split):
        data = datasets.Dataset.from_dict({"x": [1]}, split=split)
        data.info.download_checksums = {f"hf://datasets/{part}@1/x.parquet": {}}
        return torch.utils.data.DataLoader(data)

    run = TrainingRun()
    run.add_evaluation({"eval_loss": 0.5, "eval_steps_per_second": 3, "epoch": 1}, loader("a/b", "validation"))
    assert (run.metrics, run.eval_dataset, run.eval_split) == ({"loss": 0.5}, "a/b", "validation")
    run.add_evaluation({"test_loss": 9.0}, loader("a/c", "test"))  # another prefix is not of the run's evaluations
    assert (run.metrics, run.eval_dataset) == ({"loss": 0.5}, "a/b")
    run.add_evaluation({"eval_loss": 0.25}, loader("a/b", "test"))  # replaces the one before
    assert (run.metrics, run.eval_dataset, run.eval_split) == ({"loss": 0.25}, "a/b", "test")
    run.add_evaluation({"eval_mm_accuracy": 1.0}, loader("a/b", "mismatched"))  # stands beside it
    assert (run.metrics, run.eval_dataset) == ({"loss": 0.25, "mm_accuracy": 1.0}, "")


def test_data_set_is_named_only_where_the_hub_has_it():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [1]})
    assert dataset_id(rows) == (None, None)
    rows.info.dataset_name, rows.info.builder_name = "my_folder", "csv"
    assert dataset_id(rows) == (None, None)
    rows.info.download_checksums = {"hf://datasets/nyu-mll/glue@bcdcba79/rte/train.parquet": {}}
    rows.info.config_name = "rte"
    assert dataset_id(rows.map(lambda row: row)) == ("nyu-mll/glue", "rte")
    assert dataset_id([1, 2]) == (None, None)


# --- renewing a card ---


def test_saving_again_changes_nothing(tmp_path):
    delta = tuned()
    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    once = card_of(tmp_path)
    delta.save_pretrained(tmp_path)
    assert card_of(tmp_path) == once


def test_text_and_metadata_of_people_stay(tmp_path):
    delta = tuned()
    delta.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    content = card_of(tmp_path)
    lines = ("Before all.", "## Our remark\n\n\n\nBetween   blocks, spaced as we like.", "The end.")
    content = content.replace("<!-- bitfit_hf:about -->", f"{lines[0]}\n\n<!-- bitfit_hf:about -->")
    content = content.replace("<!-- bitfit_hf:use -->", f"{lines[1]}\n\n<!-- bitfit_hf:use -->")
    content = content.replace("---\nbase_model", "---\nlanguage: de\nlicense: mit\nthumbnail: x.png\nbase_model")
    content = content.replace("pipeline_tag: text-classification", "pipeline_tag: zero-shot-classification")
    content = content.replace("tags:\n", "tags:\n- legal\n") + f"\n{lines[2]}\n"
    path.write_text(content, encoding="utf-8")

    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    renewed = card_of(tmp_path)
    assert all(renewed.count(text) == 1 for text in lines)
    assert renewed.index(lines[0]) < renewed.index("# BitFit delta") < renewed.index("## How it was trained")
    assert renewed.index("## Results") < renewed.index(lines[1]) < renewed.index("## How to use it")
    assert renewed.rstrip().endswith(lines[2])
    meta = header(renewed)
    assert (meta["language"], meta["license"], meta["thumbnail"]) == ("de", "mit", "x.png")
    assert meta["pipeline_tag"] == "zero-shot-classification"
    assert meta["tags"] == ["bitfit", "peft", "transformers", "legal"]
    assert meta["model-index"][0]["results"][0]["metrics"][0]["value"] == RUN.metrics["accuracy"]
    assert validate_card(renewed) == ([], [])

    delta.config.run = None
    delta.save_pretrained(tmp_path)
    back = card_of(tmp_path)
    assert "Results" not in sections(back)
    assert not {"model-index", "datasets"} & set(header(back))  # they were of the run
    assert all(back.count(text) == 1 for text in lines)


def test_what_people_told_stays(tmp_path):
    delta = tuned()
    delta.save_pretrained(tmp_path)
    write_card(tmp_path, dataset="nyu-mll/glue", language=["en", "de"], license="cc-by-4.0")
    delta.config.run = replace(
        RUN, dataset=None, dataset_config=None, eval_dataset="", eval_config=None, eval_split=None
    )
    delta.save_pretrained(tmp_path)
    meta = header(card_of(tmp_path))
    assert (meta["language"], meta["license"], meta["datasets"]) == (["en", "de"], "cc-by-4.0", ["nyu-mll/glue"])
    assert meta["model-index"][0]["results"][0]["dataset"]["type"] == "nyu-mll/glue"
    write_card(tmp_path, language="fr")
    assert header(card_of(tmp_path))["language"] == "fr"
    check(card_of(tmp_path))


def test_results_that_people_entered_stay(tmp_path):
    delta = tuned()
    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.eval_results[0].metric_value = 0.99
    card.save(tmp_path / "README.md")
    delta.save_pretrained(tmp_path)
    assert header(card_of(tmp_path))["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.99


def test_card_without_our_marks_is_somebodys_own(tmp_path):
    own = "---\nlicense: mit\nbase_model: some/other\n---\n\n# Model\n\n[More Information Needed]\n\nI wrote this.\n"
    (tmp_path / "README.md").write_text(own)
    tuned().save_pretrained(tmp_path)
    content = card_of(tmp_path)
    assert content.split("---\n", 2)[2] == own.split("---\n", 2)[2]
    meta = header(content)
    assert meta["license"] == "mit"
    assert (meta["base_model"], meta["base_model_relation"]) == (BASE, "adapter")  # a fact of the delta
    assert "bitfit" in meta["tags"]


def test_marks_that_were_damaged_do_no_harm(tmp_path):
    delta = tuned()
    delta.save_pretrained(tmp_path)
    content = card_of(tmp_path).replace("<!-- /bitfit_hf:trained -->", "Precious text.")
    (tmp_path / "README.md").write_text(content)
    for _ in range(2):
        delta.save_pretrained(tmp_path)
        assert card_of(tmp_path).count("Precious text.") == 1
        assert card_of(tmp_path).count("<!-- /bitfit_hf:trained -->") == 1
    opened = "<!-- bitfit_hf:limits -->\nAs precious.\n\n<!-- bitfit_hf:about"
    stray = card_of(tmp_path).replace("<!-- bitfit_hf:about", opened)
    (tmp_path / "README.md").write_text(stray)
    delta.save_pretrained(tmp_path)
    assert card_of(tmp_path).count("As precious.") == 1
    doubled = card_of(tmp_path) + "\n" + sectioned(card_of(tmp_path), "limits")
    (tmp_path / "README.md").write_text(doubled)
    delta.save_pretrained(tmp_path)
    assert card_of(tmp_path).count("## Limits") == 1


def sectioned(content: str, name: str) -> str:
    return re.search(rf"<!-- bitfit_hf:{name} -->.*<!-- /bitfit_hf:{name} -->", content, re.DOTALL)[0]


@pytest.mark.parametrize("content", [b"---\na: [b\n---\ntext\n", b"---\n- a\n---\ntext\n", b"\xff\xfe\x00text"])
def test_unreadable_card_is_left_alone(content, tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(content)
    with caplog.at_level("WARNING", logger="bitfit_hf"):
        tuned().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert "README.md has not been renewed" in caplog.text
    assert BiasDelta.from_pretrained(tmp_path).num_parameters()


def test_peft_and_its_own_card(tmp_path):
    """PEFT writes its template, or into the card that is there, before it saves the configuration."""
    fresh().save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), BitFitConfig())
    wrapped.create_or_update_model_card(str(tmp_path))
    stub = OldCard.parse(card_of(tmp_path))
    assert stub.is_stub
    assert str(tmp_path) in card_of(tmp_path)
    wrapped.save_pretrained(tmp_path)
    once = card_of(tmp_path)
    check(once, tmp_path)
    (tmp_path / "README.md").write_text(once + "\nMine.\n")
    for _ in range(2):
        wrapped.save_pretrained(tmp_path)
    assert card_of(tmp_path).replace("\nMine.\n", "") == once
    edited = stub.text.replace("[More Information Needed]", "Filled in by hand.", 1)
    assert not OldCard({}, edited).is_stub


def test_trainers_card_gives_way_and_what_it_was_told_stays(tmp_path):
    trainer = trainer_for(prepared(IN_PLACE), tmp_path, BitFitCallback())
    trainer.train()
    told = {"language": "en", "license": "mit", "dataset_tags": "nyu-mll/glue", "tags": "mine"}
    trainer.create_model_card(**told)
    assert OldCard.parse(card_of(tmp_path)).is_stub
    previous = "---\nthumbnail: a.png\n---\n\nOlder words.\n"
    write_card(tmp_path, delta=BiasDelta.from_model(trainer.model), previous=previous)
    content = card_of(tmp_path)
    meta = header(content)
    assert (meta["language"], meta["license"], meta["datasets"]) == (["en"], "mit", ["nyu-mll/glue"])
    assert meta["tags"] == ["bitfit", "peft", "transformers", "mine"]
    assert meta["thumbnail"] == "a.png"
    assert "Older words." in content
    assert "Trainer had access to" not in content


def test_plain_template_of_the_client_counts_as_generated():
    assert OldCard.parse(str(ModelCard.from_template(ModelCardData(tags=["x"])))).is_stub
    assert not OldCard.parse("---\nlicense: mit\n---\n# Hello\n").is_stub


# --- the Hub, the code in the card, the template ---


@pytest.mark.parametrize("name", ["bert-sequence", "bert-token", "gpt2-causal_lm"])
def test_client_accepts_the_header(name, hub_env, tmp_path):
    delta = tuned(name)
    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    ModelCard.load(tmp_path / "README.md").validate()


def test_code_in_the_card_loads_the_model(tmp_path):
    base = tmp_path / "base"
    fresh().save_pretrained(base)
    stock = AutoModelForSequenceClassification.from_pretrained(base)
    model = fill_(get_peft_model(stock, BitFitConfig())).eval()
    inputs = ARCHITECTURES["bert-sequence"].inputs(2)
    expected = model(**inputs).logits
    folder = tmp_path / "delta"
    BiasDelta.from_model(model).save_pretrained(folder)
    content = write_card(folder, base_model="some/base").read_text()
    blocks = python_of(content)
    assert len(blocks) == 3
    for code in blocks:
        code = re.sub(r"^task = .*$", "", code, flags=re.MULTILINE)  # it takes a tokenizer
        names: dict = {}
        exec(code.replace("path/to/this/folder", str(folder)).replace("some/base", str(base)), names)
        torch.testing.assert_close(names["model"].eval()(**inputs).logits, expected, atol=2e-6, rtol=0)


def test_repo_id_is_in_title_and_code(tmp_path):
    delta = tuned()
    delta.config.run = RUN
    delta.save_pretrained(tmp_path)
    content = write_card(tmp_path, repo_id="alice/bert-rte-bitfit").read_text()
    check(content)
    assert "\n# bert-rte-bitfit\n" in content
    assert content.count('"alice/bert-rte-bitfit"') == 4
    assert "path/to/this/folder" not in content
    assert header(content)["model-index"][0]["name"] == "bert-rte-bitfit"


def test_template_is_in_the_library_and_seen_in_model_cards():
    template = ROOT / "model_cards" / "template.md"
    assert template.read_bytes() == (ROOT / "bitfit_hf" / "card" / "model_card_template.md").read_bytes()


@pytest.mark.parametrize(
    ("given", "line"), [(0.06, "warm-up, share of the updates | 0.06"), (100, "warm-up updates | 100")]
)
def test_a_warm_up_below_one_is_a_share(given, line, tmp_path):
    config = get_peft_model(build("bert-sequence"), BitFitConfig()).peft_config["default"]
    write_card(tmp_path, config, run=TrainingRun(hyperparameters={"warmup_steps": given}))
    assert line in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("way", ["in place", "BiasDelta"])
def test_a_folder_in_the_card_s_place_is_left_alone(way, tmp_path, caplog):
    (tmp_path / "README.md").mkdir()
    (tmp_path / "README.md" / "notes.txt").write_text("mine")
    model = fresh()
    model.add_adapter(BitFitConfig())
    fill_(model)
    with caplog.at_level("WARNING", logger="bitfit_hf"):
        (model if way == "in place" else BiasDelta.from_model(model)).save_pretrained(tmp_path)
    assert "README.md has not been renewed: it cannot be read" in caplog.text
    assert (tmp_path / "README.md" / "notes.txt").read_text() == "mine"
    assert BiasDelta.from_pretrained(tmp_path).digest == BiasDelta.from_model(model).digest
