"""[`Base`]: the bank's copy of the base model, whose layers can add each example's own delta."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..backends.quantized import shared_state
from ..delta.applying import is_applied
from ..errors import TaskBankError
from ..terms import Bias, find_biases
from ..terms.structure import stock_root, walk
from ..tuner.nested import take, tensors
from .batch import Batch, BatchTask, running
from .engine import Engine, run_by_engine
from .intercept import run_once, run_task_by_task
from .layers import BankedLayer
from .sites import Site
from .trial import SIZES, Trial
from .watch import Watch

# A mixed batch may differ from its examples one by one by this share of what the deltas change: far below what one
# delta on the wrong example amounts to, far above rounding.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.2
_ROWS = 7  # tasks in the tables of that trial


class Base:
    """A copy of a model's structure that shares the memory of every tensor with it, prepared for mixed batches.

    The given model is not touched: hooks, modes and classes of the copy are its own; weights are not copied. Whoever
    writes into them is noticed, see [`bitfit_hf.bank.watch`].

    Args:
        model (`nn.Module`): A stock transformers model.
        dtype (`torch.dtype`): Of the tables of deltas.
        limit (`int`, *optional*): The most tasks there will be.
        example_inputs (`Mapping[str, torch.Tensor]`, *optional*): For the trial run.
        engine ([`Engine`], *optional*): What computes the backbone; by default its own layers do.

    Raises:
        [`TaskBankError`]: A bank cannot serve the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        limit: int | None = None,
        example_inputs: Mapping[str, torch.Tensor] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.model = shared_copy(check_model(model))
        self.backbone: PreTrainedModel = self.model.base_model  # type: ignore[assignment]
        self.device: torch.device = next(self.backbone.parameters()).device
        self.sites: list[Site] = []
        self.layers: dict[nn.Module, BankedLayer] = {}
        self.engine = engine
        self._take_over(dtype, limit)
        self.no_rows = (0,) * len(self.sites)  # of a task that tunes nothing
        self.unsupported: set[Site] = set()
        self._run_once: set[nn.Module] = set()
        inside = set(self.backbone.modules())
        trial = Trial(self.backbone if inside.issuperset(self.layers) else self.model, example_inputs)
        self.answer_axes = trial.answer_axes
        self._arrange(trial)
        if engine is not None:
            self._hand_over(engine)
        self._verify(trial)
        self.watch = Watch(self.model, {id(bias) for layer in self.layers.values() for bias in layer.stored_biases()})

    # --- the layers ---

    def _take_over(self, dtype: torch.dtype, limit: int | None) -> None:
        grouped: dict[str, list[Bias]] = {}
        for bias in find_biases(self.model, add_missing_biases=True):
            grouped.setdefault(bias.name, []).append(bias)
        places: dict[str, dict[str, Site]] = {}
        modules = dict(walk(self.model))
        for biases in grouped.values():
            device = next((p.device for p in modules[biases[0].module].parameters()), torch.device("cpu"))
            site = Site(len(self.sites), biases, dtype, device, limit)
            self.sites.append(site)
            for name in (biases[0].name, *biases[0].aliases):
                path, _, parameter = name.rpartition(".")
                places.setdefault(path, {})[parameter] = site
        for path, sites in places.items():
            if modules[path] not in self.layers:  # a module may stand in several places
                self.layers[modules[path]] = BankedLayer(path, modules[path], sites)

    @property
    def why_unsupported(self) -> str:
        """What is said of a bias that is `unsupported`."""
        if self.engine is not None:
            return "is not among the biases of the engine's graph"
        return "is used where the examples of a batch cannot be told apart"

    def run_once(self, module: nn.Module) -> nn.Module:
        """Makes a module, where it is more than a layer, run once for each batch; returns it."""
        if module not in self._run_once and next(module.children(), None) is not None:
            self._run_once.add(module)
            run_once(module)
        return module

    def site_of(self, module: nn.Module | None, parameter: str) -> Site | None:
        """The site of a bias, by the module that holds it."""
        layer = self.layers.get(module) if module is not None else None
        return None if layer is None else layer.sites.get(parameter)

    # --- how they mix ---

    def _arrange(self, trial: Trial) -> None:
        """Chooses for each layer how its biases get into a mixed batch."""
        paths = {module: path for path, module in trial.model.named_modules()}
        split: dict[str, list[Site]] = {}
        for module, layer in self.layers.items():
            path = paths[module]
            if layer.adds_at_output and layer not in trial.read_outside:
                axis = trial.output_axis(path)
                if not trial.reached(path) or (axis is not None and axis >= 0 and axis != layer.channel_axis):
                    layer.batch_axis = axis
                    continue
            enclosing = trial.enclosing(path)
            if enclosing is None:
                self.unsupported.update(layer.sites.values())
            else:
                split.setdefault(enclosing, []).extend(layer.sites.values())
        self._split(trial, split)

    def _split(self, trial: Trial, paths: Mapping[str, Iterable[Site]]) -> None:
        # Outer modules last: their forward is the outermost, and inside it the inner ones have one task to do.
        for path in sorted(paths, key=len, reverse=True):
            axes = trial.separable(path)
            assert axes is not None
            run_task_by_task(path, trial.model.get_submodule(path), paths[path], *axes)

    def _hand_over(self, engine: Engine) -> None:
        """Lets an engine compute the backbone. Its tables then hold `b_0 + δ` of every bias."""
        sites, stored = [], dict(self.backbone.named_parameters())
        for name in engine.biases:
            path, _, parameter = name.rpartition(".")
            site = self.site_of(self.backbone.get_submodule(path), parameter)
            assert site is not None  # the engine's biases are this base's
            if site.exists and site.held is None:
                site.hold(stored[name])
            sites.append(site)
        run_by_engine(self.backbone, engine, sites)
        computed = set(sites)
        inside = set(self.backbone.modules())
        for module, layer in self.layers.items():
            if module in inside:
                self.unsupported.update(site for site in layer.sites.values() if site not in computed)
        self.unsupported -= computed

    # --- is it right? ---

    def _verify(self, trial: Trial) -> None:
        """Holds a mixed batch against its examples one by one, computed by the base's own layers.

        Where they differ, the whole model is split instead; an engine cannot be, so there it is an error.
        """
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        tolerance = _TOLERANCE.get(dtype, _TOLERANCE_HALF) if self.engine is None else self.engine.tolerance
        error = self._error(trial)
        if error <= tolerance:
            return
        if self.engine is not None:
            raise self.engine.mismatch(error)
        if trial.separable("") is not None:
            roots = {path for path, module in trial.model.named_modules() if module in (trial.model, self.backbone)}
            self._split(trial, {path: self.sites for path in roots if trial.separable(path) is not None})
            if self._error(trial) <= tolerance:
                return
        raise TaskBankError(
            f"{type(self.model).__name__} mixes the examples of a batch, or the bank cannot tell them apart: a batch "
            "of several tasks does not give what each example gives alone. Serve this model with one tuned model per "
            "task (`load_delta`)."
        )

    @torch.no_grad()
    def _error(self, trial: Trial) -> float:
        """The largest difference, as a share of what random deltas change; with a coarse engine, of the answers."""
        coarse = self.engine is not None and self.engine.coarse
        inputs, size = trial.batch(SIZES[0]), SIZES[0]
        usable = [site for site in self.sites if site not in self.unsupported]
        tables = {site: site.table for site in self.sites}
        generator = torch.Generator().manual_seed(0)
        # A task has other rows in other tables, so that a mix-up of tables shows.
        first, second = (
            [(1 + (task + site.number) % _ROWS) * (site in usable) for site in self.sites] for task in (0, 1)
        )
        tasks = [BatchTask([0, 2], first), BatchTask([1], second)]
        worst, change = 0.0, 0.0
        try:
            for site in usable:
                # Large deltas make rounding to 8 bits large too; of a coarse engine only another graph is to show.
                deltas = (0.02 if coarse else 0.1) * torch.randn((1 + _ROWS, site.size), generator=generator)
                deltas[0] = 0
                site.table = deltas.to(site.table) + site.table  # row 0 is the base's
            mixed = _outputs(trial, tasks, inputs)
            for task in tasks:
                for example in task.examples:
                    index = torch.tensor([example], device=self.device)
                    one = {name: take(value, 0, index, size) for name, value in inputs.items()}
                    alone = _outputs(trial, [BatchTask([0], task.rows)], one, by_layers=True)
                    plain = _outputs(trial, [BatchTask([0], self.no_rows)], one, by_layers=True)
                    for path, value in alone.items():
                        worst = max(worst, _gap(mixed[path][example : example + 1], value))
                        change = max(change, _gap(torch.zeros_like(value) if coarse else plain[path], value))
        finally:
            for site, table in tables.items():
                site.table = table
        return worst / max(change, 1e-6)


def _outputs(
    trial: Trial, tasks: list[BatchTask], inputs: Mapping[str, torch.Tensor], *, by_layers: bool = False
) -> dict[Any, torch.Tensor]:
    """The outputs that have the batch first."""
    batch = Batch(tasks, sum(len(task.examples) for task in tasks))
    batch.by_layers = by_layers
    with running(batch):
        found = tensors(trial.model(**inputs))
    return {path: t for path, t in found.items() if trial.answer_axes.get(path) == 0 and t.is_floating_point()}


def _gap(one: torch.Tensor, two: torch.Tensor) -> float:
    return torch.nan_to_num(one.float() - two.float(), nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()


def check_model(model: nn.Module) -> PreTrainedModel:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TaskBankError(
            f"This {type(model).__name__} has PEFT adapters injected. A bank needs the stock base model; add the "
            "adapters as tasks: `bank.add_task(name, BiasDelta.from_model(model, adapter_name))`."
        )
    root = stock_root(model)
    if not isinstance(root, PreTrainedModel):
        raise TaskBankError(
            f"A bank serves tasks on a stock transformers model, got a {type(root).__name__}. Load the deltas' base "
            "with `AutoModel.from_pretrained(...)`."
        )
    if is_applied(root):
        raise TaskBankError(
            "This model has a delta written into its biases. Take it out (`delta.remove_(model)`) or load the base "
            "again; the delta can be a task of the bank."
        )
    return root


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy of everything but the values of the tensors, which it shares."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        # A quantized layer's parameters have state of their own, and it converts its bias as it computes.
        plain = all(type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor for parameter in own)
        for parameter in own:
            if id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter) if plain else parameter
    twin = copy.deepcopy(model, memo | shared_state(model)).eval()
    for module in twin.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # nothing is generated, so caches of keys and values would be filled for nobody
    return twin


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter on the same memory, so that `model.to(...)` moves the given model's alone."""
    alias = nn.Parameter(parameter.detach(), requires_grad=False)
    vars(alias).update(vars(parameter))  # what libraries have noted on it
    return alias
