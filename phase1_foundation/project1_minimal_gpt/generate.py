"""Generate text with a trained model.

uv run python phase1_foundation/project1_minimal_gpt/generate.py --prompt "ROMEO:" --temperature 0.8 --top_k 50
uv run python phase1_foundation/project1_minimal_gpt/generate.py --interactive
"""

import torch

from common.run import Run, ask
from phase1_foundation.project1_minimal_gpt import config
from phase1_foundation.project1_minimal_gpt.loading import load_model
from phase1_foundation.project1_minimal_gpt.sampling import stream


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("System", "Sampling", "Generation"), description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer, _ = load_model(s.CHECKPOINT, run.device)
        generator = torch.Generator().manual_seed(s.SEED)
        if s.INTERACTIVE:
            converse(run, model, tokenizer, generator)
            return
        for number in range(s.NUM_SAMPLES):
            if number:
                run.print("-" * 40)
            write(run, model, tokenizer, s.PROMPT, generator)


def write(run, model, tokenizer, prompt, generator):
    """Print a prompt and its continuation, each character as soon as it is drawn; Ctrl-C ends it."""
    s = run.settings
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError('the prompt is empty: give at least one character, such as --prompt "ROMEO:"')
    run.print(prompt, end="")
    sampling = {"temperature": s.TEMPERATURE, "top_k": s.TOP_K, "top_p": s.TOP_P, "generator": generator}
    for token in stream(model, tokens, s.MAX_NEW_TOKENS, **sampling):
        run.print(tokenizer.decode([token]), end="")
        if run.stopping:
            break
    run.print("")


def converse(run, model, tokenizer, generator):
    """Continue what is typed, line after line; an empty line, Ctrl-D or Ctrl-C leaves."""
    run.print("Type the beginning of a text; an empty line ends.")
    while not run.stopping and (prompt := ask("> ")):
        try:
            write(run, model, tokenizer, prompt, generator)
        except ValueError as error:  # a character the model does not know must not end the conversation
            run.print(f"error: {error}")


if __name__ == "__main__":
    main()
