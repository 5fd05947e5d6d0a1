"""Language models under audit: transformers' classes, with their tokenizers, as victims.

transformers itself is only needed to load them, in `leakaudit.models.pretrained`: it takes seconds to import, and
the attacks on images do without.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakaudit.errors import InputError
from leakaudit.models.architectures import ARCHITECTURES, Architecture
from leakaudit.models.spaces import NO_TOKEN, Tokens
from leakaudit.models.victim import Classifier, Mode, Params, Victim, cross_entropy_sum, loss_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["classification", "mlm", "causal-lm"]
TASKS: tuple[Task, ...] = get_args(Task)
IGNORED = -100
"""Label of a position that the loss leaves out, as in transformers."""


@dataclass(frozen=True)
class LanguageVictim(Victim):
    """A language model, its checkpoint and its loss.

    Model inputs x are token numbers (N, L) int64, short rows filled up with `NO_TOKEN`; or embeddings
    (N, L, H) floating point in place of the word embedding's rows, short rows filled up with NaN.
    Labels y are (N,) integers or (N, K) probabilities for classification, else (N, L) token numbers with
    `IGNORED` where the loss takes nothing; for causal-lm they stand where the tokens do and are shifted
    here.  In place of token numbers, (N, L, V) weights >= 0 of every label at every position are taken.
    The loss is the mean (or sum) over examples, or over all labelled positions (all weights) of the batch.

    Dropout is off in eval mode, which attacks use; in train mode it draws from torch's generator.

    Attributes:
        task: what the head does.
        architecture: None for a family that is not in `ARCHITECTURES`.
        fresh: parameters that the checkpoint did not hold and that were initialised at random.
        lora: the adapters, as `leakaudit.models.lora.Lora.parse` takes them; None without.
    """

    module: PreTrainedModel
    space: Tokens  # type: ignore[assignment]  # image attacks never see this victim, see leakaudit.media
    task: Task = "classification"
    architecture: Architecture | None = None
    fresh: tuple[str, ...] = ()
    lora: str | None = None

    def with_mode(self, mode: Mode) -> LanguageVictim:
        return replace(self, module=copy.deepcopy(self.module).train(mode == "train"), mode=mode)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """(N, K) class scores, or (N, L, V) token scores."""
        there = _there(x)
        inputs = {"input_ids": self._token_numbers(x), "attention_mask": there.long()}
        tensors = (dict(params), self.frozen, self.buffers)
        if not x.is_floating_point():
            return functional_call(self.module, tensors, (), inputs).logits
        with self._embedding_as(x.where(there[..., None], 0.0)):
            return functional_call(self.module, tensors, (), inputs).logits

    def _token_numbers(self, x: Tensor) -> Tensor:
        """What transformers is given as `input_ids`: for embeddings any token that is not the filler."""
        tokens = _there(x).long() * (self.filler == 0) if x.is_floating_point() else x
        return tokens.where(_there(x), self.filler)

    @contextmanager
    def _embedding_as(self, rows: Tensor) -> Iterator[None]:
        """The word embedding answers with these rows (N, L, H), whatever it is asked.

        Unlike `inputs_embeds` this leaves transformers the token numbers, by which decoders find the end of
        a sentence to classify, and Gemma the factor on its rows.
        """
        embedding = self.module.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        handle = embedding.register_forward_hook(lambda *_: rows * scale)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(params, x)
        if self.task == "classification":
            return self.loss_function(logits, y)
        if self.task == "causal-lm":
            logits, y = logits[:, :-1], y[:, 1:]
        if y.is_floating_point():
            total = -(y * logits.log_softmax(dim=-1)).sum()
            return total if self.loss_function is cross_entropy_sum else total / y.sum()
        labelled = y != IGNORED
        return self.loss_function(logits[labelled], y[labelled])

    def classifier(self) -> Classifier | None:
        """As for images; or the layer that scores every token, of which decoders take the last one's."""
        return self._classifier

    @cached_property
    def _classifier(self) -> Classifier | None:
        """The same, found once: it takes a forward pass."""
        name, module, _, output = self.modules_in_order()[-1]
        scores_tokens = self.task == "classification" and output.shape[2:] == (self.num_classes,)
        if not scores_tokens or not isinstance(module, nn.Linear):
            return super().classifier()
        bias = None if module.bias is None else f"{name}.bias"
        return Classifier(weight=f"{name}.weight", bias=bias, module=name)

    def features(self, x: Tensor) -> Tensor:
        """Input of the classifier layer, (N, F), of the token that transformers takes the scores of."""
        found = super().features(x)
        if found.dim() == 2:
            return found
        spoken = self._token_numbers(x) != self.filler
        places = torch.arange(x.shape[1], device=x.device)
        return found[torch.arange(len(found), device=x.device), (places * spoken).argmax(1)]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return self.space.sample(count, generator).to(self.device)

    def probe_labels(self, count: int) -> Tensor:
        return super().probe_labels(count) if self.task == "classification" else self.probe(count)

    @property
    def normalisation(self) -> None:
        """Tokens have none."""
        return None

    @property
    def mode_matters(self) -> bool:
        """Whether dropout, of modules or of functions, changes the outputs in train mode."""
        module, probe = self.with_mode("train"), self.probe()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return not torch.equal(module.logits(self.params, probe), module.logits(self.params, probe))

    @property
    def filler(self) -> int:
        """The token that stands, masked, where a short sentence has none."""
        return _padding(self.module)

    @property
    def hidden(self) -> int:
        """Width of the word embedding."""
        return self.word_rows.shape[1]

    @property
    def word_rows(self) -> Tensor:
        """The word embedding's weight (V, H)."""
        return {**self.params, **self.frozen}[self.word]

    @property
    def word(self) -> str:
        """Name of the word embedding's weight."""
        return self._name_of(_word_rows(self.module))

    @property
    def position(self) -> str | None:
        """Name of the learnt absolute positions' weight; None for a model without, or an unknown one."""
        if self.architecture is None or self.architecture.position is None:
            return None
        embedding = self._base.get_submodule(self.architecture.position)
        return self._name_of(cast(Tensor, embedding.weight))

    @property
    def first_position(self) -> int:
        """Row of the position embedding that belongs to the first token."""
        offset = None if self.architecture is None else self.architecture.offset
        return offset if offset is not None else self.filler + 1

    @property
    def output(self) -> tuple[str, str | None] | None:
        """Names of weight (V, H) and bias (V,) of the layer that scores tokens; None for classification.

        The weight is the word embedding's where they are tied.
        """
        module: Any = self.module
        layer = module.get_output_embeddings() if self.task != "classification" else None
        if layer is None:
            return None
        return self._name_of(layer.weight), None if layer.bias is None else self._name_of(layer.bias)

    @property
    def tied(self) -> bool:
        """Whether the gradient of the word embedding also comes from the scores of tokens."""
        return self.output is not None and self.output[0] == self.word

    @property
    def depth(self) -> int:
        """Transformer blocks; 0 for an unknown architecture."""
        if self.architecture is None:
            return 0
        return len(cast(nn.ModuleList, self._base.get_submodule(self.architecture.layers)))

    def projections(self, layer: int) -> list[tuple[str, nn.Module]]:
        """(name, module) of the attention input projections of a block."""
        assert self.architecture is not None
        names = {id(module): name for name, module in self.module.named_modules()}
        block = self._base.get_submodule(f"{self.architecture.layers}.{layer}")
        found = [block.get_submodule(path) for path in self.architecture.projections]
        return [(names[id(module)], module) for module in found]

    def attention_inputs(self, x: Tensor, layer: int) -> Tensor:
        """What enters the attention of block `layer`, (N, L, H), without gradient; later blocks do not run."""
        with torch.no_grad():
            return self.inputs_of_attention(x, [layer])[0]

    def inputs_of(self, module: nn.Module, x: Tensor) -> Tensor:
        """What enters a module of the model, without gradient; nothing runs after it."""
        with torch.no_grad():
            return self._inputs_of([module], x)[0]

    def inputs_of_attention(self, x: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The same for several blocks, ascending, differentiable in embeddings x."""
        return self._inputs_of([self.projections(layer)[0][1] for layer in layers], x)

    def head_inputs(self, x: Tensor) -> Tensor | None:
        """What enters the layer that makes the scores, without gradient: (N, F), or (N, L, H) for a task on
        tokens; None where that layer is not known."""
        with torch.no_grad():
            if self.task == "classification":
                return None if self.classifier() is None else self.features(x)
            module: Any = self.module
            layer = module.get_output_embeddings()
            return None if layer is None else self._inputs_of([layer], x)[0]

    def _inputs_of(self, modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """What enters each of the modules, which run in this order; nothing runs after the last."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])
            if len(kept) == len(modules):
                raise _Enough

        handles = [module.register_forward_pre_hook(keep) for module in modules]
        try:
            self.logits(self.params, x)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return kept

    @property
    def _base(self) -> nn.Module:
        return self.module.base_model

    def _name_of(self, weight: Tensor) -> str:
        return next(name for name, tensor in self.module.named_parameters() if tensor is weight)


def text_as_labels(x: Tensor) -> Tensor:
    """Labels y (N, L) of a causal language model for token numbers x (N, L): the text itself."""
    return x.where(x != NO_TOKEN, IGNORED)


def _there(x: Tensor) -> Tensor:
    """(N, L): where a sentence has a token, or an embedding."""
    return ~x.isnan().any(dim=-1) if x.is_floating_point() else x != NO_TOKEN


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


def language_victim(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task,
    mode: Mode = "eval",
    loss: str = "cross-entropy",
    reduction: str = "mean",
    name: str = "model",
) -> LanguageVictim:
    """A transformers module, copied, as a victim; `InputError` for a tokenizer of another vocabulary."""
    function = loss_named(loss, reduction)
    module = copy.deepcopy(module).train(mode == "train")
    config: Any = module.config
    config.pad_token_id = _padding(module)
    vocabulary = _word_rows(module).shape[0]
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer of {name} has {len(tokenizer):,} tokens, the model takes {vocabulary:,};"
            " accepted: the tokenizer the model was trained with"
        )
    architecture = ARCHITECTURES.get(config.model_type)
    return LanguageVictim(
        module=module,
        params={name: p.detach() for name, p in module.named_parameters() if p.requires_grad},
        frozen={name: p.detach() for name, p in module.named_parameters() if not p.requires_grad},
        buffers={name: b.detach() for name, b in module.named_buffers()},
        space=Tokens(vocabulary, _max_length(module, tokenizer, architecture), tokenizer),
        num_classes=int(config.num_labels) if task == "classification" else vocabulary,
        mode=mode,
        loss_function=function,
        name=name,
        task=task,
        architecture=architecture,
    )


def _word_rows(module: PreTrainedModel) -> Tensor:
    return cast(Tensor, module.get_input_embeddings().weight)


def _max_length(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture | None
) -> int:
    limit = int(getattr(module.config, "max_position_embeddings", 512))
    if architecture is not None and architecture.offset is None:
        limit -= _padding(module) + 1
    return limit if tokenizer is None else min(limit, tokenizer.model_max_length)


def _padding(module: PreTrainedModel) -> int:
    """The padding token, or as people choose it for models without one the token that ends a text, or 0."""
    config: Any = module.config
    token = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    first = token[0] if isinstance(token, list) else token
    return 0 if first is None else int(first)
