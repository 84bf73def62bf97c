"""Where the bias terms live in each family of architectures.

A [`Family`] is a table. Paths are written relative to the model and matched component by component: `*` stands for any
one component, `a|b` for either. Selection never goes by these names: they only *name* what [`find_biases`] has found
by its structure, and list the vectors that have no module of their own (`free`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


Spans = tuple[tuple[int, int], ...]
Layout = Callable[[int, object], dict[str, Spans]]


@dataclass(frozen=True, eq=False)
class Family:
    """The bias terms of one family of architectures.

    Args:
        model_types (`tuple[str, ...]`): The `config.model_type`s that share the table.
        blocks (`Mapping[str, Mapping[str, str]]`):
            Path of one transformer layer (its numbers as `*`) -> path inside the layer -> term.
        outside (`Mapping[str, str]`, *optional*): Path outside the layers -> term.
        lm_head (`tuple[str, ...]`, *optional*): Roots of the pre-trained language-modelling head.
        fused (`Mapping[str, Layout]`, *optional*): Path inside a layer of a fused projection -> its layout.
        free (`Mapping[str, str]`, *optional*): Free-standing vectors, as path inside a layer -> term.
        stacks (`Mapping[str, str]`, *optional*): Path component -> name of the stack below it.
    """

    model_types: tuple[str, ...]
    blocks: Mapping[str, Mapping[str, str]]
    outside: Mapping[str, str] = field(default_factory=dict)
    lm_head: tuple[str, ...] = ()
    fused: Mapping[str, Layout] = field(default_factory=dict)
    free: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)

    def split(self, path: str) -> tuple[str, str, Mapping[str, str]] | None:
        """Splits a module path into (path of its layer, path inside the layer, table of the layer).

        Returns `None` outside the layers.
        """
        for pattern, table in self._blocks:
            match = pattern.match(path)
            if match:
                return path[: match.end(1)], path[match.end(1) + 1 :], table
        return None

    @functools.cached_property
    def _blocks(self) -> list[tuple[re.Pattern[str], Mapping[str, str]]]:
        return [
            (re.compile(rf"((?:.*?\.)??{_expression(block, any_component='[0-9]+')})(?:\.|$)"), table)
            for block, table in self.blocks.items()
        ]

    @functools.cached_property
    def _lm_head(self) -> re.Pattern[str]:
        return re.compile(rf"(?:.*\.)?(?:{'|'.join(map(_expression, self.lm_head)) or '(?!)'})(?:\..*)?")

    def outside_term(self, path: str) -> str:
        """The term of a bias outside the layers."""
        for pattern, term in self.outside.items():
            if _compiled(pattern, anywhere=True).fullmatch(path):
                return term
        return "lm_head" if self._lm_head.fullmatch(path) else "other"

    def stack(self, path: str) -> str:
        """The name of the stack that holds `path`, `""` if the family has none there."""
        return next((self.stacks[part] for part in path.split(".") if part in self.stacks), "")


def lookup(table: Mapping[str, object], inner: str) -> object | None:
    """The entry of `table` whose pattern matches the whole of `inner`."""
    if inner in table:
        return table[inner]
    return next((value for pattern, value in table.items() if _compiled(pattern).fullmatch(inner)), None)


def _expression(pattern: str, any_component: str = r"[^.]+") -> str:
    parts = (any_component if part == "*" else "|".join(map(re.escape, part.split("|"))) for part in pattern.split("."))
    return r"\.".join(f"(?:{part})" for part in parts)


@functools.cache
def _compiled(pattern: str, anywhere: bool = False) -> re.Pattern[str]:
    return re.compile((r"(?:.*\.)?" if anywhere else "") + _expression(pattern))


# --- layouts of fused projections ------------------------------------------------------------------------------------


def thirds(size: int, config: object = None) -> dict[str, Spans]:
    """`[query | key | value]`, equally long."""
    third = size // 3
    return {"query": ((0, third),), "key": ((third, 2 * third),), "value": ((2 * third, size),)}


def per_head(size: int, config: object) -> dict[str, Spans]:
    """`[head][query | key | value][head_dim]`."""
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    width = size // (3 * heads)
    return {
        term: tuple(((3 * head + part) * width, (3 * head + part + 1) * width) for head in range(heads))
        for part, term in enumerate(("query", "key", "value"))
    }


# --- the tables ------------------------------------------------------------------------------------------------------

_BERT_LAYER = {
    "attention|crossattention.self.query": "query",
    "attention|crossattention.self.key": "key",
    "attention|crossattention.self.value": "value",
    "attention|crossattention.output.dense": "attention_output",
    "attention|crossattention.output.LayerNorm": "attention_layernorm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_layernorm",
}

_FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra"),
        blocks={"encoder.layer.*": _BERT_LAYER},
        outside={"embeddings.LayerNorm": "embedding_layernorm", "pooler.dense": "pooler"},
        lm_head=("cls.predictions", "lm_head", "generator_predictions", "generator_lm_head"),
    ),
    Family(
        model_types=("distilbert",),
        blocks={
            "transformer.layer.*": {
                "attention.q_lin": "query",
                "attention.k_lin": "key",
                "attention.v_lin": "value",
                "attention.out_lin": "attention_output",
                "sa_layer_norm": "attention_layernorm",
                "ffn.lin1": "intermediate",
                "ffn.lin2": "output",
                "output_layer_norm": "output_layernorm",
            }
        },
        outside={"embeddings.LayerNorm": "embedding_layernorm"},
        lm_head=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    Family(
        model_types=("gpt2",),
        blocks={
            "h.*": {
                "ln_1|ln_cross_attn": "attention_layernorm",
                "crossattention.q_attn": "query",
                "attn|crossattention.c_proj": "attention_output",
                "ln_2": "output_layernorm",
                "mlp.c_fc": "intermediate",
                "mlp.c_proj": "output",
            }
        },
        lm_head=("lm_head",),
        fused={"attn.c_attn": thirds},
    ),
    Family(
        model_types=("llama", "mistral", "qwen2"),
        blocks={
            "layers.*": {
                "self_attn.q_proj": "query",
                "self_attn.k_proj": "key",
                "self_attn.v_proj": "value",
                "self_attn.o_proj": "attention_output",
                "input_layernorm": "attention_layernorm",
                "mlp.gate_proj|up_proj": "intermediate",
                "mlp.down_proj": "output",
                "post_attention_layernorm": "output_layernorm",
            }
        },
        lm_head=("lm_head",),
    ),
)

_BY_MODEL_TYPE = {model_type: family for family in _FAMILIES for model_type in family.model_types}

# torch's own transformer layers mean the same in every model.
TORCH_LAYERS: tuple[tuple[type[nn.Module], Mapping[str, str]], ...] = (
    (
        nn.TransformerEncoderLayer,
        {"linear1": "intermediate", "linear2": "output", "norm1": "attention_layernorm", "norm2": "output_layernorm"},
    ),
    (
        nn.TransformerDecoderLayer,
        {
            "linear1": "intermediate",
            "linear2": "output",
            "norm1|norm2": "attention_layernorm",
            "norm3": "output_layernorm",
        },
    ),
)

# Names under which composite models keep their parts, and what the part is called.
STACKS: Mapping[str, str] = {
    "encoder": "encoder",
    "decoder": "decoder",
    "text_model": "text",
    "text_encoder": "text",
    "language_model": "text",
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "audio_tower": "audio",
    "audio_model": "audio",
}


def family_of(module: nn.Module) -> Family | None:
    """The family of a Hugging Face model, by its `config.model_type`."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
