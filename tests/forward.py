"""One forward without gradients, and when the logits of two forwards agree."""

import torch


@torch.no_grad()
def logits(model, ids, **kwargs):
    """What the model says of `ids` `[B, T]`: `[B, T, V]`, or fewer positions where `kwargs` ask for fewer."""
    return model(ids, **kwargs).logits


def close(actual, expected):
    """Asserts that logits differ by rounding only."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
