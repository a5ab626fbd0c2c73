"""lm-eval on a patched model: its own scores where nothing is lost, other and repeatable ones where something is."""

import logging
import sys
from functools import cache

import pytest

from hf_kvcache import patch_model, smollm2
from hf_kvcache.testing import tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
if not smollm2.available():
    pytest.skip("the tokenizer of SmolLM2 is not installed", allow_module_level=True)

TASKS = (
    "hfkv_niah_1",
    "hfkv_niah_4_aware",
    "hfkv_kv_20",
    "hfkv_func_20",
    "hfkv_tracking_1",
    "hfkv_continuation",
    "hfkv_rolling",
    "hfkv_passkey",
)


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.load()[1]


@pytest.fixture
def model(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@cache
def manager():
    """Reads the names of all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    from hf_kvcache.integrations.lm_eval import TASKS as FOLDER

    return TaskManager(include_path=FOLDER)


def samples(lm) -> dict[str, list]:
    """What the model answered to the first two requests of every task."""
    logging.disable(logging.WARNING)
    try:
        found = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager(), limit=2, bootstrap_iters=0)
    finally:
        logging.disable(logging.NOTSET)
    return {task: [sample["filtered_resps"][0] for sample in found["samples"][task]] for task in TASKS}


def likelihood(answer) -> float | None:
    return None if isinstance(answer, str) else float(answer[0] if isinstance(answer, (tuple, list)) else answer)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_nothing_lost_gives_the_scores_of_lm_eval(model, tokenizer, batch_size):
    from lm_eval.models.huggingface import HFLM

    from hf_kvcache.integrations.lm_eval import KVCacheLM

    expected = samples(HFLM(model, tokenizer=tokenizer, batch_size=batch_size))
    found = samples(KVCacheLM(model, tokenizer=tokenizer, batch_size=batch_size))
    for task in TASKS:
        for mine, theirs in zip(found[task], expected[task], strict=True):
            if isinstance(mine, str):
                assert mine == theirs
            else:
                # a sum of hundreds of float32 log-probabilities
                assert likelihood(mine) == pytest.approx(likelihood(theirs), rel=1e-6, abs=1e-5)


def test_a_compressed_cache_gives_other_scores_that_can_be_had_again(model, tokenizer):
    from hf_kvcache.integrations.lm_eval import KVCacheLM

    full = samples(KVCacheLM(model, tokenizer=tokenizer))
    small = samples(KVCacheLM(model, "adakv+criticalkv+turboquant", budget=0.1, bits=2, tokenizer=tokenizer))
    again = samples(KVCacheLM(model, "adakv+criticalkv+turboquant", budget=0.1, bits=2, tokenizer=tokenizer))
    assert small == again
    for task in TASKS:
        assert small[task] != full[task], task


def test_a_patched_model_stays_as_it_is_patched(model, tokenizer):
    from hf_kvcache import new_cache
    from hf_kvcache.integrations.lm_eval import KVCacheLM

    lm = KVCacheLM(patch_model(model, "snapkv", budget=0.5), tokenizer=tokenizer)
    assert new_cache(lm.model).spec.scorer.name == "snapkv"


@pytest.mark.parametrize("question_tokens", [0, -1, 1.5, True])
def test_no_question_is_refused(model, tokenizer, question_tokens):
    from hf_kvcache.integrations.lm_eval import KVCacheLM

    with pytest.raises(ValueError, match="question_tokens must be an int of at least 1"):
        KVCacheLM(model, tokenizer=tokenizer, question_tokens=question_tokens)


def test_the_question_comes_after_the_compression_only_where_the_document_says_so(model, tokenizer):
    from lm_eval.api.instance import Instance

    from hf_kvcache.integrations.lm_eval import KVCacheLM

    lm = KVCacheLM(model, tokenizer=tokenizer)
    question = "\nWhat is the number? It is"
    instance = Instance("loglikelihood", {"asked": question}, ("A long text." + question, " 7"), 0)
    assert lm._tokens_asked(instance) == len(tokenizer(question, add_special_tokens=False)["input_ids"])
    assert lm._tokens_asked(Instance("loglikelihood", {"asked": ""}, instance.args, 0)) == 1
    assert lm._tokens_asked(Instance("loglikelihood", {}, instance.args, 0)) == 1


def test_the_command_knows_model_and_tasks(monkeypatch, capsys):
    from typer.testing import CliRunner

    from hf_kvcache.cli import app
    from hf_kvcache.integrations import lm_eval as integration

    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(list(sys.argv)))
    result = CliRunner().invoke(app, ["lm-eval", "run", "--model", "hf-kvcache", "--tasks", "hfkv_kv_20"])
    assert result.exit_code == 0, result.output
    expected = ["lm-eval", "run", "--model", "hf-kvcache", "--tasks", "hfkv_kv_20", "--include_path"]
    assert seen == [[*expected, str(integration.TASKS)]]
    from lm_eval.api.registry import get_model

    assert get_model("hf-kvcache") is integration.KVCacheLM
