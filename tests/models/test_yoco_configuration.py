"""The configuration of the original YOCO: what it refuses, and the layers and first weights that it makes."""

import pytest
import torch
from torch import nn

from hf_kvcache.models import YocoConfig, YocoForCausalLM
from tests.models.yoco import model_of


def small(**changes):
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "odd.*num_self_decoder_layers"),
        ({"num_self_decoder_layers": 0}, "between 1 and 3"),
        ({"num_self_decoder_layers": 4}, "between 1 and 3"),
        ({"self_decoder": "mamba"}, "retention, window"),
        ({"self_decoder": "window", "sliding_window": 129}, "longer than the context"),
        ({"self_decoder": "window", "sliding_window": 1}, "at least 2"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 50}, "give head_dim"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        YocoConfig(**small(**changes))


def test_odd_depth_is_possible_when_said_how():
    config = YocoConfig(**small(num_hidden_layers=5, num_self_decoder_layers=3))
    assert config.source_layers == (0, 1, 2, 3, 3)


def test_cross_layers_own_no_key_and_value():
    model = model_of("retention")
    for layer in model.model.layers[2:]:
        names = {name for name, module in layer.self_attn.named_modules() if isinstance(module, nn.Linear)}
        assert names == {"q_proj", "o_proj"}


@torch.no_grad()
def test_initialisation_is_the_authors():
    model = YocoForCausalLM(YocoConfig(**small(hidden_size=256, head_dim=64)))
    attention = model.model.layers[0].self_attn
    gains = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "decay_proj"), 2**-2.5) | {"o_proj": 2**-1}
    for name, gain in gains.items():
        weight = getattr(attention, name).weight
        assert float(weight.std()) == pytest.approx(gain * (2 / sum(weight.shape)) ** 0.5, rel=0.1), name  # Xavier
    assert float(model.model.embed_tokens.weight.std()) == pytest.approx(256**-0.5, rel=0.05)
