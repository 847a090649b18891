"""
Chat tab

This file implements the part of the page that holds a conversation, and what its buttons do, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a conversation
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus as a user sees them

Each component is explained with paper references for educational purposes.
"""

import uuid
from types import SimpleNamespace

from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.chatting import answer, before_last_question, keep, titles
from phase10_deployment.project30_gradio.wishes import Wishes

EMPTY = "### Say something\nor take one of these. Stop ends an answer, and its place on the server is free at once."
EXAMPLES = ["What can you do?", "Tell me a short story about a king.", "Why is the sky blue?"]
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
CHAT = "chat"  # what may be stopped
SECRET = "llm-roadmap"  # of what a browser keeps: it must be readable after a restart, and hides nothing


def build_chat_tab(backend: Backend, root, model, defaults) -> None:
    """The chat, within a tab that is open.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: labellers wrote to the model in an interface of their own, and compared what came.
    INTUITION: paper and pencil: all that is between a person and a model.
    IMPLEMENTATION: the conversation lives in a state of the session, and the list of earlier ones in the browser. While
        an answer is written the button to send is the button to stop; it sets an event, and the stream ends by itself.
    WHY: nothing is cancelled from outside, so what was written until then is kept, and the server knows at once.

    root: the whole page; model: the component that holds the model's name; defaults: the first values of the controls.
    """
    import gradio as gr

    talk, number = gr.State([]), gr.State("")
    saved = gr.BrowserState([], storage_key="llm-roadmap-talks", secret=SECRET)
    with gr.Row(elem_classes="pg-chat-row"):
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(show_label=False, height="58vh", min_height=320, placeholder=EMPTY, elem_id="chatbot",
                                 buttons=["copy"], latex_delimiters=[], feedback_options=None, examples=[
                                     {"text": text} for text in EXAMPLES])  # fmt: skip
            box = gr.Textbox(show_label=False, placeholder="Write a message, Enter sends it", submit_btn="Send",
                             lines=1, max_lines=8, elem_id="message", autofocus=True, container=False)  # fmt: skip
            told = gr.HTML(elem_id="told")
            with gr.Row(elem_classes="pg-buttons"):
                new, retry, undo = (gr.Button(words, size="sm", min_width=80) for words in ("New", "Retry", "Undo"))
        with gr.Column(scale=1, min_width=280):
            controls = sampling_controls(defaults)
            with gr.Accordion("Earlier conversations", open=False):
                earlier = gr.Radio([], show_label=False, container=False, elem_id="earlier")
                gr.HTML('<p class="pg-small">The newest 20, kept in this browser alone.</p>')
                forget = gr.Button("Forget all of them", size="sm")
    page = SimpleNamespace(root=root, talk=talk, number=number, saved=saved, chatbot=chatbot, box=box, told=told,
                           model=model, controls=controls, earlier=earlier)  # fmt: skip
    connect_writing(backend, page, retry)
    connect_history(backend, page, new, undo, forget)


def sampling_controls(defaults) -> list:
    """The system prompt, and a component for each field of `Wishes`, in order."""
    import gradio as gr

    system = gr.Textbox(defaults.SYSTEM_PROMPT, label="System prompt", lines=2, max_lines=6, elem_id="system",
                        placeholder="You are a helpful assistant.", info="Told before the first message")  # fmt: skip
    with gr.Accordion("Sampling", open=True):
        temperature = gr.Slider(0, 2, defaults.TEMPERATURE, step=0.05, label="Temperature", elem_id="temperature",
                                info="0: the likeliest")  # fmt: skip
        top_p = gr.Slider(0.05, 1, defaults.TOP_P, step=0.05, label="Top-p", info="Cuts off the tail")
        max_tokens = gr.Slider(1, 2048, defaults.MAX_TOKENS, step=1, label="Max tokens", info="Of one answer")
    with gr.Accordion("More controls", open=False):
        top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: all tokens")
        min_p = gr.Slider(0, 1, 0, step=0.01, label="Min-p", info="Of the likeliest")
        repetition = gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty", info="1: none")
        presence = gr.Slider(-2, 2, 0, step=0.1, label="Presence penalty", info="For having been")
        frequency = gr.Slider(-2, 2, 0, step=0.1, label="Frequency penalty", info="For each time")
        seed = gr.Number(None, precision=0, label="Seed", info="The same answer every time; empty: another one")
        stop = gr.Textbox("", lines=2, label="Stop texts", info="One on each line; \\n is the end of a line")
        bias = gr.Textbox("", lines=2, label="Logit bias", info="id=number on each line; -100 bans a token")
        json = gr.Checkbox(False, label="Answer in JSON", info="A grammar lets only JSON through")
    penalties = [repetition, presence, frequency]
    return [system, temperature, top_p, top_k, min_p, max_tokens, *penalties, seed, stop, bias, json]


def connect_writing(backend: Backend, page, retry) -> None:
    """Sending, trying again, and stopping."""
    import gradio as gr

    busy = {"submit_btn": False, "stop_btn": "Stop"}
    idle = {"submit_btn": "Send", "stop_btn": False}

    async def write(request: gr.Request, talk, number, saved, model, system, *wishes):
        stops, session = backend.stops, request.session_hash
        if not talk or talk[-1]["role"] != "user" or stops.busy(session, CHAT):
            yield (gr.skip(),) * 6
            return
        with stops.begin(session, CHAT) as stop:
            async for turn in answer(backend, stop, talk, model, system, Wishes(*wishes)):
                if not turn.over:
                    yield gr.skip(), turn.messages, turn.told, gr.Textbox(**busy), gr.skip(), gr.skip()
            if turn.failed:  # give the question back: it can be sent again when the reason is gone
                rest, question = before_last_question(turn.messages)
                yield rest, rest, turn.told, gr.Textbox(question, **idle), gr.skip(), gr.skip()
                return
            saved = keep(saved, number, turn.messages)
            listed = gr.Radio(titles(saved), value=number)
            yield turn.messages, turn.messages, turn.told, gr.Textbox(**idle), saved, listed

    def say(request: gr.Request, text, talk):
        if not (text and text.strip()) or backend.stops.busy(request.session_hash, CHAT):
            return (gr.skip(),) * 3
        return (talk := [*talk, {"role": "user", "content": text.strip()}]), talk, ""

    def example(talk, event: gr.SelectData):
        return (talk := [*talk, {"role": "user", "content": event.value["text"]}]), talk

    async def again(request: gr.Request, talk):
        await backend.stops.end(request.session_hash, CHAT)
        rest, question = before_last_question(talk)
        talk = [*rest, {"role": "user", "content": question}] if question else rest
        return talk, talk

    def stop(request: gr.Request):
        backend.stops.stop(request.session_hash, CHAT)

    writing = {
        "fn": write, "inputs": [page.talk, page.number, page.saved, page.model, *page.controls],
        "outputs": [page.talk, page.chatbot, page.told, page.box, page.saved, page.earlier],
        "concurrency_limit": None, **HIDDEN,
    }  # fmt: skip
    page.box.submit(say, [page.box, page.talk], [page.talk, page.chatbot, page.box], **HIDDEN).then(**writing)
    retry.click(again, page.talk, [page.talk, page.chatbot], **HIDDEN).then(**writing)
    page.chatbot.example_select(example, page.talk, [page.talk, page.chatbot], **HIDDEN).then(**writing)
    page.box.stop(stop, concurrency_limit=None, **HIDDEN)


def connect_history(backend: Backend, page, new, undo, forget) -> None:
    """Beginning anew, taking back, and going back to an earlier conversation; what is being written ends first."""
    import gradio as gr

    async def begin(request: gr.Request):
        await backend.stops.end(request.session_hash, CHAT)
        return [], [], uuid.uuid4().hex, "", gr.Radio(value=None)

    async def take_back(request: gr.Request, talk):
        await backend.stops.end(request.session_hash, CHAT)
        rest, question = before_last_question(talk)
        return rest, rest, question

    async def go_back(request: gr.Request, number, saved):
        await backend.stops.end(request.session_hash, CHAT)
        found = next((each["messages"] for each in saved if each["id"] == number), [])
        return found, found, number, ""

    def opened(saved):
        return gr.Radio(titles(saved)), uuid.uuid4().hex

    anew = [page.talk, page.chatbot, page.number, page.told, page.earlier]
    gr.on([new.click, page.chatbot.clear], begin, None, anew, **HIDDEN)
    undo.click(take_back, page.talk, [page.talk, page.chatbot, page.box], **HIDDEN)
    page.earlier.input(go_back, [page.earlier, page.saved], [page.talk, page.chatbot, page.number, page.told], **HIDDEN)
    forget.click(lambda: ([], gr.Radio([], value=None)), None, [page.saved, page.earlier], **HIDDEN)
    page.root.load(opened, page.saved, [page.earlier, page.number], **HIDDEN)
