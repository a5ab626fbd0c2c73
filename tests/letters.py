"""A tokenizer for texts that nobody reads."""


class Letters:
    """One token a character."""

    eos_token_id = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) % 96 + 1 for letter in text]}
