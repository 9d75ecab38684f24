"""Run the command line with `python -m spade_faiss.cli`."""

from .main import main

main()
