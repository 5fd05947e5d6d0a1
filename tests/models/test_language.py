"""Language models as victims: names, inputs and losses against transformers itself, for every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_transformers import (
    CASES,
    CLASSES,
    FAMILIES,
    LONGEST,
    VOCABULARY,
    labels_for,
    random_sentences,
    small_model,
    small_victim,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from leakaudit.bundled import tiny_model
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import load_checkpoint, save_checkpoint
from leakaudit.models.architectures import ARCHITECTURES
from leakaudit.models.language import IGNORED, LanguageVictim, Task, language_victim
from leakaudit.models.pretrained import load_language_victim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.rounds import parameter_gradient

DECODERS = [name for name, family in FAMILIES.items() if family.causal]
LEARNT = [name for name, family in FAMILIES.items() if family.position is not None]


def test_every_family_of_the_table_is_tested() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


# ------------------------------------------------------------------------------------- where things are


@pytest.mark.parametrize(("name", "task"), CASES)
def test_names_are_those_of_transformers(name: str, task: Task) -> None:
    family, victim = FAMILIES[name], small_victim(name, task)
    word = victim.module.get_parameter(f"{family.base}.{family.word}")
    assert victim.module.get_parameter(victim.word) is word  # tied, it may go by its other name
    assert victim.word in victim.params
    assert victim.position == (family.position and f"{family.base}.{family.position}")
    assert victim.first_position == family.first
    assert victim.depth == 2
    assert victim.space.max_length == LONGEST
    assert victim.word_rows.shape == (VOCABULARY, victim.hidden)
    assert [place for place, _ in victim.projections(0)] == [
        f"{family.base}.{path}" for path in family.inputs
    ]
    assert victim.architecture is not None
    assert victim.architecture.causal == family.causal
    assert victim.num_classes == (CLASSES if task == "classification" else VOCABULARY)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_words_and_positions_in_use_have_a_gradient(name: str) -> None:
    victim = small_victim(name, "classification")
    x = random_sentences(7)
    gradient = parameter_gradient(victim, victim.params, x, torch.tensor([1]))
    assert gradient[victim.word].any(dim=1).nonzero().flatten().tolist() == x.unique().tolist()
    if victim.position is not None:
        first = victim.first_position
        used = gradient[victim.position].any(dim=1).nonzero().flatten().tolist()
        assert used == list(range(first, first + 7))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_inputs_are_what_the_projections_get(name: str, layer: int) -> None:
    victim = small_victim(name, "classification")
    x = random_sentences(9, 9)
    paths = [f"{FAMILIES[name].base}.{path}".replace(".0.", f".{layer}.") for path in FAMILIES[name].inputs]
    seen: list[Tensor] = []
    for path in paths:
        module = victim.module.get_submodule(path)
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    victim.module(input_ids=x)
    assert len(seen) == len(paths)
    found = victim.attention_inputs(x, layer)
    assert found.shape == (2, 9, 32)
    assert not found.requires_grad
    for entered in seen:
        torch.testing.assert_close(found, entered)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_inputs_are_the_normalised_hidden_states(name: str, layer: int) -> None:
    victim, norm = small_victim(name, "classification"), FAMILIES[name].norm
    x = random_sentences(9, 9, seed=1)
    base = victim.module.base_model
    with torch.no_grad():
        expected = base(input_ids=x, output_hidden_states=True).hidden_states[layer]
        if norm is not None:
            expected = base.get_submodule(norm.format(layer))(expected)
    torch.testing.assert_close(victim.attention_inputs(x, layer), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_sees_only_what_came_before(name: str) -> None:
    victim = small_victim(name, "causal-lm")
    x = random_sentences(9)
    changed = x.clone()
    changed[0, 6] = (x[0, 6] + 1 - 5) % 50 + 5
    before, after = victim.attention_inputs(x, 1), victim.attention_inputs(changed, 1)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_what_enters_the_head_times_its_weight_is_the_score(name: str, task: Task) -> None:
    victim = small_victim(name, task)
    x = random_sentences(6, 6)
    with torch.no_grad():
        logits = victim.logits(victim.params, x)
    features = victim.head_inputs(x)
    if task == "classification":
        assert victim.output is None
        assert not victim.tied
        head = victim.classifier()
        assert head is not None
        weight, bias = head.weight, head.bias
    else:
        assert victim.output is not None
        weight, bias = victim.output
    assert features is not None
    expected = features.detach() @ victim.params[weight].T + (victim.params[bias] if bias else 0.0)
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_tied_means_one_parameter_for_words_and_scores(name: str, tie: bool) -> None:
    task: Task = "causal-lm" if FAMILIES[name].causal else "mlm"
    victim = small_victim(name, task, tie_word_embeddings=tie)
    module: Any = victim.module
    assert victim.tied == (module.get_output_embeddings().weight is module.get_input_embeddings().weight)
    assert victim.tied == tie
    assert (victim.output is not None and victim.output[0] == victim.word) == tie
    assert not small_victim(name, "classification", tie_word_embeddings=tie).tied


# ------------------------------------------------------------------------------------------ the loss


def reference_loss(module: Any, task: Task, x: Tensor, y: Tensor, padding: int) -> Tensor:
    """As transformers computes it, from numbers padded and masked by hand."""
    there = x != NO_TOKEN
    return module(
        input_ids=x.masked_fill(~there, padding), attention_mask=there.long(), labels=y.clone()
    ).loss


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("lengths", [(8,), (8, 8), (9, 4, 6)])
def test_the_loss_is_that_of_transformers(name: str, task: Task, lengths: tuple[int, ...]) -> None:
    module = small_model(name, task)
    if module.config.pad_token_id is None:
        module.config.pad_token_id = VOCABULARY - 1  # as people do: the last token ends sentences
    victim = language_victim(module, None, task, name=name)
    x = random_sentences(*lengths, seed=2)
    y = labels_for(task, x, seed=2)
    expected = reference_loss(module, task, x, y, module.config.pad_token_id)
    torch.testing.assert_close(victim.loss(victim.params, x, y), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_one_sentence_of_any_last_token_is_scored_at_its_end(name: str) -> None:
    """Without a padding token transformers scores the last token, whichever it is."""
    module = small_model(name, "classification")
    victim = language_victim(module, None, "classification", name=name)
    module.config.pad_token_id = None
    for last in {0, 2, 5} - {victim.filler}:
        x = torch.tensor([[7, 8, 9, last]])
        expected = module(input_ids=x, labels=torch.tensor([1])).loss
        torch.testing.assert_close(victim.loss(victim.params, x, torch.tensor([1])), expected)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_embeddings_in_place_of_tokens_give_the_same_scores(name: str, task: Task) -> None:
    victim = small_victim(name, task)
    x = random_sentences(8, 3, 5, seed=3)
    there = (x != NO_TOKEN)[..., None]
    rows = victim.word_rows[x.clamp(min=0)].masked_fill(~there, torch.nan)
    with torch.no_grad():
        tokens, embedded = victim.logits(victim.params, x), victim.logits(victim.params, rows)
    if task != "classification":
        tokens, embedded = tokens[there[..., 0]], embedded[there[..., 0]]
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded, tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_short_row_is_scored_as_if_it_were_alone(name: str, task: Task) -> None:
    victim = small_victim(name, task)
    x = random_sentences(9, 4, 7, seed=4)
    with torch.no_grad():
        together = victim.logits(victim.params, x)
        for row, scores in zip(x, together, strict=True):
            alone = row[row != NO_TOKEN][None]
            expected = victim.logits(victim.params, alone)[0]
            found = scores if task == "classification" else scores[: alone.shape[1]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "mlm"), ("gpt2", "causal-lm"), ("roberta", "classification")]
)
def test_the_sum_counts_every_labelled_place(name: str, task: Task) -> None:
    module = small_model(name, task)
    mean = language_victim(module, None, task)
    total = language_victim(module, None, task, reduction="sum")
    x = random_sentences(6, 4)
    y = labels_for(task, x)
    scored = y[:, 1:] if task == "causal-lm" else y
    places = int((scored != IGNORED).sum())
    assert places > 1
    torch.testing.assert_close(total.loss(total.params, x, y), places * mean.loss(mean.params, x, y))


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "mlm"), ("distilbert", "classification"), ("gpt2", "causal-lm"), ("gpt2", "classification")],
)
def test_gradients_are_finite_differences(name: str, task: Task) -> None:
    victim = small_victim(name, task).to(dtype=torch.float64)
    x = random_sentences(6, 4)
    y = labels_for(task, x)
    gradient = parameter_gradient(victim, victim.params, x, y)
    assert gradient.keys() == victim.params.keys()
    generator = torch.Generator().manual_seed(0)
    for parameter in victim.params:
        direction = torch.randn(victim.params[parameter].shape, generator=generator, dtype=torch.float64)
        step = 1e-5

        def loss(size: float, parameter: str = parameter, direction: Tensor = direction) -> Tensor:
            moved = victim.params[parameter] + size * direction
            return victim.loss({**victim.params, parameter: moved}, x, y)

        difference = (loss(step) - loss(-step)) / (2 * step)
        torch.testing.assert_close(
            (gradient[parameter] * direction).sum(), difference, rtol=1e-5, atol=1e-8, msg=parameter
        )


def test_dropout_is_on_in_train_mode_only() -> None:
    victim = small_victim("bert", "classification", hidden_dropout_prob=0.5)
    x = random_sentences(8)
    with torch.no_grad():
        first, second = (victim.logits(victim.params, x) for _ in range(2))
        training = victim.with_mode("train")
        noisy = [training.logits(training.params, x) for _ in range(2)]
    assert torch.equal(first, second)
    assert not torch.equal(noisy[0], noisy[1])
    assert (victim.mode, training.mode) == ("eval", "train")
    assert not victim.module.training
    assert torch.equal(training.with_mode("eval").logits(victim.params, x), first)


# --------------------------------------------------------------------------------------- loading


def test_the_bundled_models_load_and_name_their_new_head() -> None:
    whole = load_language_victim(f"hf:{tiny_model('bert')}", "mlm")
    assert whole.fresh == ()
    assert whole.tied
    victim = load_language_victim(f"hf:{tiny_model('bert')}", "classification", num_classes=4)
    assert {"classifier.weight", "classifier.bias"} <= set(victim.fresh) <= set(victim.params)
    assert victim.num_classes == 4
    assert victim.params["classifier.weight"].shape == (4, 96)
    again = load_language_victim(f"hf:{tiny_model('bert')}", "classification", num_classes=4)
    other = load_language_victim(f"hf:{tiny_model('bert')}", "classification", num_classes=4, seed=1)
    assert torch.equal(victim.params["classifier.weight"], again.params["classifier.weight"])
    assert not torch.equal(victim.params["classifier.weight"], other.params["classifier.weight"])
    assert load_language_victim(f"hf:{tiny_model('gpt2')}", "classification").fresh == ("score.weight",)


def test_loading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    load_language_victim(f"hf:{tiny_model('bert')}", "classification")
    assert torch.equal(state, torch.get_rng_state())


def test_an_unknown_family_has_no_architecture() -> None:
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(
            "albert",
            vocab_size=VOCABULARY,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=LONGEST,
        )
        module = AutoModelForSequenceClassification.from_config(config)
    victim = language_victim(module, None, "classification")
    assert victim.architecture is None
    assert victim.position is None
    assert victim.depth == 0
    assert victim.word == "albert.embeddings.word_embeddings.weight"
    x = random_sentences(6, 4)
    gradient = parameter_gradient(victim, victim.params, x, torch.tensor([0, 1]))
    used = gradient[victim.word].any(dim=1).nonzero().flatten().tolist()
    assert used == [token for token in x.unique().tolist() if token != NO_TOKEN]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_tokenizer_of_another_vocabulary_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("bert"))
    with pytest.raises(InputError) as error:
        language_victim(small_model("bert", "mlm"), tokenizer, "mlm", name="small")
    assert "the tokenizer of small has 800 tokens, the model takes 60" in one_line(error)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "no task given"),
        ("mlmm", "unknown task 'mlmm'"),
        ("causal_lm", "accepted by --task: classification, mlm, causal-lm"),
    ],
)
def test_an_unknown_task_is_refused(task: str | None, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_language_victim(f"hf:{tiny_model('bert')}", task)
    assert message in one_line(error)


def test_folders_without_a_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{ not json")
    for folder in (tmp_path / "missing", empty, broken):
        with pytest.raises(InputError) as error:
            load_language_victim(f"hf:{folder}", "mlm")
        assert "its configuration cannot be had" in one_line(error)
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    shutil.copy(tiny_model("bert") / "config.json", weightless)
    with pytest.raises(InputError) as error:
        load_language_victim(f"hf:{weightless}", "mlm")
    assert "its mlm model cannot be had" in one_line(error)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    config = {
        "model_type": "trap",
        "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForMaskedLM": "trap.Trap"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_language_victim(f"hf:{tmp_path}", "mlm")
    assert not (tmp_path / "sprung").exists()


def test_a_decoder_has_no_masked_head() -> None:
    with pytest.raises(InputError, match="its mlm model cannot be had"):
        load_language_victim(f"hf:{tiny_model('gpt2')}", "mlm")


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_shows_numbers(name: str, tmp_path: Path) -> None:
    small_model(name, "classification").save_pretrained(tmp_path)
    victim = load_language_victim(f"hf:{tmp_path}", "classification")
    assert victim.space.tokenizer is None
    assert victim.space.decode(torch.tensor([[5, 6, NO_TOKEN]])) == ["#5 #6"]


# ----------------------------------------------------------------------------------- checkpoints

TIED: list[tuple[str, Task]] = [("bert", "mlm"), ("gpt2", "causal-lm"), ("roberta", "mlm")]


def perturbed(name: str, task: Task, folder: Path) -> nn.Module:
    """A model whose folder has other weights than the model returned."""
    small_model(name, task, seed=0, tie_word_embeddings=True).save_pretrained(folder)
    return small_model(name, task, seed=1, tie_word_embeddings=True)


def assert_loaded(victim: LanguageVictim, trained: nn.Module) -> None:
    assert victim.tied
    expected = dict(trained.named_parameters())
    assert victim.params.keys() == expected.keys()
    for name, tensor in victim.params.items():
        assert torch.equal(tensor, expected[name]), name
    module: Any = victim.module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


@pytest.mark.parametrize(("name", "task"), TIED)
def test_a_checkpoint_of_ours_with_tied_weights_loads(name: str, task: Task, tmp_path: Path) -> None:
    trained = perturbed(name, task, tmp_path / "model")
    save_checkpoint(trained, tmp_path / "trained.safetensors")
    victim = load_language_victim(
        f"hf:{tmp_path / 'model'}", task, checkpoint=tmp_path / "trained.safetensors"
    )
    assert_loaded(victim, trained)
    assert victim.fresh == ()


@pytest.mark.parametrize(("name", "task"), TIED)
def test_a_checkpoint_of_transformers_has_tied_weights_once(name: str, task: Task, tmp_path: Path) -> None:
    trained = perturbed(name, task, tmp_path / "model")
    trained.save_pretrained(tmp_path / "trained")  # type: ignore[operator]
    file = tmp_path / "trained" / "model.safetensors"
    assert load_file(file).keys() < trained.state_dict().keys()
    victim = load_language_victim(f"hf:{tmp_path / 'model'}", task, checkpoint=file)
    assert_loaded(victim, trained)


def test_a_name_that_is_missing_and_not_tied_is_still_told(tmp_path: Path) -> None:
    trained = perturbed("bert", "mlm", tmp_path / "model")
    state = dict(trained.named_parameters())
    del state["bert.encoder.layer.1.output.dense.bias"]
    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(bert.encoder.layer.1.output.dense.bias\)"):
        load_language_victim(f"hf:{tmp_path / 'model'}", "mlm", checkpoint=tmp_path / "c.safetensors")


def test_a_tied_weight_may_not_be_missing_under_all_its_names(tmp_path: Path) -> None:
    trained = perturbed("bert", "mlm", tmp_path / "model")
    word = "bert.embeddings.word_embeddings.weight"
    state = {n: t.detach().clone() for n, t in trained.named_parameters() if n != word}
    save_file(state, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="missing"):
        load_checkpoint(small_model("bert", "mlm", tie_word_embeddings=True), tmp_path / "c.safetensors")
