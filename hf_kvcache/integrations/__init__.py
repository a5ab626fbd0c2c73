"""Other tools that run a patched model: lm-eval."""
