"""Metrics of what a judge says of generated answers."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from lightning_blue.judge import Case, Judge
from lightning_blue.language_model.chat import markers
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Evaluation
from lightning_blue.metrics.generated import extended
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.table import MetricSpec
from lightning_blue.support.processes import distribute


def with_verdicts(
    evaluation: Evaluation,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool = False,
) -> Evaluation:
    """Let a judge say which generated answers are right; add what that gives to an evaluation.

    Judged are the answers to own prompts, paraphrases and portability prompts, read on by as many
    stop strings as the object holds itself. An empty one is wrong, and is not sent, nor counted in
    how far the judge agrees with exact match. The judge sees
    prompts without the chat template that they may carry. Several processes share the answers, and
    each gets all verdicts; all of them must call it.

    Args:
        evaluation: with answers, see `generated.with_answers`; without any it is returned as it is.
        judge: that is asked.
        tokenizer: of the model that has answered.
        progress: whether to show a progress bar.
    """
    known = markers(tokenizer)
    cases = [
        Case(known.parts(each.prompt)[1], each.wanted, each.longer)
        for each in evaluation.answers
        if _is_sent(each)
    ]
    said = iter(distribute(cases, lambda part: judge.ask(part, progress=progress)))
    answers = [
        replace(each, judged=next(said) if _is_sent(each) else False) if each.compared else each
        for each in evaluation.answers
    ]
    if not answers:
        return evaluation
    means = {}
    for spec, measure in table.of_protocol("zsre", table.JUDGED_ANSWERS, added=(table.GENERATION,)):
        read = [each for each in answers if _is_read(spec, each)]
        means[spec.name] = measure.metric(sync_on_compute=False)
        requests = torch.tensor([each.request for each in read], dtype=torch.long)
        means[spec.name].update(read, requests)
    return extended(replace(evaluation, answers=answers), means)


def _is_sent(answer: GeneratedAnswer) -> bool:
    return answer.compared and bool(answer.longer.strip())


def _is_read(spec: MetricSpec, answer: GeneratedAnswer) -> bool:
    if spec.prompts not in (table.ANSWERS, answer.prompts) or not answer.compared:
        return False
    if table.JUDGE not in spec.needs:
        return True
    if spec.prompts == table.ANSWERS and not _is_sent(answer):
        return False  # of how the judge judges, nothing is seen where it was not asked
    return answer.judged is not None
