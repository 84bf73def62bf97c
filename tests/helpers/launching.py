"""Starting a script as several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).resolve().parent


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(processes: int = 2) -> list[str]:
    """What comes between `python` and the script."""
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
    return [*command, f"--master_port={free_port()}"]


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]
# What comes between `python` and the script, for two processes.
LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "torchrun": torchrun,
    "accelerate": lambda: [*ACCELERATE, f"--main_process_port={free_port()}"],
}


def run_python(
    *command: object, timeout: int = 500, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """
    Runs python to the end, with this checkout importable, and without a network: processes find each other on the
    loopback device.

    Args:
        command: Its arguments.
        timeout (`int`, *optional*, defaults to 500): Seconds.
        cwd (`Path`, *optional*): Where; here by default.
        environment: More variables.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=variables, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def launch_on_cpu(command: list[str], script: str, folder: Path, batch_size: int) -> Path:
    """Runs a script of this folder on CPU processes; it writes what it found into `folder`, which is made."""
    folder.mkdir()
    result = run_python(*command, HELPERS / script, folder, batch_size, ACCELERATE_USE_CPU="1")
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def launch_two(recipe: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a recipe to the end, as two processes on the CPU, through `accelerate launch` and the project's config."""
    config = ROOT / "recipes" / "accelerate" / "cpu_2_processes.yaml"
    script = ROOT / "recipes" / f"{recipe}.py"
    return run_python("-m", "accelerate.commands.launch", "--config_file", config, script, *arguments)
