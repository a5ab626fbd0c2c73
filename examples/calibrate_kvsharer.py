"""Search and heal a KVSharer plan once, save it, and use it again; the command line does the same.

python examples/calibrate_kvsharer.py
hf-kvcache calibrate kvsharer smollm2 --share 0.125 -o plan.safetensors
"""

from hf_kvcache import KVSharer, find_plan, patch_model, smollm2

model, tokenizer = smollm2.load()
plan = find_plan(model, KVSharer(share=0.125), tokenizer=tokenizer)
print("layers that read another layer's KV:", {layer: plan.source_layers[layer] for layer in plan.consumers})
plan.save("plan.safetensors")

patch_model(model, "kvsharer", plan="plan.safetensors")
