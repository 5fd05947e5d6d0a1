"""Language models from the hub, from a folder and from the user: all that needs transformers itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import load_checkpoint
from leakaudit.formats.phrases import first_line
from leakaudit.models.language import TASKS, LanguageVictim, Task, language_victim
from leakaudit.models.lora import Lora, attach
from leakaudit.models.victim import Mode
from leakaudit.spec import suggest

_CLASSES: dict[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}


def load_language_victim(
    spec: str,
    task: str | None,
    *,
    checkpoint: str | Path | None = None,
    lora: str | None = None,
    num_classes: int | None = None,
    mode: Mode = "eval",
    loss: str = "cross-entropy",
    reduction: str = "mean",
    seed: int = 0,
) -> LanguageVictim:
    """`hf:NAME_OR_FOLDER` for a task, from the hub or a folder, never with code of its own.

    Args:
        task: one of `TASKS`.
        checkpoint: a state dict to load over it.
        lora: see `leakaudit.models.lora.Lora.parse`; the base model is frozen then.
        num_classes: of classification; None for what the model's configuration says.
        seed: of parameters that the files do not hold, such as a new head.

    Raises `InputError` for a model or tokenizer that cannot be had or do not belong together.
    """
    if task not in _CLASSES:
        given = "no task given" if task is None else f"unknown task {task!r}{suggest(task, TASKS)}"
        raise InputError(f"{given} for model {spec}; accepted by --task: {', '.join(TASKS)}")
    name = spec.removeprefix("hf:").strip()
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = _pretrained(AutoConfig, name, "configuration")
        if task == "classification" and num_classes is not None:
            config.num_labels = num_classes
        module, info = _pretrained(
            _CLASSES[task],
            name,
            f"{task} model",
            config=config,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
        adapter = None if lora is None else Lora.parse(lora)
        if adapter is not None:
            attach(module, adapter, head=_head(module, task))
        tokenizer = _tokenizer(name)
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    fresh = sorted(info["missing_keys"])
    if adapter is not None and adapter.folder is None:
        fresh += [parameter for parameter, _ in module.named_parameters() if ".lora_" in parameter]
    victim = language_victim(module, tokenizer, task, mode, loss, reduction, name=spec)
    return replace(victim, fresh=() if checkpoint is not None else tuple(fresh), lora=lora)


def victim_of_pretrained(
    module: nn.Module,
    task: Task,
    checkpoint: str | Path | None = None,
    loss: str = "cross-entropy",
    reduction: str = "mean",
) -> LanguageVictim:
    """A user's own transformers module, copied, with the tokenizer of where it was loaded from, if any.

    Raises `InputError` for a module that is not transformers', or does not do the task.
    """
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel):
        raise InputError(f"task {task} is of language models; {name} is no model of transformers")
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    origin = module.name_or_path
    with _quiet():
        tokenizer = _tokenizer(origin) if origin else None
    victim = language_victim(module, tokenizer, task, "eval", loss, reduction, name=name)
    victim.module.set_attn_implementation("eager")  # others cannot be differentiated twice
    with torch.no_grad():
        shape = tuple(victim.logits(victim.params, victim.probe()).shape)
    if (len(shape) == 2) != (task == "classification"):
        raise InputError(f"{name} returns scores of shape {shape}, which do not fit task {task}")
    return victim


def _head(module: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """Parameters outside the base model of a classifier, which LoRA trains in full, as PEFT does."""
    if task != "classification":
        return ()
    prefix = f"{module.base_model_prefix}."
    return tuple(name for name, _ in module.named_parameters() if not name.startswith(prefix))


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """None for a model without; transformers then makes up one of special tokens alone for some families."""
    try:
        found = _nearest(AutoTokenizer, name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):
        return None
    return found if len(found) > len(found.all_special_ids) else None


def _nearest(kind: Any, name: str, **options: Any) -> Any:
    """From a folder or the hub's files on this machine; over the network only where they are not."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, local_files_only=True, **options)
    except OSError:
        if Path(name).exists():
            raise
        return kind.from_pretrained(name, trust_remote_code=False, **options)


def _pretrained(kind: Any, name: str, what: str, **options: Any) -> Any:
    try:
        return _nearest(kind, name, **options)
    except Exception as error:  # the hub, the network, the files: all of them fail in their own ways
        raise InputError(
            f"hf:{name}: its {what} cannot be had ({first_line(error)}); accepted: a model of the hub (needs a"
            " network or HF_HOME) or a folder written by save_pretrained"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports on loading, nor the hub's on every vain try to reach it; what was freshly
    initialised is in `LanguageVictim.fresh`."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = getLogger("huggingface_hub")
    level = hub.level
    logging.set_verbosity(ERROR)
    hub.setLevel(ERROR)
    show_bars: Any = (logging.disable_progress_bar, logging.enable_progress_bar)
    show_bars[False]()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        hub.setLevel(level)
        show_bars[bars]()
