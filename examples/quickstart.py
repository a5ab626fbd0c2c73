"""Patch a model, read a long text and ask about it, see what the cache holds, and take the patch off.

python examples/quickstart.py
"""

from pathlib import Path

from hf_kvcache import patch_model, report, smollm2, unpatch_model

model, tokenizer = smollm2.load()  # any AutoModelForCausalLM of a supported family
text = (Path(__file__).parents[1] / "tests" / "data" / "play.txt").read_text(encoding="utf-8")[:5000]
prompt = f"<|im_start|>user\n{text}\n\nWhat kind of text is this?<|im_end|>\n<|im_start|>assistant\n"
inputs = tokenizer(prompt, return_tensors="pt")
print(f"{inputs['input_ids'].shape[1]} tokens")

# half of the tokens, each number of them in four bits; "turboquant" alone keeps all tokens
patch_model(model, "kvzip+turboquant", budget=0.5, bits=4, tokenizer=tokenizer)
out = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :]))
print(report(out.past_key_values))

unpatch_model(model)  # the model is what it was before
