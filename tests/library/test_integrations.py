"""Libraries that take a PEFT configuration: TRL's trainers, sentence-transformers, diffusers. None knows of BitFit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import HIDDEN
from peft import PeftModel, get_peft_model
from torch import nn
from trainer_tester import files, fresh, moved, same, saved, tuned
from tuner_tester import base_tensors, fill_, same_tensors, state

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitCallback,
    BitFitConfig,
    BitFitLayer,
    TrainerSetupError,
)

WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
TEXTS = ["a b c d e", "f g h i j", "a b c d", "x y z a b", "k l m n", "o p q"]


def tokenizer() -> Any:
    """One token for each letter."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def quiet(folder: Path, **values: Any) -> dict[str, Any]:
    """Arguments that all subclasses of `TrainingArguments` share."""
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **values,
    }


# TRL -----------------------------------------------------------------------------------------------------------------


def sft(model: nn.Module, folder: Path, *, callbacks: list[Any] | None = None, **values: Any) -> Any:
    trl = pytest.importorskip("trl", reason="an optional library, of the extra `integrations`")
    datasets = pytest.importorskip("datasets", reason="of the extra `recipes`")
    config = values.pop("peft_config", None)
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(**quiet(folder, **{"max_length": 8, "gradient_checkpointing": False, **values})),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["qwen2-causal_lm", "llama-causal_lm", "gpt2-causal_lm"])
def test_sft(name: str, checkpointing: bool, tmp_path: Path) -> None:
    config = BitFitConfig(add_missing_biases=name.startswith("llama"))
    trainer = sft(
        fresh(name), tmp_path, peft_config=config, save_steps=8, gradient_checkpointing=checkpointing, weight_decay=0.1
    )
    assert isinstance(trainer.model, PeftModel)
    assert isinstance(trainer.model.peft_config["default"], BitFitConfig)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < 0.97 * curve[0]
    assert moved(trainer.model)
    assert same_tensors(base_tensors(trainer.model), base_tensors(fresh(name)))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}
    assert all(group["weight_decay"] == 0 for group in groups if group["params"])

    checkpoint = tmp_path / "checkpoint-8"
    assert same(saved(checkpoint), tuned(trainer.model))
    assert not [file for file in files(checkpoint) if file.startswith(("model", "pytorch_model"))]
    again = PeftModel.from_pretrained(fresh(name), checkpoint).eval()
    ids = torch.randint(4, 30, (2, 6))
    assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert len(BiasDelta.from_pretrained(str(checkpoint))) == len(tuned(trainer.model))


def test_sft_with_the_callback_on_a_stock_model(tmp_path: Path) -> None:
    results = []
    for values in (
        {"peft_config": BitFitConfig(), "callbacks": [BitFitCallback(lr_scale="uniform")]},
        {"peft_config": BitFitConfig()},
        {"callbacks": [BitFitCallback(lr_scale="uniform")]},
    ):
        trainer = sft(fresh("qwen2-causal_lm"), tmp_path, **values)
        trainer.train()
        results.append(tuned(trainer.model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_sft_resumes(tmp_path: Path) -> None:
    whole = sft(fresh("qwen2-causal_lm"), tmp_path / "whole", peft_config=BitFitConfig())
    whole.train()
    sft(fresh("qwen2-causal_lm"), tmp_path / "parts", peft_config=BitFitConfig(), save_steps=4).train()
    resumed = sft(fresh("qwen2-causal_lm"), tmp_path / "parts", peft_config=BitFitConfig(), save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert same(tuned(resumed.model), tuned(whole.model))


# sentence-transformers -----------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    fresh("bert-backbone").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence_model(backbone: Path) -> Any:
    library = pytest.importorskip("sentence_transformers", reason="an optional library, of the extra `integrations`")
    return library.SentenceTransformer(str(backbone), device="cpu")  # mean pooling


def encode(model: Any) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


def test_sentence_transformers(backbone: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    model = sentence_model(backbone)
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CosineSimilarityLoss

    before = encode(model)
    model.add_adapter(BitFitConfig(task_type="FEATURE_EXTRACTION"))
    assert torch.equal(encode(model), before)
    inner = model[0].auto_model if hasattr(model[0], "auto_model") else model[0].model
    stock = base_tensors(inner)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("bitfit_bias" in name for name in trained)

    pairs = {"sentence1": TEXTS, "sentence2": TEXTS[1:] + TEXTS[:1], "label": [1.0, -1.0, 0.5, -0.5, 0.2, 0.0]}
    trainer = SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(**quiet(tmp_path / "run", save_strategy="no")),
        train_dataset=Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(model),
    )
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < 0.8 * curve[0]
    after = encode(model)
    assert not torch.allclose(after, before, atol=1e-3)
    assert same_tensors(base_tensors(inner), stock)
    model.disable_adapters()
    assert torch.equal(encode(model), before)
    model.enable_adapters()
    assert torch.equal(encode(model), after)

    model.save_pretrained(str(tmp_path / "saved"))
    written = files(tmp_path / "saved")
    assert "adapter_model.safetensors" in written
    assert not [file for file in written if file.endswith((".bin", "model.safetensors")) and "adapter" not in file]
    loaded = sentence_model(tmp_path / "saved")
    assert torch.allclose(encode(loaded), after, atol=2e-6)

    other = sentence_model(backbone)
    other.load_adapter(str(tmp_path / "saved"))
    assert torch.allclose(encode(other), after, atol=2e-6)


@pytest.mark.parametrize("kind", ["stock", "with an adapter", "wrapped"])
def test_the_callback_s_advice_for_a_sentence_transformer_works(kind: str, backbone: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    model = sentence_model(backbone)
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CosineSimilarityLoss

    pairs = {"sentence1": TEXTS, "sentence2": TEXTS[1:] + TEXTS[:1], "label": [1.0, -1.0, 0.5, -0.5, 0.2, 0.0]}

    def trainer(model: Any, *callbacks: Any) -> Any:
        return SentenceTransformerTrainer(
            model,
            args=SentenceTransformerTrainingArguments(
                **quiet(tmp_path / "run", save_steps=4, weight_decay=0.1, eval_strategy="steps", eval_steps=4)
            ),
            train_dataset=Dataset.from_dict(pairs),
            eval_dataset=Dataset.from_dict(pairs),
            loss=CosineSimilarityLoss(model),
            callbacks=list(callbacks),
        )

    if kind == "with an adapter":
        model.add_adapter(BitFitConfig())
    given = get_peft_model(model, BitFitConfig()) if kind == "wrapped" else model
    before = state(given)
    message = r"SentenceTransformer .*`model\.add_adapter\(BitFitConfig\(\.\.\.\)\)`.*leave the callback out"
    with pytest.raises(TrainerSetupError, match=message) as error:
        trainer(given, BitFitCallback())
    assert "get_peft_model" not in str(error.value)
    assert state(given) == before

    model = sentence_model(backbone) if kind == "wrapped" else model
    if kind != "with an adapter":
        model.add_adapter(BitFitConfig())
    inner = model.transformers_model
    stock = base_tensors(inner)
    run = trainer(model)
    run.train()
    assert [name for name, delta in tuned(inner).items() if not delta.any()] == ["pooler.dense.bitfit_bias"]  # unused
    assert same_tensors(base_tensors(inner), stock)
    assert same(saved(tmp_path / "run" / "checkpoint-8"), tuned(inner))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = run.optimizer.param_groups
    assert {id(parameter) for group in groups for parameter in group["params"]} == trained
    assert all(group["weight_decay"] == 0 for group in groups if group["params"])


def test_sentence_transformers_refuse_another_base(backbone: Path, tmp_path: Path) -> None:
    model = sentence_model(backbone)
    model.add_adapter(BitFitConfig(task_type="FEATURE_EXTRACTION"))
    model.save_pretrained(str(tmp_path / "saved"))
    fresh("bert-backbone", seed=1).save_pretrained(backbone)
    with pytest.raises(BaseModelMismatchError):
        sentence_model(backbone).load_adapter(str(tmp_path / "saved"))


# diffusers -----------------------------------------------------------------------------------------------------------


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="an optional library, of the extra `integrations`")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def denoise(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 3, HIDDEN, generator=generator)
    return model(sample, torch.tensor([1, 5]), text).sample


def test_diffusers_adapters_are_trained_saved_and_switched(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stock = unet().requires_grad_(False)
    biases = [name for name, parameter in stock.named_parameters() if name.endswith(".bias")]
    before, tensors = denoise(stock), base_tensors(stock)
    model = unet()
    model.add_adapter(BitFitConfig())
    assert torch.equal(denoise(model), before)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(biases) == 92  # of Linear and Conv2d layers, GroupNorm and LayerNorm

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    curve = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = denoise(model).square().mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.9 * curve[0]
    assert same_tensors(base_tensors(model), tensors)
    after = denoise(model)
    model.disable_adapters()
    assert torch.equal(denoise(model), before)
    model.enable_adapters()
    assert torch.equal(denoise(model), after)

    # diffusers' own files are LoRA's alone, so the tensors are kept by PEFT's functions, as its training scripts do.
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    save_file(get_peft_model_state_dict(model), tmp_path / "delta.safetensors")
    again = inject_adapter_in_model(BitFitConfig(), unet())
    set_peft_model_state_dict(again, load_file(tmp_path / "delta.safetensors"))
    assert torch.equal(denoise(again), after)

    model.add_adapter(BitFitConfig(target_modules=["conv_in"]), "second")
    model.set_adapter("second")
    assert torch.equal(denoise(model), before)
    model.set_adapter("default")
    model.delete_adapters("second")
    assert torch.equal(denoise(model), after)


def test_a_wrapped_diffusers_model_is_saved_merged_and_loaded(tmp_path: Path) -> None:
    model = fill_(get_peft_model(unet(), BitFitConfig()).eval())
    expected = denoise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(unet(), tmp_path)
    assert torch.equal(denoise(loaded), expected)
    merged = loaded.merge_and_unload()
    assert not any(isinstance(module, BitFitLayer) for module in merged.modules())
    assert torch.allclose(denoise(merged), expected, atol=1e-6)
