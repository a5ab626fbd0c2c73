"""Methods on one model: layers share their KV, half of the tokens are evicted, the rest is coded in four bits.

python examples/compose.py
"""

from pathlib import Path

from hf_kvcache import KVSharer, Offload, SharingPlan, patch_model, report, smollm2

model, tokenizer = smollm2.load()
plan = SharingPlan.from_pairs(model.config.num_hidden_layers, [(28, 27), (6, 5)])

# a list of methods, or their names joined by +; the order does not matter, they fill different slots
patch_model(model, [KVSharer(plan=plan), Offload()])
patch_model(model, "offload+kvsharer", plan=plan)

inputs = tokenizer("The three primary colours are", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0]))

# every axis at once: which layers store, which tokens are kept, how an entry is stored, where
patch_model(model, "kvsharer+adakv+criticalkv+turboquant+offload", plan=plan, budget=0.5, bits=4)
play = (Path(__file__).parents[1] / "tests" / "data" / "play.txt").read_text(encoding="utf-8")[:4000]
inputs = tokenizer(play, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
print(repr(tokenizer.decode(out.sequences[0, -20:])), f"- {report(out.past_key_values).ratio:.1f} times smaller")

# two methods for one slot contradict each other, and the error names both
try:
    patch_model(model, [KVSharer(plan=plan), KVSharer(plan=plan)])
except ValueError as error:
    print("as expected:", error)
