"""Tokens coded under the model's own distribution: bits a token, surprisal, and the paper's arithmetic. Float32, CPU.

    python examples/benchmarks/sequential_tokens.py     # ten texts of 1,000 tokens, coded and decoded

`bits` is what the bytes of the range coder come to, `surprisal` the mean of -log2 P(token) in the same run; the first
token of a text counts log2 of the vocabulary. `desynced` counts tokens that decoding does not give back. Beside them:
ids packed in the fewest bits, keys and values in 16 bit and in 4-bit TurboQuant, and the paper's 914,000 x (keys and
values of a 70B model with 64 KV heads, at 3 bits a number, against 4.3 bits a token) as it reads for this model.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import windows, write_results
from fidelity import texts

from hf_kvcache.models.shared import layer_bytes_per_token
from hf_kvcache.real_models import REAL_MODELS
from hf_kvcache.sequential import lm_coder
from hf_kvcache.sequential.packing import pack_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=sorted(REAL_MODELS))
    parser.add_argument("--windows", type=int, default=2, help="texts a domain, of five")
    parser.add_argument("--length", type=int, default=1000)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = REAL_MODELS[options.model].load()
    ids = torch.cat([windows(tokenizer, text, options.windows, options.length) for text in texts().values()])
    began = time.perf_counter()
    coded = lm_coder.encode(model, ids)
    middle = time.perf_counter()
    desynced = int((lm_coder.decode(model, coded) != ids).sum())
    ended = time.perf_counter()
    width, _ = pack_ids(ids.reshape(-1).numpy())
    config = model.config
    numbers = config.num_hidden_layers * layer_bytes_per_token(config) // 2
    turboquant = 4.25 * numbers
    row = {
        "tokens": ids.numel(),
        "bits": coded.bits,
        "surprisal": coded.surprisal,
        "overhead": coded.bits / coded.surprisal - 1,
        "desynced": desynced,
        "packed_bits": width,
        "kv_16_bit": 16 * numbers,
        "kv_turboquant_4": turboquant,
        "turboquant_4_over_coded": turboquant / coded.bits,
        "paper_3_bits_over_4.3": 80 * 64 * 128 * 2 * 3 / 4.3,
        "same_for_this_model": 3 * numbers / coded.bits,
        "same_at_1000_x_overhead": 3 * numbers / coded.bits / 1000,
        "encode_tokens_a_second": ids.numel() / (middle - began),
        "decode_tokens_a_second": ids.numel() / (ended - middle),
    }
    write_results("sequential_tokens" + ("" if options.model == "smollm2" else f"_{options.model}"), [row])


if __name__ == "__main__":
    main()
