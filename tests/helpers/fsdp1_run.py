"""One process of the run that `test_peft_contract.py` launches: FSDP1 on two CPU processes, where it really shards.

torchrun --nproc_per_node 2 tests/fsdp1_run.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from peft import get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer
from tuner_tester import PREFIX, distance, file_tensors, fill_, outputs, tune

BERT = ARCHITECTURES["bert-sequence"]


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**BERT.inputs(), **BERT.labels()).loss.backward()
        optimizer.step()


def main() -> None:
    dist.init_process_group(backend="gloo")
    alone, tuned = fill_(tune(BERT)), fill_(tune(BERT))
    wanted = outputs(tuned, BERT)
    sharded = FullyShardedDataParallel(
        tuned,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({BertLayer}),
    )
    facts = {"output": distance(outputs(sharded, BERT), wanted)}
    before = file_tensors(alone)
    train(alone)
    train(sharded)
    facts["trained"] = distance(outputs(sharded, BERT), outputs(alone, BERT))
    with FullyShardedDataParallel.summon_full_params(sharded):
        saved = get_peft_model_state_dict(sharded.module)
    expected = file_tensors(alone)
    facts["tensors"] = len(expected)
    facts["moved"] = sum(not torch.equal(before[name], tensor) for name, tensor in expected.items())
    facts["saved"] = max((saved[PREFIX + name] - tensor).abs().max().item() for name, tensor in expected.items())
    Path(sys.argv[1]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
