"""
Status

This file implements what a page says of the server behind it, and how both share an address, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - a frontend that stays up, and
  says so, when the model does not

Each component is explained with paper references for educational purposes.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.pictures import notice, shown

EVERY = 3.0  # seconds between two looks at the server
API_PATHS = ("/v1/", "/health", "/metrics", "/tokenize", "/detokenize", "/docs", "/openapi.json")  # beginnings


def build_status(backend: Backend, root, title: str):
    """The head of a page: its title, how the server is, and a choice of models; returns the component of the choice.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 4.
    PAPER CONTEXT: users are answered by a layer that lives on while models fail, and chooses between them.
    INTUITION: the board at the door: open, opening soon, closed, and what is served today.
    IMPLEMENTATION: a timer asks the server; what has not changed is not sent to the browser again.
    WHY: who sees nothing come wants to know whether to wait, and what to do if not.

    root: the whole page.
    """
    import gradio as gr

    with gr.Row(elem_classes="pg-top"):
        with gr.Column(scale=3, min_width=260):
            gr.HTML(f"<h1>{shown(title)}</h1>", elem_classes="pg-title")
            line = gr.HTML(notice("looking for the server …"), elem_id="status")
        model = gr.Dropdown([], label="Model or adapter", elem_id="model", scale=1, min_width=220, filterable=False)
    known = gr.State((None, None))

    async def look(known, chosen):
        health, words, models = await backend.tell()
        kind = {"ready": "good", "loading": "info", "restarting": "info"}.get(health.status, "bad")
        told = notice(shown(words), kind)
        names = models or known[1]
        choice = gr.skip()
        if names != known[1]:
            choice = gr.Dropdown(names, value=chosen if chosen in names else names[0])
        return (gr.skip() if told == known[0] else told), choice, (told, names)

    timer = gr.Timer(EVERY)
    for event in (timer.tick, root.load):
        event(look, [known, model], [line, model, known], show_progress="hidden", api_visibility="private")
    return model


class Beside:
    """ASGI middleware: the API's paths go to the API, all others to the page.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 3.
    PAPER CONTEXT: applications and models meet at one interface.
    INTUITION: one house, two doors.
    IMPLEMENTATION: by the beginning of the path. The API keeps its own gate: a browser that opens the page has no key,
        and an open page is no request that a server which shuts down would have to wait for.
    WHY: one command and one port; whoever likes the page can point a program at the same address.

    Args:
        app: the page; api: what `create_app` of project 28 made.
    """

    def __init__(self, app: ASGIApp, api: ASGIApp):
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request by one of both."""
        own = scope["type"] == "http" and scope["path"].startswith(API_PATHS)
        await (self.api if own else self.app)(scope, receive, send)
