"""Which tasks of lm-evaluation-harness a run measures, on how many records, how often."""

from __future__ import annotations

from dataclasses import dataclass

from blue_callbacks.ranges import COUNT, WHOLE, check_ranges


@dataclass(frozen=True)
class AbilitySettings:
    """What is measured of a model's general ability.

    Args:
        tasks: names of tasks, groups or tags of lm-evaluation-harness, or paths of its YAML files;
            ``paper``: the six of the paper's Figure 6, ``paper_choice``: the same by comparing
            the probabilities of answers. None: no general ability.
        every: edits from one measurement to the next; 0: before the first edit and at the end.
        limit: records of a task that are read, the first ones; None: all of them.
        num_fewshot: solved examples before each record; None: as many as the task says.
        data: folder of the files that ``paper`` and ``paper_choice`` read: ``sst2.jsonl``,
            ``mrpc.jsonl``, ``cola.jsonl``, ``rte.jsonl``, ``mmlu.jsonl``, ``nli.jsonl``.
        batch_size: prompts in one forward pass.
    """

    tasks: list[str] | None = None
    every: int = 0
    limit: int | None = 100
    num_fewshot: int | None = None
    data: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_ranges(
            "measure.ability",
            vars(self),
            every=WHOLE,
            limit=COUNT,
            num_fewshot=WHOLE,
            batch_size=COUNT,
        )
