"""Guards the zoo: what the other tests conclude from these models holds only if the models are what they claim."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, build, output_tensors, randomize_, select
from expected_terms import EXPECTED

# `forward` cannot depend on these: softmax ignores a shift of all keys (unless positions are rotated into them), and
# CLIP's image classifier pools before the last norm.
DEAD = {"k_proj", "key", "k_lin", "k", "pos_key_proj"}
DEAD_IN = {"clip-image": {"vision_model.post_layernorm"}}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_depend_on_every_bias(name):
    model = randomize_(build(name))
    generator = torch.Generator().manual_seed(1)
    outputs = output_tensors(model(**ARCHITECTURES[name].inputs()))
    assert outputs
    assert all(torch.isfinite(output).all() for output in outputs)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    for row in EXPECTED[name]:
        if row.module.rpartition(".")[2] in DEAD or row.module in DEAD_IN.get(name, ()):
            continue
        gradient = model.get_parameter(f"{row.module}.{row.parameter}").grad
        assert gradient is not None, row
        assert gradient.abs().max() > 1e-6, row


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_are_small_equal_for_equal_seeds_and_without_dropout(name):
    arch = ARCHITECTURES[name]
    model, again, other = arch.build(), arch.build(), arch.build(seed=1)
    tensors = dict(model.named_parameters())
    assert sum(tensor.numel() for tensor in tensors.values()) < 60_000
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in again.named_parameters())
    assert not all(torch.equal(tensor, tensors[key]) for key, tensor in other.named_parameters())
    assert not model.training
    if name != "mlp":  # its BatchNorm is what differs
        inputs = arch.inputs(batch_size=3)
        with torch.no_grad():  # the first output: XLNet returns its memory in eval mode only
            trained, evaluated = (output_tensors(mode(**inputs))[0] for mode in (model.train(), again))
        torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch.trainable])
def test_labels_give_a_loss(name):
    arch = ARCHITECTURES[name]
    assert build(name)(**arch.inputs(), **arch.labels()).loss > 0


def test_randomizing_moves_every_parameter_and_leaves_tied_ones_tied():
    model, stock = randomize_(build("bert-masked_lm"), seed=3), build("bert-masked_lm")
    for (key, changed), original in zip(model.named_parameters(), stock.parameters()):
        assert not torch.equal(changed, original), key
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert not torch.equal(model.cls.predictions.bias, randomize_(stock, seed=4).cls.predictions.bias)


def test_building_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    build("bert-sequence", seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_select_finds_by_kind_and_family():
    assert {arch.name for arch in select(kinds=["sequence"], families=["bert", "gpt2"])} == {
        "bert-sequence",
        "gpt2-sequence",
    }
    with pytest.raises(LookupError):
        select(kinds=["no such kind"])
