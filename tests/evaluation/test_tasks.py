"""Tasks are equal for equal seeds, as long as asked, and hold the answers to their own questions."""

import re

import pytest

from hf_kvcache.evaluation import SUITE, make_task
from hf_kvcache.evaluation.lookup import MOST_ROWS
from hf_kvcache.real_models import REAL_MODELS

FILLER = " ".join(f"Sentence number {index} says nothing that matters." for index in range(90))
IN_LENGTH = ["niah-1", "niah-4", "niah-8", "tracking-1", "tracking-2", "passkey", "kv", "func"]
IN_ROWS = ["kv-20", "kv-40", "func-20", "func-50"]


def words(text, add_special_tokens=True):
    """A tokenizer in which every word and every other character is a token."""
    assert not add_special_tokens, "tasks are raw text"
    return {"input_ids": [hash(found) % 1000 for found in re.findall(r"\w+|\W", text)]}


def made(name, seed=0, length=600):
    return make_task(name, words, seed, None if name in IN_ROWS else length, FILLER)


@pytest.mark.parametrize("name", IN_LENGTH + IN_ROWS)
def test_a_seed_decides_everything(name):
    assert made(name, seed=3) == made(name, seed=3)
    first, other = made(name, seed=3), made(name, seed=4)
    assert first.context != other.context and first.questions != other.questions


@pytest.mark.parametrize("name", IN_LENGTH)
@pytest.mark.parametrize("length", [500, 1203])
def test_contexts_are_as_long_as_asked(name, length):
    tokens = len(words(made(name, length=length).context, add_special_tokens=False)["input_ids"])
    assert length - 50 <= tokens <= length


@pytest.mark.parametrize("name", IN_LENGTH + IN_ROWS)
def test_answers_stand_in_the_context(name):
    task = made(name)
    assert task.name.startswith(name)
    for _, answer in task.questions:
        assert re.fullmatch(r" [1-9]\d+", answer)
        assert len(re.findall(rf"\b{answer.strip()}\b", task.context)) == (2 if name == "passkey" else 1)


@pytest.mark.parametrize(("name", "count"), [("niah-8", 8), ("kv-40", 8), ("kv-3", 3), ("func-20", 8), ("passkey", 1)])
def test_number_of_questions(name, count):
    questions = make_task(name, words, 0, None if name[-1].isdigit() and "niah" not in name else 600, FILLER).questions
    assert len(set(questions)) == count


def test_needles_name_the_word_that_is_asked_for():
    task = made("niah-4")
    for question, answer in task.questions:
        word = re.findall(r"number for (\w+) mentioned", question)[0]
        assert f"One of the special magic numbers for {word} is:{answer}." in task.context


def test_rows_and_functions_lead_to_their_answer():
    for question, answer in made("kv-20").questions:
        assert question + answer + "\n" in made("kv-20").context
    namespace = {}
    exec(made("func-20").context.partition("# test_settings.py")[0], namespace)
    for question, answer in made("func-20").questions:
        name = re.fullmatch(r"\n    assert (get_\w+)\(\) ==", question)[1]
        assert namespace[name]() == int(answer)


def by_spaces(text, add_special_tokens):
    return {"input_ids": text.split()}


@pytest.mark.parametrize("kind", ["kv", "func"])
def test_a_list_may_have_up_to_as_many_rows_as_there_are_names(kind):
    def length(rows: int) -> int:
        return len(make_task(f"{kind}-{rows}", words, 0).context.split())

    longest, row = length(MOST_ROWS), length(2) - length(1)
    # twice as many rows as half of the names and one more are more than there are names
    for rows in (MOST_ROWS // 2 + 1, MOST_ROWS):
        assert make_task(kind, by_spaces, 0, longest - row * (MOST_ROWS - rows)).name == f"{kind}-{rows}"
    with pytest.raises(ValueError, match=f"length must be at most {longest}, .* the longest '{kind}-{MOST_ROWS}', got"):
        make_task(kind, by_spaces, 0, longest + 1)


def test_assignments_can_be_followed_forwards():
    task = made("tracking-2")
    values = {}
    for name, value in re.findall(r"VAR ([A-Z]{3}) = ((?:VAR )?\w+)\.", task.context):
        values[name] = values[value[4:]] if value.startswith("VAR ") else value
    ((question, answer),) = task.questions
    asked = re.findall(r"VAR ([A-Z]{3}) is$", question)[0]
    assert len(values) == 3 and f" {values[asked]}" == answer


def test_the_shipped_filler_is_used_without_another():
    assert "Shakespeare" in make_task("niah-1", words, 0, 3000).context


@pytest.mark.parametrize("model", SUITE)
def test_every_task_of_the_suite_can_be_made(model):
    assert model in REAL_MODELS
    names = [cell.task for cell in SUITE[model]]
    assert len(set(names)) == len(names)
    for cell in SUITE[model]:
        assert make_task(cell.task, words, 0, cell.length).name == cell.task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("niah", words, 0, 600), "unknown task 'niah'"),
        (("qa-4", words, 0, 600), "unknown task 'qa-4'"),
        (("niah-x", words, 0, 600), "unknown task 'niah-x'"),
        (("niah-0", words, 0, 600), "needles must be from 1"),
        (("niah-8", words, 0, 50), "length must be at least"),
        (("niah-1", words, 0), "needs length"),
        (("kv-20", words, 0, 600), "use 'kv' with length=600"),
        (("kv-0", words, 0), "rows must be from 1"),
        (("niah-1", words, 0, 600, "?"), "filler must be prose"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_explained(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(*arguments)
