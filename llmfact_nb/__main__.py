"""`python -m llmfact_nb` is the command `llmfact`; torchrun starts it this way."""

from llmfact_nb.cli import main

if __name__ == "__main__":
    main()
