"""What the tests of bad input share: a model, a plan for it, and `refused`, which judges errors and what they leave."""

from functools import cache as memoize

from hf_kvcache import SharingPlan, is_patched
from hf_kvcache.testing import model_state, tiny_model

PLAN = SharingPlan((0, 0, 2, 2))


@memoize
def original():
    return tiny_model("llama")


class refused:
    """Expects an error that says all of `words`, and the model afterwards as it was before."""

    def __init__(self, kind: type[Exception], *words: str, model=None):
        self.kind, self.words, self.model = kind, words, model

    def __enter__(self):
        self.before = None if self.model is None else model_state(self.model)
        self.patched = self.model is not None and is_patched(self.model)

    def __exit__(self, kind, error, traceback):
        assert error is not None, f"expected {self.kind.__name__}, and nothing was raised"
        if not isinstance(error, self.kind):
            return False
        missing = [word for word in self.words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        if self.model is not None:
            assert is_patched(self.model) == self.patched
            self.before.assert_equal(model_state(self.model))
        return True
