"""Any options: `patch_model` gives a working model or a clear error, and after an error the model is as it was."""

from dataclasses import MISSING, fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kvcache import METHODS, is_patched, patch_model, unpatch_model
from hf_kvcache.testing import greedy, model_state, random_ids, tiny_model

FAMILIES = ("llama", "gemma2", "phi3", "qwen3")
IDS = random_ids(2, 40)
# calibration on text takes seconds and needs a tokenizer; what it does is tested elsewhere
SLOW = {"kvsharer", "headkv", "kvzip", "planned"}

names = st.sampled_from(sorted(set(METHODS) - SLOW))
numbers = st.one_of(
    st.integers(-2, 64),
    st.floats(-0.5, 2.0),
    st.just(float("nan")),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 0.25, 0.5, 1.0, float("inf")]),
)
values = st.one_of(
    numbers,
    st.booleans(),
    st.none(),
    st.sampled_from(["mix", "paper", "prod", "l1", "token", "channel", "", "nonsense"]),
)


def option_names() -> list[str]:
    return sorted(
        {field.name for name in set(METHODS) - SLOW for field in fields(METHODS[name])} | {"nonsense", "plan"}
    )


@st.composite
def calls(draw):
    """A method, composed or not, with options of which some have the type of their default."""
    method = "+".join(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    options = draw(st.dictionaries(st.sampled_from(option_names()), values, max_size=3))
    sensible = draw(st.booleans())
    for name in method.split("+") if sensible else ():
        for field in fields(METHODS[name]) if name in METHODS else ():
            if field.name in options and field.default is not MISSING and isinstance(field.default, (bool, str)):
                options[field.name] = field.default
    return method, options


@pytest.fixture(scope="module")
def models():
    """For every family a model and what it was."""
    made = {family: tiny_model(family) for family in FAMILIES}
    return {family: (model, model_state(model)) for family, model in made.items()}


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(), family=st.sampled_from(FAMILIES))
def test_any_options_work_or_are_refused(models, call, family):
    model, before = models[family]
    method, options = call
    try:
        patch_model(model, method, **options)
    except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        # one that a reader can act on: it names what was given, or what was expected
        assert len(str(error)) > 20, repr(error)
        assert not is_patched(model)
    else:
        try:
            tokens = greedy(model, IDS, tokens=3)
            assert tokens.shape == (2, 3)
            assert torch.equal(greedy(model, IDS, tokens=3), tokens)
        except (ValueError, NotImplementedError) as error:
            # what only a forward can know, such as the width of a head
            assert len(str(error)) > 20, repr(error)
        finally:
            unpatch_model(model)
    model_state(model).assert_equal(before)
