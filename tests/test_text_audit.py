"""Audits of text from capture to report, on the bundled tiny models: the way, its findings, and bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from tiny_audits import Runner, runner, timeless, words
from tiny_text import (
    BERT,
    CASES,
    GPT2,
    TEXTS,
    PositionRows,
    batch_of,
    registered_attack,
    text_victim,
    text_view,
)
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import leakaudit
from leakaudit.attacks import registry
from leakaudit.attacks.base import Reconstruction
from leakaudit.attempts import AttemptStore
from leakaudit.bundled import labelled_sentences, sentences, tiny_model
from leakaudit.capture import capture
from leakaudit.data import photo_folder
from leakaudit.errors import InputError
from leakaudit.execution import Plan, run_attacks
from leakaudit.formats.reading import read_file
from leakaudit.media import medium_of
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.randomness import fork
from leakaudit.report.folder import read_run
from leakaudit.results import AuditResult, Finding
from leakaudit.rounds import Round, client_update
from leakaudit.subject import Sources, open_update
from leakaudit.text_data import load_truth
from leakaudit.text_inspection import inspect_text
from leakaudit.threat import known
from leakaudit.update import Update

SENTENCE = TEXTS[0]


@pytest.fixture(autouse=True)
def rows() -> Iterator[str]:
    with registered_attack() as name:
        yield name


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    (tmp_path / "notes.tsv").write_text(f"sentence\tlabel\n{TEXTS[0]}\t1\n{TEXTS[1]}\t0\n")
    return runner(monkeypatch, capsys, tmp_path)


def captured(run: Runner, *options: object, model: str = BERT, task: str = "classification") -> str:
    done = run(
        "capture", "--model", model, "--task", task, "--text", "notes.tsv", "--out", "shared.safetensors",
        "--truth", "truth.safetensors", "--force", *options,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done.out


def attacked(run: Runner, *options: object, model: str = BERT, code: int = 1) -> AuditResult:
    done = run(
        "attack", "shared.safetensors", "--model", model, "--attack", "test-rows", "--device", "cpu",
        "--out", "out", "--force", *options,
    )  # fmt: skip
    assert done.code == code, (done.err, done.out)
    return read_run(Path("out"))


def named(findings: list[Finding] | tuple[Finding, ...], name: str) -> Finding | None:
    return next((finding for finding in findings if finding.name == name), None)


# ------------------------------------------------------------------ the whole way


def test_labels_that_cancel_are_no_noise() -> None:
    """The last layer's gradient of two examples is then all rounding, but rows of words are exactly zero."""
    victim = text_victim()
    batch = batch_of(victim, 2)
    x = torch.cat([batch.tokens[:1], batch.tokens[:1]])
    view, _ = text_view(victim, 2)
    update = client_update(victim, victim.params, view.round, x, torch.tensor([0, 1])).detach()
    residue = dict(update.items())
    residue["classifier.weight"] = 1e-8 * torch.randn(2, victim.hidden, generator=fork(0, "rounding"))
    found = inspect_text(replace(view, observed=Update(residue)), generator=fork(0, "inspection"))
    assert found.noise_std is None
    assert named(found.findings, "bag of tokens") is not None


def test_the_truth_of_another_client_is_no_good_news(run: Runner) -> None:
    captured(run)
    assert run(
        "capture", "--model", BERT, "--task", "classification", "--text", "notes.tsv", "--start", 1,
        "--out", "other.safetensors", "--truth", "other-truth.safetensors",
    ).code == 0  # fmt: skip
    result = attacked(run, "--truth", "other-truth.safetensors")
    assert result.verdict.headline == "The shared update determines the private text."
    assert "does not belong to this update" in result.verdict.reasons[-1]
    captured(run, "--defense", "gaussian-noise:std=1e-5")
    result = attacked(run, "--truth", "other-truth.safetensors", "--noise-std", "0.1", code=3)
    warning = named(result.findings, "truth")
    assert warning is not None
    assert warning.data["own"] > 1.5 * warning.data["reached"]


def test_capture_inspect_attack_report(run: Runner, tmp_path: Path) -> None:
    out = captured(run)
    assert "Truth: truth.safetensors" in out
    assert "initialised at random: bert.pooler.dense.bias" in words(out)
    manifest = read_file(tmp_path / "shared.safetensors").manifest
    assert (manifest.task, manifest.model, manifest.num_classes) == ("classification", BERT, 2)
    assert manifest.normalisation is None
    assert manifest.input_shape is None
    assert manifest.lora is None

    looked = run("inspect", "shared.safetensors", "--model", BERT, "--json")
    assert looked.code == 0
    found = {finding["name"]: finding for finding in json.loads(looked.out)}
    assert found["bag of tokens"]["severity"] == "leak"
    assert found["bag of tokens"]["data"]["proven"] is True
    assert found["longest sentence"]["data"]["length"] == len(text_victim().space.encode([SENTENCE])[0][0])
    assert found["labels"]["data"]["counts"] == {"1": 1}

    result = attacked(run, "--truth", "truth.safetensors", "--html", "page/own.html")
    assert result.medium == "text"
    assert result.verdict.headline == "Private text was reconstructed."
    assert result.verdict.policy == "token-accuracy>0.5,words-f1>0.5,rouge-l>0.5"
    assert result.model.task == "classification"
    assert not {row.name for row in result.knowledge} & {"normalisation", "statistics"}
    best = result.best_trial
    assert best is not None
    scores = {score.metric: score for score in best.scores}
    assert {"token-accuracy", "bag-f1", "rouge-1", "rouge-2", "rouge-l", "exact-match"} <= set(scores)
    assert all(scores[name].value == 1 for name in ("token-accuracy", "rouge-l", "label-accuracy"))
    assert scores["rouge-l"].chance is not None
    assert scores["rouge-l"].chance < 0.4
    (example,) = best.examples
    assert (example.true_label, example.recovered_label) == ("1", "1")
    assert all(token.right for token in example.recovered_tokens or [])
    assert [t.text for t in example.recovered_tokens or []] == [t.text for t in example.original_tokens or []]
    assert [frame.iteration for frame in best.strip] == [0, 1]
    assert not any(token.right for token in best.strip[0].sentences[0])
    assert best.verification is not None
    assert best.verification.text.startswith("verified exact: ")
    assert {control.name: control.passed for control in result.controls} == {"floor": True, "positive": None}

    kept = load((tmp_path / "out" / "reconstruction.safetensors").read_bytes())
    assert torch.equal(kept["tokens"], load_truth(tmp_path / "truth.safetensors").sentences)
    page = (tmp_path / "page" / "own.html").read_text()
    assert "Private text was reconstructed." in page
    assert run("report", "out", "--html", "again.html").code == 0


def test_a_resumed_audit_reads_its_attempts_back(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    captured(run)
    first = attacked(run)

    def never(*_: object) -> None:
        raise AssertionError("the attempt was not read back")

    monkeypatch.setattr(PositionRows, "run", never)
    assert timeless(attacked(run)) == timeless(first)


def test_without_the_truth_verification_decides(run: Runner) -> None:
    captured(run)
    result = attacked(run)
    assert result.verdict.headline == "The shared update determines the private text."
    assert result.best_trial is not None
    assert result.best_trial.examples[0].original_tokens is None
    assert all(token.right is None for token in result.best_trial.examples[0].recovered_tokens or [])


def test_the_words_alone_are_a_leak(run: Runner) -> None:
    """No attack applies to two sentences; the rows of the word embedding prove what was written."""
    captured(run, "--batch-size", "2")
    result = attacked(run)
    assert result.best is None
    assert result.verdict.headline == "The words of the private text are in the shared update."
    assert "cat" in result.verdict.reasons[0]


def test_redaction_leaves_no_original(run: Runner, tmp_path: Path) -> None:
    captured(run)
    result = attacked(run, "--truth", "truth.safetensors", "--redact")
    assert result.redacted
    assert result.best_trial is not None
    (example,) = result.best_trial.examples
    assert (example.original_tokens, example.true_label) == (None, None)


def test_an_attack_on_images_is_skipped_with_its_reason(run: Runner) -> None:
    captured(run)
    result = attacked(run, "--attack", "dlg")
    assert [(s.attack, s.reason) for s in result.skipped] == [
        ("dlg", "it reconstructs images, this model takes text")
    ]


def test_an_attack_on_text_is_skipped_on_images(run: Runner, tmp_path: Path) -> None:
    done = run("capture", "--model", "lenet", "--data", photo_folder(), "--out", "shared.safetensors")
    assert done.code == 0, done.err
    result = attacked(run, "--checkpoint", "model.safetensors", model="lenet", code=3)
    assert result.skipped[0].reason == "it reconstructs text, this model takes images"
    assert result.medium == "images"


@pytest.mark.parametrize(("model", "task"), CASES)
def test_api_audit(tmp_path: Path, model: str, task: str) -> None:
    """Every task goes through; only the classifier's sentence can be found by this attack."""
    result = leakaudit.audit(
        f"hf:{tiny_model(model)}", text=labelled_sentences(), task=task, attacks=["test-rows"],  # type: ignore[arg-type]
        out=tmp_path / "run",
    ) if task == "classification" else leakaudit.audit(
        f"hf:{tiny_model(model)}", text=labelled_sentences(), task=task, attacks=["dlg"], out=tmp_path / "run"
    )  # fmt: skip
    assert (result.medium, result.model.task) == ("text", task)
    assert result.truth_known
    if task == "classification":
        assert result.verdict.status == "leaks"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "shared.safetensors", "truth.safetensors", "model.safetensors", "result.json", "report.html",
    }  # fmt: skip


def test_the_demo_recovers_both_sentences(run: Runner, tmp_path: Path) -> None:
    done = run("demo", "--text", "--out", "demo")
    assert done.code == 0, done.err
    assert words(done.out).count("Private text was reconstructed.") >= 2
    strip = read_run(tmp_path / "demo" / "dlg").trials[0].strip
    assert len(strip) > 3  # of the optimiser at work, which may run out of time
    for name in ("gpt2", "bert"):
        best = read_run(tmp_path / "demo" / name).best_trial
        assert best is not None
        assert {score.metric: score.value for score in best.scores}["exact-match"] == 1
        assert best.verification is not None
        assert best.verification.status == "verified"
        assert (tmp_path / "demo" / name / "report.html").is_file()


def test_the_positive_control_is_a_bundled_sentence(run: Runner, tmp_path: Path) -> None:
    """Behind loud noise nothing is recovered, while the same attack finds the undefended sentence."""
    captured(run, "--defense", "gaussian-noise:std=1e-3")
    result = attacked(run, "--truth", "truth.safetensors", "--fail-on", "exact-match>0.9", code=0)
    assert result.verdict.status == "not-recovered"
    assert result.verdict.headline == "No attack that ran recovered the private text."
    positive = {control.name: control for control in result.controls}["positive"]
    assert positive.passed
    assert positive.text.endswith("on the undefended gradient of one sentence succeeded.")


@pytest.mark.parametrize(("model", "task"), CASES)
def test_the_control_fits_the_task(model: str, task: str) -> None:
    victim = text_victim(model, task)
    view, _ = text_view(victim)
    example = medium_of(victim).control(view)
    assert example.texts == sentences()[:1]
    assert (example.tokens != NO_TOKEN).sum() <= victim.space.max_length
    blind = replace(view, victim=replace(victim, space=replace(victim.space, tokenizer=None)))
    x, y = medium_of(victim).tensors(victim, medium_of(victim).control(blind))
    assert victim.loss(victim.params, x, y).isfinite()


# ------------------------------------------------------------------ what the client does


def test_dropout_is_seeded_and_leaves_the_global_stream_alone() -> None:
    victim = text_victim().with_mode("train")
    assert victim.mode_matters
    batch = batch_of(victim)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = capture(victim, batch, Round(1), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    same, other = capture(victim, batch, Round(1), seed=3), capture(victim, batch, Round(1), seed=4)
    assert torch.equal(first.update.flat(), same.update.flat())
    assert not torch.equal(first.update.flat(), other.update.flat())
    calm = capture(victim.with_mode("eval"), batch, Round(1), seed=3)
    assert not torch.equal(first.update.flat(), calm.update.flat())


def test_dropout_is_a_warning_and_attacks_simulate_without(run: Runner) -> None:
    captured(run, "--mode", "train")
    result = attacked(run, "--truth", "truth.safetensors")
    assert result.model.mode == "eval"
    assert {row.name: row.text for row in result.knowledge}["mode"] == "train"
    warning = named(result.findings, "dropout")
    assert warning is not None
    assert warning.severity == "warning"
    assert result.best_trial is not None
    assert result.best_trial.verification is not None
    assert result.best_trial.verification.status == "not-matched"


def test_a_fresh_head_is_named(run: Runner) -> None:
    captured(run, "--save-model", "model.safetensors")
    fresh = named(attacked(run).findings, "fresh parameters")
    assert fresh is not None
    assert fresh.severity == "info"
    assert "classifier.weight" in fresh.text
    assert "--checkpoint" in fresh.text
    given = attacked(run, "--checkpoint", "model.safetensors")
    assert named(given.findings, "fresh parameters") is None


def test_another_head_needs_the_clients_model(run: Runner) -> None:
    captured(run, "--seed", "5", "--save-model", "model.safetensors")
    done = run("attack", "shared.safetensors", "--model", BERT)
    assert done.code == 2
    assert "pass the checkpoint the client downloaded" in done.err
    assert attacked(run, "--checkpoint", "model.safetensors").verdict.status == "leaks"


def test_a_checkpoint_that_holds_tied_weights_once(run: Runner) -> None:
    """As transformers' own save_pretrained leaves them out."""
    folder = tiny_model("bert")
    captured(run, task="mlm")
    done = run("inspect", "shared.safetensors", "--model", BERT, "--checkpoint", folder / "model.safetensors")
    assert done.code == 0, done.err


def test_lora_updates_hold_the_adapters_only(run: Runner, tmp_path: Path) -> None:
    captured(run, "--lora", "rank=4,targets=query")
    raw = read_file(tmp_path / "shared.safetensors")
    assert raw.tensors is not None
    assert all("lora_" in name or name.startswith("classifier.") for name in raw.tensors)
    assert raw.manifest.lora == "rank=4,alpha=16,targets=query,rslora=false"
    opened = open_update(Sources(tmp_path / "shared.safetensors", BERT, device="cpu"))
    assert set(opened.view.observed) == set(opened.view.victim.params)
    truth = load_truth(tmp_path / "truth.safetensors")
    assert opened.view.residual(truth.tokens, truth.labels) < 1e-5
    assert named(opened.inspection.findings, "bag of tokens") is None


def test_a_strangers_file_names_no_folder_to_read(run: Runner, tmp_path: Path) -> None:
    captured(run, "--lora", "rank=4")
    tensors = load((tmp_path / "shared.safetensors").read_bytes())
    stated = json.loads(read_file(tmp_path / "shared.safetensors").manifest.to_json())
    (tmp_path / "adapters").mkdir()
    save_file(
        tensors, tmp_path / "bad.safetensors", {"leakaudit": json.dumps({**stated, "lora": "adapters"})}
    )
    done = run("inspect", "bad.safetensors", "--model", BERT)
    assert done.code == 2
    assert (
        done.err == "leakaudit: the update names the folder 'adapters' of its adapters; pass it as --lora\n"
    )


def test_several_local_steps_with_defenses(run: Runner, tmp_path: Path) -> None:
    captured(
        run, "--batch-size", "1", "--examples", "2", "--local-steps", "4", "--lr", "0.01",
        "--defense", "clip:max_grad_norm=0.5",
    )  # fmt: skip
    opened = open_update(Sources(tmp_path / "shared.safetensors", BERT, device="cpu"))
    assert opened.view.round == Round(2, 4, 1, 0.01)
    bag = named(opened.inspection.findings, "bag of tokens")
    truth = load_truth(tmp_path / "truth.safetensors")
    assert bag is not None
    assert set(bag.data["numbers"]) == set(truth.tokens[truth.tokens != NO_TOKEN].tolist())


# ------------------------------------------------------------------ in somebody's training loop


def test_save_in_a_training_loop_then_attack(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert")).eval()
    batch = batch_of(text_victim())
    model(input_ids=batch.tokens, labels=batch.labels).loss.backward()
    leakaudit.save_update(tmp_path / "shared.safetensors", model, batch_size=1, task="classification")
    result = leakaudit.attack(tmp_path / "shared.safetensors", model, attacks=["test-rows"])
    assert result.verdict.headline == "The shared update determines the private text."
    assert result.best_trial is not None
    tokens = [token.text for token in result.best_trial.examples[0].recovered_tokens or []]
    assert tokens == text_victim().space.pieces(batch.tokens[0]), "the tokenizer of where the model came from"


def test_save_with_tied_weights(tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(tiny_model("bert")).eval()
    before = copy.deepcopy(model.state_dict())
    batch = batch_of(text_victim("bert", "mlm"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=batch.tokens, labels=batch.labels).loss.backward()
    optimiser.step()
    leakaudit.save_update(
        tmp_path / "delta.safetensors", model, before=before, learning_rate=0.1, local_steps=1, batch_size=1,
        num_examples=1, task="mlm",
    )  # fmt: skip
    raw = read_file(tmp_path / "delta.safetensors")
    assert raw.tensors is not None
    assert "cls.predictions.decoder.weight" not in raw.tensors
    opened = open_update(Sources(tmp_path / "delta.safetensors", BERT, device="cpu"))
    assert opened.view.residual(batch.tokens, batch.labels) < 1e-4


def test_a_module_of_another_task_or_kind(tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(tiny_model("bert")).eval()
    batch = batch_of(text_victim("bert", "mlm"))
    model(input_ids=batch.tokens, labels=batch.labels).loss.backward()
    leakaudit.save_update(tmp_path / "shared.safetensors", model, batch_size=1)
    with pytest.raises(InputError, match="which do not fit task classification"):
        leakaudit.attack(tmp_path / "shared.safetensors", model, task="classification")
    with pytest.raises(InputError, match="or the task of a language model"):
        leakaudit.attack(tmp_path / "shared.safetensors", model)
    with pytest.raises(InputError, match="Linear is no model of transformers"):
        leakaudit.attack(tmp_path / "shared.safetensors", torch.nn.Linear(2, 2), task="mlm")


# ------------------------------------------------------------------ findings


@pytest.mark.parametrize("std", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("model", "task"), CASES)
def test_noise_is_seen_in_rows_that_should_be_zero(model: str, task: str, std: float) -> None:
    view, _ = text_view(text_victim(model, task))
    generator = fork(1, "noise")
    loud = view.observed.map(lambda t: t + std * torch.randn(t.shape, generator=generator))
    found = inspect_text(replace(view, observed=loud), generator=fork(0, "t"))
    assert found.noise_std == pytest.approx(std, rel=0.05)
    assert named(found.findings, "bag of tokens") is None


@pytest.mark.parametrize(("model", "task"), CASES)
def test_an_undefended_update_shows_no_noise(model: str, task: str) -> None:
    view, batch = text_view(text_victim(model, task), 2)
    found = inspect_text(view, generator=fork(0, "t"))
    assert found.noise_std is None
    longest = named(found.findings, "longest sentence")
    assert longest is not None
    assert longest.data["length"] == batch.tokens.shape[1]
    bag = named(found.findings, "bag of tokens")
    assert bag is not None
    seen = [row[row != NO_TOKEN][: -1 if task == "causal-lm" else None].tolist() for row in batch.tokens]
    assert set(bag.data["numbers"]) == {token for row in seen for token in row}, (
        "the last has no label to ask"
    )


def test_sentences_that_fill_every_position_show_no_noise() -> None:
    victim = text_victim("gpt2", "causal-lm")
    tokens = victim.space.encode(["word " * 70, " ".join(TEXTS) * 8])[0][:, :64]
    observed = client_update(victim, victim.params, Round(2), tokens, tokens).detach()
    view = replace(text_view(victim, 2)[0], observed=observed)
    assert inspect_text(view, generator=fork(0, "t")).noise_std is None


def test_pruning_leaves_some_of_the_words() -> None:
    view, batch = text_view(text_victim())
    flat = view.observed.flat().abs()
    least = float(flat.kthvalue(int(0.995 * len(flat))).values)
    pruned = view.observed.map(lambda t: t.where(t.abs() > least, torch.zeros_like(t)))
    found = inspect_text(replace(view, observed=pruned), generator=fork(0, "t"))
    assert named(found.findings, "pruning") is not None
    bag = named(found.findings, "bag of tokens")
    assert bag is not None
    assert "at least these tokens" in bag.text
    assert set(bag.data["numbers"]) < set(batch.tokens[0].tolist())


def test_weight_decay_is_no_noise() -> None:
    victim = text_victim()
    view, _ = text_view(victim)
    decayed = Update({name: t + 0.01 * victim.params[name] for name, t in view.observed.items()})
    found = inspect_text(replace(view, observed=decayed), generator=fork(0, "t"))
    assert found.noise_std is None
    warning = named(found.findings, "weight decay")
    assert warning is not None
    assert warning.severity == "warning"


def test_frozen_embeddings_are_said_to_be_missing() -> None:
    view, _ = text_view(text_victim())
    names = [name for name in view.observed if "embeddings" not in name]
    found = inspect_text(replace(view, observed=view.observed.select(names)), generator=fork(0, "t"))
    missing = named(found.findings, "missing parameters")
    assert missing is not None
    assert "bert.embeddings.word_embeddings.weight" in missing.data["names"]
    assert named(found.findings, "bag of tokens") is None


# ------------------------------------------------------------------ attempts


def test_attempts_keep_tokens_and_embeddings_of_a_strip(tmp_path: Path) -> None:
    view, batch = text_view(text_victim())
    frames = [batch.tokens, torch.randn(1, batch.tokens.shape[1], text_victim().hidden)]
    found = Reconstruction(
        x=batch.tokens, y=batch.labels, loss=0.5, iterations=2, stopped="finished",
        strip=[(i, 1.0, frame) for i, frame in enumerate(frames)],
    )  # fmt: skip
    store = AttemptStore(tmp_path, view, "spec", 0)
    store.put(0, found, 1.0)
    kept = store.get(0)
    assert kept is not None
    assert torch.equal(kept[0].x, batch.tokens)
    assert [torch.equal(a, b[2]) for a, b in zip(frames, kept[0].strip, strict=True)] == [True, True]


def test_embeddings_are_shown_as_the_nearest_words(tmp_path: Path) -> None:
    victim = text_victim()
    view, batch = text_view(victim, 2)
    rows = victim.word_rows[batch.tokens.clamp(min=0)]
    near = rows + 1e-4 * torch.randn(rows.shape, generator=fork(0, "t"))
    near[batch.tokens == NO_TOKEN] = torch.nan
    found = Reconstruction(x=near, y=batch.labels, loss=0.0, iterations=1, stopped="finished")
    tensors, metadata = medium_of(victim).contents(found, view)
    assert torch.equal(tensors["tokens"], batch.tokens)
    assert json.loads(metadata["texts"]) == victim.space.decode(batch.tokens)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", BERT, "--text", "notes.tsv"), "no task given for model hf:"),
        (("--model", BERT, "--text", "notes.tsv", "--task", "mml"), "did you mean 'mlm'?"),
        (("--model", BERT, "--data", "notes.tsv", "--task", "mlm"), "takes text, accepted: text"),
        (("--model", BERT, "--task", "mlm"), "no private data given; accepted: one of data"),
        (("--model", BERT, "--data", "a", "--text", "b"), "images a and sentences b given"),
        (("--model", "lenet", "--text", "notes.tsv"), "model lenet takes images, accepted: data"),
        (("--model", "lenet", "--data", "a", "--task", "mlm"), "task and lora are of language models"),
        (("--model", "lenet", "--data", "a", "--max-length", "4"), "max length 4 is of sentences"),
        (("--model", BERT, "--text", "no.txt", "--task", "mlm"), "cannot read no.txt"),
        (("--model", BERT, "--text", "empty.txt", "--task", "mlm"), "empty.txt holds no sentences"),
        (("--model", BERT, "--text", "long.txt", "--task", "mlm"), "long.txt:1 has"),
        (("--model", "hf:folder", "--text", "notes.tsv", "--task", "mlm"), "its configuration cannot be had"),
        (
            ("--model", BERT, "--text", "notes.tsv", "--task", "mlm", "--lora", "rank=0"),
            "rank must be at least 1",
        ),
        (
            ("--model", BERT, "--text", "notes.tsv", "--task", "mlm", "--lora", "targets=x"),
            "accepted as targets",
        ),
        (
            ("--model", BERT, "--text", "notes.tsv", "--task", "classification", "--batch-size", "3"),
            "notes.tsv holds 2 sentences, 3 from 0 on were asked for",
        ),
    ],
)
def test_a_bad_capture_is_one_line_and_code_2(
    run: Runner, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("word " * 99)
    (tmp_path / "folder").mkdir()
    done = run("capture", *options, "--out", "shared.safetensors")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert not (tmp_path / "shared.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "a model of the hub is fetched only when you pass it as --model"),
        (("--model", BERT, "--labels", "7"), "label 7 is not a class; accepted: 0 to 1"),
        (("--model", BERT, "--fail-on", "psnr>20"), "psnr does not measure text"),
        (("--model", BERT, "--metric", "ssim"), "metric ssim does not measure text"),
        (("--model", BERT, "--metric", "rogue-1"), "unknown metric 'rogue-1', did you mean 'rouge-1'?"),
        (("--model", BERT, "--task", "sing"), "task='sing'"),
        (("--model", BERT, "--task", "mlm"), "pass the checkpoint the client downloaded"),
        (("--model", GPT2), "pass the checkpoint the client downloaded"),
        (("--model", "lenet"), "task and lora are of language models"),
        (("--model", BERT, "--truth", "shared.safetensors"), "is not a truth file of sentences"),
        (("--model", BERT, "--truth", "truth.safetensors", "--pool", "none.txt"), "cannot read none.txt"),
        (("--model", BERT, "--attack", "position-row"), "unknown attack"),
    ],
)
def test_a_bad_attack_is_one_line_and_code_2(
    run: Runner, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    captured(run)
    done = run("attack", "shared.safetensors", "--out", "out", *options)
    assert done.code == 2, done.out
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


def test_gradients_of_another_architecture(tmp_path: Path) -> None:
    view, _ = text_view(text_victim("bert", "mlm"))
    save_file(dict(view.observed), tmp_path / "shared.safetensors")
    with pytest.raises(InputError, match=r"no parameter of model hf:.* has that shape"):
        leakaudit.attack(tmp_path / "shared.safetensors", GPT2, task="causal-lm")


def test_labels_of_a_language_model_are_the_text(run: Runner) -> None:
    captured(run, task="mlm")
    done = run("attack", "shared.safetensors", "--model", BERT, "--labels", "1")
    assert done.code == 2
    assert "those of task mlm are the private tokens themselves" in done.err


def test_a_truth_of_another_task_or_number(run: Runner, tmp_path: Path) -> None:
    captured(run, "--batch-size", "2")
    (tmp_path / "truth.safetensors").rename(tmp_path / "two.safetensors")
    captured(run, task="mlm")
    done = run("attack", "shared.safetensors", "--model", BERT, "--truth", "two.safetensors", "--out", "out")
    assert "two.safetensors is of task classification, the model's is mlm" in done.err
    captured(run)
    done = run("attack", "shared.safetensors", "--model", BERT, "--truth", "two.safetensors", "--out", "out")
    assert "two.safetensors holds 2 sentences, the update is of 1 example" in done.err
    assert done.code == 2


def test_a_tokenizer_with_a_larger_vocabulary(run: Runner, tmp_path: Path) -> None:
    """A folder whose tokenizer does not belong to its model."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((tiny_model("bert") / name).read_bytes())
    done = run(
        "capture", "--model", "hf:small", "--task", "mlm", "--text", "notes.tsv", "--out", "s.safetensors"
    )
    assert done.code == 2
    assert "tokens, the model takes 50; accepted: the tokenizer the model was trained with" in done.err


# ------------------------------------------------------------------ truth isolation


def test_nothing_changes_when_the_truth_is_overwritten(tmp_path: Path) -> None:
    victim = text_victim()
    view, batch = text_view(victim)
    view = replace(view, knowledge=replace(view.knowledge, labels=known(batch.labels.clone(), "test")))
    plan = Plan(attacks=("test-rows",), seed=4)
    left, _ = run_attacks(view, plan, tmp_path / "with")
    batch.tokens.fill_(3)
    batch.labels.fill_(0)
    right, _ = run_attacks(view, plan, tmp_path / "without")
    assert left[0].best is not None
    assert right[0].best is not None
    assert torch.equal(left[0].best.found.x, right[0].best.found.x)
    assert left[0].verification == right[0].verification


def test_no_view_holds_a_tensor_of_the_truth(run: Runner, tmp_path: Path) -> None:
    from test_truth_isolation import reachable_tensors

    captured(run)
    truth = load_truth(tmp_path / "truth.safetensors")
    opened = open_update(Sources(tmp_path / "shared.safetensors", BERT, device="cpu"))
    for tensor in reachable_tensors(opened.view):
        assert tensor.numel() != truth.tokens.numel() or tensor.dtype != torch.int64
    text = read_file(tmp_path / "shared.safetensors").manifest.to_json()
    assert "piano" not in text


def test_a_wrong_reconstruction_is_no_proof(tmp_path: Path) -> None:
    """The test's own attack, three tokens wrong: scored, not verified."""
    view, batch = text_view(text_victim())
    view = replace(view, knowledge=replace(view.knowledge, labels=known(batch.labels, "test")))
    registry.TEXT_ATTACKS["test-rows"] = registry.ATTACKS["test-rows"] = PositionRows(wrong=3)
    outcomes, _ = run_attacks(view, Plan(attacks=("test-rows",)), tmp_path)
    assert outcomes[0].verification is not None
    assert outcomes[0].verification.status == "not-matched"
