"""Other ways to one evaluation of a matching objective (its value and its gradient for the candidate), each alone.

    python benchmarks/maths.py --threads 1 double          double backward, forward over reverse, differences
    python benchmarks/maths.py --threads 1 distance        cosine distance, tensor by tensor and joined
    python benchmarks/maths.py --threads 1 ghost           inner products of a layer without its weight gradient
    python benchmarks/maths.py --threads 1 convolutions    library, F.unfold and strided views, layer by layer
    python benchmarks/maths.py --threads 1 precision       products in bfloat16, and what becomes of the pictures

CPU seconds of this process are given beside wall time, because they count alike on a busy machine.  With
--compiled, `double`, `distance` and `ghost` compile every way too (a ResNet-18 takes minutes each).
docs/performance/maths.md has the figures and what was kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakaudit.attacks.compiling import Function
from leakaudit.attacks.graphs import bind, compile_graph, record
from leakaudit.attacks.matching import cosine, total_variation
from leakaudit.attacks.optimise import Matching, value_and_gradient
from leakaudit.attacks.single_backward import central_difference, forward_over_reverse
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import View
from leakaudit.update import Update

Row = dict[str, Any]
Cases = Sequence[tuple[str, int, int]]
PLAIN = Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3)


def picture(seed: int) -> Tensor:
    """A smooth one in colour, (1, 3, 32, 32) in [0, 1]."""
    coarse = torch.rand(1, 3, 6, 6, generator=fork(seed, "picture"))
    return F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=True)


def view_of(
    model: str, count: int, seed: int = 0, dtype: torch.dtype = torch.float32, x: Tensor | None = None
) -> View:
    victim = load_victim(model, num_classes=10, input_shape=(3, 32, 32), normalisation=PLAIN, seed=seed)
    victim = victim.to(dtype=dtype)
    x = victim.space.sample(count, fork(seed, "photo"), dtype) if x is None else x
    round = Round(count)
    update = client_update(victim, victim.params, round, x, torch.arange(count) % 10)
    return View(victim, round, update.detach())


def start(view: View) -> tuple[Tensor, Tensor]:
    shape = (view.round.num_examples, *view.victim.space.shape)
    x = torch.randn(shape, generator=fork(1, "start"), dtype=torch.float64).to(view.victim.dtype)
    return x, torch.arange(len(x)) % 10


def compared(functions: Mapping[str, Callable[..., Any]], point: Sequence[Tensor], rounds: int) -> list[Row]:
    """Median CPU and wall milliseconds over rounds in which all take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function(*point)
            if turn >= 2:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return [
        {"way": name, "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in found),
         "wall_ms": 1e3 * statistics.median(wall for _, wall in found)}
        for name, found in times.items()
    ]  # fmt: skip


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative distance of gradients."""
    return float((found[-1] - expected[-1]).norm() / expected[-1].norm())


def table(model: str, count: int, ways: dict[str, Function], rounds: int, compiled: bool) -> list[Row]:
    """Every way eagerly, and compiled where asked for, with its distance from the first in float64-exact terms."""
    point = start(view_of(model, count))
    running, sizes = dict(ways), {name: record(way, point).operations for name, way in ways.items()}
    seconds: dict[str, float] = {}
    for name, way in ways.items() if compiled else ():
        recorded = record(way, point)
        built = compile_graph(recorded, point)
        running[f"{name}, compiled"] = bind(built, recorded.constants, point)
        seconds[f"{name}, compiled"] = built.seconds
    expected = next(iter(ways.values()))(*point)
    return [
        {"model": model, "batch": count, **row, "operations": sizes.get(row["way"]),
         "compile_s": seconds.get(row["way"]), "apart": apart(running[row["way"]](*point), expected)}
        for row in compared(running, point, rounds)
    ]  # fmt: skip


CASES = (("lenet", 1, 40), ("lenet", 8, 40), ("resnet20", 1, 7), ("resnet20", 8, 5), ("resnet18", 1, 5))
"""Model, batch, and rounds of timing."""


# ------------------------------------------------------------------ forward over reverse


def double(cases: Cases, compiled: bool) -> list[Row]:
    rows = []
    for model, count, rounds in cases:
        objective = Matching(view_of(model, count), "cosine", tv=1e-4)
        ways: dict[str, Function] = {
            "double backward": value_and_gradient(objective),
            "forward over reverse": forward_over_reverse(objective, False),
        }
        rows += table(model, count, ways, rounds, compiled)
    return rows + accuracy()


def accuracy() -> list[Row]:
    """Against double backward in float64."""
    rows = []
    for model in ("lenet", "lenet:activation=relu", "resnet20"):
        objective = Matching(view_of(model, 1, dtype=torch.float64), "cosine")
        point = start(objective.view)
        expected = value_and_gradient(objective)(*point)
        for make in (forward_over_reverse, central_difference):
            row = {"model": model, "batch": 1, "way": f"{make.__name__}, float64"}
            rows.append({**row, "apart": apart(make(objective, False)(*point), expected)})
    return rows


# ------------------------------------------------------------------ the distance


def tensor_by_tensor(simulated: Update, observed: Update) -> Tensor:
    """The cosine distance as it was."""

    def same_size(update: Update) -> Update:
        largest = torch.stack([tensor.detach().abs().max() for tensor in update.values()]).max()
        return update.map(lambda tensor: tensor / largest)

    simulated, observed = same_size(simulated), same_size(observed)
    return 1 - simulated.dot(observed) / (simulated.norm() * observed.norm())


def with_distance(view: View, distance: Callable[[Update, Update], Tensor]) -> Function:
    return value_and_gradient(lambda x, y: distance(view.simulate(x, y), view.observed))


def distance(cases: Cases, compiled: bool) -> list[Row]:
    rows = []
    for model, count, rounds in cases:
        view = view_of(model, count)
        ways = {
            "tensor by tensor": with_distance(view, tensor_by_tensor),
            "joined": with_distance(view, cosine),
        }
        rows += table(model, count, ways, rounds, compiled)
    return rows


# ------------------------------------------------------------------ ghost inner products


def ghost_layers(view: View) -> list[tuple[str, nn.Conv2d]]:
    """Convolutions whose Gram matrices of patches and output gradients have fewer numbers than their weights."""
    found = []
    for name, module, _, out in view.victim.modules_in_order():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            places = view.round.num_examples * out.shape[2] * out.shape[3]
            filters, width = len(module.weight), module.weight[0].numel()
            if places**2 * (width + filters) < width * filters and width * filters > 2**16:
                found.append((name, module))
    return found


def ghost_cosine(view: View, tv: float = 0.0) -> Function:
    """Cosine matching that never forms the weight gradients of `ghost_layers` (Goodfellow 2015, Li et al. 2022).

    <g, g*> = sum(delta * conv(a; g*)) and |g|^2 = sum((a'a) * (delta'delta)) over patches a and output gradients
    delta.  For one local step and layers that run once.
    """
    victim, layers = view.victim, ghost_layers(view)
    hidden = {f"{name}.weight" for name, _ in layers}
    shown = [name for name in victim.params if name not in hidden]
    length = view.observed.to(dtype=torch.float64).norm()
    unit = view.observed.map(lambda g: (g.double() / length).to(g))

    def objective(x: Tensor, y: Tensor) -> Tensor:
        params = {name: p.detach().requires_grad_(name in shown) for name, p in victim.params.items()}
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            victim.module.get_submodule(name).register_forward_hook(
                lambda _, inputs, out, name=name: calls.__setitem__(name, (inputs[0], out))
            )
            for name, _ in layers
        ]
        loss = victim.loss(params, x, y)
        for handle in handles:
            handle.remove()
        wanted = [*(params[name] for name in shown), *(calls[name][1] for name, _ in layers)]
        found = torch.autograd.grad(loss, wanted, create_graph=True)
        gradients, deltas = found[: len(shown)], found[len(shown) :]
        largest = torch.stack([g.detach().abs().max() for g in gradients]).max()
        products = [(g / largest * unit[name]).sum() for g, name in zip(gradients, shown, strict=True)]
        squares = [(g / largest).square().sum() for g in gradients]
        for (name, module), delta in zip(layers, deltas, strict=True):
            entering, delta = calls[name][0], delta / largest
            settings = module.stride, module.padding, module.dilation
            products.append((delta * F.conv2d(entering, unit[f"{name}.weight"], None, *settings)).sum())
            patches = F.unfold(entering, module.kernel_size, module.dilation, module.padding, module.stride)
            a, d = (t.transpose(0, 1).flatten(1) for t in (patches, delta.flatten(2)))
            squares.append(((a.T @ a) * (d.T @ d)).sum())
        prior = tv * total_variation(x) if tv else 0.0
        return 1 - torch.stack(products).sum() / torch.stack(squares).sum().sqrt() + prior

    return value_and_gradient(objective)


def ghost(cases: Cases, compiled: bool) -> list[Row]:
    view = view_of("resnet18", 1)
    ways = {
        "weight gradients": value_and_gradient(Matching(view, "cosine", tv=1e-4)),
        "ghost": ghost_cosine(view, 1e-4),
    }
    return table("resnet18", 1, ways, 5, compiled)


# ------------------------------------------------------------------ convolutions


def unfolded(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    patches = F.unfold(x, weight.shape[2:], 1, padding, stride).permute(1, 0, 2)
    return _product(patches.reshape(patches.shape[0], -1), x, weight, stride, padding)


def strided(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Patches as a view of the padded input, copied once by the reshape."""
    padded = F.pad(x, (padding,) * 4)
    patches = padded.unfold(2, weight.shape[2], stride).unfold(3, weight.shape[3], stride)
    flat = patches.permute(1, 4, 5, 0, 2, 3).reshape(weight[0].numel(), -1)
    return _product(flat, x, weight, stride, padding)


def _product(patches: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    height, width = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:])
    out = weight.flatten(1) @ patches
    return out.reshape(len(weight), len(x), height, width).transpose(0, 1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "library": lambda x, weight, stride, padding: F.conv2d(x, weight, None, stride, padding),
    "F.unfold": unfolded,
    "strided": strided,
}
LAYERS = {
    "LeNet 1": (3, 32, 12, 5, 2, 2), "LeNet 2": (12, 16, 12, 5, 2, 2), "LeNet 3": (12, 8, 12, 5, 1, 2),
    "ResNet20 first": (3, 32, 16, 3, 1, 1), "ResNet20 1": (16, 32, 16, 3, 1, 1),
    "ResNet20 2": (32, 16, 32, 3, 1, 1), "ResNet20 3": (64, 8, 64, 3, 1, 1),
    "ResNet-18 1": (64, 32, 64, 3, 1, 1), "ResNet-18 2": (128, 16, 128, 3, 1, 1),
    "ResNet-18 3": (256, 8, 256, 3, 1, 1), "ResNet-18 4": (512, 4, 512, 3, 1, 1),
}  # fmt: skip
"""Channels, size, filters, kernel, stride, padding."""


def layer_step(form: Callable[..., Tensor], stride: int, padding: int) -> Function:
    """What matching does with a layer: both gradients of its output's square, and the backward pass through both."""

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            loss = form(x, weight, stride, padding).square().sum()
            to_x, to_weight = torch.autograd.grad(loss, (x, weight), create_graph=True)
            return torch.autograd.grad(to_x.sum() + to_weight.square().sum(), x)

    return function


def convolutions(cases: Cases, compiled: bool) -> list[Row]:
    rows = []
    for name, (channels, size, filters, kernel, stride, padding) in LAYERS.items():
        for count in (1, 8):
            x = torch.randn(count, channels, size, size, generator=fork(0, "x"))
            weight = torch.randn(filters, channels, kernel, kernel, generator=fork(0, "w")) / 10
            ways = {form: layer_step(function, stride, padding) for form, function in FORMS.items()}
            timed = compared(ways, (x, weight), 15 if name.startswith("LeNet") else 5)
            places = count * (-(-size // stride)) ** 2
            row: Row = {"layer": name, "batch": count, "numbers of patches": places * weight[0].numel()}
            rows.append(row | {f"{one['way']}_ms": one["cpu_ms"] for one in timed})
    return rows


# ------------------------------------------------------------------ precision


def in_bfloat16(function: Function) -> Function:
    """Products of autocast operations in bfloat16, accumulated in float32, their results rounded."""

    def rounded(*point: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return tuple(tensor.float() for tensor in function(*point))

    return rounded


def bfloat16_products(function: Function) -> Function:
    """Operands of the library's products and convolutions in bfloat16, results in float32."""

    def lowered(*point: Tensor) -> tuple[Tensor, ...]:
        settings: Any = torch.backends.mkldnn
        settings.matmul.fp32_precision = settings.conv.fp32_precision = "bf16"
        try:
            return function(*point)
        finally:
            settings.matmul.fp32_precision = settings.conv.fp32_precision = "none"

    return lowered


LOWER = {"bfloat16 autocast": in_bfloat16, "bfloat16 products": bfloat16_products}


def precision(cases: Cases, compiled: bool) -> list[Row]:
    rows = []
    for model, count, rounds in cases:
        view = view_of(model, count)
        step, point = value_and_gradient(Matching(view, "cosine", tv=1e-4)), start(view)
        ways = {"float32": step} | {name: lower(step) for name, lower in LOWER.items()}
        exact = step(*point)[-1]
        for row in compared(ways, point, rounds):
            gradient = ways[row["way"]](*point)[-1]
            agree = float((gradient.sign() == exact.sign()).float().mean())
            rows.append(
                {"model": model, "batch": count, **row, "apart": apart((gradient,), (exact,)), "signs": agree}
            )
    return rows + pictures()


def pictures(seeds: int = 3, iterations: int = 400) -> list[Row]:
    """PSNR and final distance on a LeNet with ReLU, the first half of the descent in lower precision."""
    rows = []
    for name, lower in {"float32": None, **LOWER}.items():
        found = [_picture(seed, iterations, lower) for seed in range(seeds)]
        decibels, losses = zip(*found, strict=True)
        rows.append({"model": "lenet:activation=relu", "batch": 1, "way": f"{name} in the first half",
                     "psnr": statistics.median(decibels), "distance": statistics.median(losses)})  # fmt: skip
    return rows


def _picture(seed: int, iterations: int, lower: Callable[[Function], Function] | None) -> tuple[float, float]:
    truth = picture(seed)
    view = view_of("lenet:activation=relu", 1, seed, x=truth)
    space, objective = view.victim.space, Matching(view, "cosine", tv=1e-4)
    steps = [value_and_gradient(objective)] * 2
    if lower is not None:
        steps[0] = lower(steps[0])
    x, y = space.sample(1, fork(seed, "start"), torch.float32).requires_grad_(), torch.tensor([0])
    optimizer = torch.optim.Adam([x], lr=0.1)
    milestones = [iterations * eighths // 8 for eighths in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for iteration in range(iterations):
        x.grad = steps[iteration >= iterations // 2](x, y)[1].sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(space.project(x))
    with torch.no_grad():
        mse = (x - truth).square().mean()
        return float(-10 * mse.log10()), float(objective.mismatch(x, y))


PARTS = {
    "double": double, "distance": distance, "ghost": ghost, "convolutions": convolutions, "precision": precision,
}  # fmt: skip


def main() -> None:
    parser = measuring.options(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--compiled", action="store_true", help="compile every way too")
    parser.add_argument("--models", default=",".join(dict.fromkeys(model for model, _, _ in CASES)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if case[0] in options.models.split(",")]
    measuring.show(options.part, PARTS[options.part](cases, options.compiled), options.json)


if __name__ == "__main__":
    main()
