"""Made-up audits for the tests of the report, and for looking at it in a browser.

`python tests/report/sample_audits.py FOLDER` writes one run folder a sample.
`python tests/report/sample_audits.py --golden` writes the golden reports anew: look at
the difference before committing it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from leakaudit.report.folder import picture_names, read_run, write_run
from leakaudit.report.pictures import contact_sheet, difference, write_png
from leakaudit.results import (
    Attempt,
    AuditResult,
    Control,
    ExampleScores,
    Finding,
    Frame,
    KnowledgeRow,
    ModelSummary,
    RoundSummary,
    Score,
    Skipped,
    SuccessRate,
    Token,
    Trial,
    Verdict,
    Verification,
)

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
GOLDEN = Path(__file__).parent / "golden_run"
GOLDEN_TEXT = Path(__file__).parent / "golden_text_run"
EVIL = '<script>alert("x")</script><img src="https://evil.example/x.png" onerror=alert(1)>\x1b[31m[red]'


def photos(count: int, size: int = 32) -> np.ndarray:
    """(count, size, size, 3) in [0, 1]; mirrored and turned when there are more than files."""
    files = [PHOTOS / f"{name}.png" for name in ("chelsea", "coffee", "astronaut", "rocket")]
    pictures = []
    for index in range(count):
        image = (
            Image.open(files[index % len(files)])
            .convert("RGB")
            .resize((size, size), Image.Resampling.LANCZOS)
        )
        pictures.append(np.rot90(np.asarray(image) / 255.0, k=index // len(files)))
    return np.stack(pictures)


def loss_history(
    start: float, end: float, iterations: int, seed: int, points: int = 120
) -> list[tuple[int, float]]:
    """A curve that falls on a log scale with some noise."""
    random = np.random.default_rng(seed)
    steps = sorted({round(iterations * i / (points - 1)) for i in range(points)})
    falls = [(step / iterations) ** 0.7 for step in steps]
    noise = np.cumsum(random.normal(0, 0.05, len(steps)))
    logs = [
        math.log10(start) * (1 - f) + math.log10(end) * f + n * (1 - f)
        for f, n in zip(falls, noise, strict=True)
    ]
    return [(step, float(10**value)) for step, value in zip(steps, logs, strict=True)]


def attempt(
    restart: int, end: float, iterations: int, stopped: str = "converged", success: bool = True
) -> Attempt:
    history = loss_history(120.0, end, iterations, seed=restart)
    return Attempt(
        restart=restart,
        loss=end,
        residual=math.sqrt(end) / 11,
        iterations=iterations,
        seconds=iterations * 0.034,
        stopped=stopped,
        success=success,
        history=history,
    )


def knowledge(upper_bound: bool = True) -> list[KnowledgeRow]:
    return [
        KnowledgeRow(
            name="labels",
            status="inferred",
            text="1 label: cat",
            source="sign of the last layer's bias gradient",
        ),
        KnowledgeRow(name="batch_size", status="known", text="1", source="manifest"),
        KnowledgeRow(name="local_steps", status="known", text="1", source="manifest"),
        KnowledgeRow(name="learning_rate", status="unknown", text="unknown"),
        KnowledgeRow(name="mode", status="known", text="eval", source="manifest", upper_bound=upper_bound),
        KnowledgeRow(name="loss", status="known", text="cross-entropy, mean", source="manifest"),
        KnowledgeRow(name="normalisation", status="known", text="mean 0.5, std 0.25", source="model"),
        KnowledgeRow(name="defense", status="unknown", text="unknown, taken to be none"),
    ]


FINDINGS = [
    Finding(
        name="independent_equations",
        severity="info",
        text="15,388 equations for 3,072 unknowns.",
        data={"equations": 15388, "unknowns": 3072},
    ),
    Finding(
        name="batch_size",
        severity="hint",
        text="The rank of the last layer's gradient is 1: one example, or one class.",
    ),
    Finding(
        name="labels",
        severity="leak",
        text="The label is cat: the only negative entry of the last layer's bias gradient.",
        data={"labels": [3], "counts": {"3": 1}},
    ),
    Finding(
        name="checkpoint_hash",
        severity="warning",
        text="The manifest names no checkpoint hash; the update may belong to another checkpoint.",
    ),
]
SCORES = [
    Score(metric="mse", value=2.1e-9, higher_is_better=False, chance=0.094),
    Score(metric="psnr", value=86.8, unit="dB", chance=10.3),
    Score(metric="ssim", value=0.99998, chance=0.02),
    Score(
        metric="lpips",
        value=None,
        higher_is_better=False,
        reason="the weights of lpips' AlexNet are not on this machine",
    ),
    Score(metric="identification rank", value=1, higher_is_better=False, chance=50.5),
    Score(metric="label accuracy", value=100.0, unit="%", chance=1.0),
]
FLOOR = Score(metric="psnr", value=10.3, unit="dB")
MODEL = ModelSummary(
    name="lenet (sigmoid)",
    parameters=15388,
    num_classes=100,
    input_shape=[3, 32, 32],
    mode="eval",
    checkpoint="model.safetensors",
)
VERIFIED = Verification(
    status="verified",
    text="The residual is at its floor and the Jacobian has full rank: any input near this one"
    " with the same update is within 3.1e-6 RMS per pixel.",
    residual=4.1e-8,
    floor=6e-8,
    distance=3.1e-6,
    smallest_singular_value=2.4e-4,
    largest_singular_value=8.8,
    rank=3072,
    unknowns=3072,
    equations=15388,
)


def write_batch(folder: Path, originals: np.ndarray, found: np.ndarray) -> list[ExampleScores]:
    examples = []
    names = ["cat", "cup", "astronaut", "rocket"]
    for index, (truth, guess) in enumerate(zip(originals, found, strict=True)):
        write_png(truth, folder / f"images/original-{index}.png")
        write_png(guess, folder / f"images/best-{index}.png")
        write_png(difference(truth, guess), folder / f"images/difference-{index}.png")
        error = float(np.mean((truth - guess) ** 2))
        examples.append(
            ExampleScores(
                index=index,
                matched=index,
                true_label=names[index % 4],
                recovered_label=names[index % 4]
                if index % 5
                else names[(index + 1 - (len(originals) == 1)) % 4],
                scores={
                    "mse": error,
                    "psnr": -10 * math.log10(error) if error else math.inf,
                    "ssim": 0.97,
                    "lpips": None,
                },
                original=f"images/original-{index}.png",
                reconstruction=f"images/best-{index}.png",
                difference=f"images/difference-{index}.png",
            )
        )
    return examples


def write_strip(folder: Path, name: str, batch: np.ndarray, steps: list[int], seed: int = 0) -> list[Frame]:
    """From noise to the batch."""
    noise = np.random.default_rng(seed).uniform(0, 1, batch.shape)
    frames = []
    for place, step in enumerate(steps):
        share = (place / max(1, len(steps) - 1)) ** 0.8
        image = f"images/strip-{name}-{place}.png"
        write_png(contact_sheet((1 - share) * noise + share * batch), folder / image)
        frames.append(Frame(iteration=step, loss=120 * 10 ** (-9 * share), image=image))
    return frames


STEPS = [0, 1, 2, 4, 7, 13, 23, 42, 76, 137, 211, 300]


def photo_audit_frame(count: int) -> AuditResult:
    """What an audit of `count` photos holds besides its trials."""
    return AuditResult(
        created="2025-11-22 08:30 UTC",
        command="leakaudit attack --model lenet --checkpoint model.safetensors shared.safetensors"
        " --truth truth.safetensors --attack auto --seed 7 --out runs/one",
        seed=7,
        model=MODEL,
        round=RoundSummary(num_examples=count, local_steps=1, local_batch_size=count, learning_rate=None),
        setting="upper bound",
        knowledge=knowledge(),
        findings=FINDINGS,
        trials=[],
        skipped=[
            Skipped(attack="linear", reason="the first layer is a convolution, not fully connected"),
            Skipped(attack="levenberg-marquardt", reason="out of the time budget of 5 min"),
        ],
        controls=[
            Control(
                name="positive",
                passed=True,
                text="dlg on an undefended one-example update of this model reached 84.2 dB.",
                scores=SCORES[:2],
            ),
            Control(name="floor", passed=True, text="100 unrelated images.", scores=[FLOOR]),
        ],
        best=None,
        verdict=Verdict(
            status="leaks",
            headline="One shared update gives the private photo back, pixel by pixel."
            if count == 1
            else f"One shared update gives all {count} private photos back.",
            reasons=[
                "dlg recovered the photo at 86.8 dB PSNR; an unrelated photo scores 10.3 dB.",
                "The reconstruction is verified without the truth, to within 3.1e-6 RMS per pixel.",
                "The label was inferred from the update alone.",
            ],
            policy="PSNR below 15 dB for every example",
        ),
        truth_known=True,
        seconds=248.6,
        environment={"leakaudit": "0.1.0", "python": "3.11.7", "torch": "2.6.0", "device": "cpu"},
        files={"shared.safetensors": "sha256:" + "3f9a" * 16, "model.safetensors": "sha256:" + "77c1" * 16},
    )  # fmt: skip


def photo_audit(folder: Path, count: int = 1, size: int = 32) -> AuditResult:
    """A full audit of `count` photos that leak."""
    originals = photos(count, size)
    noise = np.random.default_rng(1).normal(0, 0.02, originals.shape)
    found = np.clip(originals + noise * (1 if count > 1 else 1e-3), 0, 1)
    examples = write_batch(folder, originals, found)
    best = Trial(
        attack="dlg",
        spec="dlg:iterations=300,init=uniform(-0.5,0.5),restarts=4",
        status="done",
        best=1,
        residual=4.1e-8,
        seconds=41.3,
        attempts=[
            attempt(0, 3e-6, 300, "finished"),
            attempt(1, 2e-9, 211),
            attempt(2, 18.0, 96, "plateau", False),
            attempt(3, 4e-8, 300, "finished"),
        ],
        success=SuccessRate(successes=3, restarts=4, low=0.30, high=0.954, criterion="MSE below 1e-3"),
        label_source="inferred from the last layer's gradient",
        scores=SCORES,
        examples=examples,
        verification=VERIFIED,
        strip=write_strip(folder, "dlg", found, STEPS),
        details={"rank": 3072, "condition": 36700.0, "precision": "float64"},
    )
    cosine = best.model_copy(
        update={
            "attack": "inverting-gradients",
            "spec": "inverting-gradients:iterations=4800,tv=1e-4,restarts=2",
            "best": 0,
            "residual": 0.0123,
            "seconds": 162.0,
            "attempts": [attempt(5, 0.0012, 4800, "finished"), attempt(6, 0.004, 4800, "finished", False)],
            "success": SuccessRate(
                successes=1, restarts=2, low=0.095, high=0.905, criterion="MSE below 1e-3"
            ),
            "scores": [
                SCORES[0].model_copy(update={"value": 0.0031}),
                SCORES[1].model_copy(update={"value": 25.1}),
            ],
            "verification": Verification(
                status="not-matched", text="The residual is far above its floor.", residual=0.0123, floor=6e-8
            ),
            "strip": write_strip(folder, "ig", np.clip(found + 0.1, 0, 1), [0, 10, 100, 1000, 4800], seed=3),
            "details": {},
        }
    )
    failed = Trial(
        attack="idlg",
        spec="idlg",
        status="failed",
        reason="the matching loss was never finite in any of 2 attempts",
        attempts=[
            Attempt(
                restart=0,
                loss=math.nan,
                residual=math.inf,
                iterations=3,
                seconds=0.2,
                stopped="diverged",
                success=False,
            )
        ],
    )
    return photo_audit_frame(count).model_copy(update={"trials": [cosine, best, failed], "best": 1})


def blind_audit(folder: Path) -> AuditResult:
    """A saved gradient without truth, four examples, consistent only."""
    result = photo_audit(folder, 4)
    best = result.trials[1]
    examples = [
        example.model_copy(update={"original": None, "difference": None, "true_label": None, "scores": {}})
        for example in best.examples
    ]
    unproven = Verification(
        status="consistent",
        text="The residual is at its floor, but the Jacobian has rank 11,904 of 12,288 unknowns.",
        residual=5e-8, floor=6e-8, rank=11904, unknowns=12288, equations=15388,
    )  # fmt: skip
    trial = best.model_copy(
        update={"examples": examples, "scores": [], "verification": unproven, "success": None}
    )
    return result.model_copy(
        update={
            "trials": [trial],
            "best": 0,
            "truth_known": False,
            "setting": "realistic",
            "knowledge": knowledge(upper_bound=False),
            "verdict": Verdict(
                status="inconclusive",
                headline="A reconstruction explains the update, but it may not be the only one.",
                reasons=["The Jacobian is rank deficient: other inputs share this update."],
            ),
        }
    )


def hostile_audit(folder: Path) -> AuditResult:
    """Every string is an attack on the page, every number is odd, no pictures on disk."""
    result = photo_audit(folder, 16)
    long = "a-very-long-name-without-any-break-" * 6
    odd = Attempt(
        restart=0, loss=math.inf, residual=math.nan, iterations=10**9, seconds=math.inf, stopped=EVIL
    )
    trials = [
        trial.model_copy(
            update={
                "attack": f"{EVIL}{index}" if index % 2 else f"{long}{index}",
                "spec": EVIL + long,
                "status": ("done", "interrupted", "failed")[index % 3],
                "reason": EVIL,
                "residual": (math.nan, math.inf, None, 0.0)[index % 4],
                "label_source": EVIL,
                "scores": [
                    Score(metric=EVIL, value=math.nan),
                    Score(metric=long, value=-math.inf, unit=EVIL),
                ],
                "strip": [Frame(iteration=0, loss=math.nan, image="images/missing.png")][: index == 1],
                "attempts": [
                    odd.model_copy(update={"loss": 0.0, "history": [(0, math.inf), (2, 1e-30), (3, 0.0)]}),
                    odd.model_copy(update={"iterations": 0, "history": [(0, 1.0)]}),
                ],
                "success": SuccessRate(successes=0, restarts=0, low=0.0, high=1.0, criterion=EVIL),
                "details": {EVIL: [1, {"x": EVIL, "n": math.nan}]},
            }
        )
        for index, trial in enumerate([result.trials[1]] * 12)
    ]  # fmt: skip
    return result.model_copy(
        update={
            "title": EVIL,
            "command": EVIL + long,
            "model": result.model.model_copy(update={"name": EVIL + long, "checkpoint": EVIL}),
            "trials": trials,
            "interrupted": True,
            "skipped": [Skipped(attack=EVIL, reason=EVIL + long)],
            "findings": [Finding(name=EVIL, severity="hint", text=EVIL + long, data={EVIL: EVIL})],
            "knowledge": [
                KnowledgeRow(name=EVIL, status="known", text=EVIL + long, source=EVIL, upper_bound=True)
            ],
            "controls": [
                Control(name="positive", passed=None, text=EVIL),
                Control(name="floor", passed=False, text=long),
            ],
            "verdict": Verdict(status="inconclusive", headline=EVIL, reasons=[EVIL, long], policy=EVIL),
            "environment": {EVIL: EVIL, long: long},
            "files": {EVIL: long},
        }
    )  # fmt: skip


def nothing_recovered_audit(folder: Path) -> AuditResult:
    """No attack kept a candidate."""
    result = photo_audit(folder)
    verdict = Verdict(
        status="not-recovered",
        headline="None of the attacks tried recovered the private photo.",
        reasons=[
            "idlg diverged in both attempts.",
            "The positive control passed, so the attack itself works.",
        ],
    )
    empty = {"trials": [result.trials[2]], "best": None, "findings": [], "skipped": [], "controls": []}
    return result.model_copy(update={**empty, "verdict": verdict, "setting": "realistic", "knowledge": []})


def tiny_audit(folder: Path) -> AuditResult:
    """The golden case: one photo of 4x4 pixels, curves of a few points, two frames."""
    result = photo_audit(folder, size=4)

    def small(trial: Trial) -> Trial:
        attempts = [item.model_copy(update={"history": item.history[::17]}) for item in trial.attempts]
        return trial.model_copy(update={"attempts": attempts, "strip": trial.strip[::6][:2]})

    return result.model_copy(update={"trials": [small(trial) for trial in result.trials]})


SENTENCES = [
    "[CLS] registration , volunteer applications , and student travel application open the first week of "
    "september . child care will be available . [SEP]",
    "[CLS] the ##rapist said no to the new dose . [SEP]",
    "[CLS] Ġmeet Ġme Ġat ĠcafÃ© ĠðŁĺĢ Ġun believ ably Ġlate [SEP]",
    "[CLS] ▁der ▁Pati ent ▁ist ▁ gesund [SEP]",
]
NOISE = [
    "##ing",
    "dragon",
    "tablet",
    "the",
    "1847",
    "##ogy",
    "of",
    "weather",
    "##ble",
    "silk",
    "moor",
    "said",
]


def tokens(text: str) -> list[Token]:
    return [Token(text=piece, special=piece.startswith("[")) for piece in text.split()]


def marked(found: list[Token], truth: list[Token]) -> list[Token]:
    return [
        token.model_copy(update={"right": index < len(truth) and token.text == truth[index].text})
        for index, token in enumerate(found)
    ]


def recovered(text: str, share: float, seed: int = 0) -> list[Token]:
    """The sentence with the first `share` of a random order of its tokens right, marked."""
    truth = tokens(text)
    order = np.random.default_rng(seed).permutation(len(truth))
    found = [
        token if token.special or rank < share * len(truth) else Token(text=NOISE[(rank + seed) % len(NOISE)])
        for token, rank in zip(truth, np.argsort(order), strict=True)
    ]
    return marked(found, truth)


TEXT_SCORES = [
    Score(metric="token-accuracy", value=0.96, chance=0.004),
    Score(metric="special-accuracy", value=1.0, chance=1.0),
    Score(metric="bag-precision", value=0.98, chance=0.12),
    Score(metric="bag-recall", value=0.98, chance=0.11),
    Score(metric="bag-f1", value=0.98, chance=0.11),
    Score(metric="exact-match", value=0.5, chance=0.0),
    Score(metric="rouge-1", value=0.98, chance=0.14),
    Score(metric="rouge-2", value=0.95, chance=0.01, reason="1 of 4 sentences: fewer than 2 words"),
    Score(metric="rouge-l", value=0.98, chance=0.13),
]


def text_audit(folder: Path, count: int = 1, share: float = 1.0) -> AuditResult:
    """An audit of `count` sentences; `share` of their tokens was recovered.  Writes no picture."""
    texts = SENTENCES[:count]
    examples = [
        ExampleScores(
            index=index,
            matched=index,
            true_label="announcement",
            recovered_label="announcement" if index != 1 else "complaint",
            scores={score.metric: score.value for score in TEXT_SCORES},
            original_tokens=tokens(text),
            recovered_tokens=recovered(text, share, seed=index),
        )
        for index, text in enumerate(texts)
    ]
    strip = [
        Frame(
            iteration=step,
            loss=120 * 10 ** (-step / 4),
            sentences=[recovered(text, share * step / 30, seed=index) for index, text in enumerate(texts)],
        )
        for step in (0, 10, 20, 30)
    ]
    best = Trial(
        attack="dlg-text",
        spec="dlg-text:iterations=30,restarts=2",
        status="done",
        best=0,
        residual=5.1e-8,
        seconds=12.5,
        attempts=[attempt(0, 3e-12, 30), attempt(1, 7.0, 30, "finished", False)],
        success=SuccessRate(
            successes=1,
            restarts=2,
            low=0.095,
            high=0.905,
            criterion="token-accuracy>0.5,bag-f1>0.5,rouge-l>0.5",
        ),
        label_source="inferred from the last layer's gradient",
        scores=TEXT_SCORES,
        examples=examples,
        verification=Verification(
            status="verified",
            text="The update of the recovered tokens equals the observed one to float rounding.",
            residual=5.1e-8,
            floor=6e-8,
        ),
        strip=strip,
    )
    bag = Trial(
        attack="bag",
        spec="bag",
        status="done",
        best=0,
        residual=0.31,
        seconds=0.2,
        attempts=[attempt(0, 0.09, 1, "finished")],
        scores=[score.model_copy(update={"value": 0.4}) for score in TEXT_SCORES],
        examples=examples,
        strip=strip[:1],
    )
    private = "sentence" if count == 1 else f"{count} sentences"
    return photo_audit_frame(count).model_copy(
        update={
            "medium": "text",
            "command": "leakaudit attack --model hf:minilm --task classification shared.safetensors"
            " --truth truth.safetensors --attack auto --seed 7 --out runs/text",
            "model": ModelSummary(
                name="bert (6 layers, hidden 384)",
                parameters=22713216,
                num_classes=2,
                input_shape=[256],
                mode="eval",
                task="classification",
            ),
            "trials": [bag, best],
            "best": 1,
            "verdict": Verdict(
                status="leaks",
                headline=f"One shared update gives the private {private} back, word for word.",
                reasons=["dlg-text recovered 98 % of the words; unrelated sentences score 14 %."],
                policy="token-accuracy>0.5,bag-f1>0.5,rouge-l>0.5",
            ),
            "skipped": [Skipped(attack="lora", reason="the update holds no adapters")],
        }
    )


def text_blind_audit(folder: Path) -> AuditResult:
    """Sentences recovered from a saved gradient, no truth at hand."""
    result = text_audit(folder, 4, 0.8)
    best = result.trials[1]

    def unmarked(row: list[Token]) -> list[Token]:
        return [token.model_copy(update={"right": None}) for token in row]

    examples = [
        ExampleScores(index=e.index, matched=e.index, recovered_tokens=unmarked(e.recovered_tokens or []))
        for e in best.examples
    ]
    strip = [
        frame.model_copy(update={"sentences": [unmarked(row) for row in frame.sentences]})
        for frame in best.strip
    ]
    trial = best.model_copy(update={"examples": examples, "strip": strip, "scores": [], "success": None})
    return result.model_copy(
        update={"trials": [trial], "best": 0, "truth_known": False, "setting": "realistic"}
    )


EVIL_TOKENS = [
    "<script>alert(1)</script>",
    "</style>",
    "</span></p>",
    '"><img src=x onerror=1>',
    "'onmouseover='alert(1)",
    "{{ 7*7 }}",
    "\u202eesrever\u2066",
    "\x1b[31m[red]\x00\n",
    "a" * 400,
    "",
    "##",
    "▁",
    "&lt;b&gt;",
]


def text_hostile_audit(folder: Path) -> AuditResult:
    """Tokens that attack the page, empty sentences, sentences of 5,000 tokens, 40 of them a frame."""
    result = text_audit(folder)
    evil = [
        Token(text=text, right=index % 3 == 0, special=index % 5 == 4)
        for index, text in enumerate(EVIL_TOKENS)
    ]
    rows = [evil, [], evil[::-1], [Token(text="א" * 9), Token(text="ב##")], evil * (5000 // len(evil))]
    examples = [
        ExampleScores(index=index, matched=index, original_tokens=evil, recovered_tokens=row)
        for index, row in enumerate(rows)
    ]
    examples += [ExampleScores(index=9, matched=-1, original_tokens=evil)]
    examples += [ExampleScores(index=10 + i, matched=i, recovered_tokens=evil) for i in range(8)]
    strip = [Frame(iteration=i, loss=math.nan, sentences=rows * 8) for i in (0, 10**9)]
    strip += [Frame(iteration=3, loss=0.0)]
    trial = result.trials[1].model_copy(update={"examples": examples, "strip": strip})
    return result.model_copy(update={"trials": [trial], "best": 0})


SAMPLES = {
    "one": photo_audit,
    "batch": lambda folder: photo_audit(folder, 16),
    "blind": blind_audit,
    "hostile": hostile_audit,
    "nothing": nothing_recovered_audit,
    "redacted": lambda folder: photo_audit(folder, 4).model_copy(update={"redacted": True}),
    "text": text_audit,
    "text-batch": lambda folder: text_audit(folder, 4, 0.8),
    "text-blind": text_blind_audit,
    "text-hostile": text_hostile_audit,
    "text-redacted": lambda folder: text_audit(folder, 2, 0.8).model_copy(update={"redacted": True}),
}


def main(argument: str) -> None:
    if argument == "--golden":
        write_run(tiny_audit(GOLDEN), GOLDEN)
        named = {GOLDEN / name for name in picture_names(read_run(GOLDEN))}
        for path in set(GOLDEN.glob("images/*.png")) - named:
            path.unlink()
        write_run(text_audit(GOLDEN_TEXT, 2, 0.8), GOLDEN_TEXT)
        return
    for name, make in SAMPLES.items():
        folder = Path(argument) / name
        write_run(make(folder), folder)
        print(folder / "report.html")


if __name__ == "__main__":
    main(sys.argv[1])
