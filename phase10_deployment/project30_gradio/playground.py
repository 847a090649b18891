"""
Playground

This file implements the part of the page that shows what the roadmap teaches: one panel each, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2015) - tokens
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - the next token
- "Attention Is All You Need" (Vaswani et al., 2017) - attention
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - blocks
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - beginnings
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - guesses

Each component is explained with paper references for educational purposes.
"""

from phase10_deployment.project30_gradio import engine_panels, panels
from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.pictures import refusal
from phase10_deployment.project30_gradio.talking import ServerError

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
RUN = {"elem_classes": "pg-run", "min_width": 100}
STORY = "Once upon a time there was a king, and the king had a daughter."
TWICE = "the cat sat on the mat and the dog sat on the mat and the cat sat on the"
RULES = ("You are a careful assistant of a small library. Answer in one sentence, name the shelf, and never guess. "
         "Question: ")  # fmt: skip
ENGINE_ONLY = "\n\n*Looks into the engine: the page must have been started without `--api_url`.*"


def build_playground(backend: Backend, model) -> None:
    """All panels, in tabs.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, figures 3 to 5.
    PAPER CONTEXT: the authors show what their model looks at, sentence by sentence.
    INTUITION: a museum of one's own machine, in which everything may be touched.
    IMPLEMENTATION: `PANELS` names a builder for each tab; each builds its components and says what its buttons do. A
        later project adds its panel by a line there.
    WHY: what a reader has built is seen at work beside the chat that needs it.

    model: the component that holds the model's name.
    """
    import gradio as gr

    with gr.Tabs(elem_id="panels"):
        for name, build in PANELS.items():
            with gr.Tab(name, elem_id=f"panel-{name.lower().replace(' ', '-')}"):
                build(backend, model)


def tokens_panel(backend: Backend, model) -> None:
    """A text in its tokens."""
    import gradio as gr

    gr.Markdown("**How the model reads.** A text becomes pieces from a fixed list, each with a number. Rare words, "
                "other languages and digits fall into more pieces. (projects 2 and 4)")  # fmt: skip
    text = gr.Textbox(STORY, label="Text", lines=3, elem_id="tokens-text")
    with gr.Row():
        as_chat = gr.Checkbox(False, label="As the model reads it in a chat", info="With the tokens of its template")
        ids = gr.Checkbox(True, label="Show the numbers")
    button = gr.Button("Show tokens", variant="primary", elem_id="tokens-run", elem_classes="pg-run")
    picture = gr.HTML(elem_id="tokens-picture")

    async def show(text, model, as_chat, ids):
        try:
            return await panels.show_tokens(backend, text, model, as_chat, ids)
        except ServerError as error:
            return refusal(error)

    gr.on([button.click, text.submit, as_chat.input, ids.input], show, [text, model, as_chat, ids], picture, **QUIET)


def next_token_panel(backend: Backend, model) -> None:
    """What may come next, and what the rules of sampling make of it."""
    import gradio as gr

    gr.Markdown("**What comes next.** The model bets on every token; temperature bends the odds, and top-p, top-k and "
                "min-p send the unlikely ones home. Move the sliders: the model is not asked again. "
                "(projects 1 and 8)")  # fmt: skip
    text = gr.Textbox("Once upon a", label="Beginning of a text", lines=2, elem_id="next-text")
    button = gr.Button("What comes next?", variant="primary", elem_id="next-run", elem_classes="pg-run")
    odds = gr.State(None)
    with gr.Row():
        rules = [
            gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", min_width=140, elem_id="next-temperature"),
            gr.Slider(0, 100, 0, step=1, label="Top-k", min_width=140),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", min_width=140, elem_id="next-top-p"),
            gr.Slider(0, 1, 0, step=0.01, label="Min-p", min_width=140),
        ]
    picture = gr.HTML(elem_id="next-picture")

    async def ask(text, model, *rules):
        try:
            found = await panels.next_odds(backend, text, model)
        except ServerError as error:
            return None, refusal(error)
        return found, panels.show_odds(found, *rules)

    gr.on([button.click, text.submit], ask, [text, model, *rules], [odds, picture], **QUIET)
    gr.on(
        [rule.input for rule in rules], panels.show_odds, [odds, *rules], picture, trigger_mode="always_last", **QUIET
    )


def attention_panel(backend: Backend, model) -> None:
    """Who looks at whom."""
    import gradio as gr

    gr.Markdown("**Who looks at whom.** In each layer several heads decide for every token which earlier ones matter. "
                "A row is a token that looks; the darker a square, the more it looks there. (projects 1, 3 and 9)"
                + ENGINE_ONLY * (backend.client is None))  # fmt: skip
    maps = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            text = gr.Textbox("The king said to the queen that the king was tired.", label="Text", lines=2,
                              info="The first 64 tokens", elem_id="attention-text")  # fmt: skip
            button = gr.Button("Look", variant="primary", elem_id="attention-run", elem_classes="pg-run")
            layer = gr.Slider(0, 31, 1, step=1, label="Layer", info="0 is the first", elem_id="layer")
            head = gr.Slider(0, 31, 0, step=1, label="Head", info="Shown large", elem_id="head")
            heads = gr.HTML(elem_id="heads-picture")
        with gr.Column(min_width=300):
            picture = gr.HTML(elem_id="attention-picture")

    async def look(text, model, layer, head):
        try:
            shape = await backend.shape()
            found = await panels.attend(backend, text, model, layer)
        except ServerError as error:
            return None, "", refusal(error), gr.skip(), gr.skip()
        layers, all_heads = gr.Slider(maximum=shape.n_layer - 1), gr.Slider(maximum=len(found.heads) - 1)
        return found, *panels.show_attention(found, head), layers, all_heads

    outputs = [maps, heads, picture, layer, head]
    gr.on([button.click, text.submit, layer.release], look, [text, model, layer, head], outputs, **QUIET)
    head.input(panels.show_attention, [maps, head], [heads, picture], trigger_mode="always_last", **QUIET)


def blocks_panel(backend: Backend, model) -> None:
    """Blocks of the running batch, and a film of them."""
    import gradio as gr

    gr.Markdown("**Where keys and values lie.** Memory is lent in blocks. Texts that begin alike share the blocks of "
                "their beginning; what has ended stays until its memory is wanted. The chat's texts are here, too. "
                "(projects 12 and 13)" + ENGINE_ONLY * (backend.client is None))  # fmt: skip
    text = gr.Textbox(STORY + " One day", label="Beginning of all texts", lines=2)
    with gr.Row():
        n = gr.Slider(1, 12, 5, step=1, label="Texts at a time", min_width=140)
        n_tokens = gr.Slider(8, 512, 64, step=8, label="Tokens of each", min_width=140)
    apart = gr.Checkbox(False, label="Begin differently: with a number in front, so that nothing is shared")
    with gr.Row():
        run = gr.Button("Write them", variant="primary", elem_id="blocks-run", **RUN)
        stop, now = gr.Button("Stop", **RUN), gr.Button("Look now", elem_id="blocks-now", **RUN)
    place = gr.Slider(0, 1, 0, step=1, label="Moment", info="Look at the film again, step by step", visible=False,
                      elem_id="moment")  # fmt: skip
    picture, film = gr.HTML(elem_id="blocks-picture"), gr.State([])

    async def write(text, model, n, n_tokens, apart, request: gr.Request):
        try:
            async for seen in engine_panels.run_batch(backend, request.session_hash, text, model, int(n), int(n_tokens),
                                                      apart):  # fmt: skip
                if not seen.over:
                    yield seen.picture, gr.skip(), gr.skip()
        except ServerError as error:
            yield refusal(error), gr.skip(), gr.skip()
            return
        yield (
            seen.picture,
            seen.moments,
            gr.Slider(maximum=max(len(seen.moments) - 1, 1), value=seen.place, visible=True),
        )

    async def look():
        try:
            moment = await backend.look(engine_panels.snapshot)
        except ServerError as error:
            return refusal(error)
        return engine_panels.show_moment([moment], 0)

    run.click(write, [text, model, n, n_tokens, apart], [picture, film, place], concurrency_limit=None, **QUIET)
    now.click(look, None, picture, **QUIET)
    stops(backend, stop, engine_panels.BLOCKS)
    place.input(engine_panels.show_moment, [film, place], picture, trigger_mode="always_last", **QUIET)


def prefix_panel(backend: Backend, model) -> None:
    """What was found in the cache."""
    import gradio as gr

    gr.Markdown("**What need not be read again.** Send a prompt twice, or change its end: the beginning is found in "
                "the cache, in whole blocks. Change its first word, and nothing is. (projects 10 and 13)")  # fmt: skip
    text = gr.Textbox(RULES + "where are the atlases?", label="Prompt", lines=3, elem_id="prefix-text")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="prefix-run", **RUN)
        other, first = gr.Button("Another question", **RUN), gr.Button("Another first word", **RUN)
    picture, sent = gr.HTML(elem_id="prefix-picture"), gr.State([])

    async def ask(text, model, sent):
        try:
            return await engine_panels.send_prompt(backend, text, model, sent)
        except ServerError as error:
            return sent, refusal(error)

    asking = {"fn": ask, "inputs": [text, model, sent], "outputs": [sent, picture], **QUIET}
    send.click(**asking)
    other.click(lambda: RULES + "who may borrow a map?", None, text, **QUIET).then(**asking)
    first.click(lambda: "Please. " + RULES + "where are the atlases?", None, text, **QUIET).then(**asking)


def speculation_panel(backend: Backend, model) -> None:
    """Guesses, kept and refused."""
    import gradio as gr

    gr.Markdown("**Guess, then check.** The text itself guesses what comes next, by what followed the same words "
                "before. The model checks all guesses in one run, and the text is what it would have written alone. "
                "(project 11)" + ENGINE_ONLY * (backend.client is None))  # fmt: skip
    text = gr.Textbox(TWICE, label="Beginning of a text", lines=2, elem_id="speculation-text",
                      info="Repetition is what this draft lives on: try a text without")  # fmt: skip
    with gr.Row():
        k = gr.Slider(1, 12, 5, step=1, label="Guesses a step", min_width=140)
        n_tokens = gr.Slider(4, 128, 48, step=4, label="Tokens to write", min_width=140)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", min_width=140)
    with gr.Row():
        run = gr.Button("Write", variant="primary", elem_id="speculation-run", **RUN)
        stop = gr.Button("Stop", **RUN)
    picture = gr.HTML(elem_id="speculation-picture")

    async def write(text, model, k, n_tokens, temperature, request: gr.Request):
        try:
            async for drawn in engine_panels.speculate(backend, request.session_hash, text, model, int(k),
                                                       int(n_tokens), temperature):  # fmt: skip
                yield drawn
        except ServerError as error:
            yield refusal(error)

    run.click(write, [text, model, k, n_tokens, temperature], picture, concurrency_limit=None, **QUIET)
    stops(backend, stop, engine_panels.GUESSES)


def stops(backend: Backend, button, kind: str) -> None:
    """Let a button end what its session has begun of a kind."""
    import gradio as gr

    def stop(request: gr.Request):
        backend.stops.stop(request.session_hash, kind)

    button.click(stop, concurrency_limit=None, **QUIET)


# The name of each tab and what builds it. Panels of later projects (early exit, experts) join here.
PANELS = {
    "Tokens": tokens_panel,
    "Next token": next_token_panel,
    "Attention": attention_panel,
    "KV blocks": blocks_panel,
    "Prefix cache": prefix_panel,
    "Speculation": speculation_panel,
}
