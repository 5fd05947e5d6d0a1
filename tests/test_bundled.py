"""The language models and sentences that ship with leakaudit."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import save_tiny_llama, tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from leakaudit.bundled import TinyModel, labelled_sentences, sentences, tiny_model
from leakaudit.errors import InputError

__all__ = ["tiny_llama"]

ROOT = Path(__file__).parents[1]
NAMES: tuple[TinyModel, ...] = ("bert", "gpt2")
HEADS: dict[str, Any] = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", refuse)


def refuse(*_: object) -> None:
    raise AssertionError("a bundled model reached for the network")


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def labelled() -> list[tuple[str, str]]:
    with labelled_sentences().open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == ["sentence", "label"]
    return [(sentence, label) for sentence, label in rows]


def test_there_are_varied_sentences() -> None:
    texts = sentences()
    assert len(texts) == len(set(texts)) == 327
    assert all(6 <= len(text.split()) <= 30 for text in texts)
    assert all(text == text.strip() and text.isascii() and text.isprintable() for text in texts)
    repeating = [text for text in texts if len(set(text.lower().split())) < len(text.split())]
    assert len(repeating) > 150
    assert sum(any(character.isdigit() for character in text) for text in texts) > 100


def test_labelled_sentences_are_balanced_and_unseen() -> None:
    rows = labelled()
    assert [label for _, label in rows].count("1") == [label for _, label in rows].count("0") == 20
    assert not {sentence for sentence, _ in rows} & set(sentences())


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"'llama'; accepted: bert, gpt2"):
        tiny_model("llama")  # type: ignore[arg-type]


def test_finding_the_files_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "from leakaudit.bundled import labelled_sentences, sentences, tiny_model\n"
        "assert tiny_model('bert').is_dir() and labelled_sentences().is_file() and sentences()\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_small_and_hold_no_pickle(name: TinyModel) -> None:
    files = [path for path in tiny_model(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_the_usual_ones(name: TinyModel) -> None:
    config = AutoConfig.from_pretrained(tiny_model(name))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 4)
    assert config.max_position_embeddings == 64
    assert config.tie_word_embeddings
    raw = json.loads((tiny_model(name) / "config.json").read_text())
    dropouts = {key: rate for key, rate in raw.items() if "drop" in key and isinstance(rate, float)}
    assert dropouts
    assert set(dropouts.values()) == {0.1}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_comes_from_the_file_and_embeddings_are_tied(name: TinyModel) -> None:
    model, found = HEADS[name].from_pretrained(tiny_model(name), output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == len(tokenizer_of(tiny_model(name)))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_classification_adds_a_head_and_nothing_else(name: TinyModel) -> None:
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tiny_model(name), num_labels=2, output_loading_info=True
    )
    assert {key.split(".")[-2] for key in found["missing_keys"]} <= {"classifier", "score", "dense"}
    inputs = tokenizer_of(tiny_model(name))(sentences()[0], return_tensors="pt")
    assert model.eval()(**inputs).logits.shape == (1, 2)


def test_tokenizers_hold_the_usual_special_tokens() -> None:
    pieces, bytes_ = tokenizer_of(tiny_model("bert")), tokenizer_of(tiny_model("gpt2"))
    assert len(pieces) == len(bytes_) == 800
    assert pieces.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == list(range(5))
    assert pieces.pad_token_id == 0
    assert {bytes_.bos_token, bytes_.eos_token, bytes_.unk_token} == {"<|endoftext|>"}
    assert bytes_.pad_token is None
    ids = pieces("The kettle", "is on")
    assert pieces.decode(ids["input_ids"]) == "[CLS] the kettle [SEP] is on [SEP]"
    assert sorted(set(ids["token_type_ids"])) == [0, 1]


def test_word_pieces_round_trip_up_to_case_and_spacing() -> None:
    tokenizer = tokenizer_of(tiny_model("bert"))
    for text in [*sentences(), *(sentence for sentence, _ in labelled()), "Zq7@x.org {42} ~#!"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert len(ids) <= 64
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(decoded.split()) == "".join(text.lower().split())


def test_bytes_round_trip_exactly() -> None:
    tokenizer = tokenizer_of(tiny_model("gpt2"))
    for text in [*sentences(), *(sentence for sentence, _ in labelled()), " Zq7@x  Ünïcödé 猫 🐈 , .\n"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert len(ids) <= 62  # room for <|endoftext|> at both ends
        assert tokenizer.decode(ids) == text


def language_loss(name: TinyModel, model: nn.Module, texts: list[str]) -> float:
    """Nats per predicted token: every fifth token masked, or the next token."""
    tokenizer = tokenizer_of(tiny_model(name))
    losses = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        inputs, labels = tokens.clone(), tokens.clone()
        if name == "bert":
            inputs[:, 3::5] = tokenizer.mask_token_id
            labels[inputs == tokens] = -100
        losses.append(model(input_ids=inputs, labels=labels).loss)
    return float(torch.stack(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize(("name", "gain_seen", "gain_unseen"), [("bert", 1.5, 0.8), ("gpt2", 2.5, 1.7)])
def test_training_brought_the_loss_down(name: TinyModel, gain_seen: float, gain_unseen: float) -> None:
    trained = HEADS[name].from_pretrained(tiny_model(name)).eval()
    fresh = HEADS[name].from_config(AutoConfig.from_pretrained(tiny_model(name))).eval()
    seen, unseen = list(sentences()[::8]), [sentence for sentence, _ in labelled()]
    for texts, gain in ((seen, gain_seen), (unseen, gain_unseen)):
        untrained = language_loss(name, fresh, texts)
        assert untrained == pytest.approx(math.log(800), abs=0.2)
        assert language_loss(name, trained, texts) < untrained - gain


def assert_double_backward(model: nn.Module, tokens: Tensor, *, causal: bool, tolerance: float) -> None:
    """The gradient of the squared norm of the parameters' gradient, by embedded token, against differences."""
    parameters = list(model.parameters())

    def squared_norm(embedded: Tensor) -> Tensor:
        logits = model(inputs_embeds=embedded).logits[0]  # with labels, causal losses are cast to float32
        loss = cross_entropy(logits[:-1], tokens[0, 1:]) if causal else cross_entropy(logits, tokens[0])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()  # type: ignore[operator]
    (second,) = torch.autograd.grad(squared_norm(embedded), embedded)
    step = 1e-6 * torch.randn_like(embedded)
    difference = (squared_norm(embedded + step) - squared_norm(embedded - step)) / 2
    torch.testing.assert_close((second * step).sum(), difference, rtol=tolerance, atol=0)
    reach = second[0].norm(dim=-1)  # nothing is predicted from a decoder's last token
    assert (reach[:-1] > 0).all()
    assert (reach[-1] == 0) == causal


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_works_with_eager_attention(name: TinyModel) -> None:
    folder = tiny_model(name)
    model = HEADS[name].from_pretrained(folder, attn_implementation="eager").eval().double()
    tokens = tokenizer_of(folder)(sentences()[1], return_tensors="pt")["input_ids"]
    assert_double_backward(model, tokens, causal=name == "gpt2", tolerance=1e-6)


def test_the_tiny_llama_is_fresh_and_repeatable(tiny_llama: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    other = save_tiny_llama(tmp_path / "other", seed=1)
    again = save_tiny_llama(tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny_llama, again, other)]
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval().double()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    tokens = tokenizer_of(tiny_llama)(sentences()[1], return_tensors="pt")["input_ids"]
    assert_double_backward(model, tokens, causal=True, tolerance=2e-3)  # norms and softmax are in float32


def test_wheel_and_sdist_hold_them() -> None:
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    included = build["wheel"]["force-include"]
    assert included["examples/sentences"] == "leakaudit/sentences"
    for name in NAMES:
        assert included[f"examples/tiny_models/{name}"] == f"leakaudit/tiny_models/{name}"
    assert all((ROOT / source).exists() for source in included)
    assert not any(
        (ROOT / "examples/tiny_models/build.py").is_relative_to(ROOT / source) for source in included
    )
    assert "examples" in build["sdist"]["include"]
