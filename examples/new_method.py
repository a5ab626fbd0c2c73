"""A method of your own: a score that says which tokens of a prompt to keep, and the laws of the cache checked for it.

A method is a frozen dataclass whose fields are its options. It fills one slot of the description of a cache, here the
scorer, so it composes with what fills the others. No registry is needed, and no other file.

    python examples/new_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

from hf_kvcache import patch_model, report, smollm2
from hf_kvcache.laws import check_laws
from hf_kvcache.methods import AdaKV, ScoringMethod, TurboQuant


@dataclass(frozen=True)
class LargeValues(ScoringMethod):
    """Keeps tokens with large values: a small share of attention to them moves the output most.

    Args:
        power: of the norm; 2 prefers few large numbers to many small ones.
    """

    name: ClassVar[str] = "large-values"
    paper: ClassVar[str] = "-"
    while_decoding: ClassVar[bool] = True  # needs nothing but what is held, so it may be asked again

    sinks: int = 4
    window: int = 8
    power: float = 2.0

    def score(self, observation):
        """`[B, H_kv, T]`, higher for what is to stay."""
        return observation.value.abs().pow(self.power).sum(-1)


if __name__ == "__main__":
    check_laws(LargeValues(budget=24))
    check_laws([LargeValues(budget=24, every=4), AdaKV(), TurboQuant(bits=8)])
    if smollm2.available():
        model, tokenizer = smollm2.load()
        patch_model(model, [LargeValues(budget=0.5), TurboQuant(bits=4)])
        inputs = tokenizer(
            "The capital of France is Paris. The capital of Germany is Berlin. " * 8, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=8, pad_token_id=0, do_sample=False, return_dict_in_generate=True)
        print(tokenizer.decode(out.sequences[0, -8:]))
        print(f"{report(out.past_key_values).ratio:.1f} times smaller")
