"""Where transformers keep what attacks on text look at: position rows and the inputs of attention.

The word embedding is found through `get_input_embeddings`, which every transformers model has, tied
weights included.  Norms and type embeddings need no entry: what enters an attention layer is read off the
running model (`LanguageVictim.attention_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One family of models; paths are relative to the base model.

    Attributes:
        layers: the list of transformer blocks.
        projections: within a block, the modules whose input is the block's (normalised) input: query, key
            and value, apart or as one.
        position: the learnt absolute position embedding; None for rotary and other kinds.
        offset: row of the position embedding that the first token gets; None for one above the padding
            row, as RoBERTa has it.
        causal: whether a token sees only those before it.
    """

    layers: str
    projections: tuple[str, ...]
    position: str | None = None
    offset: int | None = 0
    causal: bool = False


_SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
_PROJ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT = Architecture("encoder.layer", _SELF, "embeddings.position_embeddings")
_ROBERTA = Architecture("encoder.layer", _SELF, "embeddings.position_embeddings", offset=None)
_LLAMA = Architecture("layers", _PROJ, causal=True)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "electra": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Architecture(
        "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "embeddings.position_embeddings",
    ),
    "gpt2": Architecture("h", ("attn.c_attn",), "wpe", causal=True),
    "gpt_neo": Architecture(
        "h", ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"), "wpe", causal=True
    ),
    "gpt_neox": Architecture("layers", ("attention.query_key_value",), causal=True),
    "opt": Architecture("decoder.layers", _PROJ, "decoder.embed_positions", offset=2, causal=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
}
"""By `config.model_type` of transformers."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, GPT-2's linear layer, whose weight is (in, out) where `Linear`'s is
    (out, in).  By its name, so that nobody imports transformers to learn that there is none."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return "transformers.pytorch_utils.Conv1D" in names
