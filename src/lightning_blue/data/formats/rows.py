"""The data formats that there are, in the order in which files are matched with them."""

from __future__ import annotations

from types import MappingProxyType

from lightning_blue.data.formats.derived import statement_parts, unify_spelling
from lightning_blue.data.formats.format import Format, ProbeFields

COUNTERFACT = Format(
    name="counterfact",
    required_columns=("requested_rewrite",),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "requested_rewrite.subject",
            "prompt": "requested_rewrite.prompt",
            "target_new": "requested_rewrite.target_new.str",
            "target_true": "requested_rewrite.target_true.str",
            "relation": "requested_rewrite.relation_id",
            "paraphrases": "paraphrase_prompts",
            "neighborhood_prompts": "neighborhood_prompts",
            "neighborhood_answer": "requested_rewrite.target_true.str",
            "generation_prompts": "generation_prompts",
        }
    ),
    needed=("subject", "prompt", "target_new", "target_true"),
    unused=frozenset({"pararel_idx", "attribute_prompts"}),
)
ZSRE = Format(
    name="zsre",
    required_columns=("subject", "src", "answers"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "src",
            "target_new": "answers.0",
            "paraphrases": "rephrase",
            "neighborhood_prompts": "loc",
            "neighborhood_answer": "loc_ans",
            "aliases": "answers",  # all of them; the first is the target
        }
    ),
    otherwise=MappingProxyType({"target_new": "alt"}),
    unused=frozenset({"pred", "cond"}),
    neighbor_ending="?",
)
# The same files, edited to the counterfactual answer, as MEND and EasyEdit do; ``answers`` is what
# is true. Told by its columns only where a file has no ``answers`` at all.
ZSRE_ALT = Format(
    name="zsre-alt",
    required_columns=("subject", "src", "alt"),
    paths=MappingProxyType(
        {
            **{field: path for field, path in ZSRE.paths.items() if field != "aliases"},
            "target_new": "alt",
            "target_true": "answers.0",
        },
    ),
    absent=frozenset({"answers"}),
    unused=frozenset({"pred", "cond"}),
    neighbor_ending="?",
)
FLAT_COUNTERFACT = Format(
    name="counterfact-flat",
    required_columns=("subject", "prompt", "target_new", "ground_truth"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "ground_truth",
            "paraphrases": "rephrase_prompt",
            "neighborhood_prompts": "locality_prompt",
            "neighborhood_answer": "locality_ground_truth",
        }
    ),
    needed=("subject", "prompt", "target_new", "target_true"),
)
# EasyEdit's KnowEdit (WikiData counterfact and recent, ZsRE): probes by what they probe.
KNOWEDIT = Format(
    name="knowedit",
    required_columns=("subject", "prompt", "target_new", "locality"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "ground_truth",
            "paraphrases": "rephrase|rephrase_prompt",
            "neighborhood_prompts": "locality.*.*",
            "portability": "portability.*.*",
        }
    ),
    unused=frozenset({"cond", "pred"}),
    probe=ProbeFields(answer="ground_truth", listed=True),
)
QAEDIT = Format(
    name="qaedit",
    required_columns=("subject", "prompt", "target", "rephrase"),
    paths=MappingProxyType(
        {
            "case_id": "id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target",
            "paraphrases": "rephrase",
            "neighborhood_prompts": "locality",
        }
    ),
    unused=frozenset({"source"}),
    probe=ProbeFields(prompt="loc", answer="loc_ans"),
)
RIPPLE_EDITS = Format(
    name="ripple-edits",
    required_columns=("edit", "Relation_Specificity"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "target_true",
            "relation": "edit.relation",
            "neighborhood_prompts": "Relation_Specificity|Forgetfulness.*.test_queries.*",
            "portability": "Logical_Generalization|Compositionality_I|Compositionality_II"
            "|Subject_Aliasing.*.test_queries.*",
        }
    ),
    unused=frozenset({"edit", "example_type"}),
    probe=ProbeFields(answer="answers.*.value|aliases", listed=True),
    derive=statement_parts,
)
MQUAKE = Format(
    name="mquake",
    required_columns=("requested_rewrite", "questions", "new_answer"),
    paths=MappingProxyType(
        {
            **{
                name: COUNTERFACT.paths[name]
                for name in ("case_id", "relation", *COUNTERFACT.needed)
            },
            "paraphrases": "requested_rewrite.question",
            "portability": "questions",
            "portability_answer": "new_answer",
            "portability_aliases": "new_answer_alias",
        }
    ),
    unused=frozenset(
        {"answer", "answer_alias", "answer_extended", "new_answer_extended", "orig"}
        | {"single_hops", "new_single_hops"}
    ),
    edits="requested_rewrite",
)
# Facts that a model is asked for (ROME's known_1000.json): what it should say, and no edit.
KNOWN = Format(
    name="known",
    required_columns=("subject", "prompt", "attribute"),
    absent=frozenset({"target_new"}),  # with it the attribute is a column like any other
    paths=MappingProxyType(
        {
            "case_id": "known_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "attribute",
            "relation": "relation_id",
        }
    ),
    unused=frozenset({"template", "prediction"}),
)
FACTS = Format(
    name="facts",
    required_columns=("subject", "prompt", "target_new"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "target_true",
            "paraphrases": "paraphrases",
            "neighborhood_prompts": "neighborhood_prompts",
            "neighborhood_answer": "target_true",
            "generation_prompts": "generation_prompts",
            "reference_texts": "reference_texts",
            "target_prefix": "target_prefix",
            "aliases": "aliases",
            "portability": "portability",
            "relation": "relation",
        }
    ),
    unused=frozenset({"neighbourhood_prompts"}),
    derive=unify_spelling,
)
# A format whose required columns include another's stands before that one.
_ALL = (
    MQUAKE,
    COUNTERFACT,
    RIPPLE_EDITS,
    ZSRE,
    ZSRE_ALT,
    KNOWEDIT,
    FLAT_COUNTERFACT,
    QAEDIT,
    KNOWN,
    FACTS,
)
FORMATS = MappingProxyType({row.name: row for row in _ALL})
