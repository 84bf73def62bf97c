"""One process of the runs that `test_engine.py` launches: a Trainer that asks which engine it runs on.

accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml tests/engine_run.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common.engine import check_engine
from trainer_tester import WRAPPED, prepared, rows, trainer_for


def main(folder: Path) -> None:
    cpu = not torch.cuda.is_available()
    trainer = trainer_for(prepared(WRAPPED), folder, train=rows(8), max_steps=1, use_cpu=cpu)
    engine = check_engine(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "engine.txt").write_text(str(engine))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
