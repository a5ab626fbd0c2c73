"""Ten chats over one system prompt and one document, which are read once: time to the first token, bytes, dedup factor.

python examples/shared_prefix_chat.py                        # the chats
python examples/shared_prefix_chat.py --continue 3           # another process goes on with the third
python examples/shared_prefix_chat.py --store redis://host   # and so does another machine, through a shared store
"""

import argparse
import time
from pathlib import Path

import torch

from hf_kvcache import patch_model, smollm2
from hf_kvcache.sequential.store import PrefixStore

QUESTIONS = [
    "Who speaks first?",
    "What is the text about?",
    "Name one person in it.",
    "Is it a play or a novel?",
    "Where does it take place?",
    "What happens in the end?",
    "Is anybody angry?",
    "Quote a short sentence.",
    "How old is the text?",
    "What would you ask the author?",
]


def conversation(tokenizer, document: str, question: str) -> torch.Tensor:
    """Token ids `[1, T]`: what all chats share comes first."""
    system = f"<|im_start|>system\nYou answer questions about a text.\n\n{document}<|im_end|>\n"
    text = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def ask(model, ids: torch.Tensor, tokens: int, store: PrefixStore) -> tuple[torch.Tensor, float]:
    """The reply, and the seconds to its first token; the second call takes the whole prompt from the store."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    first = time.perf_counter() - began
    store.flush()
    return model.generate(ids, max_new_tokens=tokens, **options)[:, ids.shape[1] :], first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="shared-prefix-chat", help="folder or URL")
    parser.add_argument("--document", type=Path, default=Path(__file__).parents[1] / "tests" / "data" / "play.txt")
    parser.add_argument("--characters", type=int, default=9000, help="of the document")
    parser.add_argument("--chats", type=int, default=len(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=16, help="of a reply")
    parser.add_argument("--continue", type=int, default=0, dest="turn", help="go on with this chat, counted from 1")
    options = parser.parse_args()
    document = options.document.read_text(encoding="utf-8")[: options.characters]
    model, tokenizer = smollm2.load()
    store = PrefixStore(options.store)
    patch_model(model, "turboquant+sequential", bits=8, store=store)

    if options.turn:
        ids = conversation(tokenizer, document, QUESTIONS[options.turn - 1])
        follow = tokenizer("Thank you. And why?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, follow], dim=1)
        reply, first = ask(model, ids, options.tokens, store)
        adopted = store.counts.adopted_tokens - (ids.shape[1] - 1)
        print(f"{ids.shape[1]} tokens, first token after {first:.2f} s: {tokenizer.decode(reply[0])!r}")
        print(f"adopted {adopted} tokens that another process had read")
        store.close()
        return

    prompts = 0
    for number, question in enumerate(QUESTIONS[: options.chats], 1):
        ids = conversation(tokenizer, document, question)
        before = store.counts.adopted_tokens
        reply, first = ask(model, ids, options.tokens, store)
        adopted = store.counts.adopted_tokens - before - (ids.shape[1] - 1)
        prompts += ids.shape[1]
        print(f"chat {number}: {ids.shape[1]} tokens, {adopted} from the store, first token after {first:.2f} s")
        print(f"    {question} {tokenizer.decode(reply[0])!r}")
    store.flush()
    held = sum(len(entry.ids) for entry in store.entries())
    print(f"{store.backend.total():,} bytes in {options.store}: {held} tokens where {prompts} were read")
    print(f"every token is stored once, which saves a factor of {prompts / held:.1f}")
    store.close()


if __name__ == "__main__":
    main()
