"""Several sequences in one row of the original YOCO, told by their positions: each is read as if it were alone."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hf_kvcache import new_cache
from hf_kvcache.testing import greedy, random_ids
from tests.forward import close, logits
from tests.models.yoco import every_kind, model_of, patched_or_not

# of the sequences of each row; longer and shorter than a window and than a chunk, both 8
LENGTHS = ((18, 12), (3, 27), (1, 8, 21), (30,))


def packed(*lengths):
    """The arguments of rows of sequences of these lengths."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return {"input_ids": random_ids(batch=len(lengths), length=positions.shape[1]), "position_ids": positions}


def alone(model, ids, lengths):
    """Logits of rows whose sequences are read one by one."""
    rows = zip(ids, lengths, strict=True)
    return torch.stack(
        [
            torch.cat([logits(model, part[None], use_cache=False)[0] for part in row.split(list(sizes))])
            for row, sizes in rows
        ]
    )


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [0, 1, 15])
def test_a_sequence_of_a_row_is_the_sequence_alone(kind, attention, rows):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    for lengths in (LENGTHS[:1], LENGTHS):
        asked = packed(*lengths)
        expected = alone(model, asked["input_ids"], lengths)[:, -rows:]
        close(logits(model, asked.pop("input_ids"), use_cache=False, logits_to_keep=rows, **asked), expected)


@every_kind
def test_so_it_is_in_a_patched_model(kind):
    model, asked = patched_or_not(kind, "none"), packed(*LENGTHS)
    expected = alone(model, asked["input_ids"], LENGTHS)
    close(logits(model, asked.pop("input_ids"), use_cache=False, **asked), expected)


def test_many_short_sequences_lose_no_digits():
    model, lengths = model_of("retention", retention_chunk_size=256), (5,) * 40
    asked = packed(lengths)
    expected = alone(model, asked["input_ids"], [lengths])
    found = logits(model, asked.pop("input_ids"), use_cache=False, **asked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_no_gradient_passes_from_one_sequence_to_another(kind):
    model, asked = model_of(kind).train(), packed((18, 12))
    embedded = model.get_input_embeddings()(asked.pop("input_ids")).detach().requires_grad_()
    found = model(inputs_embeds=embedded, use_cache=False, **asked).logits
    (grad,) = torch.autograd.grad(found[:, 18:].square().sum(), embedded)
    assert not grad[:, :18].any() and bool(grad[:, 18:].all())


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_a_cache_has_one_past_for_a_row(kind, method):
    model, asked = patched_or_not(kind, method), packed((18, 12))
    ids = asked.pop("input_ids")
    caches = [{}] if method == "unpatched" else [{}, {"past_key_values": new_cache(model)}]
    for cache in caches:
        for rows in (0, 1):
            with pytest.raises(ValueError, match=r"begin again at token 18, .*use_cache=False"):
                logits(model, ids, logits_to_keep=rows, **cache, **asked)
    with pytest.raises(ValueError, match="begin again at token 18"):
        greedy(model, ids, **asked)
    # a second chunk counts on from the first
    whole = logits(model, ids)
    with torch.no_grad():
        past = model(ids[:, :18]).past_key_values
    close(logits(model, ids[:, 18:], past_key_values=past, position_ids=torch.arange(18, 30)[None]), whole[:, 18:])


@every_kind
def test_an_attention_without_masks_is_told_the_bounds(kind):
    """As Flash: here SDPA stands for it."""
    AttentionInterface.register("no_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("no_mask", flash_attention_mask)
    model, asked = model_of(kind), packed((18, 12))
    model.set_attn_implementation("no_mask")
    ids = asked.pop("input_ids")
    with pytest.raises(ValueError, match=r"'no_mask' takes no mask .* cu_seq_lens_q"):
        logits(model, ids, use_cache=False, **asked)
    bounds = torch.tensor([0, 18, 30])
    assert logits(model, ids, use_cache=False, cu_seq_lens_q=bounds, **asked).shape[1] == 30
