"""One process of the runs that `test_sharded.py` launches: FSDP2 on a mesh of CPU processes, where it really shards.

torchrun --nproc_per_node 2 tests/sharded_run.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from trainer_tester import WRAPPED, fresh, prepared, rows, tuned

import bitfit_hf
from bitfit_hf import BiasDelta, BitFitConfig, optimizer_groups

BATCH, STEPS = 8, 4
# Architectures with biases of their own, and with terms that are slices of one vector.
CASES = {
    "bert": ("bert-sequence", BitFitConfig()),
    "slices": ("gpt2-sequence", BitFitConfig(bias_terms=["query", "intermediate"])),
}


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    examples = rows(BATCH * STEPS, name)
    groups = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    return [{key: torch.stack([row[key] for row in group]) for key in group[0]} for group in groups]


def train(model: Any, name: str, part: slice) -> list[float]:
    """Trains on a part of every batch; the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, 1e-2))
    losses = []
    for batch in batches(name):
        loss = model(**{key: value[part] for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model: Any, mesh: DeviceMesh, **policy: Any) -> Any:
    layers = model.base_model.model.base_model
    for layer in layers.encoder.layer if hasattr(layers, "encoder") else layers.h:
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def logits(model: Any, name: str) -> torch.Tensor:
    inputs = {key: value for key, value in batches(name)[0].items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def run_case(case: str, folder: Path, mesh: DeviceMesh, dtype: torch.dtype, **policy: Any) -> None:
    name, config = CASES[case]
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = prepared(WRAPPED, config, name).to(dtype)
    losses = train(alone, name, slice(None))

    model = shard(prepared(WRAPPED, config, name).to(dtype), mesh, **policy)
    share = BATCH // size
    train(model, name, slice(rank * share, (rank + 1) * share))
    kinds = {type(parameter.data) for parameter in model.parameters()}
    held = sum(parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor))
    total = sum(parameter.numel() for parameter in alone.parameters())
    delta = BiasDelta.from_model(model)

    # Every process takes part, one writes. The others are given folders too, which have to stay empty.
    target = folder / f"{case}-{rank}"
    target.mkdir(parents=True)
    model.save_pretrained(str(target), is_main_process=rank == 0)
    facts = {
        "losses": losses,
        "kinds": sorted(kind.__name__ for kind in kinds),
        "share": held / total,
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}),
        "files": sorted(path.name for path in target.iterdir()),
        "num_parameters": delta.num_parameters(head=True),
        "expected": BiasDelta.from_model(alone).num_parameters(head=True),
    }
    answers = {"sharded": logits(model, name), "alone": logits(alone, name)}
    dist.barrier()

    # Onto one device, and back into a model in slices.
    saved = folder / f"{case}-0"
    answers["one device"] = logits(PeftModel.from_pretrained(fresh(name).to(dtype), str(saved)), name)
    again = shard(prepared(WRAPPED, config, name).to(dtype), mesh, **policy)
    again.load_adapter(str(saved), "default")
    answers["sharded again"] = logits(again, name)
    other = fresh(name, seed=7).to(dtype)
    onto_another = shard(PeftModel(other, BitFitConfig(bias_terms=config.bias_terms)), mesh, **policy)
    try:
        onto_another.load_adapter(str(saved), "from disk")
        facts["another base"] = "loaded"
    except bitfit_hf.BaseModelMismatchError:
        facts["another base"] = "refused"

    (folder / f"{case}-{rank}.json").write_text(json.dumps(facts))
    tensors = {f"sharded/{key}": value for key, value in delta.tensors().items()}
    tensors |= {f"again/{key}": value for key, value in BiasDelta.from_model(again).tensors().items()}
    tensors |= {f"alone/base_model.model.{key}": value for key, value in tuned(alone).items()}
    tensors |= {f"logits/{key}": value.float().contiguous() for key, value in answers.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{case}-{rank}.safetensors")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in CASES:
        run_case(case, folder / "float32", mesh, torch.float32)
    run_case("bert", folder / "bfloat16", mesh, torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run_case("bert", folder / "mixed", mesh, torch.float32, mp_policy=policy)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
