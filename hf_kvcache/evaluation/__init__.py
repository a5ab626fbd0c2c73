"""Tasks with long contexts, the protocol that scores a compressed cache on them, and intervals for the scores."""

from hf_kvcache.evaluation.bootstrap import Interval, bootstrap
from hf_kvcache.evaluation.protocol import (
    Answer,
    context_ids,
    filled_cache,
    natural,
    recall,
    score_answers,
    score_answers_aware,
)
from hf_kvcache.evaluation.suite import SUITE, SuiteTask
from hf_kvcache.evaluation.task import Task
from hf_kvcache.evaluation.tasks import make_task
