"""What the report says in one way of images and in another of text."""

from __future__ import annotations

from dataclasses import dataclass

from leakaudit.policy import Medium


@dataclass(frozen=True)
class Wording:
    """Headings and sentences of the report; whole ones, so that each can be read as it will stand."""

    contents: str
    strip: str
    compared: str
    alone: str
    one: str
    many: str
    many_private: str
    none_kept: str
    unknown_originals: str
    matching: str
    course: str
    one_step: str
    whole_batch: str
    no_course: str
    redacted: str
    verified_badge: str
    verified: str
    consistent: str
    distance: str
    score_columns: tuple[str, ...] = ()


IMAGES = Wording(
    contents="Pictures",
    strip="Film strip",
    compared="Original beside reconstruction",
    alone="Reconstruction",
    one="The private example",
    many="Example",
    many_private="Private examples",
    none_kept="The best attack kept no pictures.",
    unknown_originals="The originals are not known to this audit, so nothing is scored against them;",
    matching="Each original is matched to the reconstruction that fits it best (Hungarian method)."
    " Differences are five times enlarged, black where equal.",
    course="From noise to picture",
    one_step="found its answer in one step: there is one frame.",
    whole_batch="Every frame shows the whole batch.",
    no_course="has no film strip: it found its answer in one step or kept no frames.",
    redacted="Redacted: original pictures, difference pictures, true labels and labels given to the adversary"
    " are left out. The reconstructions are still here: where an attack succeeded, they show what the"
    " originals show.",
    verified_badge="verified",
    verified="Verified means: the residual is at its floor and the Jacobian has full rank, so every nearby"
    " input with the same update lies within the distance below (root mean square per pixel, pixels in"
    " 0 to 1). Inputs far away are not excluded.",
    consistent="Consistent means: this input explains the update as well as the true one would, but the"
    " Jacobian is rank deficient or was not computed. Other inputs may share the update; do not read the"
    " picture as proof.",
    distance="RMS per pixel",
)

TEXT = Wording(
    contents="Sentences",
    strip="Iterations",
    compared="Original beside recovered text",
    alone="Recovered text",
    one="The private sentence",
    many="Sentence",
    many_private="Private sentences",
    none_kept="The best attack kept no text.",
    unknown_originals="The original text is not known to this audit, so no token can be called right or wrong;",
    matching="Each original sentence is matched to the recovered one that fits it best (Hungarian method).",
    course="From noise to text",
    one_step="found its answer in one step.",
    whole_batch="",
    no_course="has no iterations to show: it found its answer in one step or kept nothing on the way.",
    redacted="Redacted: original sentences, the marks on right and wrong tokens, true labels and labels given"
    " to the adversary are left out. The recovered text is still here: where an attack succeeded, it says"
    " what the original says.",
    verified_badge="verified exact",
    verified="Verified means: the update of these very tokens was simulated and equals the observed one up to"
    " its floor. Tokens are discrete: a wrong one moves the update by far more than rounding does.",
    consistent="Consistent means: these tokens explain the update as well as the true ones would, but others"
    " may explain it too; do not read the text as proof.",
    distance="RMS per coordinate of the embeddings",
    score_columns=("token-accuracy", "rouge-l"),
)

WORDINGS: dict[Medium, Wording] = {"images": IMAGES, "text": TEXT}
