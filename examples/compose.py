"""Two methods on one model: layers share their KV, and what is left rests in host memory.

python examples/compose.py
"""

from hf_kvcache import KVSharer, Offload, SharingPlan, patch_model, smollm2

model, tokenizer = smollm2.load()
plan = SharingPlan.from_pairs(model.config.num_hidden_layers, [(28, 27), (6, 5)])

# a list of methods, or their names joined by +; the order does not matter, they fill different slots
patch_model(model, [KVSharer(plan=plan), Offload()])
patch_model(model, "offload+kvsharer", plan=plan)

inputs = tokenizer("The three primary colours are", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0]))

# two methods for one slot contradict each other, and the error names both
try:
    patch_model(model, [KVSharer(plan=plan), KVSharer(plan=plan)])
except ValueError as error:
    print("as expected:", error)
