"""A client of `bitfit serve`: a mixed stream for many tasks, what it is answered with, and how fast.

By default a server is started with the two tasks of the quickstart and many copies of each, and some clients send as
fast as they are answered, which is as much as there can be. With `--rate` requests arrive as they would from many
people: as a Poisson process, whether those before have been answered or not.

    python recipes/serve_many_tasks.py
    python recipes/serve_many_tasks.py --copies 500 --requests 4000 --rate 100
    python recipes/serve_many_tasks.py --verify --requests 50000
    python recipes/serve_many_tasks.py --url http://localhost:8080 --rate 20

`--verify` compares every answer with that of a bank in this process, while an administrator adds, replaces and removes
tasks: no request may be lost, none may have another's answer, and the server's memory may not grow. `--url` asks a
server that runs already, for the tasks that it lists.

What a client has to do is little, in any language:

    curl localhost:8080/predict -H 'Content-Type: application/json' -d '{"inputs": "not bad at all", "task": "stance"}'

For a bank inside a program of your own see `TaskBank`; `bitfit_hf.serving.create_app` is the server as an ASGI
application.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import quickstart
import synthetic_data
import torch
import transformers
from common.load import Client, Outcome, closed_loop, open_loop
from common.record import checkout, hardware, versions
from common.server import Running, bitfit_serve
from rich.console import Console
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from bitfit_hf import TaskBank

ADMIN = "the-load-generator"
POOL = 100  # texts of each task
TOLERANCE = 1e-4  # of a score: other batches round otherwise
GUESTS = 4  # tasks that come and go


@dataclass
class Arguments:
    task: list[str] = field(
        default_factory=lambda: list(quickstart.GENERATED_ROWS), metadata={"help": "Tasks of the quickstart."}
    )
    task_dir: str = field(default="outputs/quickstart", metadata={"help": "Folder with a delta for each."})
    model: str | None = field(default=None, metadata={"help": "Their base. Default: the quickstart's MiniLM."})
    copies: int = field(default=50, metadata={"help": "Further names under which each task is served."})
    requests: int = field(default=1000, metadata={"help": "Texts in the stream."})
    rate: float | None = field(default=None, metadata={"help": "Arrivals per second. Default: all there can be."})
    clients: int = field(default=32, metadata={"help": "Without --rate: requests under way at a time."})
    verify: bool = field(default=False, metadata={"help": "Compare every answer, while tasks come and go."})
    url: str | None = field(default=None, metadata={"help": "A server that runs already."})
    api_key: str | None = field(default=None, metadata={"help": "Its key, if it asks for one."})
    output: str | None = field(default=None, metadata={"help": "A JSON file for the figures."})
    seed: int = 0


def delta_folders(args: Arguments) -> dict[str, Path]:
    """The tasks' deltas."""
    folders = {task: Path(args.task_dir) / task for task in args.task}
    missing = [task for task, folder in folders.items() if not (folder / "adapter_config.json").is_file()]
    if missing:
        raise SystemExit(
            f"There is no delta of {' and '.join(missing)} in {args.task_dir}. Train the quickstart's tasks first, "
            "which takes some minutes (`python recipes/quickstart.py`), or name the folder of others with --task_dir "
            "and --task."
        )
    return folders


def texts_for(task: str, seed: int) -> list[str]:
    """Texts that suit the task, where it is a generated one."""
    name = task if task in quickstart.GENERATED_ROWS else "intent"
    return [row["text"] for row in synthetic_data.generate(name, "eval", POOL, seed)]


@dataclass
class Stream:
    """Requests, and for each the tasks of the quickstart that may answer it.

    Args:
        names (`list[str]`), texts (`list[str]`): Of each request.
        allowed (`list[list[str]]`): The tasks whose answer is right.
        may_be_gone (`list[bool]`): Whether its task may not be there.
    """

    names: list[str]
    texts: list[str]
    allowed: list[list[str]]
    may_be_gone: list[bool]

    def bodies(self) -> list[bytes]:
        """The JSON of each request."""
        pairs = zip(self.texts, self.names, strict=True)
        return [json.dumps({"inputs": text, "task": name}).encode() for text, name in pairs]


def make_stream(args: Arguments, tasks: list[str], names: list[str]) -> Stream:
    """A random stream for some names; `stance-7` is a copy of `stance`.

    With `--verify` a part of it is for tasks that come and go, `guest-0` and others, and for one that is now this and
    now that, `changing`.
    """
    rng = random.Random(args.seed)
    pools = {task: texts_for(task, args.seed) for task in tasks}
    if args.verify:
        names = [*names, *(f"guest-{number}" for number in range(GUESTS)), "changing"]
    stream = Stream([], [], [], [])
    for name in rng.choices(names, k=args.requests):
        guest = name.startswith("guest-")
        task = tasks[int(name[6:]) % len(tasks)] if guest else name.rpartition("-")[0] or name
        allowed = list(tasks) if name == "changing" else [task] if task in pools else []
        stream.names.append(name)
        stream.texts.append(rng.choice(pools[rng.choice(allowed or list(pools))]))
        stream.allowed.append(allowed)
        stream.may_be_gone.append(guest)
    return stream


def own_answers(base: str, folders: dict[str, Path], seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """The scores of a bank in this process, for all texts and tasks."""
    bank = TaskBank(AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    texts = sorted({text for task in folders for text in texts_for(task, seed)})
    found = {}
    for task, folder in folders.items():
        bank.add_task(task, folder)
        for text, answer in zip(texts, bank.predict(texts, task), strict=True):
            assert isinstance(answer, dict)
            found[task, text] = answer["scores"]
    return found


def same(answer: list[dict[str, Any]], scores: dict[str, float]) -> bool:
    """Whether an answer of the server has these scores."""
    given = {row["label"]: row["score"] for row in answer}
    return given.keys() == scores.keys() and all(abs(given[label] - scores[label]) < TOLERANCE for label in scores)


async def come_and_go(client: Client, tasks: list[str], seed: int, enough: asyncio.Event) -> Counter[str]:
    """Adds, replaces and removes tasks until it is enough; returns how often."""
    rng, done = random.Random(seed), Counter[str]()
    for turn in itertools.count():
        if enough.is_set():
            break
        number = rng.randrange(GUESTS)
        changes = [
            ("PUT", f"/tasks/guest-{number}", {"source": tasks[number % len(tasks)]}),
            ("PUT", "/tasks/changing", {"source": tasks[turn % len(tasks)]}),
            ("DELETE", f"/tasks/guest-{rng.randrange(GUESTS)}", None),
        ]
        for method, path, body in changes:
            status, answer = await client.request(method, path, body)
            if status not in (200, 201, 204, 404):
                raise SystemExit(f"{method} {path}: {status} {answer.decode(errors='replace')}")
            done[f"{method} {status}"] += 1
        await asyncio.sleep(0.1)
    return done


async def send(args: Arguments, client: Client, stream: Stream, check: Any = None) -> Outcome:
    bodies = stream.bodies()
    if args.rate:
        return await open_loop(client, "/predict", bodies, rate=args.rate, seed=args.seed, check=check)
    return await closed_loop(client, "/predict", bodies, clients=args.clients, check=check)


async def verified(args: Arguments, server: Running, base: str, folders: dict[str, Path], names: list[str]) -> Any:
    """Sends the stream while tasks come and go, and says what became of it."""
    tasks, wanted = list(folders), own_answers(base, folders, args.seed)
    stream = make_stream(args, tasks, names)
    memory: list[int] = []

    def check(number: int, answer: Any) -> bool:
        if number % max(1, args.requests // 20) == 0:
            memory.append(server.memory() or 0)
        return any(same(answer, wanted[task, stream.texts[number]]) for task in stream.allowed[number])

    client, admin = Client(server.url), Client(server.url, {"Authorization": f"Bearer {ADMIN}"})
    await admin.request("PUT", "/tasks/changing", {"source": tasks[0]})
    enough = asyncio.Event()
    changing = asyncio.create_task(come_and_go(admin, tasks, args.seed, enough))
    outcome = await send(args, client, stream, check)
    enough.set()
    changes = await changing
    for one in (client, admin):
        await one.close()
    warm = memory[len(memory) // 5 :] or [0]
    gone = outcome.statuses.get(404, 0)
    return {
        **outcome.figures(),
        "gone": gone,
        "lost": args.requests - len(outcome.latencies) - min(gone, sum(stream.may_be_gone)),
        "changes": dict(changes),
        "memory": {"warm": warm[0], "end": warm[-1], "most": max(warm)},
    }


async def measured(args: Arguments, url: str, tasks: list[str], console: Console) -> Any:
    """Sends the stream to the tasks that the server lists, and says how fast it was answered."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    client = Client(url, headers)
    status, listed = await client.request("GET", "/tasks")
    if status != 200:
        raise SystemExit(f"{url}/tasks: {status} {listed.decode(errors='replace')[:200]}")
    names = [row["name"] for row in json.loads(listed) if row["type"] == "text-classification"]
    if not names:
        raise SystemExit(f"{url} has no task of text classification.")
    stream = make_stream(args, tasks, names)
    for number in range(min(5, args.requests)):
        _, answer = await client.request("POST", "/predict", stream.bodies()[number])
        best = json.loads(answer)[0]
        name, text = stream.names[number], stream.texts[number]
        console.print(f"[bold]{name:>12}[/]  {best['label']} ({best['score']:.2f})  [dim]{text}[/]")
    outcome = await send(args, client, stream)
    await client.close()
    return {**outcome.figures(), "tasks": len(names)}


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the figures."""
    console.print(
        f"{figures['answered']} answers in {figures['seconds']:.1f} s, {figures['throughput']:.0f} per second; half "
        f"within {1000 * figures['p50']:.0f} ms, 99 of 100 within {1000 * figures['p99']:.0f} ms. Statuses: "
        f"{figures['statuses']}. Of each request, {1e6 * figures['generator_seconds_per_request']:.0f} µs of a "
        "processor were this program's."
    )
    if "lost" in figures:
        memory = figures["memory"]
        console.print(
            f"{figures['wrong']} mixed up, {figures['lost']} lost, {figures['gone']} for tasks that were gone, while "
            f"tasks changed {sum(figures['changes'].values())} times. The server's memory: "
            f"{memory['warm'] / 1e6:.0f} MB when warm, {memory['end'] / 1e6:.0f} MB at the end."
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    if args.url and args.verify:
        raise SystemExit("--verify starts a server of its own: leave --url out.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    if args.url:
        figures = asyncio.run(measured(args, args.url, args.task, console))
    else:
        folders, base = delta_folders(args), args.model or quickstart.demo_model()
        names = [*folders, *(f"{task}-{number}" for task in folders for number in range(args.copies))]
        tasks = {name: folders[name if name in folders else name.rpartition("-")[0]] for name in names}
        options = ["--allow-source", str(Path(args.task_dir).resolve())] if args.verify else []
        environment = {"BITFIT_SERVE_ADMIN_TOKEN": ADMIN} if args.verify else {}
        with bitfit_serve(base, tasks, *options, environment=environment) as server:
            console.print(f"{len(tasks)} tasks at {server.url}.")
            work = verified(args, server, base, folders, names) if args.verify else None
            figures = asyncio.run(work or measured(args, server.url, args.task, console))
    show(figures, console)
    if args.output:
        commit, dirty = checkout()
        record = {
            "arguments": asdict(args) | {"output": None, "task_dir": None, "model": None},
            "figures": figures,
            "hardware": hardware(1, torch.device("cpu")),
            "versions": versions(),
            "commit": commit,
            "dirty": dirty,
        }
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    found = main()
    raise SystemExit(1 if found["wrong"] or found.get("lost") else 0)
