"""Low-rank adapters: the formula by autograd, and files as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_transformers import labels_for, random_sentences, small_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from leakaudit.errors import InputError
from leakaudit.formats.loading import load_update
from leakaudit.formats.manifest import Manifest
from leakaudit.models.language import LanguageVictim, Task, language_victim
from leakaudit.models.lora import Lora, LoraLinear, attach
from leakaudit.models.pretrained import load_language_victim
from leakaudit.rounds import Round, client_update, parameter_gradient

QUERY = "bert.encoder.layer.0.attention.self.query"
ATTENTION = "transformer.h.0.attn.c_attn"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    small_model("bert", "classification").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    small_model("gpt2", "causal-lm").save_pretrained(folder)
    return folder


def load(folder: Path, task: Task, lora: str | None) -> LanguageVictim:
    return load_language_victim(f"hf:{folder}", task, lora=lora)


def with_factors(victim: LanguageVictim, seed: int = 0) -> dict[str, Tensor]:
    """Trained parameters whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) / 8 if "lora_" in name else tensor
        for name, tensor in victim.params.items()
    }


# ------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_adapted_layer_computes_the_formula(kind: str, rank: int) -> None:
    base: Any = nn.Linear(6, 4) if kind == "linear" else Conv1D(4, 6)
    nn.init.normal_(base.bias)
    layer = LoraLinear(base, rank, scale=0.7)
    assert layer.lora_A.weight.shape == (rank, 6)
    assert layer.lora_B.weight.shape == (4, rank)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), base(x))
    nn.init.normal_(layer.lora_B.weight)
    weight = base.weight if kind == "linear" else base.weight.T
    whole = weight + 0.7 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), x @ whole.T + base.bias)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight",
        "lora_B.weight",
    }


def test_fresh_adapters_change_no_score(bert: Path, gpt2: Path) -> None:
    cases: list[tuple[Path, Task, str]] = [
        (bert, "classification", "query+value"),
        (gpt2, "causal-lm", "c_attn"),
    ]
    for folder, task, targets in cases:
        plain, adapted = load(folder, task, None), load(folder, task, f"rank=4,targets={targets}")
        x = random_sentences(7, 5)
        with torch.no_grad():
            expected, found = plain.logits(plain.params, x), adapted.logits(adapted.params, x)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(16.0, False, 4.0), (4.0, False, 1.0), (8.0, True, 4.0)]
)
def test_scale(alpha: float, rslora: bool, scale: float) -> None:
    assert Lora(rank=4, alpha=alpha, rslora=rslora).scale == scale


def merged(victim: LanguageVictim, leaves: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of the plain model with W + scale B A, differentiable in the factors."""
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in {**victim.frozen, **leaves}.items()
        if "lora_" not in name
    }
    for name, down in leaves.items():
        if not name.endswith(".lora_A.weight"):
            continue
        target = name.removesuffix(".lora_A.weight")
        product = scale * leaves[f"{target}.lora_B.weight"] @ down
        is_conv = isinstance(victim.module.get_submodule(target).base_layer, Conv1D)
        state[f"{target}.weight"] = state[f"{target}.weight"] + (product.T if is_conv else product)
    return state


@pytest.mark.parametrize(
    ("name", "task", "targets"),
    [
        ("bert", "classification", "query+value"),
        ("bert", "mlm", "query+key+value+dense"),
        ("gpt2", "causal-lm", "c_attn"),
        ("llama", "causal-lm", "q_proj+v_proj"),
    ],
)
def test_gradients_are_those_of_the_merged_weights(
    name: str, task: Task, targets: str, tmp_path: Path
) -> None:
    module = small_model(name, task)
    module.save_pretrained(tmp_path)
    victim = load(tmp_path, task, f"rank=3,alpha=5,targets={targets}")
    params = with_factors(victim)
    x = random_sentences(7, 7)
    y = labels_for(task, x)
    found = parameter_gradient(victim, params, x, y)

    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    weights = merged(victim, leaves, scale=5 / 3)
    logits = functional_call(module, weights, (), {"input_ids": x}).logits
    if task == "causal-lm":
        logits, y = logits[:, :-1], y[:, 1:]
    loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), ignore_index=-100)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert any("lora_A" in n and bool(g.any()) for n, g in found.items())
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-6, msg=parameter)


def test_only_adapters_and_the_head_train(bert: Path, gpt2: Path) -> None:
    classifier = load(bert, "classification", "rank=2")
    assert {name for name in classifier.params if "lora_" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert sum("lora_A" in name for name in classifier.params) == 4  # query and value of two layers
    decoder = load(gpt2, "causal-lm", "rank=2,targets=c_attn")
    assert all("lora_" in name for name in decoder.params)
    assert decoder.word in decoder.frozen
    assert f"{ATTENTION}.lora_B.weight" in decoder.params
    assert decoder.params[f"{ATTENTION}.lora_B.weight"].shape == (96, 2)


def test_adapters_are_drawn_from_the_seed(bert: Path) -> None:
    first, again, other = (
        load_language_victim(f"hf:{bert}", "classification", lora="rank=2", seed=seed) for seed in (0, 0, 1)
    )
    name = f"{QUERY}.lora_A.weight"
    assert torch.equal(first.params[name], again.params[name])
    assert not torch.equal(first.params[name], other.params[name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targets=qeury", "no layer of the model is called qeury; accepted as targets: .*query"),
        ("rank=0", "rank"),
        ("rank=two", "rank"),
        ("ranks=2", "ranks"),
        ("no/such/folder", "not key=value"),
    ],
)
def test_mistakes_are_told_in_one_line(bert: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load(bert, "classification", text)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- PEFT's files


def peft_names(victim: LanguageVictim, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `save_pretrained` of PEFT 0.10 and later names them."""
    return {f"base_model.model.{name}": tensor.clone() for name, tensor in params.items()}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_loads(bert: Path, tmp_path: Path, rslora: bool) -> None:
    fresh = load(bert, "classification", "rank=3,alpha=6")
    params = with_factors(fresh)
    params["classifier.weight"] = params["classifier.weight"] + 1
    folder = write_adapter(tmp_path / "adapter", peft_names(fresh, params), use_rslora=rslora)
    victim = load(bert, "classification", str(folder))
    assert victim.params.keys() == params.keys()
    for name, tensor in params.items():
        assert torch.equal(victim.params[name], tensor), name
    x = random_sentences(6)
    module = small_model("bert", "classification")
    scale = 6 / 3**0.5 if rslora else 2.0
    expected = functional_call(module, merged(victim, victim.params, scale), (), {"input_ids": x}).logits
    torch.testing.assert_close(victim.logits(victim.params, x), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_that_does_not_fit_is_refused(bert: Path, tmp_path: Path) -> None:
    fresh = load(bert, "classification", "rank=3,alpha=6")
    tensors = peft_names(fresh, with_factors(fresh))
    lacking = {name: t for name, t in tensors.items() if "layer.1.attention.self.value.lora_B" not in name}
    foreign = {name.replace("layer.0", "layer.7"): t for name, t in tensors.items()}
    for wrong, config in ((lacking, {}), (foreign, {}), (tensors, {"r": 4})):
        folder = write_adapter(tmp_path / "adapter", wrong, **config)
        with pytest.raises(InputError, match=r"adapter_model.safetensors does not fit the model"):
            load(bert, "classification", str(folder))
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 3}')
    with pytest.raises(InputError, match="holds no LoRA adapter of PEFT"):
        load(bert, "classification", str(tmp_path / "adapter"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no LoRA adapter of PEFT"):
        load(bert, "classification", str(tmp_path / "empty"))


def live_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `named_parameters()` of a running PeftModel has them, the frozen classifier's copy left out."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        name = name.replace("classifier.", "classifier.modules_to_save.default.")
        renamed[f"base_model.model.{name}"] = tensor
    return renamed


@pytest.mark.parametrize(
    "names", [live_names, lambda tensors: {f"base_model.model.{n}": t for n, t in tensors.items()}]
)
def test_an_update_under_the_names_of_peft_resolves(bert: Path, tmp_path: Path, names: Any) -> None:
    victim = load(bert, "classification", "rank=3")
    x = random_sentences(7, 5)
    update = client_update(victim, victim.params, Round(2), x, torch.tensor([0, 1])).detach()
    renamed = names(dict(update))
    assert "base_model.model.classifier.modules_to_save.default.weight" in live_names(dict(update))
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, tmp_path / "u.safetensors")
    shared = load_update(tmp_path / "u.safetensors", victim, overrides=Manifest(kind="gradient"))
    assert list(shared.update) == list(update)
    assert shared.missing == ()
    for name, tensor in update.items():
        assert torch.equal(shared.update[name], tensor), name


def test_an_update_of_the_adapters_alone_is_fine(bert: Path, tmp_path: Path) -> None:
    """Without `modules_to_save` the head is frozen and not shared."""
    victim = load(bert, "classification", "rank=3")
    update = client_update(victim, victim.params, Round(1), random_sentences(7), torch.tensor([0])).detach()
    adapters = {name: t.contiguous() for name, t in live_names(dict(update)).items() if "lora_" in name}
    save_file(adapters, tmp_path / "u.safetensors")
    shared = load_update(tmp_path / "u.safetensors", victim, overrides=Manifest(kind="gradient"))
    assert shared.missing == ("classifier.weight", "classifier.bias")
    assert len(shared.update) == 8


def test_attaching_freezes_all_but_the_head() -> None:
    module = small_model("llama", "classification")
    attach(module, Lora(rank=2, targets="q_proj"), head=("score.weight",))
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained.count("score.weight") == 1
    assert len(trained) == 5
    victim = language_victim(module, None, "classification")
    assert list(victim.params) == trained


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 13),
        ("attention.output.dense", 2),
        ("0.attention.self.query+value", 3),
    ],
)
def test_targets_as_peft_reads_them(bert: Path, targets: str, expected: int) -> None:
    victim = load(bert, "classification", f"rank=2,targets={targets}")
    adapted = [name for name in victim.params if name.endswith("lora_A.weight")]
    assert len(adapted) == expected
    assert not any(name.startswith("classifier") for name in adapted)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha_pattern": {"query": 4}}, "alpha_pattern is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"peft_type": "LOHA"}, "type LOHA is not supported"),
        ({"target_modules": r".*\.(query|value)"}, "is a pattern"),
    ],
)
def test_adapters_of_another_kind_are_refused_in_one_line(
    tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "peft_type": "LORA", **option}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as caught:
        Lora.parse(str(tmp_path))
    assert "\n" not in str(caught.value)
