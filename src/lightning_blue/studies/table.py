"""The studies: one row each, from which the command, its help and the report are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_blue.studies.bench import Bench
from lightning_blue.studies.confound import confound
from lightning_blue.studies.contribution import contribution
from lightning_blue.studies.residuals import residuals
from lightning_blue.studies.results import Result
from lightning_blue.studies.shift import shift
from lightning_blue.studies.similarity import similarity
from lightning_blue.studies.single_layer import single_layer
from lightning_blue.studies.steps import steps


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        title: a heading.
        where: in the paper.
        claim: what the paper says, a sentence.
        run: makes it.
    """

    title: str
    where: str
    claim: str
    run: Callable[[Bench], Result]


STUDIES: dict[str, Study] = {
    "contribution": Study(
        "Contribution of each layer's memory",
        "Eq. 9, Fig. 2",
        "with distributed memories only the last critical layer comes near a score of 1, the "
        "others stay under 0.7, falling layer by layer to under 0.1 in the first; with computed "
        "memories every layer comes near 1.",
        contribution,
    ),
    "similarity": Study(
        "Distributed and computed memories",
        "Fig. 3",
        "the cosine between them falls the farther the layer is from the last.",
        similarity,
    ),
    "single-layer": Study(
        "Edits of a single layer",
        "Fig. 4, 8",
        "specificity and fluency stay near the unedited model's with either residual; with "
        "computed ones efficacy is more than 3 times higher on average, generalization more than "
        "2 times, consistency more than 10%.",
        single_layer,
    ),
    "residuals": Study(
        "Residuals and the bound of the weight shift",
        "Theorem 4.1, Lemma 4.2, Fig. 5",
        "the shift of the weights is bounded by `(|R^l* - R^L| + (L - l) |R^l|) |Q|`; "
        "`|R^l* - R^L|` grows the farther the layer is from the last, and `|Q|` with the batch and "
        "with sequential edits.",
        residuals,
    ),
    "steps": Study(
        "Optimisation steps when every layer is computed in turn",
        "Table 1",
        "after the first two layers next to no step is left (Llama-3: 25.0, 11.10, 0.63, 0, 0).",
        steps,
    ),
    "shift": Study(
        "Hidden states before and after editing",
        "Fig. 7, 9, 10",
        "hidden states of factual prompts move less with BLUE.",
        shift,
    ),
    "confound": Study(
        "Layers written, targets and shares, apart",
        "beyond the paper",
        "nothing: it compares plans that differ in all three at once.",
        confound,
    ),
}
