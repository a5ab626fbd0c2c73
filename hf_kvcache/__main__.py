"""`python -m hf_kvcache`: the command line."""

from hf_kvcache.cli import main

if __name__ == "__main__":
    main()
