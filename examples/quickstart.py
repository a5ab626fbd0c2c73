"""Patch a model, generate, see what its cache holds, and take the patch off.

python examples/quickstart.py
"""

from hf_kvcache import KVSharer, SharingPlan, patch_model, report, smollm2, unpatch_model

model, tokenizer = smollm2.load()  # any AutoModelForCausalLM of a supported family
messages = [{"role": "user", "content": "Name three uses of a raincoat."}]
prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
inputs = tokenizer(prompt, return_tensors="pt")

# patch_model(model, "kvsharer", share=0.1, tokenizer=tokenizer) would search a plan; two pairs are named here instead
plan = SharingPlan.from_pairs(model.config.num_hidden_layers, [(28, 27), (6, 5)])
patch_model(model, KVSharer(plan=plan))
out = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :]))
print(report(out.past_key_values))

unpatch_model(model)  # the model is what it was before
